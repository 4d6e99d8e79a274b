"""HandPoseEstimator: where hands are cut out, what it says of them, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hands import CAMERA, CENTER, hand_frame, save_network, write_png

from datasets import DATASETS
from engine.checkpoints import load_network
from frames.cameras import PRESETS, check_depth, parse_camera, read_depth
from frames.samples import prepare_crop
from frames.transforms import Frame
from model import StageOutput
from predict import HandPoseEstimator
from prediction.estimator import middle_of_hand
from utils import UserError

ESTIMATOR = "prediction.estimator"


def test_the_crop_is_the_data_sets_to_the_last_bit(fresh_indexed):
    sizes = {"image_size": 64, "label_size": 32}
    dataset = DATASETS["NYU"](path=fresh_indexed("NYU"), dataset="test", test_only=True, **sizes)
    estimator = HandPoseEstimator(save_network(Path("small.pt"), 14, dataset="NYU"), "NYU", device="cpu")
    depth_mm = read_depth(dataset.frame_path(0), PRESETS["NYU"])
    own = estimator.locate(depth_mm, dataset.center_uvd(dataset.line(0))).crop
    for ours, theirs in zip(own, dataset.sample(0), strict=True):
        assert torch.equal(ours, theirs)


def test_a_mirrored_frame_of_a_left_hand_gives_mirrored_joints(model, estimator):
    depth_mm = hand_frame()
    right = estimator(depth_mm)
    left = HandPoseEstimator(model, CAMERA, hand="left", device="cpu")(depth_mm[:, ::-1])
    np.testing.assert_allclose(left.joints_xyz, right.joints_xyz * (-1, 1, 1), atol=0.01)
    np.testing.assert_allclose(left.joints_uvd[:, 0], 639 - right.joints_uvd[:, 0], atol=0.01)
    np.testing.assert_allclose(left.center_uvd, right.center_uvd * (-1, 1, 1) + (639, 0, 0), atol=0.01)


@pytest.mark.parametrize("hand, column", [("right", 300), ("left", 339)])
def test_the_hand_is_looked_for_where_it_was(hand, column, model, monkeypatch):
    asked = []
    monkeypatch.setattr(
        f"{ESTIMATOR}.find_center", lambda frame, camera, near, bbox: asked.append(near) or CENTER
    )
    HandPoseEstimator(model, CAMERA, hand=hand, device="cpu")(hand_frame(), near_uvd=(300, 200, 490))
    np.testing.assert_array_equal(asked, [(column, 200, 490)])


@pytest.mark.parametrize("off_mm, moves", [(20, False), (30, True)])
def test_a_second_crop_is_cut_where_the_first_prediction_is_far_from_the_first(
    off_mm, moves, estimator, monkeypatch
):
    first, other = CENTER, (320 + off_mm / 505 * 475, 240.0, 505.0)
    monkeypatch.setattr(f"{ESTIMATOR}.find_center", lambda *_: first)
    monkeypatch.setattr(f"{ESTIMATOR}.middle_of_hand", lambda crop, uvd: np.array(other))
    found = estimator(hand_frame()).center_uvd
    np.testing.assert_array_equal(found, other if moves else first)
    for hint in ({"center_uvd": first}, {"bbox": (200, 100, 240, 300)}):
        np.testing.assert_array_equal(estimator(hand_frame(), **hint).center_uvd, first)


def test_confidence_is_the_share_of_the_heatmap_near_the_joint(model, monkeypatch):
    """A pixel of this map is 9.7 mm: 15 mm reach to its eight neighbours."""
    estimator = HandPoseEstimator(model, CAMERA, device="cpu")
    heatmaps = torch.zeros(1, 21, 32, 32)
    for row, column, share in ((16, 16, 0.5), (16, 17, 0.2), (17, 15, 0.1), (16, 18, 0.2)):
        heatmaps[:, :, row, column] = share
    output = StageOutput(heatmaps, heatmaps, torch.zeros(1, 21, 3))
    monkeypatch.setattr(estimator, "_forward", lambda *_: output)
    np.testing.assert_allclose(estimator(hand_frame()).confidence, 0.8, rtol=1e-6)


def test_a_batch_gives_what_single_frames_give(estimator):
    frames = [hand_frame(), hand_frame(600, 250, 200), np.zeros((480, 640), np.uint16)]
    poses = estimator.batch(frames)
    assert poses[2].joints_xyz is None and "empty" in poses[2].reason
    for pose, frame in zip(poses[:2], frames):
        assert pose.joints_xyz.shape == (21, 3) and pose.confidence.shape == (21,)
        assert ((pose.confidence >= 0) & (pose.confidence <= 1.001)).all()
        np.testing.assert_allclose(pose.joints_xyz, estimator(frame).joints_xyz, atol=0.05)


def test_the_joints_of_an_unnamed_checkpoint_come_from_their_number_or_the_files_name(tmp_path):
    msra = save_network(tmp_path / "MSRA_default_subject0_final.pt")
    assert load_network(msra).dataset == "MSRA"
    assert load_network(msra, "HAND17").dataset == "HAND17"
    assert load_network(save_network(tmp_path / "any.pt", joints=16)).dataset == "ICVL"


def test_a_place_without_a_hand_gets_its_reason(estimator):
    depth_mm = hand_frame()
    near = np.full((480, 640), 500, np.uint16)
    near[200:260, 280:360] = 30
    patch = np.zeros((480, 640), np.uint16)
    patch[240:252, 320:332] = 500
    for pose, message in (
        (estimator(depth_mm, center_uvd=(20, 20, 500)), "fewer than 10 hand pixels"),
        (estimator(patch, center_uvd=(320, 240, 505)), "fewer than 10 hand pixels"),
        (estimator(depth_mm, center_uvd=(320, 240, 3)), "too near"),
        (estimator(near, bbox=(300, 220, 20, 20)), "too near"),
        (estimator(depth_mm, bbox=(0, 0, 20, 20)), "no depth"),
    ):
        assert pose.joints_xyz is None and message in pose.reason


@pytest.mark.parametrize(("distance_mm", "where"), [(2500, "too far"), (100, "too near")])
def test_a_frame_in_which_no_hand_can_be_costs_no_other_frame(distance_mm, where, estimator):
    empty = np.full((480, 640), distance_mm, np.uint16)
    found, none = estimator.batch([hand_frame(), empty])
    np.testing.assert_array_equal(found.joints_xyz, estimator(hand_frame()).joints_xyz)
    assert none.joints_xyz is None and where in none.reason


@pytest.mark.parametrize("depth_mm", [0, 0.001, 1])
def test_a_hint_nearer_than_any_hand_does_no_harm(depth_mm, estimator):
    pose = estimator(hand_frame(), near_uvd=(320, 240, depth_mm))
    np.testing.assert_allclose(pose.center_uvd, estimator(hand_frame()).center_uvd, atol=10)
    specks = hand_frame()
    specks[20:30, 20:30] = 1
    estimator(specks, bbox=(10, 10, 30, 30))


def test_a_second_crop_that_cannot_be_leaves_the_first(estimator, monkeypatch):
    monkeypatch.setattr(f"{ESTIMATOR}.middle_of_hand", lambda crop, uvd: np.array([320.0, 240.0, 1.0]))
    assert estimator(hand_frame()).reason is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cube_mm": -3}, "cube must be above 0 and below 2000 mm, not -3"),
        ({"cube_mm": np.nan}, "not nan"),
        ({"turns": 1.5}, "turns must be 1 to 12, not 1.5"),
        ({"turns": "2"}, "turns must be 1 to 12, not '2'"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda, not 'tpu'"),
    ],
)
def test_what_an_estimator_cannot_be_is_said(options, message, model):
    with pytest.raises(UserError, match=message):
        HandPoseEstimator(model, CAMERA, **{"device": "cpu"} | options)


@pytest.mark.parametrize("hint", [{"center_uvd": (320, 240)}, {"near_uvd": [3]}, {"bbox": (200, 100, 140)}])
def test_hints_of_too_few_numbers_are_the_reason(hint, estimator):
    assert "must be " in estimator(hand_frame(), **hint).reason


@pytest.mark.parametrize("hand", ["right", "left"])
def test_hints_may_be_arrays(hand, model):
    estimator = HandPoseEstimator(model, CAMERA, hand=hand, device="cpu")
    depth_mm = hand_frame()
    depth_mm[240:] += depth_mm[240:] // 50  # not flat: what lies at the centre's depth counts as empty
    for name, hint in (("centers_uvd", (320, 240, 505)), ("bboxes", (200, 100, 240, 300))):
        pose, same = (estimator.batch([depth_mm], **{name: [h]})[0] for h in (hint, np.array(hint)))
        assert pose.reason is None
        np.testing.assert_array_equal(pose.joints_xyz, same.joints_xyz)
    pose = estimator.batch([depth_mm], np.array([[320, 240, 505]]))[0]
    assert pose.reason is None


def test_a_frame_of_another_size_than_the_cameras_is_refused(tmp_path, model):
    depth_mm = np.full((240, 320), 500, np.uint16)
    path = write_png(tmp_path / "small.png", depth_mm)
    with pytest.raises(UserError, match="320x240 px, the camera 640x480"):
        read_depth(path, PRESETS["D435"])
    with pytest.raises(ValueError, match="320x240 px, the camera 640x480"):
        HandPoseEstimator(model, "D435", device="cpu")(depth_mm)
    with pytest.raises(ValueError, match="480x640 px, the camera 640x480"):
        check_depth(np.full((640, 480), 500, np.uint16), size_px=(640, 480))


def test_the_hand_is_the_surface_within_25_mm_of_the_predicted_joints():
    """Two strips: one behind the joint, one 45 mm beside it, which belongs to something else."""
    depth_mm = np.zeros((240, 320), np.uint16)
    depth_mm[110:130, 150:170] = 410
    depth_mm[110:130, 190:200] = 410
    camera = parse_camera("MSRA").camera
    crop = prepare_crop(Frame(depth_mm), np.array([165, 120, 400]), 125, camera)
    joint = np.array([[-5 / 151, 0, 0.08]])
    middle = middle_of_hand(crop, joint)
    np.testing.assert_allclose(middle, (159.5, 119.5, 410), atol=3)


def test_second_crop_goes_around_the_surface_near_the_first_prediction():
    depth_mm = np.zeros((240, 320), np.uint16)
    depth_mm[100:140, 150:190] = 410
    camera = parse_camera("MSRA").camera
    crop = prepare_crop(Frame(depth_mm), np.array([160, 115, 400]), 125, camera)
    middle = middle_of_hand(crop, np.array([[0.07, 0.03, 0.08]]))
    np.testing.assert_allclose(middle, (169.5, 119.5, 410), atol=2)


@pytest.mark.parametrize("margin_px", [0, 40, 80])
def test_a_box_with_a_margin_gives_the_place_that_the_box_alone_gives(margin_px, estimator):
    """A wall behind the hand comes into the box with its margin."""
    depth_mm, columns = hand_frame(), np.nonzero(hand_frame()[:330])[1]
    depth_mm[depth_mm == 0] = 900
    left, width = columns.min(), np.ptp(columns)
    box = (left - margin_px, 130 - margin_px, width + 2 * margin_px, 190 + 2 * margin_px)
    center_uvd = estimator(depth_mm, bbox=box).center_uvd
    np.testing.assert_allclose(center_uvd, (316, 235, 500), atol=14)


@pytest.mark.parametrize("hand", ["right", "left"])
def test_a_box_that_can_only_be_two_corners_is_named(hand, model):
    estimator, depth_mm = HandPoseEstimator(model, CAMERA, hand=hand, device="cpu"), hand_frame()
    for corners in ((250, 130, 400, 430), (300, 130, 500, 320)):
        left, top, right, bottom = corners
        reason = estimator(depth_mm, bbox=corners).reason
        assert f"for two corners give {left},{top},{right - left},{bottom - top}" in reason
    for box in ((200, 100, 240, 300), (-40, -40, 720, 560)):
        assert estimator(depth_mm, bbox=box).reason is None
    assert "above 0" in estimator(depth_mm, bbox=(200, 100, -240, 300)).reason


def test_an_answer_that_is_not_finite_is_none(model, monkeypatch):
    estimator = HandPoseEstimator(model, CAMERA, device="cpu")
    nothing = torch.full((1, 21, 3), torch.nan)
    output = StageOutput(torch.ones(1, 21, 32, 32), torch.ones(1, 21, 32, 32), nothing)
    monkeypatch.setattr(estimator, "_forward", lambda *_: output)
    pose = estimator(hand_frame(), center_uvd=CENTER)
    assert pose.joints_xyz is None and "not finite" in pose.reason


@pytest.mark.parametrize("hand", ["right", "left"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_hint_that_is_no_number_is_the_reason(hand, wrong, model):
    estimator = HandPoseEstimator(model, CAMERA, hand=hand, device="cpu")
    for place in ((wrong, 240, 600), (320, wrong, 600), (320, 240, wrong)):
        assert estimator(hand_frame(), center_uvd=place).reason.startswith("the centre (")
        assert estimator(hand_frame(), near_uvd=place).reason.startswith("the place before (")
