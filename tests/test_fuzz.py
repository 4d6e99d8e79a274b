"""Random damage to every kind of file ends in a clear error, a refused frame, or does no harm.

The damage is done in a process of its own, so that a crash or a hang there fails a test here:
`python tests/test_fuzz.py FOLDER CASES` damages the data set in FOLDER, file after file.
"""

import hashlib
import json
import random
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest
import torch

import cache
import runs
from annotations import build_cache, build_index, sources
from checkpoints import load_checkpoint, save_checkpoint
from datasets import DATASETS
from frames import FrameError
from model import PixelwiseRegression
from runs import load_network
from utils import UserError

CASES = 2000
# What is damaged in each data set.
TARGETS = {
    "NYU": [
        "train.txt",
        "nyu_center_train.txt",
        "train/joint_data.mat",
        "train/*.png",
        "train.cache",
        "*.pt",
    ],
    "ICVL": [
        "train.txt",
        "icvl_center_train.txt",
        "icvl_train_list.txt",
        "Training/labels.txt",
        "Training/Depth/*/*.png",
        "train.cache",
    ],
    "MSRA": ["train_0.txt", "P1/1/joint.txt", "P1/1/*.bin", "frames.cache"],
    "HAND17": [
        "train.txt",
        "hands17_center_train.txt",
        "training/Training_Annotation.txt",
        "frame/BoundingBox.txt",
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


DAMAGES = [flip_bytes, overwrite_bytes, truncate, repeat_part]
TEXT_DAMAGES = [*DAMAGES, shuffle_lines, double_lines, replace_numbers]


# What reads the files: functions of (data set, folder) that count outcomes


def read_split(name, root, outcomes):
    """Read index, centres and frames as training does, and judge frames as the check does."""
    frames = DATASETS[name](path=root, dataset="train", label_size=16, image_size=32)
    for index in range(min(len(frames), 4)):
        try:
            sample = frames[index, 7]
            assert all(torch.isfinite(field).all() for field in sample), "a sample is not finite"
            outcomes["sample"] += 1
        except FrameError as error:
            assert_one_line(error)
            outcomes["refused"] += 1
        reason = frames.refusal(index)
        assert reason is None or "\n" not in reason


def read_annotations(name, root, outcomes):
    """Read the official label files as the check does."""
    for source in sources(name, root)[: 2 if name == "MSRA" else None]:
        for index in range(min(len(source.frames), 4)):
            outcomes["refused" if source.frames.refusal(index) else "sample"] += 1


def read_weights(_, root, outcomes):
    load_network(root / "network.pt", 14)
    outcomes["network"] += 1


def assert_one_line(error):
    assert str(error) and "\n" not in str(error), repr(str(error))


def readers_of(file):
    if file.endswith(".pt"):
        return [read_weights]
    official = re.search(r"labels|joint|Annotation|BoundingBox", file)
    return [read_annotations] if official else [read_split]


def hashes(root):
    return {
        path: hashlib.blake2b(path.read_bytes()).digest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def fuzz(name, root, cases):
    """Damage one file after another, and put each back; return how often each thing came of it."""
    outcomes, whole = Counter(), hashes(root)
    targets = [sorted(root.glob(pattern)) for pattern in TARGETS[name]]
    assert all(targets), targets
    for case in range(cases):
        rng = random.Random(f"{name} {case}")
        path = rng.choice(targets[case % len(targets)])
        text = path.suffix == ".txt"
        damage, data = rng.choice(TEXT_DAMAGES if text else DAMAGES), path.read_bytes()
        print(f"{name} {case} {damage.__name__} {path}", file=sys.stderr, flush=True)
        path.write_bytes(damaged := damage(data, rng))
        cache._noticed.clear()
        file = path.relative_to(root).as_posix()
        before = outcomes.total()
        for read in readers_of(file):
            try:
                read(name, root, outcomes)
            except UserError as error:
                assert_one_line(error)
                outcomes["error"] += 1
        assert outcomes.total() > before
        assert path.read_bytes() == damaged
        path.write_bytes(data)
    assert hashes(root) == whole, "a file was changed"
    return outcomes


def main():
    root, cases = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    # More than twice what the data take: a length that damage made absurd must not be believed.
    resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))
    print(json.dumps(fuzz(root.name, root, cases)))


def damage_in_process(root, cases):
    """Run `main` in a process; return the outcomes' counts."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "ignore", __file__, root, str(cases)],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=root.parent.parent,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def prepared(fresh):
    """Return a function that makes a data set with index and cache, and a network's checkpoint."""

    def prepare(name):
        root = fresh(name)
        build_index(name, root)
        build_cache(name, root)
        torch.manual_seed(0)
        network = PixelwiseRegression(14, stage=1, label_size=16, features=32, level=1)
        save_checkpoint(
            root / "network.pt", {"state_dict": network.state_dict(), "model_param": network.param, "seed": 1}
        )
        return root.resolve()

    return prepare


def test_a_few_damaged_files(prepared):
    damage_in_process(prepared("NYU"), 36)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DATASETS))
def test_damaged_files(name, prepared, capsys):
    counts = damage_in_process(prepared(name), CASES // len(DATASETS))
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
    def build(_):
        raise AssertionError("would take all memory")

    monkeypatch.setattr(runs, "from_checkpoint", build)
    path = prepared("NYU") / "network.pt"
    with_parameters(path, **change)
    with pytest.raises(UserError, match="does not fit this network: the weights are not those of"):
        load_network(path, 14)


@pytest.mark.parametrize("change", [{"stage": float("nan")}, {"stage": "2"}, {"level": None}, {"width": 3}])
def test_network_of_no_size_is_refused(change, prepared):
    path = prepared("NYU") / "network.pt"
    with_parameters(path, **change)
    with pytest.raises(UserError, match="does not fit this network"):
        load_network(path, 14)


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


if __name__ == "__main__":
    main()
