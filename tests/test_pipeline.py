"""The commands of the README from official files to printed errors, on golden data and on one real frame.

Each data set's commands run once, as forked processes; the tests look at what they left.
"""

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from conftest import NO_AUGMENTATION, ON_CPU, SHARED, SMALL_NETWORK, copy_golden
from processes import run_forked

from datasets import DATASETS
from engine.metrics import PROTOCOLS
from engine.testing import test_labels_uvd

test_labels_uvd.__test__ = False  # the library's function only looks like a test

NAMES = ["NYU", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ICVL", "MSRA", "HAND17"))]
SUBJECT = 3
REAL_REPEATS = 20


class Chain(NamedTuple):
    """How a data set's three commands Finished, in the folder where they ran."""

    folder: Path
    check: tuple
    train: tuple
    test: tuple

    def run_name(self, name):
        return f"{name}_default" + (f"_subject{SUBJECT}" if name == "MSRA" else "")


def golden_chain(folder, name):
    """Run check_dataset, two epochs of training and testing on a golden copy in the folder."""
    copy_golden(name, folder / "Data" / name)
    msra = name == "MSRA"
    data = ["--subject", SUBJECT] if msra else ["--dataset", name]
    workers = ["--num_workers", 2] if name == "ICVL" else []
    options = [*data, *ON_CPU, *workers]
    training = [*options, *SMALL_NETWORK, "--epoch", 2, "--batch_size", 2, "--alpha", 0.5, "--seed", 11]
    return Chain(
        folder,
        run_forked("check_dataset.py", "--dataset", name, cwd=folder),
        run_forked("train_msra.py" if msra else "train.py", *training, cwd=folder),
        run_forked("test_msra.py" if msra else "test.py", *options, cwd=folder),
    )


def real_chain(folder):
    """Overfit a small network to the one real NYU frame, which is all of train and test.

    The index names the frame twenty times, so that an epoch is twenty steps and not one.
    """
    for split in ("train", "test"):
        root = folder / "Data" / "NYU"
        shutil.copytree(SHARED / "real/nyu/test", root / split)
        shutil.copy(SHARED / "real/nyu/nyu_center_test.txt", root / f"nyu_center_{split}.txt")
    check = run_forked("check_dataset.py", "--dataset", "NYU", cwd=folder)
    (root / "train.txt").write_text((root / "train.txt").read_text() * REAL_REPEATS)
    recipe = "--epoch 4 --batch_size 1 --lr 3e-3 --decay_epoch 3 --seed 1".split()
    return Chain(
        folder,
        check,
        run_forked("train.py", *ON_CPU, *SMALL_NETWORK, *NO_AUGMENTATION, *recipe, cwd=folder),
        run_forked("test.py", *ON_CPU, cwd=folder),
    )


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """Return a function from a data set's name (or `real`) to its Chain, which runs when first asked for."""
    folder = tmp_path_factory.mktemp("golden")
    real = tmp_path_factory.mktemp("real")
    return cache(lambda name: real_chain(real) if name == "real" else golden_chain(folder, name))


def epochs_of(folder, run):
    """Return the records of a run's epochs; the log's first line tells its circumstances."""
    lines = (Path(folder) / "logs" / run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "epoch" in record]


def results_of(chain, name, which=""):
    """Return the result file's joints [N, J, 3] uvd."""
    return np.loadtxt(chain.folder / "Result" / f"{chain.run_name(name)}{which}.txt", ndmin=2).reshape(
        -1, DATASETS[name].joint_number, 3
    )


def mean_error_mm(chain, name, **fold):
    """Return the mean joint error of a result file, by the community's protocol."""
    labels = test_labels_uvd(name, chain.folder / "Data" / name, **fold)
    to_xyz = PROTOCOLS[name].to_xyz
    return np.linalg.norm(to_xyz(results_of(chain, name)) - to_xyz(labels), axis=-1).mean()


def assert_succeeded(done):
    assert done.status == 0 and "Traceback" not in done.err, done.err


# From official files to printed errors


@pytest.mark.parametrize("name", NAMES)
def test_check_dataset_accepts_the_golden_frames(name, chains):
    done = chains(name).check
    assert_succeeded(done)
    counts = re.findall(rf"{name} \w+: (\d+) of (\d+) frames accepted, 0 refused", done.out)
    assert len(counts) == (9 if name == "MSRA" else 2) and all(a == b for a, b in counts)


@pytest.mark.parametrize("name", NAMES)
def test_training_prints_a_line_an_epoch_and_saves_each(name, chains):
    chain = chains(name)
    assert_succeeded(chain.train)
    lines = re.findall(r"^epoch +(\d) +loss (\d+\.\d+) +val (\d+\.\d+) mm", chain.train.out, re.MULTILINE)
    assert [line[0] for line in lines] == ["1", "2"]
    run = chain.run_name(name)
    for record, (epoch, loss, val_mm) in zip(epochs_of(chain.folder, run), lines, strict=True):
        assert record["epoch"] == int(epoch) and f"{record['loss']:.4f}" == loss
        assert f"{record['val_mm']:.2f}" == val_mm and np.isfinite(record["val_loss"])
    assert (chain.folder / "logs" / run / "curves.png").stat().st_size > 0
    assert list((chain.folder / "logs" / run).glob("events.*"))


@pytest.mark.parametrize("name", NAMES)
def test_final_checkpoint_is_the_best_epoch_in_the_published_form(name, chains):
    chain = chains(name)
    run = chain.run_name(name)
    epochs = [
        torch.load(chain.folder / "Model" / f"{run}_{which}.pt", weights_only=True)
        for which in (1, 2, "final")
    ]
    errors_mm = [record["val_mm"] for record in epochs_of(chain.folder, run)]
    best, final = epochs[int(np.argmin(errors_mm))], epochs[-1]
    assert best["state_dict"].keys() == final["state_dict"].keys()
    assert all(torch.equal(best["state_dict"][key], final["state_dict"][key]) for key in best["state_dict"])
    assert final["seed"] == 11 and final["model_param"]["features"] == 32 and final["dataset"] == name
    assert len(final["state_dict"]["stages.0.plane_regression.conv.9.bias"]) == DATASETS[name].joint_number
    assert f"best epoch {int(np.argmin(errors_mm)) + 1}: {min(errors_mm):.2f} mm" in chain.train.out
    assert f"last epoch 2: {errors_mm[1]:.2f} mm" in chain.train.out


@pytest.mark.parametrize("name", NAMES[:3])
def test_result_file_holds_uvd_and_its_errors_are_printed(name, chains, script, monkeypatch):
    chain = chains(name)
    assert_succeeded(chain.test)
    fold, index = ({}, "test.txt") if name != "MSRA" else ({"subject": SUBJECT}, f"test_{SUBJECT}.txt")
    results = f"Result/{chain.run_name(name)}.txt"
    lines = (chain.folder / results).read_text().splitlines()
    assert len(lines) == len((chain.folder / "Data" / name / index).read_text().splitlines())
    numbers = 3 * DATASETS[name].joint_number
    assert all(re.fullmatch(rf"(-?\d+\.\d{{3}} ){{{numbers - 1}}}-?\d+\.\d{{3}}", line) for line in lines)
    assert_prints_mean(chain.test, mean_error_mm(chain, name, **fold))
    monkeypatch.chdir(chain.folder)
    subject = ("--subject", SUBJECT) if fold else ()
    table = script("evaluate.py", "--dataset", name, results, *subject).out.partition("\n")[2]
    assert "mean, mm" in table and chain.test.out.endswith(table), "every figure, to the last digit"


def assert_prints_mean(done, mean_mm):
    """Check that the table prints the mean error, to what rounding the result file's %.3f allows."""
    printed = [float(number) for number in re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", done.out)]
    assert any(abs(number - mean_mm) < 0.006 for number in printed), done.out


@pytest.mark.slow
def test_hand17_result_file_has_the_challenges_form(chains):
    chain = chains("HAND17")
    assert_succeeded(chain.test)
    lines = (chain.folder / "Result/HAND17_default.txt").read_text().splitlines()
    assert len(lines) == 2
    for number, line in enumerate(lines, start=1):
        name, *numbers = line.split("\t")
        assert name == f"frame\\images\\image_D{number:08d}.png" and len(numbers) == 63
        joints_xyz = np.array(numbers, float).reshape(21, 3)
        assert (joints_xyz[:, 2] > 100).all(), "xyz in mm, in front of the camera"
        assert all(re.fullmatch(r"-?\d+\.\d{3}", n) for n in numbers)


@pytest.mark.slow
def test_hand17_can_be_tested_with_bounding_boxes(chains, script, monkeypatch):
    monkeypatch.chdir(chains("HAND17").folder)
    centred = Path("Result/HAND17_default.txt").read_text()
    done = script("test.py", "--dataset", "HAND17", "--process_mode", "bb", *ON_CPU)
    assert_succeeded(done)
    other = Path("Result/HAND17_default_bb.txt").read_text()
    assert other.count("\n") == 2 and other != centred
    assert Path("Result/HAND17_default.txt").read_text() == centred


def test_test_can_use_any_epoch_and_leaves_the_final_result(chains, script, monkeypatch):
    chain = chains("NYU")
    monkeypatch.chdir(chain.folder)
    final, predictions = results_of(chain, "NYU"), {}
    for epoch in (1, 2):
        model = f"Model/NYU_default_{epoch}.pt"
        assert_succeeded(script("test.py", "--seed", epoch, *ON_CPU))
        by_seed = results_of(chain, "NYU", f"_{epoch}")
        # One frame at a time, so that frames in a wrong order within a batch would show.
        assert_succeeded(script("test.py", "--model", model, "--batch_size", 1, *ON_CPU))
        by_name = results_of(chain, "NYU", f"_NYU_default_{epoch}")
        np.testing.assert_allclose(by_seed, by_name, atol=0.01)
        predictions[epoch] = by_seed
    assert not np.array_equal(predictions[1], predictions[2])
    np.testing.assert_array_equal(results_of(chain, "NYU"), final)


def test_resolved_options_can_be_given_back_and_repeat_the_run(chains, script, monkeypatch):
    chain = chains("NYU")
    monkeypatch.chdir(chain.folder)
    options = yaml.safe_load(Path("Model/NYU_default.yml").read_text())
    assert (options["dataset"], options["seed"], options["features"]) == ("NYU", 11, 32)
    done = script("train.py", "--config", "Model/NYU_default.yml", "--suffix", "again")
    assert_succeeded(done)
    first, again = (epochs_of(".", run) for run in ("NYU_default", "NYU_again"))
    assert len(again) == 2
    for before, after in zip(first, again, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-3)
        assert after["val_mm"] == pytest.approx(before["val_mm"], rel=1e-3)
    assert {**options, "suffix": "again"} == yaml.safe_load(Path("Model/NYU_again.yml").read_text())


@pytest.mark.slow
def test_msra_options_can_be_given_back(chains, script, monkeypatch):
    monkeypatch.chdir(chains("MSRA").folder)
    given = ("--config", f"Model/MSRA_default_subject{SUBJECT}.yml")
    assert_succeeded(script("train_msra.py", *given, "--suffix", "again", "--epoch", 1))
    assert Path(f"Model/MSRA_again_subject{SUBJECT}_final.pt").is_file()


def test_unseeded_run_records_the_seed_it_drew(fresh_indexed, script):
    fresh_indexed("NYU")
    assert_succeeded(script("train.py", *ON_CPU, *SMALL_NETWORK, "--epoch", 1, "--holdout", 0.4))
    checkpoint = torch.load("Model/NYU_default_final.pt", weights_only=True)
    assert checkpoint["seed"] > 0
    assert yaml.safe_load(Path("Model/NYU_default.yml").read_text())["seed"] == checkpoint["seed"]


# One real frame


@pytest.mark.slow
def test_training_reaches_3_mm_on_a_real_frame_and_test_prints_it(shared, chains):
    chain = chains("real")
    for done in (chain.check, chain.train, chain.test):
        assert_succeeded(done)
    assert "NYU train: 1 of 1 frames accepted" in chain.check.out
    best_mm = float(re.search(r"best epoch \d+: ([\d.]+) mm", chain.train.out)[1])
    mean_mm = mean_error_mm(chain, "NYU")
    assert best_mm < 3 and mean_mm < 3
    assert results_of(chain, "NYU").shape == (1, 14, 3)
    assert_prints_mean(chain.test, mean_mm)
