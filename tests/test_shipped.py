"""The model that comes with the code: what its card says, and that it is taken where none is named."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ON_CPU, REPO

from check_dataset import build_index
from datasets import HAND17Dataset
from engine.checkpoints import load_network
from engine.metrics import joint_errors_mm
from engine.options import parse_test, parse_train
from engine.testing import test as run_test
from evaluate import read_joints
from frames.cameras import parse_camera, read_depth
from predict import HandPoseEstimator
from prediction.estimator import SHIPPED_MODEL
from rendering.layouts import write_dataset

CARD = (REPO / "Model" / "README.md").read_text()
FRAME = REPO / "docs" / "predict" / "frame.png"


def test_the_file_is_small_and_holds_the_joints_of_hand17():
    network = load_network(SHIPPED_MODEL)
    assert SHIPPED_MODEL.stat().st_size < 8e6
    assert (network.dataset, network.joints) == ("HAND17", 21)


def test_its_recipe_is_of_this_network():
    args = parse_train("", ["--dataset", "HAND17", "--config", str(REPO / "recipes" / "shipped.yml")])
    param = load_network(SHIPPED_MODEL).param
    assert {
        name: vars(args)[name] for name in ("label_size", "features", "level", "norm_method")
    }.items() <= (param.items())
    assert args.stages == param["stage"] and args.filter_size == param["kernel_size"]


@pytest.mark.slow
def test_the_card_says_how_far_off_it_is_on_rendered_frames(workplace):
    write_dataset("HAND17", {"train": 20, "test": 100}, 101, workplace / "data", 1)
    build_index("HAND17", workplace / "data")
    options = ["--dataset", "HAND17", "--data_dir", "data", "--model", str(SHIPPED_MODEL), *ON_CPU]
    frames = HAND17Dataset(path="data", dataset="test", test_only=True)
    true_xyz = read_joints(workplace / "data" / "frame" / "test_annotation.txt", frames.joint_number)
    for turns, said in (("1", "the first 100 of them"), ("3", "those 100 with `--turns 3`")):
        predicted_uvd = run_test(parse_test("", [*options, "--turns", turns])).joints_uvd
        error_mm = joint_errors_mm(frames.uvd2xyz(predicted_uvd), true_xyz).mean()
        (said_mm,) = re.findall(rf"{said} \| ([\d.]+) mm", CARD)
        assert error_mm == pytest.approx(float(said_mm), abs=0.1)


def test_it_is_taken_where_no_model_is_named(workplace, script):
    done = script("predict.py", FRAME, "--camera", "SR305", "--device", "cpu", "--no-pictures")
    assert done.status == 0
    named, silent = (
        HandPoseEstimator(*model, camera="SR305", device="cpu")(read_depth(FRAME, parse_camera("SR305")))
        for model in ([SHIPPED_MODEL], [])
    )
    np.testing.assert_array_equal(named.joints_xyz, silent.joints_xyz)
    head = json.loads((workplace / "Result/predict/predictions.jsonl").read_text().splitlines()[0])
    assert Path(head["model"]).name == SHIPPED_MODEL.name and head["turns"] == 2
