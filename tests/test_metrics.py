"""Joint errors, their summary and the printed table, on numbers that can be checked by hand."""

import json

import numpy as np
import pytest

from engine.metrics import PROTOCOLS, format_table, joint_errors_mm, success_curve, summarise


def errors_mm():
    """Return [4 frames, 2 joints]; the worst joints are 10, 20, 35 and 60 mm."""
    return np.array([[0.0, 10.0], [20.0, 4.0], [35.0, 1.0], [10.0, 60.0]])


def test_joint_errors_are_euclidean_distances():
    true_xyz = np.zeros((2, 2, 3))
    pred_xyz = np.array([[[3, 4, 0], [0, 0, 7]], [[1, 2, 2], [0, 0, 0]]], float)
    np.testing.assert_allclose(joint_errors_mm(pred_xyz, true_xyz), [[5, 7], [3, 0]])


def test_joint_errors_refuse_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"\(5, 2, 3\).*\(1, 2, 3\)"):
        joint_errors_mm(np.zeros((5, 2, 3)), np.zeros((1, 2, 3)))


def test_success_curve_counts_frames_whose_worst_joint_is_under_the_threshold():
    share = success_curve(errors_mm(), np.array([0, 10, 10.1, 20.1, 40, 60, 61]))
    np.testing.assert_allclose(share, [0, 0, 0.25, 0.5, 0.75, 0.75, 1])


def test_summary_of_known_errors():
    summary = summarise(errors_mm(), split=1)
    assert summary["mean"] == pytest.approx(140 / 8)
    assert summary["median"] == pytest.approx(10)
    assert summary["per_joint"] == pytest.approx([65 / 4, 75 / 4])
    assert summary["first_part"] == pytest.approx(5)
    assert summary["second_part"] == pytest.approx(130 / 6)
    assert summary["worst_joint_within"] == pytest.approx({"20": 25, "30": 50, "40": 75})
    assert summary["joints_within_20"] == pytest.approx(100 * 5 / 8)


@pytest.mark.parametrize(
    ("error_mm", "area"),
    [
        (0, 1),  # at or under every threshold, 0 mm among them
        (50, 0.01),  # the last trapezoid alone: half of 1 mm, over 50
        (50.1, 0),
        (10.5, 0.79),  # full from 11 to 50 mm and half from 10 to 11: 39.5 of 50
        (10, 0.81),
    ],
)
def test_area_under_the_curve_of_joints(error_mm, area):
    assert summarise(np.full((3, 2), float(error_mm)))["auc_0_50"] == pytest.approx(area)


@pytest.mark.parametrize("split", [None, 4, 2440])
def test_parts_are_none_without_a_split_inside_the_frames(split):
    summary = summarise(errors_mm(), split)
    assert summary["first_part"] is None
    assert summary["second_part"] is None


def test_summary_survives_json():
    summary = summarise(errors_mm().astype(np.float32), split=2)
    assert json.loads(json.dumps(summary)) == summary


def test_inputs_are_left_as_they_are():
    error_mm = errors_mm()
    summarise(error_mm, split=2)
    np.testing.assert_array_equal(error_mm, errors_mm())


def test_table_puts_predictions_side_by_side():
    summaries = {"ours": summarise(errors_mm(), 1), "a longer name": summarise(errors_mm() / 2)}
    lines = format_table(summaries, ["palm", "tip"]).splitlines()
    assert lines[0].split(maxsplit=1) == ["ours", "a longer name"]
    assert {len(line) for line in lines} == {len(lines[0])}
    cells = {line.rsplit(maxsplit=2)[0]: line.split()[-2:] for line in lines[1:]}
    assert cells["mean, mm"] == ["17.500", "8.750"]
    assert cells["first test part, mm"] == ["5.000", "-"]
    assert cells["worst joint < 30 mm, % of frames"] == ["50.00", "75.00"]
    assert cells[" 1 tip, mm"] == ["18.750", "9.375"]


def test_table_numbers_joints_that_have_no_names():
    assert " 1 joint, mm" in format_table({"ours": summarise(errors_mm())})


def test_protocols_are_those_of_the_published_numbers():
    assert {name: len(protocol.joint_names) for name, protocol in PROTOCOLS.items()} == {
        "NYU": 14,
        "ICVL": 16,
        "MSRA": 21,
        "HAND17": 21,
    }
    assert all(len(set(protocol.joint_names)) == len(protocol.joint_names) for protocol in PROTOCOLS.values())
    assert PROTOCOLS["NYU"].camera == (588.03, 587.07, 320, 240)
    assert PROTOCOLS["ICVL"].camera == (240.99, 240.96, 160, 120)
    assert PROTOCOLS["MSRA"].camera == (241.42, 241.42, 160, 120)
    assert [protocol.split for protocol in PROTOCOLS.values()] == [2440, 702, None, None]


@pytest.mark.parametrize(
    ("dataset", "thumb", "index", "middle", "ring", "little"),
    [
        ("NYU", (10, 9, 8), (1, 0), (3, 2), (5, 4), (7, 6)),
        ("ICVL", (1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12), (13, 14, 15)),
        ("MSRA", (17, 18, 19, 20), (1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12), (13, 14, 15, 16)),
        ("HAND17", (1, 6, 7, 8), (2, 9, 10, 11), (3, 12, 13, 14), (4, 15, 16, 17), (5, 18, 19, 20)),
    ],
)
def test_joint_names_follow_the_skeletons(dataset, thumb, index, middle, ring, little):
    names = PROTOCOLS[dataset].joint_names
    fingers = {"thumb": thumb, "index": index, "middle": middle, "ring": ring, "little": little}
    for finger, joints in fingers.items():
        assert all(names[joint].startswith(finger) for joint in joints)
        assert names[joints[-1]] == f"{finger} tip"


def test_uvd_is_projected_back_and_hand17_is_not():
    uvd = np.array([[[320 + 588.03, 240.0, 500.0], [320.0, 240 - 587.07, 100.0]]])
    np.testing.assert_allclose(PROTOCOLS["NYU"].to_xyz(uvd), [[[500, 0, 500], [0, -100, 100]]])
    np.testing.assert_array_equal(PROTOCOLS["HAND17"].to_xyz(uvd), uvd)
