"""What a recipe adds to the published one: schedules, averaged weights, weights to begin with."""

import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import REPO
from test_resume import signal_during
from training import RUN, assert_same_run, assert_same_values, records, repeat_lines, train_tiny

from engine.checkpoints import load_checkpoint, load_network, save_checkpoint
from engine.full_regression import FullRegression
from engine.options import parse_test, parse_train
from engine.recipe import averaged, epoch_options, learning_rate, load_weights, set_learning_rate
from engine.testing import test as read_test
from model import PixelwiseRegression
from utils import Stopped, UserError

STRONG = (
    "--alpha 0.5 --coordinates_from 2 --coordinate_loss smooth_l1 --lr_schedule cosine --warmup_epochs 0.5 "
    "--ema 0.8 --rotation_deg 180 --shift_mm 10 --erasing 0.5 --depth_noise 2"
).split()


def save(network, path):
    content = {"state_dict": network.state_dict(), "seed": 0, "model_param": network.param}
    save_checkpoint(path, {**content, "dataset": {21: "HAND17", 16: "ICVL"}[network.joints]})
    return path


def small_network(joints=16, **more):
    size = dict(stage=2, label_size=16, features=32, level=0, norm_method="instance")
    return PixelwiseRegression(joints, **{**size, **more})


# Schedules


def test_alpha_turns_to_coordinates_alone_in_its_epoch():
    args = parse_train("", ["--alpha", "0.5", "--coordinates_from", "3"])
    assert [epoch_options(args, epoch).alpha for epoch in (1, 2, 3, 4)] == [0.5, 0.5, 1, 1]
    assert args.alpha == 0.5 and epoch_options(parse_train("", []), 9).alpha == 1
    assert epoch_options(parse_train("", ["--alpha", "0"]), 9).alpha == 0


def test_cosine_climbs_then_falls_to_nothing():
    args = parse_train("", "--lr_schedule cosine --warmup_epochs 2 --epoch 10 --lr 0.01".split())
    assert [learning_rate(args, done) for done in (0, 1, 2)] == pytest.approx([0, 0.005, 0.01])
    for done in (2.5, 6, 9.9, 10):
        expected = 0.005 * (1 + math.cos(math.pi * (done - 2) / 8))
        assert learning_rate(args, done) == pytest.approx(expected)
    assert learning_rate(args, 10) == pytest.approx(0, abs=1e-12)
    assert learning_rate(parse_train("", ["--lr_schedule", "cosine"]), 0) == 1e-3  # without warm-up


def test_only_a_cosine_sets_the_rate_of_a_step():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    set_learning_rate(optimizer, parse_train("", []), 3)
    assert optimizer.param_groups[0]["lr"] == 0.5
    set_learning_rate(optimizer, parse_train("", ["--lr_schedule", "cosine", "--epoch", "6"]), 3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)


@pytest.mark.parametrize("path", sorted((REPO / "recipes").glob("*.yml")), ids=lambda path: path.name)
def test_a_recipe_that_comes_along_is_a_configuration(path):
    args = parse_train("", ["--dataset", "HAND17", "--config", str(path)])
    assert (args.features, args.label_size, args.alpha, args.lr) == {
        "strong.yml": (48, 16, 0.5, 2e-3),
        "coarse.yml": (64, 16, 0.5, 3e-3),
        "shipped.yml": (64, 32, 0.5, 1.2e-3),
    }[path.name]


# Averaged weights


def test_averaged_weights_are_those_of_a_slow_reference():
    torch.manual_seed(0)
    network = small_network(norm_method="batch")
    average, slow = averaged(network, 0.7), None
    for _ in range(5):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += torch.randn_like(parameter)
            for buffer in network.buffers():
                buffer += 1
        average.update_parameters(network)
        now = {name: value.double() for name, value in network.named_parameters()}
        slow = now if slow is None else {name: 0.7 * slow[name] + 0.3 * now[name] for name in now}
    for name, value in average.module.named_parameters():
        torch.testing.assert_close(value.double(), slow[name], rtol=1e-5, atol=1e-6)
    for one, other in zip(average.module.buffers(), network.buffers(), strict=True):
        assert torch.equal(one, other)
    assert averaged(network, 0) is None


# Weights to begin with


def test_weights_to_begin_with_are_kept_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    one, other = small_network(), small_network()
    assert load_weights(other, save(one, tmp_path / "a.pt")) == []
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


@pytest.mark.parametrize("joints", [5, 21])
def test_weights_of_joints_that_no_data_set_has_or_nobody_names_are_a_beginning(joints, tmp_path):
    torch.manual_seed(0)
    other = small_network(joints=joints)
    save_checkpoint(tmp_path / "best.pt", {"state_dict": other.state_dict(), "model_param": other.param})
    network = small_network(joints=14)
    assert "stages.0.plane_regression.conv.9.bias" in load_weights(network, tmp_path / "best.pt")
    assert torch.equal(network.state_dict()["conv.0.weight"], other.state_dict()["conv.0.weight"])


def test_layers_of_another_number_of_joints_begin_anew_and_are_named(tmp_path):
    torch.manual_seed(0)
    one, other = small_network(21), small_network(14)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    left_out = load_weights(other, save(one, tmp_path / "a.pt"))
    heads = [
        f"stages.{stage}.{name}"
        for stage in (0, 1)
        for name in (
            *(
                f"{kind}_regression.conv.9.{part}"
                for kind in ("plane", "depth")
                for part in ("weight", "bias")
            ),
            "plane_regression.w",
        )
    ]
    assert sorted(left_out) == sorted([*heads, "stages.1.conv.weight"])
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name] if name in left_out else one.state_dict()[name])


def test_weights_learnt_on_coarse_maps_are_kept_on_finer_ones(tmp_path):
    torch.manual_seed(0)
    coarse, fine = small_network(), small_network(label_size=32)
    grid = fine.stages[0].plane_regression.filter.clone()
    assert load_weights(fine, save(coarse, tmp_path / "a.pt")) == []
    for (name, value), (_, other) in zip(fine.named_parameters(), coarse.named_parameters(), strict=True):
        assert torch.equal(value, other), name
    assert torch.equal(fine.stages[0].plane_regression.filter, grid)


def test_a_stage_that_the_file_has_not_begins_anew_and_is_named(tmp_path):
    torch.manual_seed(0)
    one, two = small_network(stage=1), small_network(stage=2)
    before = {name: value.clone() for name, value in two.state_dict().items()}
    left_out = load_weights(two, save(one, tmp_path / "a.pt"))
    assert left_out == ["stages.1"]
    for name, value in two.state_dict().items():
        anew = name.startswith("stages.1.")
        assert torch.equal(value, before[name] if anew else one.state_dict()[name])


def test_stages_beyond_the_second_begin_as_copies_of_the_last(tmp_path):
    torch.manual_seed(0)
    two, four = small_network(stage=2), small_network(stage=4)
    assert load_weights(four, save(two, tmp_path / "a.pt")) == []
    for name, value in two.state_dict().items():
        for number in (1, 2, 3):
            assert torch.equal(four.state_dict()[name.replace("stages.1.", f"stages.{number}.")], value)


def test_stages_that_cannot_be_copied_begin_anew_and_are_named(tmp_path):
    torch.manual_seed(0)
    one, two, other = small_network(stage=1), small_network(stage=2), small_network(14, stage=3)
    assert load_weights(small_network(stage=3), save(one, tmp_path / "a.pt")) == ["stages.1", "stages.2"]
    left_out = load_weights(other, save(two, tmp_path / "b.pt"))
    assert "stages.2.conv.weight" in left_out and "stages.2" not in left_out
    for name, value in two.state_dict().items():
        copy = name.replace("stages.1.", "stages.2.")
        if name.startswith("stages.1.") and copy not in left_out:
            assert torch.equal(other.state_dict()[copy], value)


@pytest.mark.parametrize("option", [{"features": 48}, {"stage": 3}, {"norm_method": "batch"}])
def test_another_network_is_no_beginning(option, tmp_path):
    one, (name, value) = small_network(**option), *option.items()
    with pytest.raises(UserError, match=f"its {name} is {value}, here"):
        load_weights(small_network(), save(one, tmp_path / "a.pt"))


# In a run


@pytest.fixture
def place(fresh_indexed):
    """Make a current folder whose Data/ICVL has 24 training and 6 validation frames: 6 and 2 steps."""
    root = fresh_indexed("ICVL")
    repeat_lines(root / "train.txt", 24)
    repeat_lines(root / "val.txt", 6)


@pytest.mark.slow
def test_a_run_with_every_option_goes_on_as_if_never_stopped(place, tmp_path, monkeypatch):
    train_tiny(*STRONG)
    for folder in ("Model", "logs"):
        shutil.move(folder, tmp_path / "whole" / folder)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="in epoch 2 after step 3"):
        signal_during(patch, signal.SIGTERM, "train_step", call=9)
        train_tiny(*STRONG)
    train_tiny(*STRONG, "--resume")
    assert_same_run(".", tmp_path / "whole")
    average, other = (
        load_checkpoint(folder / "Model" / f"{RUN}_last.pt")["average"]
        for folder in (Path(), tmp_path / "whole")
    )
    assert_same_values(average, other)
    with pytest.raises(UserError, match="--epoch is 3 here and 2"):  # a cosine's shape depends on it
        train_tiny(*STRONG, "--resume", "--epoch", 3)


def test_averaged_weights_are_those_that_are_saved_and_validated(place):
    train_tiny("--ema", 0.9, "--epoch", 1)
    saved, last = (load_checkpoint(Path("Model", f"{RUN}_{which}.pt")) for which in (1, "last"))
    for name, value in saved["state_dict"].items():
        assert torch.equal(value, last["average"][f"module.{name}"])
    assert any(
        not torch.equal(value, saved["state_dict"][name]) for name, value in last["state_dict"].items()
    )
    (record,) = records()
    best_mm, weights = record["val_mm"], last["state_dict"]
    # Another epoch without a step's effect would validate the raw weights: they give another error.
    save_checkpoint("raw.pt", {**saved, "state_dict": weights})
    still = ("--opt", "sgd", "--lr", 1e-30, "--epoch", 1)
    train_tiny("--suffix", "raw", "--init", "raw.pt", *still)
    train_tiny("--suffix", "averaged", "--init", f"Model/{RUN}_1.pt", *still)
    raw, averaged_ = (
        load_checkpoint(Path("Model", f"ICVL_{suffix}_1.pt"))["record"]["val_mm"]
        for suffix in ("raw", "averaged")
    )
    assert averaged_ == pytest.approx(best_mm, abs=1e-9) and raw != averaged_


def test_training_says_what_it_begins_with(place, capfd):
    torch.manual_seed(1)
    other = PixelwiseRegression(21, 1, label_size=16, features=32, level=0, norm_method="instance")
    train_tiny("--init", save(other, "other.pt"), "--opt", "sgd", "--lr", 1e-30, "--epoch", 1)
    assert (
        "begins with the weights of other.pt; these layers begin anew: stages.0.plane"
        in capfd.readouterr().out
    )
    weights = load_checkpoint(Path("Model", f"{RUN}_1.pt"))["state_dict"]
    assert torch.equal(weights["conv.0.weight"], other.state_dict()["conv.0.weight"])
    assert len(weights["stages.0.plane_regression.conv.9.bias"]) == 16
    with pytest.raises(UserError, match="absent.pt not found"):
        train_tiny("--init", "absent.pt")


def test_the_comparison_network_trains_and_tests(place):
    train_tiny("--network", "full", "--label_size", 16)
    assert isinstance(load_network(f"Model/{RUN}_final.pt"), FullRegression)
    assert (
        len(read_test(parse_test("", ["--dataset", "ICVL", "--device", "cpu", "--num_workers", "0"]))[0]) > 0
    )
    with pytest.raises(UserError, match="leave --alpha at 1"):
        parse_train("", ["--network", "full", "--alpha", "0.5"])


def test_the_loss_of_an_epoch_is_that_of_its_options(place):
    terms = []
    for options in ((), ("--coordinate_loss", "l1"), ("--alpha", 0), ("--alpha", 0, "--coordinates_from", 1)):
        train_tiny("--epoch", 1, *options)
        terms.append(records()[0]["loss"])
    assert len(set(terms)) == 3 and terms[0] == terms[3]
