"""Several processes, joined by gloo on the CPU, train as one does with the same global batch.

`torchrun --nproc_per_node N tests/test_distributed.py` prints the losses of twenty steps.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from conftest import REPO, hidden_files
from training import RUN, TINY, global_batches, records, repeat_lines, train_in_two, train_tiny

from datasets import DATASETS
from engine import distributed
from engine.batches import EpochSampler, batches_of, make_loader, own_part
from engine.checkpoints import load_checkpoint
from engine.loops import train_step
from engine.options import parse_train
from engine.state import STATE_KEYS, RunState
from model import PixelwiseRegression
from utils import UserError

LAST = Path("Model", f"{RUN}_last.pt")
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node",
    "2",
]
TRAIN = [*TORCHRUN, REPO / "train.py", *TINY]


def torchrun(*arguments, cwd="."):
    """Train in two processes; return their exit status and what they printed."""
    command = [*TRAIN, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def data(fresh_indexed):
    """Return Data/ICVL with 8 training and 5 validation frames: an odd number for two processes."""
    root = fresh_indexed("ICVL")
    repeat_lines(root / "train.txt", 8)
    repeat_lines(root / "val.txt", 5)
    return root


def as_each(monkeypatch, world):
    """Yield the ranks of a world that this process pretends to be in."""
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        yield rank


# Who gets which frames


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("start", [0, 5])
def test_processes_share_each_batch_without_repeats(world, start, monkeypatch):
    """Nor does their number, or where an epoch goes on, change what a batch holds."""
    whole = EpochSampler(np.arange(100), 12, seed=7)
    whole.epoch = 3
    steps = global_batches(whole)
    assert len(steps) == 8 and len(set(sum(steps, []))) == 96
    parts = []
    for _ in as_each(monkeypatch, world):
        sampler = EpochSampler(np.arange(100), 12, seed=7)
        sampler.epoch, sampler.start = 3, start
        own = list(sampler)
        assert len(own) == len(sampler) == (8 - start) * 12 // world
        parts.append(np.reshape([index for index, _ in own], (8 - start, -1)))
    assert np.concatenate(parts, axis=1).tolist() == steps[start:]


def test_order_and_augmentation_differ_from_epoch_to_epoch_and_seed_to_seed():
    orders = []
    for seed, epoch in ((1, 0), (1, 1), (2, 0), (1, 0)):
        sampler = EpochSampler(np.arange(50), 5, seed)
        sampler.epoch = epoch
        orders.append(list(sampler))
    assert orders[0] == orders[3]
    firsts = [{index for index, _ in order[:5]} for order in orders[:3]]
    assert firsts[0] != firsts[1] and firsts[0] != firsts[2]
    assert {seed for _, seed in orders[0]}.isdisjoint(seed for _, seed in orders[1])


@pytest.mark.parametrize("frames", [0, 1, 2, 7, 24, 25])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_takes_every_frame_once(frames, world, monkeypatch):
    found = sum((own_part(np.arange(100, 100 + frames)) for _ in as_each(monkeypatch, world)), [])
    assert sorted(found) == list(range(100, 100 + frames))


def test_batch_that_cannot_be_shared_is_refused(monkeypatch):
    for _ in as_each(monkeypatch, 3):
        with pytest.raises(UserError, match="--batch_size 8 is the batch of all processes together: .* 3"):
            EpochSampler(np.arange(20), 8, 1)


# Two processes


def losses_in_double_precision():
    """Return the losses of twenty steps of Adam, without the noise of rounding."""
    args = parse_train("", [*TINY, "--batch_size", "6"])
    distributed.start("cpu", 0)
    torch.manual_seed(args.seed)
    frames = DATASETS["ICVL"](label_size=16, image_size=32, targets=False)
    network = PixelwiseRegression(
        frames.joint_number, stage=1, label_size=16, features=32, level=0, norm_method="instance"
    ).double()
    state, losses = RunState(args, network, (frames,)), []
    own_batch = args.batch_size // distributed.world_size()
    sampler = EpochSampler(np.arange(120), args.batch_size, args.seed)
    for batch in batches_of(make_loader(frames, sampler, args, torch.device("cpu"), own_batch)):
        samples = type(batch.samples)(*(field.double() for field in batch.samples))
        losses.append(train_step(state.parallel, state.optimizer, samples, args)[0])
    return losses if distributed.is_main() else None


@pytest.mark.parametrize("frames, val_frames", [(4, 1), (7, 4), (9, 41)])
def test_two_processes_equal_one_at_every_remainder(frames, val_frames, data, tmp_path):
    """Batches of two; a process may have one validation frame more than the other, or none at all."""
    repeat_lines(data / "train.txt", frames)
    repeat_lines(data / "val.txt", val_frames)
    options = ["--batch_size", 2, "--epoch", 1, "--lr", 1e-6, "--save_minutes", 0]
    other = tmp_path / "two"
    other.mkdir()
    (other / "Data").symlink_to(tmp_path / "Data")
    assert train_in_two(other, *options) == [0, 0], (other / "output.txt").read_text()
    train_tiny(*options)
    (one,), (two,) = records(), records(other)
    assert one["val_mm"] == pytest.approx(two["val_mm"], abs=1e-3)
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    assert one["val_loss"] == pytest.approx(two["val_loss"], abs=1e-5)


def test_several_runs_follow_each_other_in_the_same_processes(data):
    """As `train_msra.py --subject all` trains its folds."""
    assert train_in_two(".", "--epoch", 1, "--suffix", "one,two,three") == [0, 0], Path(
        "output.txt"
    ).read_text()
    runs = [records(run=f"ICVL_{suffix}") for suffix in ("one", "two", "three")]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(data):
    """In double precision Adam's divisions do not make rounding visible: only a mistake would be."""
    repeat_lines(data / "train.txt", 120)
    one = losses_in_double_precision()
    done = subprocess.run([*TORCHRUN, __file__], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    assert len(one) == len(two) == 20 and np.ptp(one) > 0.1
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_two_processes_train_as_one(data, tmp_path):
    """Twenty steps, each an epoch with a validation, so that every loss and error is on record.

    Adam divides gradients by their size, and so makes differences of rounding as large as the rate,
    which is small here; the test above is for large steps.
    """
    options = ["--batch_size", 8, "--epoch", 20, "--lr", 1e-6]
    other = tmp_path / "two"
    other.mkdir()
    (other / "Data").symlink_to(tmp_path / "Data")
    status, out, err = torchrun(*options, cwd=other)
    assert status == 0, err
    train_tiny(*options)
    one, two = records(), records(other)
    assert len(one) == len(two) == 20
    for key, limit in (("loss", 1e-5), ("val_loss", 1e-5), ("val_mm", 1e-3)):
        apart = np.abs([a[key] - b[key] for a, b in zip(one, two)])
        assert apart.max() < limit, (key, apart)
    # One process prints, logs and saves.
    assert [out.count(f"epoch {epoch:>3}  loss") for epoch in range(1, 21)] == [1] * 20
    assert len(list((other / "logs" / RUN).glob("events*"))) == 1 and not hidden_files(other / "Model")
    assert len(load_checkpoint(other / LAST)["state_dict"]) > 50


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
def test_resume_with_another_number_of_processes(first, data, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "Data").symlink_to(tmp_path / "Data")
    train_tiny("--epoch", 4, "--opt", "sgd")
    before = Path.cwd()
    for processes, options in ((first, ["--epoch", 2]), (3 - first, ["--epoch", 4, "--resume"])):
        if processes == 2:
            status, _, err = torchrun("--opt", "sgd", *options, cwd=other)
            assert status == 0, err
        else:
            os.chdir(other)
            train_tiny("--opt", "sgd", *options)
            os.chdir(before)
    for one, two in zip(records(), records(other), strict=True):
        assert abs(one["loss"] - two["loss"]) < 1e-5 and abs(one["val_mm"] - two["val_mm"]) < 1e-3


@pytest.mark.slow
def test_frames_that_cannot_be_used_are_replaced_alike(data, tmp_path):
    """Validation of a single frame leaves one process without any."""
    lines = (data / "train.txt").read_text().splitlines()
    assert len({line.split()[0] for line in lines}) > 1
    lines[2:] = [line.replace(".png", "_gone.png") for line in lines[2:]]
    (data / "train.txt").write_text("\n".join(lines))
    (data / "val.txt").write_text((data / "val.txt").read_text().splitlines()[0])
    options = ["--batch_size", 8, "--epoch", 3, "--opt", "sgd", "--skip_bad", "--seed", 2]
    other = tmp_path / "two"
    other.mkdir()
    (other / "Data").symlink_to(tmp_path / "Data")
    status, _, err = torchrun(*options, cwd=other)
    assert status == 0, err
    train_tiny(*options)
    for one, two in zip(records(), records(other), strict=True):
        assert one["refused"] == two["refused"] == 6 + 5 + 4 + 3 + 2 + 1
        assert abs(one["loss"] - two["loss"]) < 1e-5 and abs(one["val_mm"] - two["val_mm"]) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_frame_that_one_process_cannot_read_ends_all(workers, data):
    """Process 1 of 2 misses its frame of the third step; the state that was saved before stays."""
    lines = (data / "train.txt").read_text().splitlines()
    order = EpochSampler(np.arange(8), 2, 5)
    gone = global_batches(order)[2][1]
    lines[gone] = lines[gone].replace(".png", "_gone.png")
    mended = (data / "train.txt").read_text()
    (data / "train.txt").write_text("\n".join(lines))
    options = ["--batch_size", 2, "--epoch", 1, "--num_workers", workers, "--save_minutes", 0]
    status, _, err = torchrun(*options)
    assert status != 0 and f"error: {data}" in err and "_gone.png" in err and "]: Traceback" not in err
    assert load_checkpoint(LAST, STATE_KEYS)["progress"]["step"] == 2
    (data / "train.txt").write_text(mended)
    train_tiny(*options, "--resume")
    assert len(records()) == 1


@pytest.mark.slow
def test_what_one_process_finds_wrong_at_the_start_is_said_without_a_traceback(data):
    status, _, err = torchrun("--resume")
    assert status != 0 and f"error: {LAST} not found" in err and "]: Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_sigterm_stops_all_processes_in_the_same_step(workers, data, tmp_path):
    repeat_lines(data / "train.txt", 400)
    options = ["--batch_size", "2", "--epoch", "1", "--num_workers", workers, "--save_minutes", "0"]
    process = subprocess.Popen([*TRAIN, *options], stderr=subprocess.PIPE, text=True)
    while not LAST.is_file():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=90)
    assert process.returncode != 0 and err.count("stopped by SIGTERM in epoch 1 after step ") == 2
    saved = load_checkpoint(LAST, STATE_KEYS)
    step = saved["progress"]["step"]
    assert 0 < step < 200 and f"after step {step};" in err
    train_tiny(*options[:4], "--resume")
    (record,) = records()
    assert record["epoch"] == 1 and torch.isfinite(torch.tensor(record["loss"]))


@pytest.mark.slow
def test_batch_norm_needs_gpus_to_be_synchronised(data):
    status, _, err = torchrun("--norm_method", "batch")
    assert status != 0 and "error: batch norm is synchronised between GPUs only" in err


if __name__ == "__main__":
    if losses := losses_in_double_precision():
        print(json.dumps(losses))
