"""Random damage to every kind of file ends in a clear error, a refused frame, or does no harm.

The damage is done in a process of its own, so that a crash or a hang there fails a test here.
"""

import faulthandler
import hashlib
import io
import json
import random
import re
import resource
import shutil
import sys
import warnings
from collections import Counter
from functools import cache as remember
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refusal
from processes import run_function

from check_dataset import build_cache, build_index, open_parts
from datasets import DATASETS
from engine import checkpoints
from engine.checkpoints import load_checkpoint, load_network, save_checkpoint
from engine.options import parse_train
from engine.state import RunState, Saver, load_state
from engine.training import build_network, open_splits
from frames import cache
from frames.files import FrameError
from model import PixelwiseRegression
from rendering.layouts import write_dataset
from utils import UserError

CASES = 2000
# Rendered training and test frames: three for each file that holds a line a frame, MSRA's P0/1/joint.txt too.
FRAMES = {"NYU": (3, 1), "ICVL": (3, 2), "MSRA": (16, 35), "HAND17": (4, 3)}
# What is damaged of each data set.
TARGETS = {
    "NYU": [
        "train.txt",
        "nyu_center_train.txt",
        "train/joint_data.mat",
        "train/*.png",
        "train.cache",
        "train.cache.npy",
        "network.pt",
        "*_last.pt",
    ],
    "ICVL": [
        "train.txt",
        "icvl_center_train.txt",
        "icvl_train_list.txt",
        "Training/labels.txt",
        "Training/Depth/*/*.png",
        "train.cache",
    ],
    "MSRA": ["train_0.txt", "P0/1/joint.txt", "P1/*/*.bin", "frames.cache"],
    "HAND17": [
        "train.txt",
        "hands17_center_train.txt",
        "training/Training_Annotation.txt",
        "frame/BoundingBox.txt",
        "test.txt",
        "training/images/*.png",
        "train.cache",
    ],
}
NUMBERS = [
    b"nan",
    b"-nan",
    b"inf",
    b"-1",
    b"0",
    b"1e9",
    b"-1e300",
    b"1e400",
    b"9" * 400,
    b"",
    b"1_0",
    b"0x1f",
]
VALUES = [None, True, -1, 0, 10**30, float("nan"), float("inf"), "", "1", [], [None], {}, {"1": 1}]


# Damage: functions of (bytes, random generator)


def flip_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def overwrite_bytes(data, rng):
    place, data = rng.randrange(len(data)), bytearray(data)
    data[place : place + 8] = rng.choice([rng.randbytes(8), b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f"])
    return bytes(data)


def truncate(data, rng):
    return data[: rng.randrange(len(data))]


def repeat_part(data, rng):
    first, last = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:last] + data[first:]


def shuffle_lines(data, rng):
    lines = data.split(b"\n")
    rng.shuffle(lines)
    return b"\n".join(lines)


def double_lines(data, rng):
    return b"\n".join(line for line in data.split(b"\n") for _ in range(rng.choice([1, 1, 0, 2])))


def replace_numbers(data, rng):
    return re.sub(
        rb"-?\d+\.?\d*", lambda found: rng.choice(NUMBERS) if rng.random() < 0.05 else found.group(), data
    )


def empty(data, rng):
    return b""


def replace_value(data, rng):
    """Put something else in the place of a value of a checkpoint, whose checksums stay right."""
    checkpoint = inside = torch.load(io.BytesIO(data), weights_only=True)
    while True:
        key = rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        if not isinstance(inside[key], (dict, list)) or not inside[key] or rng.random() < 0.3:
            break
        inside = inside[key]
    inside[key] = rng.choice(VALUES)
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


DAMAGES = [flip_bytes, overwrite_bytes, truncate, empty, repeat_part]
TEXT_DAMAGES = [*DAMAGES, shuffle_lines, double_lines, replace_numbers]
CHECKPOINT_DAMAGES = [*DAMAGES, *[replace_value] * 5]


# What reads the files: functions of (data set, folder) that count outcomes


def read_split(name, root, outcomes):
    """Read index, centres and frames as training does, and judge frames as the check does."""
    read_samples(DATASETS[name](path=root, dataset="train", label_size=16, image_size=32), outcomes)


def read_boxes(name, root, outcomes):
    """Read the test split by its bounding boxes, which its index holds."""
    read_samples(
        DATASETS[name](path=root, dataset="test", test_only=True, process_mode="bb", image_size=32), outcomes
    )


def read_samples(frames, outcomes):
    for index in range(min(len(frames), 4)):
        try:
            sample = frames[index, 7]
            assert all(torch.isfinite(field).all() for field in sample), "a sample is not finite"
            outcomes["sample"] += 1
        except FrameError as error:
            assert_one_line(error)
            outcomes["refused"] += 1
        reason = refusal(frames, index)
        assert reason is None or "\n" not in reason


def read_annotations(name, root, outcomes):
    """Read the official label files as the check does."""
    for dataset in list(open_parts(name, root).values())[:2]:
        for index in range(min(len(dataset), 4)):
            outcomes["refused" if refusal(dataset, index) else "sample"] += 1


def read_weights(_, root, outcomes):
    load_network(root / "network.pt", "NYU")
    outcomes["network"] += 1


def read_state(_name, _root, outcomes):
    """Take over a run's state as --resume does."""
    state = new_state()
    state.restore(load_state(state.args))
    outcomes["state"] += 1


def new_state():
    """Return the state of a training run that has not begun, in a workplace with an NYU data set."""
    words = (
        "--suffix fuzz --label_size 16 --features 32 --level 1 --stages 1 --seed 1 --resume --num_workers 0"
    )
    args = parse_train("", [*words.split(), "--device", "cpu"])
    train_set, _, val_set, _ = open_splits(args)
    network = build_network(args, train_set.joint_number, torch.device("cpu"))
    return RunState(args, network, (train_set, val_set))


def assert_one_line(error):
    assert str(error) and "\n" not in str(error), repr(str(error))


def reader_of(path):
    if path.suffix == ".pt":
        return read_state if path.stem.endswith("_last") else read_weights
    if path.name == "test.txt":
        return read_boxes
    return read_annotations if re.search(r"labels|joint|Annotation|BoundingBox", path.name) else read_split


def damages_of(path):
    return {".pt": CHECKPOINT_DAMAGES, ".txt": TEXT_DAMAGES}.get(path.suffix, DAMAGES)


def hashes(root):
    return {
        path: hashlib.blake2b(path.read_bytes()).digest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def fuzz(name, root, cases):
    """Damage one file after another, and put each back; return how often each thing came of it."""
    outcomes, whole = Counter(), hashes(Path())
    targets = [sorted([*root.glob(pattern), *Path("Model").glob(pattern)]) for pattern in TARGETS[name]]
    assert all(targets), targets
    for case in range(cases):
        rng = random.Random(f"{name} {case}")
        path = rng.choice(targets[case % len(targets)])
        damage, data = rng.choice(damages_of(path)), path.read_bytes()
        print(f"{name} {case} {damage.__name__} {path}", file=sys.stderr, flush=True)
        path.write_bytes(damaged := damage(data, rng))
        cache._noticed.clear()
        before = outcomes.total()
        try:
            reader_of(path)(name, root, outcomes)
        except UserError as error:
            assert_one_line(error)
            outcomes["error"] += 1
        assert outcomes.total() > before
        assert path.read_bytes() == damaged
        path.write_bytes(data)
    assert hashes(Path()) == whole, "a file was changed"
    return outcomes


def print_outcomes(root, cases):
    """Fuzz and print what came of it, as a script would that ends where memory does."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    # More than twice what the data take: a length that damage made absurd must not be believed.
    resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))
    print(json.dumps(fuzz(root.name, root, cases)))


def damage_in_process(root, cases):
    """Fuzz in a process; return the outcomes' counts."""
    done = run_function(print_outcomes, root, cases, cwd=Path.cwd())
    assert done.status == 0, (done.status, done.err[-3000:])
    return json.loads(done.out.splitlines()[-1])


@pytest.fixture(scope="session")
def rendered(tmp_path_factory):
    """Return a function from a data set's name to a rendered one without index, not to be changed."""

    @remember
    def render(name):
        root = tmp_path_factory.mktemp("rendered") / name
        write_dataset(name, dict(zip(("train", "test"), FRAMES[name])), 1, root, 1)
        return root

    return render


@pytest.fixture
def prepared(workplace, rendered):
    """Return a function that makes a rendered data set with index and cache, and a network's checkpoint."""

    def prepare(name):
        root = Path(shutil.copytree(rendered(name), Path("Data", name)))
        build_index(name, root)
        build_cache(name, root)
        torch.manual_seed(0)
        network = PixelwiseRegression(14, stage=1, label_size=16, features=32, level=1)
        save_checkpoint(
            root / "network.pt", {"state_dict": network.state_dict(), "model_param": network.param, "seed": 1}
        )
        return root

    return prepare


def write_state():
    """Write the state of a run after an epoch of one step."""
    state = new_state()
    for weights in state.network.parameters():
        weights.grad = torch.zeros_like(weights)
    state.optimizer.step()
    state.epoch, state.records = 1, [{"epoch": 1, "loss": 0.1, "val_loss": 0.1, "val_mm": 9.0, "lr": 1e-3}]
    Saver(10, []).save(state)


def test_a_few_damaged_files(prepared):
    root = prepared("NYU")
    write_state()
    damage_in_process(root, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DATASETS))
def test_damaged_files(name, prepared, capsys):
    root = prepared(name)
    if name == "NYU":
        write_state()
    counts = damage_in_process(root, CASES // len(DATASETS))
    with capsys.disabled():
        print(f" {name}: {counts} ", end="")
    assert counts["error"] and counts["refused"] > CASES / 100


@pytest.mark.slow
def test_damaged_checkpoint_is_refused_or_the_same(prepared):
    """Torch itself would take weights of which a bit has changed."""
    path = prepared("NYU") / "network.pt"
    data, weights = path.read_bytes(), load_checkpoint(path)["state_dict"]
    same = 0
    for case in range(300):
        rng = random.Random(case)
        path.write_bytes(rng.choice(DAMAGES)(data, rng))
        try:
            found = load_checkpoint(path)["state_dict"]
        except UserError as error:
            assert_one_line(error)
            continue
        same += 1
        assert all(torch.equal(found[key], weights[key]) for key in weights)
    assert same < 100


def with_parameters(path, **change):
    checkpoint = load_checkpoint(path)
    save_checkpoint(path, {**checkpoint, "model_param": {**checkpoint["model_param"], **change}})


@pytest.mark.parametrize(
    "change",
    [
        {"features": 10**6},
        {"features": 10**12},
        {"label_size": 2**20},
        {"label_size": 2**60},
        {"stage": 10**7},
        {"kernel_size": 10**6 + 1},
        {"level": 500, "label_size": 2**502},
        {"features": -32},
    ],
)
def test_network_of_absurd_size_is_refused_before_it_is_built(change, prepared, monkeypatch):
    def build(*_, **__):
        raise AssertionError("would take all memory")

    monkeypatch.setattr(checkpoints, "PixelwiseRegression", build)
    path = prepared("NYU") / "network.pt"
    with_parameters(path, **change)
    with pytest.raises(UserError, match="does not fit this network: the weights are not those of"):
        load_network(path, "NYU")


@pytest.mark.parametrize("change", [{"stage": float("nan")}, {"stage": "2"}, {"level": None}, {"width": 3}])
def test_network_of_no_size_is_refused(change, prepared):
    path = prepared("NYU") / "network.pt"
    with_parameters(path, **change)
    with pytest.raises(UserError, match="does not fit this network"):
        load_network(path, "NYU")


def test_damaged_cache_serves_the_samples_of_the_files(prepared):
    """Or says that it is not used: damage there never shows in a sample."""
    root = prepared("NYU")
    path = root / "train.cache"
    data, whole = path.read_bytes(), DATASETS["NYU"](path=root, use_cache=False)
    wanted = [whole.sample(index) for index in range(len(whole))]
    for case in range(60):
        rng = random.Random(case)
        path.write_bytes(rng.choice(DAMAGES)(data, rng))
        frames = DATASETS["NYU"](path=root)
        for index, sample in enumerate(wanted):
            assert all(torch.equal(a, b) for a, b in zip(frames.sample(index), sample))
