"""Scores against marks: in space, on crops, and what a set's line says."""

import json

import cv2
import numpy as np
import pytest
from hands import hand_frame

from datasets import HAND17Dataset, NYUDataset
from frames.transforms import Camera, uvd2xyz
from predict import HandPose
from prediction.output import finger_chains
from tools import score_marks
from utils import UserError

CAMERA = Camera(500, 500, 320, 240)
TIPS = [chain[-1] for chain in finger_chains(HAND17Dataset)]


def pose_at(uvd, center_uvd=(320, 240, 500)):
    return HandPose(uvd2xyz(uvd, CAMERA), uvd, None, np.array(center_uvd))


def marks_and_pose():
    """Return 21 marks uvd in a row, 10 mm from each other, and the pose that lies on them."""
    uvd = np.array([[220.0 + 10 * joint, 240, 500] for joint in range(21)])
    return uvd, pose_at(uvd.copy())


def test_a_mark_is_compared_with_its_own_joint():
    uvd = np.full((14, 3), [1000.0, 1000, 500])
    uvd[0] = 323, 244, 500  # by the labels the little finger's tip
    true_uvd = score_marks.marks_uvd({"pinky": [320, 240, 512]}, NYUDataset)
    one = score_marks.score(pose_at(uvd, (345, 240, 500)), true_uvd, CAMERA, NYUDataset)
    assert one.space[0] == pytest.approx(13) and np.isnan(one.space[1:]).all()  # 3, 4 and 12 mm
    assert one.plane[0] == pytest.approx(5 * 512 / 500)
    assert one.center == pytest.approx(np.hypot(25, 12))
    with pytest.raises(UserError, match="nothing is marked"):
        score_marks.marks_uvd({}, NYUDataset)


def test_swapped_fingertips_lie_nearest_another_fingers():
    true_uvd, pose = marks_and_pose()
    assert not any(score_marks.score(pose, true_uvd, CAMERA, HAND17Dataset).astray)
    pose.joints_uvd[TIPS[:2]] = pose.joints_uvd[TIPS[1::-1]]
    swapped = score_marks.score(pose, true_uvd, CAMERA, HAND17Dataset)
    assert swapped.astray == [True, True, False, False, False]
    true_uvd[TIPS[0]] = np.nan  # a tip that is not marked is neither judged nor near
    assert score_marks.score(pose, true_uvd, CAMERA, HAND17Dataset).astray == [False] * 4


def test_a_crop_is_padded_around_its_middle_and_keeps_its_marks():
    depth_mm = np.full((131, 91), 600, np.uint16)
    depth_mm[:, :40] = 0
    canvas, uvd = score_marks.pad_crop(depth_mm, [[45, 65], [46, 65], [-3, 200]])
    assert canvas.shape == (480, 640) and canvas.sum() == depth_mm.astype(int).sum()
    assert uvd[:, 2].tolist() == [600] * 3
    assert np.abs(uvd[0, :2] - (319.5, 239.5)).max() <= 0.5
    assert canvas[239, 319] == 600 and (uvd[1] - uvd[0]).tolist() == [1, 0, 0]
    with pytest.raises(UserError, match="nothing was measured"):
        score_marks.pad_crop(depth_mm, [[0, 0]])


@pytest.fixture
def score(model, tmp_path, capsys):
    """Return a function that scores one frame (and an absent one) and returns the printed lines."""

    def call(depth_mm, marks, *options, **content):
        camera = {"fx": 475, "fy": 475, "u0": 319.5, "v0": 239.5}
        content = {"camera": camera, "frames": {"a": marks, "absent": marks}, **content}
        (tmp_path / "marks.json").write_text(json.dumps(content))
        for name in content["frames"].keys() - {"absent"}:
            cv2.imwrite(str(tmp_path / f"{name}.png"), depth_mm)
        marks = ["--marks", str(tmp_path / "marks.json"), "--model", str(model), "--device", "cpu"]
        assert score_marks.main([*marks, *options]) == 0
        return capsys.readouterr().out.splitlines()

    return call


MARKS = {"thumb": [250, 200, 500], "wrist": [320, 310, 500]}


def distances_mm(lines):
    """Return the numbers of the first frame's line: of the centre and of each mark."""
    return [float(cell) for cell in lines[2].split()[1:] if cell != "-"]


def test_marks_are_scored_in_millimetres_and_a_wrist_is_no_fingertip(score):
    lines = score(hand_frame(), MARKS, hand="right")
    _, thumb_mm, _ = distances_mm(lines)
    assert "missing" in lines[3] and lines[4].startswith("found 1 of 2, ")
    assert f"fingertips in space {thumb_mm} mm" in lines[4] and lines[4].endswith(
        "0 of 1 tips nearest another finger's"
    )


@pytest.mark.parametrize(
    ("thumb", "message"),
    [
        ([1, 2], "thumb must be 3 numbers, not [1, 2]"),
        (["a", 2, 3], "thumb must be 3 numbers, not ['a', 2, 3]"),
        ([250, 200, 0], "thumb is marked where nothing was measured: its depth is 0"),
    ],
)
def test_a_wrong_mark_costs_its_frame_alone(thumb, message, score):
    good = score(hand_frame(), MARKS)
    lines = score(hand_frame(), MARKS, frames={"b": {"thumb": thumb}, "a": MARKS})
    assert lines[2].split(maxsplit=1) == ["b", message]
    assert lines[3] == good[2] and lines[4].startswith("found 1 of 2")


@pytest.mark.parametrize("marks", [[[1, 2]] * 5, [[1, 2]] * 20 + [[1]], [[1, None]] * 21, 3])
def test_too_few_or_odd_marks_are_named(marks):
    with pytest.raises(UserError, match="joints_uv must be 21 x 2 numbers, not "):
        score_marks.numbers(marks, (21, 2), "joints_uv")


def test_a_left_hand_scores_as_its_mirror_image_does(score):
    right = score(hand_frame(), MARKS)
    mirrored = {mark: [639 - u, v, d] for mark, (u, v, d) in MARKS.items()}
    left = score(hand_frame()[:, ::-1], mirrored, hand="left")
    assert "left hand" in left[0] and distances_mm(left) == pytest.approx(distances_mm(right), abs=0.15)


def test_a_crop_scores_as_the_whole_picture_does(score):
    whole = hand_frame()
    whole[:240] += whole[:240] // 50  # the fingers bend away: nothing flat lies at the centre's own depth
    rows, columns = np.nonzero(whole)
    top, left = rows.min(), columns.min()
    crop = whole[top : rows.max() + 1, left : columns.max() + 1]
    middle = (columns.max() - left) / 2, (rows.max() - top) / 2
    uv = [[float(columns[k] - left), float(rows[k] - top)] for k in range(0, len(rows), len(rows) // 20)][:21]
    named = {"joint_order": "HAND17", "camera": {"fx": 475, "fy": 475}}
    cropped = score(crop, {"joints_uv": uv}, "--at_marks", **named)
    assert "in the plane" in cropped[-1] and cropped[-1].startswith("found 1 of 2, 1 within 60 mm")
    # The same marks in a picture with the hand where the crop's padding leaves it.
    shift = np.round((319.5 - middle[0], 239.5 - middle[1])).astype(int)
    moved = np.zeros_like(whole)
    moved[shift[1] : shift[1] + crop.shape[0], shift[0] : shift[0] + crop.shape[1]] = crop
    again = score(moved, {"joints_uv": (np.array(uv) + shift).tolist()}, "--at_marks", **named)
    assert distances_mm(cropped)[1:] == pytest.approx(distances_mm(again)[1:], abs=1.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds no marks"),
        ({"frames": {"a": {}}}, "holds no marks"),
        ({"frames": {"a": {"joints_uv": []}}, "camera": {"fx": 1}}, "holds no marks"),
        (
            {"frames": {"a": {"joints_uv": []}, "b": {}}, "camera": {}},
            "only some of its frames have joints_uv",
        ),
    ],
)
def test_a_file_without_marks_is_refused(content, message, tmp_path):
    (tmp_path / "marks.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        score_marks.read_marks(tmp_path / "marks.json")


def test_marks_of_another_data_sets_joints_are_refused(model, tmp_path):
    content = {
        "camera": {"fx": 475, "fy": 475},
        "joint_order": "MSRA",
        "frames": {"a": {"joints_uv": [[1, 2]]}},
    }
    (tmp_path / "marks.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="marks of MSRA"):
        score_marks.main(["--marks", str(tmp_path / "marks.json"), "--model", str(model)])
