"""A run that was stopped, at whatever moment and however, goes on as if it never had been."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ON_CPU, REPO, hidden_files
from processes import start_script
from training import (
    RUN,
    TINY,
    assert_same_run,
    assert_same_values,
    records,
    repeat_lines,
    tiny_process,
    train_tiny,
)

from engine import loops as engine
from engine import state as runstate
from engine import training as runs
from engine.checkpoints import load_checkpoint
from engine.options import parse_train
from engine.state import STATE_KEYS
from utils import Stopped, UserError

LAST = Path("Model", f"{RUN}_last.pt")
KILLS = 20


@pytest.fixture(scope="session")
def data(indexed, tmp_path_factory):
    """Return a folder whose Data/ICVL has 24 training and 6 validation frames: 6 and 2 steps."""
    folder = tmp_path_factory.mktemp("resume")
    root = shutil.copytree(indexed("ICVL"), folder / "Data" / "ICVL")
    repeat_lines(root / "train.txt", 24)
    repeat_lines(root / "val.txt", 6)
    return folder / "Data"


@pytest.fixture(scope="session")
def uninterrupted(data):
    """Return the folder of two epochs trained without a stop."""
    before = Path.cwd()
    os.chdir(data.parent)
    try:
        train_tiny()
    finally:
        os.chdir(before)
    return data.parent


@pytest.fixture
def place(workplace, data):
    """Return a fresh current folder that shares the data."""
    Path("Data").symlink_to(data)
    return workplace


def signal_during(monkeypatch, number, function, call):
    """Send this process signal `number` during call `call` of engine.`function`; return the list of calls."""
    original, calls = getattr(engine, function), []

    def wrapped(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(engine, function, wrapped)
    return calls


def test_stop_between_epochs(place, uninterrupted):
    train_tiny("--epoch", 1)
    train_tiny("--resume")
    assert_same_run(".", uninterrupted)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", [0, 2])
def test_signal_ends_the_run_after_the_step(number, status, workers, place, uninterrupted, monkeypatch):
    with monkeypatch.context() as patch:
        steps = signal_during(patch, number, "train_step", call=9)
        with pytest.raises(Stopped, match="in epoch 2 after step 3; go on with .* --resume") as stop:
            train_tiny("--num_workers", workers)
    assert stop.value.status == status and len(steps) == 9
    assert load_checkpoint(LAST, STATE_KEYS)["progress"]["step"] == 3
    train_tiny("--resume", "--num_workers", workers)
    assert_same_run(".", uninterrupted)


def test_a_record_that_a_killed_run_left_out_is_written_on_resuming(place):
    train_tiny()
    whole = records()
    path = Path("logs", RUN, "metrics.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    train_tiny("--resume")
    assert records() == whole


def test_signal_during_validation_does_not_wait_for_its_end(place, uninterrupted, monkeypatch):
    with monkeypatch.context() as patch:
        # Six training steps, then the first of two validation steps.
        forwards = signal_during(patch, signal.SIGTERM, "forward_losses", call=7)
        with pytest.raises(Stopped, match="in epoch 1 after step 6"):
            train_tiny()
    assert len(forwards) == 7
    train_tiny("--resume")
    assert_same_run(".", uninterrupted)


def test_signal_in_the_last_step_keeps_the_whole_run(place, uninterrupted, monkeypatch):
    with monkeypatch.context() as patch:
        signal_during(patch, signal.SIGTERM, "train_step", call=12)
        with pytest.raises(Stopped, match="in epoch 2 after step 6"):
            train_tiny()
    train_tiny("--resume")
    assert_same_run(".", uninterrupted)


def test_signal_handlers_are_given_back(place):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train_tiny("--epoch", 1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("minutes, steps", [(0, [1, 2, 3, 4, 5, 6, 6, 6]), (1, [3, 6])])
def test_state_is_written_every_save_minutes(minutes, steps, place, monkeypatch):
    """After a step of training or validation, which takes 25 s here, and at the end of the epoch."""
    forward, save, seconds, saves = engine.forward_losses, runs.Saver.save, [], []

    def slow(*arguments):
        seconds.append(25)
        return forward(*arguments)

    def noted(self, state):
        saves.append((state.epoch, state.progress.step))
        save(self, state)

    monkeypatch.setattr(engine, "forward_losses", slow)
    monkeypatch.setattr(runs.Saver, "save", noted)
    monkeypatch.setattr(runstate, "time", SimpleNamespace(monotonic=lambda: sum(seconds)))
    train_tiny("--save_minutes", minutes, "--epoch", 1)
    assert saves == [*((0, step) for step in steps), (1, 0)]


def test_rate_decays_as_asked_also_over_a_stop(place):
    options = ["--lr", 0.01, "--lr_decay", 0.5, "--decay_epoch", 2]
    train_tiny(*options, "--epoch", 1)
    train_tiny(*options, "--epoch", 4, "--resume")
    assert [record["lr"] for record in records()] == pytest.approx([0.01, 0.01, 0.005, 0.005])


def test_auto_starts_where_there_is_nothing_and_says_where_it_goes_on(place, uninterrupted, capfd):
    train_tiny("--resume", "auto", "--epoch", 1)
    assert "resuming" not in capfd.readouterr().out
    train_tiny("--resume", "auto")
    assert f"resuming from {LAST}, epoch 2, step 0" in capfd.readouterr().out
    assert_same_run(".", uninterrupted)


def test_an_ended_run_that_is_resumed_only_ends_again(place, capfd):
    first = train_tiny()
    before = LAST.read_bytes()
    assert train_tiny("--resume") == first
    assert LAST.read_bytes() == before and "best epoch" in capfd.readouterr().out


def test_drawn_seed_is_kept(place):
    train_tiny("--seed", 0, "--epoch", 1)
    seed = load_checkpoint(LAST)["seed"]
    train_tiny("--seed", 0, "--resume")
    assert load_checkpoint(LAST)["seed"] == seed != 0


def test_batch_larger_than_the_data_resumes(place):
    train_tiny("--batch_size", 100, "--epoch", 1)
    train_tiny("--batch_size", 100, "--resume")
    assert load_checkpoint(LAST, STATE_KEYS)["epoch"] == 2


def test_of_all_subjects_those_not_begun_begin_on_resume(workplace):
    args = parse_train("", ["--subject", "all", "--resume"], subject=True)
    assert {fold.resume for fold in runs.folds(args)} == {"always"}, "none was begun: the first says so"
    Path("Model").mkdir(exist_ok=True)
    Path("Model/MSRA_default_subject0_last.pt").touch()
    assert {fold.resume for fold in runs.folds(args)} == {"auto"}
    args.subject = 3
    assert [fold.resume for fold in runs.folds(args)] == ["always"]


def test_resume_without_state_says_so(place):
    with pytest.raises(UserError, match=f"{LAST} not found: train first"):
        train_tiny("--resume")


def test_beginning_anew_over_a_run_is_said(place, capfd):
    train_tiny("--epoch", 1)
    assert "WARNING" not in capfd.readouterr().out
    train_tiny("--epoch", 1)
    assert f"WARNING: {LAST} and its run are written over" in capfd.readouterr().out


def test_moments_lie_in_memory_as_their_weights_do(place):
    """Fused steps walk both in memory's order; --compile and GPUs put weights into channels_last."""
    train_tiny("--epoch", 1)
    args = parse_train("", TINY)
    splits = runs.open_splits(args)
    network = runs.build_network(args, splits[0].joint_number, torch.device("cpu"))
    state = runs.RunState(args, network.to(memory_format=torch.channels_last), splits[::2])
    state.restore(saved := load_checkpoint(LAST, STATE_KEYS))
    for number, parameter in enumerate(network.parameters()):
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state.optimizer.state[parameter][name]
            assert moment.stride() == parameter.stride()
            assert torch.equal(moment, saved["optimizer"]["state"][number][name])


def test_an_epoch_whose_validation_was_no_number_is_not_the_best(place):
    train_tiny()
    state = torch.load(LAST, weights_only=True)
    state["records"][0]["val_mm"] = float("nan")
    torch.save(state, LAST)
    assert train_tiny("--resume")[0] == 2


@pytest.mark.slow
def test_final_is_no_other_runs_epoch(place, capfd):
    train_tiny("--seed", 6)
    other = Path(f"Model/{RUN}_2.pt").read_bytes()
    best, *_ = train_tiny()
    Path(f"Model/{RUN}_{best}.pt").write_bytes(other)
    train_tiny("--resume")
    assert f"Model/{RUN}_{best}.pt is not this run's best epoch any more" in capfd.readouterr().out
    final, last = (load_checkpoint(Path(f"Model/{RUN}_{which}.pt")) for which in ("final", "last"))
    assert_same_values(final["state_dict"], last["state_dict"])


def test_folder_that_cannot_be_written_is_named(place):
    Path("Model").write_text("")
    with pytest.raises(UserError, match="cannot write Model/.*lock: File exists"):
        train_tiny()


def test_two_runs_of_one_name_are_refused(place):
    """The lock goes with the process that holds it, however that ends."""
    process = tiny_process(place, "--epoch", 1000)
    wait_for_saves(process, 1)
    with pytest.raises(UserError, match=f"{RUN} is being trained already: wait, or give another --suffix"):
        train_tiny()
    train_tiny("--epoch", 1, "--suffix", "other")
    process.kill()
    process.join()
    train_tiny("--epoch", 1)


@pytest.mark.parametrize("option, value", [("lr", 0.01), ("batch_size", 2), ("features", 48), ("seed", 6)])
def test_other_options_are_refused(option, value, place):
    train_tiny("--epoch", 1)
    with pytest.raises(UserError, match=f"--{option} is {value} here and .* in {LAST}: give the same"):
        train_tiny("--resume", f"--{option}", value)


def test_changed_index_is_said(workplace, data, capfd):
    shutil.copytree(data, "Data")
    train_tiny("--epoch", 1)
    index = Path("Data/ICVL/train.txt")
    index.write_text("".join(index.read_text().splitlines(keepends=True)[::-1]))
    train_tiny("--resume")
    assert "WARNING: the index files changed" in capfd.readouterr().out


class RunsCode:
    """Would write a file when unpickled."""

    def __reduce__(self):
        return open, ("intruder", "w")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: {**state, "records": RunsCode()}, "was refused unread"),
        (lambda state: {**state, "optimizer": {}}, "does not fit this run"),
        (lambda state: {**state, "progress": {"steps": 3}}, "is no state of a run"),
        (lambda state: {**state, "options": [1]}, "is no state of a run .its options"),
        (lambda state: {key: state[key] for key in ("state_dict", "model_param")}, "has no optimizer"),
    ],
)
def test_state_that_is_none_is_refused(change, words, place):
    train_tiny("--epoch", 1)
    torch.save(change(torch.load(LAST, weights_only=True)), LAST)
    with pytest.raises(UserError, match=f"{LAST}.*{words}"):
        train_tiny("--resume")
    assert not Path("intruder").exists()


def test_checkpoint_and_log_say_what_the_run_depended_on(place):
    train_tiny("--epoch", 1)
    logged = json.loads(Path("logs", RUN, "metrics.jsonl").read_text().splitlines()[0])
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True, check=False
    ).stdout.strip()
    for which in ("1", "last", "final"):
        found = load_checkpoint(Path("Model", f"{RUN}_{which}.pt"))
        assert found["seed"] == found["options"]["seed"] == 5
        assert found["options"]["batch_size"] == 4 and found["options"]["lr"] == 1e-3
        assert found["versions"]["torch"] == str(torch.__version__)
        assert {"python", "numpy", "opencv"} < found["versions"].keys()
        assert found["commit"] == (commit or None) and re.fullmatch("[0-9a-f]{32}", found["index"])
        assert {key: found[key] for key in logged} == logged
    assert {"options", "versions", "commit", "index"} <= logged.keys()


def test_index_hash_tells_one_changed_number(workplace, data):
    shutil.copytree(data, "Data")
    index, hashes = Path("Data/ICVL/val.txt"), []
    for text in (index.read_text(), index.read_text().replace("1", "2", 1)):
        index.write_text(text)
        train_tiny("--epoch", 1)
        hashes.append(load_checkpoint(LAST)["index"])
    assert hashes[0] != hashes[1]


def test_same_seed_gives_the_same_result_file(place, script):
    results = []
    for _ in range(2):
        train_tiny("--epoch", 1)
        assert script("test.py", "--dataset", "ICVL", *ON_CPU).status == 0
        results.append(Path("Result", f"{RUN}.txt").read_bytes())
        shutil.rmtree("Model")
    assert results[0] == results[1]


def wait_for_saves(process, count):
    """Wait until a run has written its state so many times more, or has ended."""

    def version():
        return LAST.stat().st_mtime_ns if LAST.is_file() else 0

    for _ in range(count):
        known = version()
        while version() == known and process.is_alive():
            time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_twenty_moments_it_ends_the_same(workers, place, data, tmp_path_factory):
    """Kill -9; the state is written after every step, so that many kills hit the writing.

    A run lives until a random one of its first saves, and then up to a step longer.
    """
    options = ["--num_workers", workers, "--epoch", 6, "--save_minutes", 0]
    whole = tmp_path_factory.mktemp("whole")
    (whole / "Data").symlink_to(data)
    start = time.monotonic()
    reference = tiny_process(whole, *options)
    reference.join()
    life_s = time.monotonic() - start
    assert reference.exitcode == 0, (whole / "output.txt").read_text()

    rng, kills, resumed = random.Random(workers), 0, 0
    while kills < KILLS:
        # What is left of a killed one's workers may still write to the file that it had.
        Path("output.txt").unlink(missing_ok=True)
        process = tiny_process(place, *options, "--resume", "auto")
        saves = rng.randrange(5)
        wait_for_saves(process, saves)
        process.join(rng.uniform(0, life_s / (50 if saves else 5)))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            if LAST.is_file():
                resumed += load_checkpoint(LAST, STATE_KEYS)["progress"]["step"] > 0
        else:
            assert process.exitcode == 0, Path("output.txt").read_text()
            assert_same_run(".", whole)
            shutil.rmtree("Model")
    Path("output.txt").unlink(missing_ok=True)
    process = tiny_process(place, *options, "--resume", "auto")
    process.join()
    assert process.exitcode == 0, Path("output.txt").read_text()
    assert "Traceback" not in Path("output.txt").read_text()
    assert_same_run(".", whole)
    assert resumed > KILLS / 4, "too few stops in the middle of an epoch"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_whole_process_group_ends_a_script_in_order(number, place):
    """As a batch system or Ctrl-C does it: the loading processes get the signal too."""
    words = [*TINY, "--epoch", 1000, "--num_workers", 2]
    process = start_script("train.py", *words, cwd=place, output=["out.txt", "err.txt"])
    while not LAST.is_file():
        assert process.is_alive()
        time.sleep(0.05)
    os.killpg(process.pid, number)
    process.join(60)
    err = Path("err.txt").read_text()
    assert process.exitcode == 128 + number
    assert err.splitlines()[-1].startswith(f"stopped by {number.name} in epoch ")
    assert "--resume" in err and "Traceback" not in err and not hidden_files("Model")
