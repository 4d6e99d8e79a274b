"""What a test run writes: the lines of its result file and the file's name."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from datasets import DATASETS
from engine import testing
from engine.options import parse_test
from engine.testing import result_lines, result_name


def test_a_line_holds_a_frame_and_no_negative_zero():
    joints = np.array([[[1, -0.0001, 2.00049]], [[-3, -0.0006, 0]]])
    assert result_lines(SimpleNamespace(name="NYU"), joints) == ["1.000 0.000 2.000", "-3.000 -0.001 0.000"]


def test_hand17_lines_begin_with_the_frame_and_hold_xyz(indexed):
    frames = DATASETS["HAND17"](path=indexed("HAND17"), dataset="test", test_only=True)
    camera = frames.camera
    lines = result_lines(frames, np.array([[[camera.u0 - 0.0001, camera.v0 + camera.fy, 500]]] * 2))
    assert lines[0] == "frame\\images\\image_D00000001.png\t0.000\t500.000\t500.000"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("", "NYU_default"),
        ("--seed 7", "NYU_default_7"),
        ("--turns 3 --seed 7", "NYU_default_3turns_7"),
        ("--model Model/NYU_default_final.pt", "NYU_default_NYU_default_final"),
        ("--model elsewhere/best.pt --suffix mine --seed 3", "NYU_mine_best"),
    ],
)
def test_only_the_final_checkpoint_has_the_runs_own_result(words, name):
    assert result_name(parse_test("", words.split())) == name


@pytest.mark.parametrize(("words", "name"), [("", "MSRA_default"), ("--seed 7", "MSRA_default_7")])
def test_results_of_all_subjects_are_merged_under_one_name(words, name, workplace, monkeypatch, capsys):
    """In the order of the subjects, with the exit status and the table of them all."""
    tested = []

    def test(args):
        tested.append(args.subject)
        uvd = np.full((1, 21, 3), (156.0 + args.subject, 130.0, 400.0))
        lines = result_lines(SimpleNamespace(name="MSRA"), uvd)
        return testing.Tested(lines, uvd, uvd, ["refused"] * (args.subject == 5))

    monkeypatch.setattr(testing, "test", test)
    status = testing.test_and_evaluate(parse_test("", [*words.split(), "--subject", "all"], subject=True))
    assert tested == list(range(9)) and status == 3
    first = np.loadtxt(Path("Result", f"{name}.txt"))[:, 0]
    np.testing.assert_array_equal(first, np.arange(9) + 156)
    assert capsys.readouterr().out.splitlines()[1].split() == [name]


def test_joints_of_both_stages_differ_and_the_last_is_taken(indexed):
    torch.manual_seed(0)
    network = testing.load_network(Path(__file__).parent / "golden/expected/instance_softmax.pt", "NYU")
    size = network.param["label_size"]
    frames = DATASETS["NYU"](
        path=indexed("NYU"), dataset="test", test_only=True, label_size=size, image_size=2 * size
    )
    args = SimpleNamespace(num_workers=0, batch_size=2, turns=1)
    joints_uvd, refused = testing.predict(network, frames, args, torch.device("cpu"))
    batch = default_collate([frames[0]])
    with torch.no_grad():
        first_uvd, last_uvd = (
            frames.recover_uvd(stage.uvd, batch) for stage in network(batch.img, batch.label_img, batch.mask)
        )
    assert not refused and np.abs(first_uvd - last_uvd).max() > 5
    np.testing.assert_allclose(joints_uvd[0], last_uvd[0], atol=0.5)
