"""Several processes, joined by gloo on the CPU, train as one does with the same global batch."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, hidden_files
from processes import end_together
from training import (
    RUN,
    TINY,
    global_batches,
    records,
    repeat_lines,
    start_two,
    train_as_a_script_does,
    train_in_two,
    train_tiny,
)

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
TORCHRUN = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split()]
TRAIN = [*TORCHRUN, REPO / "train.py", *TINY]


def torchrun(*arguments, cwd="."):
    """Train in two processes by the command that users give; return its exit status and what was printed."""
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
    return losses


def write_losses():
    """Write losses.json, in the first of several processes."""
    losses = losses_in_double_precision()
    if distributed.is_main():
        Path("losses.json").write_text(json.dumps(losses))


@pytest.fixture
def two(data, tmp_path):
    """Return another folder that shares the data."""
    folder = tmp_path / "two"
    folder.mkdir()
    (folder / "Data").symlink_to(tmp_path / "Data")
    return folder


@pytest.mark.parametrize("frames, val_frames", [(4, 1), (7, 4), (9, 41)])
def test_two_processes_equal_one_at_every_remainder(frames, val_frames, data, two):
    """Batches of two; a process may have one validation frame more than the other, or none at all."""
    repeat_lines(data / "train.txt", frames)
    repeat_lines(data / "val.txt", val_frames)
    options = ["--batch_size", 2, "--epoch", 1, "--lr", 1e-6, "--save_minutes", 0]
    assert train_in_two(two, *options) == [0, 0], (two / "output.txt").read_text()
    train_tiny(*options)
    (one,), (other,) = records(), records(two)
    assert one["val_mm"] == pytest.approx(other["val_mm"], abs=1e-3)
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert one["val_loss"] == pytest.approx(other["val_loss"], abs=1e-5)


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
    assert end_together(start_two(write_losses, cwd="."), 120) == [0, 0], Path("output.txt").read_text()
    other = json.loads(Path("losses.json").read_text())
    assert len(one) == len(other) == 20 and np.ptp(one) > 0.1
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_two_processes_train_as_one(data, two):
    """Twenty steps, each an epoch with a validation, so that every loss and error is on record.

    Adam divides gradients by their size, and so makes differences of rounding as large as the rate,
    which is small here; the test above is for large steps.
    """
    options = ["--batch_size", 8, "--epoch", 20, "--lr", 1e-6]
    status, out, err = torchrun(*options, cwd=two)
    assert status == 0, err
    train_tiny(*options)
    one, other = records(), records(two)
    assert len(one) == len(other) == 20
    for key, limit in (("loss", 1e-5), ("val_loss", 1e-5), ("val_mm", 1e-4)):
        apart = np.abs([a[key] - b[key] for a, b in zip(one, other)])
        assert apart.max() < limit, (key, apart)
    # One process prints, logs and saves.
    assert [out.count(f"epoch {epoch:>3}  loss") for epoch in range(1, 21)] == [1] * 20
    assert len(list((two / "logs" / RUN).glob("events*"))) == 1 and not hidden_files(two / "Model")
    assert len(load_checkpoint(two / LAST)["state_dict"]) > 50


@pytest.mark.slow
def test_resume_with_another_number_of_processes(data, two, monkeypatch):
    """From one to two, and from two to one."""
    sgd, first, both = ("--opt", "sgd"), ("--epoch", 2), ("--epoch", 4, "--resume")
    train_tiny(*sgd, "--epoch", 4)
    assert train_in_two(two, *sgd, *first) == [0, 0], (two / "output.txt").read_text()
    with monkeypatch.context() as patch:
        patch.chdir(two)
        train_tiny(*sgd, *both)
        train_tiny(*sgd, *first, "--suffix", "more")
    assert train_in_two(two, *sgd, *both, "--suffix", "more") == [0, 0], (two / "output.txt").read_text()
    for run in (RUN, "ICVL_more"):
        for one, other in zip(records(), records(two, run), strict=True):
            assert abs(one["loss"] - other["loss"]) < 1e-5 and abs(one["val_mm"] - other["val_mm"]) < 1e-4


@pytest.mark.slow
def test_frames_that_cannot_be_used_are_replaced_alike(data, two):
    """Validation of a single frame leaves one process without any."""
    lines = (data / "train.txt").read_text().splitlines()
    assert len({line.split()[0] for line in lines}) > 1
    lines[2:] = [line.replace(".png", "_gone.png") for line in lines[2:]]
    (data / "train.txt").write_text("\n".join(lines))
    (data / "val.txt").write_text((data / "val.txt").read_text().splitlines()[0])
    options = ["--batch_size", 8, "--epoch", 3, "--opt", "sgd", "--skip_bad", "--seed", 2]
    assert train_in_two(two, *options) == [0, 0], (two / "output.txt").read_text()
    train_tiny(*options)
    for one, other in zip(records(), records(two), strict=True):
        assert one["refused"] == other["refused"] == 6 + 5 + 4 + 3 + 2 + 1
        assert abs(one["loss"] - other["loss"]) < 1e-5 and abs(one["val_mm"] - other["val_mm"]) < 1e-4


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
    statuses, out = train_in_two(".", "--resume"), Path("output.txt").read_text()
    assert all(statuses) and f"error: {LAST} not found" in out and "Traceback" not in out


@pytest.mark.slow
@pytest.mark.parametrize("workers, by_torchrun", [(0, True), (1, False)])
def test_sigterm_stops_all_processes_in_the_same_step(workers, by_torchrun, data):
    repeat_lines(data / "train.txt", 200)
    options = ["--batch_size", "2", "--epoch", "1", "--num_workers", str(workers), "--save_minutes", "0"]
    if by_torchrun:
        processes = [subprocess.Popen([*TRAIN, *options], stderr=Path("output.txt").open("w"))]
        is_running = lambda process: process.poll() is None  # noqa: E731
    else:
        processes = start_two(train_as_a_script_does, *options, cwd=".")
        is_running = lambda process: process.is_alive()  # noqa: E731
    while not LAST.is_file():
        assert all(map(is_running, processes)), Path("output.txt").read_text()
        time.sleep(0.05)
    for process in processes:
        process.terminate()
    if by_torchrun:
        assert processes[0].wait(90) != 0
    else:
        assert end_together(processes, 90) == [128 + signal.SIGTERM] * 2
    err = Path("output.txt").read_text()
    assert err.count("stopped by SIGTERM in epoch 1 after step ") == 2
    saved = load_checkpoint(LAST, STATE_KEYS)
    step = saved["progress"]["step"]
    assert 0 < step < 100 and f"after step {step};" in err
    train_tiny(*options[:4], "--resume")
    (record,) = records()
    assert record["epoch"] == 1 and torch.isfinite(torch.tensor(record["loss"]))


@pytest.mark.slow
def test_batch_norm_needs_gpus_to_be_synchronised(data):
    statuses, out = train_in_two(".", "--norm_method", "batch"), Path("output.txt").read_text()
    assert all(statuses) and "error: batch norm is synchronised between GPUs only" in out
