"""Bad numbers, frames that go bad in the middle of training, dying workers and a full disk lose nothing."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from conftest import hidden_files
from training import (
    RUN,
    TINY,
    assert_same_values,
    records,
    repeat_lines,
    tiny_process,
    train_tiny,
)

import utils
from datasets import DATASETS
from engine import loops as engine
from engine import state as runstate
from engine import training as training_run
from engine.batches import EpochSampler, batches_of, make_loader
from engine.checkpoints import load_checkpoint, save_checkpoint
from engine.loops import Progress, train_one_epoch, train_step
from engine.options import parse_train
from engine.state import STATE_KEYS, build_optimizer
from frames.drawing import write_picture
from frames.files import LineFile
from frames.samples import Sample
from model import PixelwiseRegression
from utils import UserError, atomic_path

LAST = Path("Model", f"{RUN}_last.pt")
CPU = torch.device("cpu")


@pytest.fixture
def data(fresh_indexed):
    """Return Data/ICVL with 12 training and 4 validation frames: 3 steps and one."""
    root = fresh_indexed("ICVL")
    repeat_lines(root / "train.txt", 12)
    repeat_lines(root / "val.txt", 4)
    return root


def options(*arguments):
    return parse_train("", [*TINY, *map(str, arguments)])


# Numbers that are not finite


def tiny_network(frames, norm_method="instance"):
    torch.manual_seed(0)
    return PixelwiseRegression(
        frames.joint_number, stage=1, label_size=16, features=32, level=0, norm_method=norm_method
    )


def copied(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
@pytest.mark.parametrize("first_bad", [0, 2])
@pytest.mark.parametrize("norm_method", ["instance", "batch"])
def test_bad_step_changes_nothing(optimiser, first_bad, norm_method, data):
    """Also the very first, and running statistics: the run equals one that never saw the bad batch."""
    frames = DATASETS["ICVL"](label_size=16, image_size=32, targets=False)
    good = Sample(*(field[None] for field in frames.sample(0)))
    bad = good._replace(img=good.img * np.nan)
    weights = []
    for batches in ([good] * 4, [*[good] * first_bad, bad, bad, *[good] * (4 - first_bad)]):
        network, args = tiny_network(frames, norm_method), options("--opt", optimiser)
        optimizer = build_optimizer(args, network.parameters())
        network.train()
        applied = [train_step(network, optimizer, samples, args)[1] for samples in batches]
        weights.append([copied(network), optimizer.state_dict()])
    assert applied == [True] * first_bad + [False] * 2 + [True] * (4 - first_bad)
    assert_same_values(*weights)


def test_finite_loss_with_a_gradient_that_is_not_is_bad_too(data, monkeypatch):
    frames = DATASETS["ICVL"](label_size=16, image_size=32, targets=False)
    network, args = tiny_network(frames), options()
    before = copied(network)

    def root_of_zero(network, samples, args, mixed_precision):
        return None, {"root": (0 * next(network.parameters()).sum()).sqrt()}

    monkeypatch.setattr(engine, "forward_losses", root_of_zero)
    assert train_step(network, build_optimizer(args, network.parameters()), None, args) == (0, False)
    assert_same_values(copied(network), before)


def spoil_steps(monkeypatch, calls):
    """Make the loss of these calls of engine.train_step NaN."""
    original, count = engine.train_step, iter(range(1, 1000))

    def spoilt(network, optimizer, samples, args):
        if next(count) in calls:
            samples = samples._replace(uvd=samples.uvd * np.nan)
        return original(network, optimizer, samples, args)

    monkeypatch.setattr(engine, "train_step", spoilt)


def test_bad_step_is_counted_and_its_frames_are_named(data, monkeypatch, capfd):
    spoil_steps(monkeypatch, {2})
    train_tiny("--epoch", 1)
    (warning,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("warning: loss")]
    assert "step not applied" in warning and warning.count("image_") == 4
    (record,) = records()
    assert record["bad_steps"] == 1 and np.isfinite(record["loss"])


@pytest.mark.parametrize("calls, epoch, bad", [({1, 2, 3}, 0, 3), ({2, 3, 4, 5}, 1, 2)])
def test_too_many_bad_steps_end_the_run_with_its_state_saved(calls, epoch, bad, data, monkeypatch):
    """Within an epoch, and from one to the next."""
    spoil_steps(monkeypatch, calls)
    limit = len(calls) - 1
    with pytest.raises(
        UserError, match=f"{len(calls)} steps in a row were not finite .*max_bad_steps {limit}"
    ):
        train_tiny("--max_bad_steps", limit)
    saved = load_checkpoint(LAST, STATE_KEYS)
    assert saved["epoch"] == epoch
    expected = {"step": bad, "good_steps": 0, "bad_steps": bad, "bad_in_a_row": len(calls)}
    assert expected.items() <= saved["progress"].items()
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())


def test_as_many_bad_steps_as_allowed_do_not_end_it(data, monkeypatch):
    spoil_steps(monkeypatch, {2, 3, 4})
    train_tiny("--max_bad_steps", 3)
    assert [record["bad_steps"] for record in records()] == [2, 1]


def test_epoch_without_a_good_step_is_none(data, monkeypatch):
    with monkeypatch.context() as patch:
        spoil_steps(patch, {1, 2, 3})
        with pytest.raises(UserError, match="no step of epoch 1 could be applied"):
            train_tiny()
    train_tiny("--resume")
    assert [record["bad_steps"] for record in records()] == [0, 0]


# Frames that go bad in the middle of training


def rewrite(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def repicture(change):
    return lambda path: cv2.imwrite(str(path), change(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))


def int32(data, place, value):
    return data[: 4 * place] + int(value).to_bytes(4, "little", signed=True) + data[4 * place + 4 :]


PNG_DAMAGES = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    "empty": (rewrite(lambda data: b""), "is empty"),
    "cut": (rewrite(lambda data: data[: len(data) // 2]), "cut short"),
    "flipped": (rewrite(lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:]), "decode"),
    "text": (rewrite(lambda data: b"no picture at all, by no means"), "is no PNG"),
    "size": (repicture(lambda image: image[:-1]), "px, found"),
    "depth": (repicture(lambda image: image.astype("uint8" if image.ndim == 2 else "uint16")), "expected a"),
    "channels": (
        repicture(lambda image: np.dstack([image] * 4) if image.ndim == 2 else image[:, :, 0]),
        "exp",
    ),
}
BIN_DAMAGES = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "empty": (rewrite(lambda data: b""), "is empty"),
    "header cut": (rewrite(lambda data: data[:20]), "24 bytes"),
    "cut": (rewrite(lambda data: data[:-4]), "promises"),
    "long": (rewrite(lambda data: data + b"1234"), "promises"),
    "width": (rewrite(lambda data: int32(data, 0, 640)), "the header says"),
    "negative": (rewrite(lambda data: int32(data, 2, -5)), "beyond the picture"),
    "huge": (rewrite(lambda data: int32(data, 4, 2**31 - 1)), "beyond the picture"),
    "NaN": (rewrite(lambda data: data[:24] + b"\0\0\xc0\x7f" + data[28:]), "not finite"),
}
CASES = [
    *((name, damage) for name in ("NYU", "ICVL", "HAND17") for damage in PNG_DAMAGES),
    *(("MSRA", damage) for damage in BIN_DAMAGES),
]


def train_with_damage(monkeypatch, name, damage, *arguments):
    """Train an epoch of single frames; after the first step damage(training set). Return the Progress.

    The optimiser's step is left out, for only reading matters here.
    """
    frames, damages = DATASETS[name](label_size=16, image_size=32, targets=False), [damage]

    def no_step(network, optimizer, samples, args):
        if damages:
            damages.pop()(frames)
        return 0.0, True

    monkeypatch.setattr(engine, "train_step", no_step)
    args, progress = options("--batch_size", 1, *arguments), Progress()
    sampler, substitutes = EpochSampler(np.arange(len(frames)), 1, 3), len(frames) * args.skip_bad
    loader = make_loader(frames, sampler, args, CPU, 1, substitutes)
    assert len(list(train_one_epoch(torch.nn.Identity(), loader, None, CPU, args, progress))) == 20
    return progress


@pytest.mark.parametrize("name, kind", CASES)
def test_frame_that_goes_bad_is_named_or_counted(name, kind, fresh_indexed, monkeypatch, capfd):
    root = fresh_indexed(name)
    index = root / ("train_0.txt" if name == "MSRA" else "train.txt")
    repeat_lines(index, 20)
    damages = {**PNG_DAMAGES, **BIN_DAMAGES} if name == "MSRA" else PNG_DAMAGES
    damage, words = damages[kind]
    spoilt = []

    def spoil(frames):
        spoilt.append(frames.frame_path(0))
        if not spoilt[1:]:
            damage(frames.frame_path(0))

    with pytest.raises(UserError) as refusal:
        train_with_damage(monkeypatch, name, spoil)
    message = str(refusal.value)
    assert message.startswith(f"{spoilt[0]}: ") and words in message and "\n" not in message
    assert message.endswith("(--skip_bad counts such frames and goes on)")

    capfd.readouterr()
    progress = train_with_damage(monkeypatch, name, spoil, "--skip_bad")
    assert progress.good_steps == 20 and progress.refused > 0, "another frame takes its place"
    assert capfd.readouterr().out.count(f"warning: skipped {spoilt[0]}: ") == min(progress.refused, 10)


@pytest.mark.parametrize(
    "name, file, change, words",
    [
        ("ICVL", "train.txt", lambda numbers: ["nan", *numbers[1:]], "the label has a number that is not"),
        ("ICVL", "train.txt", lambda numbers: ["1e9", *numbers[1:]], "outside the heatmap grid"),
        (
            "ICVL",
            "train.txt",
            lambda numbers: [*numbers[:2], "1e99", *numbers[3:]],
            "the label is impossible",
        ),
        ("ICVL", "train.txt", lambda numbers: ["x", *numbers[1:]], "the label is not numbers"),
        ("ICVL", "train.txt", lambda numbers: numbers[1:], "the label has 47 numbers, expected 48"),
        ("ICVL", "train.txt", lambda numbers: [], "the label has 0 numbers"),
        ("HAND17", "train.txt", lambda numbers: [*numbers[:2], "-1", *numbers[3:]], "behind the camera"),
        ("ICVL", "icvl_center_train.txt", lambda _: ["invalid"], "no hand was found in it"),
        ("ICVL", "icvl_center_train.txt", lambda _: [], "the centre has 0 numbers"),
        ("NYU", "nyu_center_train.txt", lambda _: ["1", "2", "nan"], "the centre has a number that is not"),
        ("NYU", "nyu_center_train.txt", lambda _: ["1", "2", "-3"], "the centre is impossible"),
        ("HAND17", "hands17_center_train.txt", lambda _: ["0"] * 4, "the centre has 4 numbers"),
    ],
)
def test_text_that_goes_bad_in_place_is_named(name, file, change, words, fresh_indexed, monkeypatch):
    root = fresh_indexed(name)
    repeat_lines(root / "train.txt", 20)

    def spoil(_):
        with (root / file).open("r+") as text:
            lines = text.read().splitlines()
            for number, line in enumerate(lines):
                path = line.split()[:1] if file == "train.txt" else []
                lines[number] = " ".join(path + change(line.split()[len(path) :])).ljust(len(line))[
                    : len(line)
                ]
            text.seek(0)
            text.write("\n".join(lines))

    with pytest.raises(UserError, match=words) as refusal:
        train_with_damage(monkeypatch, name, spoil)
    assert str(refusal.value).startswith(f"{root}/") and "\n" not in str(refusal.value)


def test_index_cut_short_under_a_run_does_not_crash_it(data):
    """A memory map would have: reading behind a file's end is a signal, not an error."""
    path = data / "train.txt"
    lines = LineFile(path)
    assert lines[5]
    os.truncate(path, 0)
    pid = os.fork()
    if pid == 0:
        os._exit(lines[5] != "")
    assert os.waitpid(pid, 0)[1] == 0


def test_bad_validation_frame_is_counted_once_over_a_whole_run(data, capfd):
    """The picture for TensorBoard is of that frame too."""
    path = next((data / "Testing/Depth").rglob("*.png"))
    path.unlink()
    with pytest.raises(UserError, match="the file is missing"):
        train_tiny("--epoch", 1)
    train_tiny("--resume", "--skip_bad", "--epoch", 1)
    (record,) = records()
    repeats = (data / "val.txt").read_text().count(path.name)
    assert record["refused"] == repeats > 0 and np.isfinite(record["val_mm"])


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_no_frames_fault_ends_a_run_also_with_skip_bad(workers, data):
    (data / "icvl_center_train.txt").rename("moved")
    with pytest.raises(UserError, match="icvl_center_train.txt not found: put it there") as error:
        train_tiny("--skip_bad", "--num_workers", workers)
    assert "\n" not in str(error.value)


# Loading processes, and those that die


class Process(NamedTuple):
    """A process that loads a frame: its number, group, OpenCV threads."""

    pid: torch.Tensor
    group: torch.Tensor
    threads: torch.Tensor


def test_a_second_ctrl_c_soon_after_the_first_leaves_time_to_clean_up(capsys):
    before, cleaned = signal.getsignal(signal.SIGINT), []

    def main():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGINT)  # as launchers hand it on
            time.sleep(0.05)
            cleaned.append(True)

    assert utils.run(main) == 130 and cleaned
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) == before


def test_a_full_disk_under_standard_output_is_one_line(capsys, monkeypatch):
    def write(text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(utils, "discard", lambda stream: None)
    monkeypatch.setattr(sys.stdout, "write", write)
    assert utils.run(lambda: utils.say("done")) == 1
    assert capsys.readouterr().err == "error: cannot write to standard output: No space left on device\n"


class Processes:
    """Its frames tell of the process that loads them, which gets a Ctrl-C each time."""

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGINT)
        return Process(*map(torch.tensor, (os.getpid(), os.getpgid(0), cv2.getNumThreads())))


def test_loading_processes_have_one_thread_and_outlive_ctrl_c_and_epochs():
    loader = make_loader(Processes(), range(6), options("--num_workers", 2), CPU, 1)
    epochs = [[batch.samples for batch in batches_of(loader)] for _ in range(2)]
    pids = [{process.pid.item() for process in epoch} for epoch in epochs]
    assert pids[0] == pids[1] and len(pids[0]) == 2 and os.getpid() not in pids[0]
    assert {process.threads.item() for epoch in epochs for process in epoch} == {1}
    groups = {process.group.item() for process in epochs[0]}
    assert groups == pids[0], "a signal to the main process's group does not come to them"


def test_loading_processes_may_be_spawned(indexed):
    """As on macOS."""
    frames = DATASETS["ICVL"](path=indexed("ICVL"), label_size=16, image_size=32, targets=False)
    loaders = [
        make_loader(frames, EpochSampler(np.arange(3), 3, 1), options("--num_workers", n), CPU, 3)
        for n in (0, 1)
    ]
    loaders[1].multiprocessing_context = "spawn"
    (one,), (other,) = (list(batches_of(loader)) for loader in loaders)
    assert_same_values(list(one.samples), list(other.samples))


def test_temporary_folder_with_a_long_name_does_no_harm(data, tmp_path, monkeypatch):
    """Batch systems make such; tensors would be handed over by a socket in it, whose path is limited."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 80)))
    Path(tempfile.tempdir).mkdir()
    train_tiny("--num_workers", 1, "--epoch", 1)
    assert len(records()) == 1


def test_loading_processes_that_cannot_start_are_told_in_a_line(data, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    ignored = []
    monkeypatch.setattr(torch.multiprocessing, "Queue", refuse)
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    with pytest.raises(UserError, match="Too many open files.*fewer --num_workers.*ulimit -n") as error:
        train_tiny("--num_workers", 1)
    traceback.clear_frames(error.value.__cause__.__traceback__)  # torch's iterator ends here, if not before
    assert "\n" not in str(error.value) and not ignored


def kill_worker_at(monkeypatch, index):
    """Let a loading process that reads frame `index` die, as for lack of memory."""
    original = DATASETS["ICVL"].__getitem__

    def deadly(self, key):
        if key == index or isinstance(key, tuple) and key[0] == index:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, key)

    monkeypatch.setattr(DATASETS["ICVL"], "__getitem__", deadly)


@pytest.mark.slow
def test_a_loading_process_that_dies_ends_the_run_in_one_line(data, monkeypatch):
    """The state that was saved last stays, and is gone on from."""
    train_tiny("--epoch", 1)
    before = LAST.read_bytes()
    with monkeypatch.context() as patch:
        kill_worker_at(patch, 7)
        with pytest.raises(UserError, match="DataLoader worker .*give fewer --num_workers") as error:
            train_tiny("--num_workers", 2, "--batch_size", 4, "--resume")
    assert "\n" not in str(error.value) and LAST.read_bytes() == before
    train_tiny("--num_workers", 2, "--resume")
    assert len(records()) == 2


# A full disk


def fill_disk(monkeypatch, calls):
    """Let these calls of os.fsync, which every atomic write makes, find the disk full."""
    original, count = os.fsync, iter(range(1, 1000))

    def full(handle):
        if next(count) in calls:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(handle)

    monkeypatch.setattr(utils.os, "fsync", full)


def test_training_goes_on_without_space_and_saves_later(data, monkeypatch, capfd):
    train_tiny("--epoch", 1)
    good = LAST.read_bytes()
    original, states = engine.train_step, []

    def noted(*arguments):
        states.append(LAST.read_bytes())
        return original(*arguments)

    with monkeypatch.context() as patch:
        # One write for the options; then epoch 2's checkpoint, again before the state, and the log.
        fill_disk(patch, {2, 3, 4, 5})
        patch.setattr(engine, "train_step", noted)
        train_tiny("--epoch", 3, "--resume")
    assert states == [good] * 6, "the last good state stayed"
    out = capfd.readouterr().out
    assert out.count("WARNING: cannot write") == 4 and out.count("No space left on device") == 4
    assert load_checkpoint(Path("Model", f"{RUN}_2.pt"))["record"]["epoch"] == 2
    assert load_checkpoint(LAST, STATE_KEYS)["epoch"] == 3 and len(records()) == 3
    kept = {path: load_checkpoint(path)["state_dict"] for path in Path("Model").glob("*_?.pt")}
    train_tiny("--epoch", 3)
    for path, weights in kept.items():
        assert_same_values(weights, load_checkpoint(path)["state_dict"])
    assert not hidden_files(".")


def test_tensorboard_without_space_does_not_end_the_run(data, monkeypatch, capfd):
    from torch.utils.tensorboard import SummaryWriter

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    train_tiny()
    assert capfd.readouterr().out.count("WARNING: TensorBoard's log ends here: No space left") == 1
    assert len(records()) == 2
    monkeypatch.setattr(SummaryWriter, "__init__", full)
    train_tiny("--suffix", "other")
    assert capfd.readouterr().out.count("WARNING: no log for TensorBoard: [Errno 28] No space left") == 1


def test_curves_that_cannot_be_written_do_not_end_the_run(data, capfd):
    Path("logs", RUN, "curves.png").mkdir(parents=True)
    train_tiny()
    assert capfd.readouterr().out.count("WARNING: cannot write") == 1
    assert len(records()) == 2


@pytest.fixture
def small_disk(data):
    """Return a function that makes Model/ a file system of so many kB; skip where none can be mounted."""

    def resize(size_kb):
        option = f"{'remount,' if os.path.ismount('Model') else ''}size={size_kb}k"
        command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", "Model"]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")

    Path("Model").mkdir()
    yield resize
    subprocess.run(["umount", "-l", "Model"], capture_output=True)


def test_disk_that_stays_full_to_the_end_costs_no_weights(small_disk, tmp_path, monkeypatch):
    small_disk(40)
    monkeypatch.setattr(training_run, "RETRY_S", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spare"))
    with pytest.raises(UserError, match="the disk is full: move .*_final.pt.* to Model/$"):
        train_tiny()
    small_disk(100_000)
    names = sorted(path.name for path in (tmp_path / "spare").glob("*.pt"))
    assert names == [f"{RUN}_{which}.pt" for which in ("1", "2", "final", "last")]
    for name in names:
        shutil.move(tmp_path / "spare" / name, "Model")
    train_tiny("--resume", "--epoch", 3)
    assert len(records()) == 3


def test_space_that_comes_after_the_end_is_used(small_disk, monkeypatch, capfd):
    small_disk(40)
    monkeypatch.setattr(runstate.time, "sleep", lambda _: small_disk(100_000))
    train_tiny()
    assert "what is not saved yet is tried again" in capfd.readouterr().out
    assert {path.name for path in Path("Model").glob("*.pt")} == {
        f"{RUN}_{which}.pt" for which in ("1", "2", "final", "last")
    }


@pytest.mark.slow
def test_nothing_is_claimed_that_is_not_so_where_no_folder_takes_files(data):
    """The kernel refuses files of this size wherever they are, so that they are cut short."""
    train_tiny("--epoch", 1)
    good = {path: path.read_bytes() for path in Path("Model").glob("*.pt")}
    process = tiny_process(Path.cwd(), "--epoch", 100, "--resume", limit_bytes=50_000)
    while "epoch   3" not in (out := Path("output.txt").read_text() if Path("output.txt").exists() else ""):
        assert process.is_alive(), out
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    out = Path("output.txt").read_text()
    last = out.splitlines()[-1]
    assert process.exitcode == 143 and "stopped by SIGTERM" in last and "--resume" not in last
    unsaved = last.partition("NOT SAVED: ")[2].split(", ")
    assert {f"Model/{RUN}_2.pt", f"Model/{RUN}_3.pt", str(LAST)} <= set(unsaved)
    assert "TensorBoard's log ends here" in out and "File too large" in out
    assert {path: path.read_bytes() for path in Path("Model").glob("*.pt")} == good
    train_tiny("--epoch", 3, "--resume")
    assert len(records()) == 3


def test_checkpoint_without_space_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "network.pt"
    save_checkpoint(path, {"a": 1})
    fill_disk(monkeypatch, {1})
    with pytest.raises(UserError, match="cannot write .*network.pt: No space left on device"):
        save_checkpoint(path, {"a": 2})
    assert load_checkpoint(path, ()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


# What torch says of the machine


class InductorError(RuntimeError):
    """As torch raises it."""

    __module__ = "torch._inductor.exc"


@pytest.mark.parametrize(
    "error, words",
    [
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried"),
            "the GPU's memory is full: .*--batch_size",
        ),
        (InductorError("no g[+][+]\nlong"), "compiling failed .no g.*leave --compile out"),
    ],
)
def test_full_gpu_and_missing_compiler_end_a_run_in_one_line(error, words, data, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(engine, "train_step", fail)
    with pytest.raises(UserError, match=words) as shown:
        train_tiny("--epoch", 1)
    assert "\n" not in str(shown.value)


# Atomic writes


def test_killed_writer_leaves_the_old_file_and_its_rubbish_goes(tmp_path, monkeypatch):
    path = tmp_path / "train.txt"
    path.write_text("old")
    pid = os.fork()
    if pid == 0:
        with atomic_path(path) as temporary:
            temporary.write_text("ne")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (leftover,) = hidden_files(tmp_path)
    assert path.read_text() == "old"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert leftover.exists(), "its writer might still be at work"
    monkeypatch.setattr(utils, "_swept", {})
    os.utime(leftover, (time.time() - 4000,) * 2)
    other = tmp_path / ".train.longer.abcdefgh.txt"
    other.touch()
    os.utime(other, (0, 0))
    with atomic_path(path) as temporary:
        temporary.write_text("newer")
    assert path.read_text() == "newer" and sorted(tmp_path.iterdir()) == [other, path]


def test_file_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "train.txt"):
            pass
        assert stat.S_IMODE((tmp_path / "train.txt").stat().st_mode) == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, picture = tmp_path / "hand.png", np.full((8, 9, 3), (10, 20, 30), np.uint8)
    write_picture(path, picture)
    assert (cv2.imread(str(path)) == (30, 20, 10)).all()
    fill_disk(monkeypatch, {1})
    with pytest.raises(UserError, match="cannot write"):
        write_picture(path, picture * 0)
    assert cv2.imread(str(path)).any() and list(tmp_path.iterdir()) == [path]


def test_a_system_without_posix_signals_is_told_so(monkeypatch, capsys):
    monkeypatch.delattr(utils.signal, "SIGCHLD")
    assert utils.run(lambda: pytest.fail("it ran")) == 1
    assert capsys.readouterr().err == "error: this runs on Linux and macOS; on Windows use WSL\n"


def test_error_lines_of_several_processes_do_not_run_into_each_other(monkeypatch):
    """Under torchrun, Python's streams are unbuffered: each write goes out by itself."""
    written = []
    stream = Mock(write=written.append)
    monkeypatch.setattr(utils.sys, "stderr", stream)

    def fail():
        raise UserError("gone")

    assert utils.run(fail) == 1 and written == ["error: gone\n"]
