"""The community's evaluation of 3D hand poses: joint errors in mm, their summary and its table."""

from typing import NamedTuple

import numpy as np

from frames.cameras import PRESETS
from frames.transforms import Camera, uvd2xyz, xyz2uvd
from utils import UserError

WORST_JOINT_LIMITS_MM = (20, 30, 40)
JOINT_LIMIT_MM = 20
AUC_LIMIT_MM = 50

_FINGERS = ("thumb", "index", "middle", "ring", "little")


# The depths at which the data sets' hands and those of most cameras are.
WORKING_DEPTH_MM = (50, 3000)


class Protocol(NamedTuple):
    """How published results of one data set are evaluated (source: X. Chen, awesome-hand-pose-estimation).

    camera: of the data set's pictures, `size_px` (width, height). is_uvd: results and labels are uvd, not
    xyz. split: number of frames of the first test part; None where the test set has one part. joint_names:
    J names in the order of the joints.
    """

    camera: Camera
    size_px: tuple[int, int]
    is_uvd: bool
    split: int | None
    joint_names: tuple[str, ...]

    def to_xyz(self, joints):
        """Turn results or labels [N, J, 3] (uvd; HAND17: xyz, mm) into xyz in the camera frame, mm."""
        return uvd2xyz(joints, self.camera) if self.is_uvd else joints

    def require_form(self, joints, source):
        """Raise UserError where joints [N, J, 3] of a file, `source`, are not in the form of the data set.

        A few joints may be predicted outside the picture, but not one in twenty: such are xyz, or relative
        to something, in the place of uvd, or uvd in the place of xyz.
        """
        near, far = WORKING_DEPTH_MM
        joints = joints[has_joints(joints)]
        at_depth = (near < joints[..., 2]) & (joints[..., 2] < far)
        seen = joints[at_depth] if self.is_uvd else xyz2uvd(joints[at_depth], self.camera)
        size_px = np.array(self.size_px)
        inside = (np.abs(seen[:, :2] - size_px / 2) < 0.6 * size_px).all(axis=-1)
        if not self.is_uvd and len(joints) > 2 and joints.min() >= 0:
            inside[:] = False  # all right of and below the camera's axis, as uvd are and hands are not
        if inside.sum() < 0.95 * at_depth.size:
            form = "uvd (px, px, mm)" if self.is_uvd else "xyz (mm, camera frame)"
            raise UserError(
                f"{source}: {1 - inside.sum() / at_depth.size:.0%} of its joints cannot be {form}: expected "
                f"joints within the {self.size_px[0]} x {self.size_px[1]} px picture, {near} to {far} mm away"
            )


# The intrinsics differ slightly from the loaders' because the published numbers were computed with these.
# NYU's finger names follow the released programs, as the skeletons do.
PROTOCOLS = {
    "NYU": Protocol(
        Camera(588.03, 587.07, 320.0, 240.0),
        (640, 480),
        True,
        2440,
        (
            *(f"{finger} {part}" for finger in _FINGERS[1:] for part in ("tip", "root")),
            *("thumb tip", "thumb mid", "thumb root", "wrist 1", "wrist 2", "palm"),
        ),
    ),
    "ICVL": Protocol(
        Camera(240.99, 240.96, 160.0, 120.0),
        (320, 240),
        True,
        702,
        ("palm", *(f"{finger} {part}" for finger in _FINGERS for part in ("root", "mid", "tip"))),
    ),
    "MSRA": Protocol(
        Camera(241.42, 241.42, 160.0, 120.0),
        (320, 240),
        True,
        None,
        (
            "wrist",
            *(f"{finger} {part}" for finger in _FINGERS[1:] for part in ("MCP", "PIP", "DIP", "tip")),
            *(f"thumb {part}" for part in ("MCP", "PIP", "DIP", "tip")),
        ),
    ),
    "HAND17": Protocol(
        PRESETS["HAND17"].camera,
        (640, 480),
        False,
        None,
        (
            "wrist",
            *(f"{finger} MCP" for finger in _FINGERS),
            *(f"{finger} {part}" for finger in _FINGERS for part in ("PIP", "DIP", "tip")),
        ),
    ),
}


def joint_errors_mm(pred_xyz, true_xyz):
    """Measure the 3D distance of each joint to its label.

    Takes two arrays [N, J, 3] in the camera frame, mm; returns [N, J], mm. Raises ValueError when their
    shapes differ, which broadcasting would hide.
    """
    if pred_xyz.shape != true_xyz.shape:
        raise ValueError(f"predictions have shape {pred_xyz.shape}, labels {true_xyz.shape}")
    return np.linalg.norm(pred_xyz - true_xyz, axis=-1)


def has_joints(joints):
    """Return which frames of [N, J, 3] have joints: zeros alone are what test.py writes where it has none."""
    return joints.any(axis=(1, 2))


def measure_errors(protocol, joints, labels):
    """Return the errors [n, J], mm, of the frames that have joints, and how many are of the first test part.

    `joints` and `labels` [N, J, 3] are in the form of the data set's results. The second value is None where
    the test set has one part.
    """
    kept = has_joints(joints) & has_joints(labels)
    error_mm = joint_errors_mm(protocol.to_xyz(joints[kept]), protocol.to_xyz(labels[kept]))
    return error_mm, None if protocol.split is None else int(kept[: protocol.split].sum())


def success_curve(error_mm, thresholds_mm):
    """Give the share (0..1) of frames whose worst joint is under each threshold: [N, J] mm, [T] mm -> [T]."""
    worst_mm = np.sort(error_mm.max(axis=1))
    return np.searchsorted(worst_mm, thresholds_mm, side="left") / len(worst_mm)


def area_under_curve(error_mm):
    """Give the mean height (0..1) of the curve of joints at or under a threshold: [N, J] mm -> float.

    Trapezoid rule over the thresholds 0, 1, ..., 50 mm, divided by 50.
    """
    thresholds_mm = np.arange(AUC_LIMIT_MM + 1)
    share = np.searchsorted(np.sort(error_mm, axis=None), thresholds_mm, side="right") / error_mm.size
    return float((share[1:] + share[:-1]).mean() / 2)


def summarise(error_mm, split=None):
    """Sum up joint errors [N, J] in mm (N > 0) as a dict of plain floats that JSON can hold.

    In mm: mean, median, per_joint (list of J), first_part and second_part (means of the first `split` frames
    and of the others; None without a split or where a part has no frame). In percent: joints_within_20 and
    worst_joint_within (keys "20", "30", "40": frames whose worst joint is under so many mm). 0..1: auc_0_50.
    """
    has_parts = split is not None and 0 < split < len(error_mm)
    worst_share = success_curve(error_mm, WORST_JOINT_LIMITS_MM)
    return {
        "mean": float(error_mm.mean()),
        "median": float(np.median(error_mm)),
        "per_joint": [float(value) for value in error_mm.mean(axis=0)],
        "first_part": float(error_mm[:split].mean()) if has_parts else None,
        "second_part": float(error_mm[split:].mean()) if has_parts else None,
        "worst_joint_within": {
            str(limit_mm): 100 * float(share)
            for limit_mm, share in zip(WORST_JOINT_LIMITS_MM, worst_share, strict=True)
        },
        "joints_within_20": 100 * float((error_mm < JOINT_LIMIT_MM).mean()),
        "auc_0_50": area_under_curve(error_mm),
    }


def format_table(summaries, joint_names=None):
    """Lay out {name: summary} as aligned text: a row for each figure, a column for each name.

    Summaries come from `summarise` and share their J; joint_names (J texts) label the rows of single joints.
    """
    rows = [["", *summaries]]
    columns = [_table_column(summary, joint_names) for summary in summaries.values()]
    for label in columns[0]:
        rows.append([label, *(column[label] for column in columns)])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def _table_column(summary, joint_names):
    """Format one summary as {row label: text}."""
    column = {"mean, mm": f"{summary['mean']:.3f}", "median, mm": f"{summary['median']:.3f}"}
    for part in ("first", "second"):
        error_mm = summary[f"{part}_part"]
        column[f"{part} test part, mm"] = "-" if error_mm is None else f"{error_mm:.3f}"
    for limit_mm, percent in summary["worst_joint_within"].items():
        column[f"worst joint < {limit_mm} mm, % of frames"] = f"{percent:.2f}"
    column[f"joints < {JOINT_LIMIT_MM} mm, %"] = f"{summary['joints_within_20']:.2f}"
    column[f"AUC 0-{AUC_LIMIT_MM} mm, joints"] = f"{summary['auc_0_50']:.4f}"
    for joint, error_mm in enumerate(summary["per_joint"]):
        name = joint_names[joint] if joint_names else "joint"
        column[f"{joint:2d} {name}, mm"] = f"{error_mm:.3f}"
    return column
