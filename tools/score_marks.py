"""Measure predicted joints on real frames whose joints were marked, in space or on the picture alone.

    python -m tools.score_marks --marks recording/annotations.json --model Model/HAND17_default_final.pt

The JSON holds `camera`, `hand` and, by the name of the PNG beside it, `frames`:

- marks in space: `thumb`, `index`, `middle`, `ring`, `pinky`, `wrist`, each u px, v px, depth mm of the
  surface; the camera is fx, fy, u0, v0, depth_unit_mm;
- marks on the picture: `joints_uv`, u px, v px of every joint of the data set that `joint_order` names.
  Such pictures are crops whose place in the whole picture nobody knows: their middle is taken for the
  principal point (the camera is fx, fy; `unit_mm` is what a stored 1 means, if not 1 mm), zeros for what
  surrounds them, and distances are measured in the plane through the hand.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.checkpoints import DEVICES, torch_errors_explained
from engine.options import TURNS_OF_MODEL
from frames.cameras import DepthCamera, parse_camera, read_depth
from frames.transforms import Camera, uvd2xyz
from predict import HandPoseEstimator
from prediction.output import finger_chains
from utils import HelpFormatter, UserError, one_line, run, say

# In the order of `finger_chains`, whose last joints are the fingertips.
FINGERS = ("thumb", "index", "middle", "ring", "pinky")
CANVAS_PX = 640, 480  # what crops are padded to
FOUND_WITHIN_MM = 60.0


class MarkedSet(NamedTuple):
    """The content of a marks file: `frames` is {name: marks}, `on_crops` says that they have no depth."""

    hand: str
    depth_camera: DepthCamera
    frames: dict
    on_crops: bool
    joint_order: str | None


class Score(NamedTuple):
    """Distances of one frame, mm.

    `center`: from the crop's centre to the mean of the marks; `space` and `plane` [J]: from each joint to its
    mark, and between the two at the mark's depth, NaN without a mark; `astray`: for each marked fingertip
    whether the predicted one lies nearest another finger's tip.
    """

    center: float
    space: np.ndarray
    plane: np.ndarray
    astray: list


def read_marks(path):
    """Return the MarkedSet of a JSON file. Raises UserError where it is none."""
    path = Path(path)
    try:
        content = json.loads(path.read_text())
        frames, camera = content["frames"], content["camera"]
        on_crops = any("joints_uv" in marks for marks in frames.values())
        if on_crops and not all("joints_uv" in marks for marks in frames.values()):
            raise ValueError("only some of its frames have joints_uv")
        if on_crops:
            middle = ((size - 1) / 2 for size in CANVAS_PX)
            pinhole = Camera(float(camera["fx"]), float(camera["fy"]), *middle)
            depth_camera = DepthCamera(pinhole, float(content.get("unit_mm", 1.0)))
        else:
            depth_camera = parse_camera(path)
        return MarkedSet(
            content.get("hand", "right"), depth_camera, frames, on_crops, content.get("joint_order")
        )
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no marks of frames: {type(error).__name__} {error}") from None


def marked_joints(dataset):
    """Return {mark: joint index}: fingertips, and the wrist where the skeleton starts there."""
    joints = {finger: chain[-1] for finger, chain in zip(FINGERS, finger_chains(dataset))}
    return joints | ({"wrist": 0} if dataset.joint_number == 21 else {})


def marks_uvd(marks, dataset):
    """Return the joints [J, 3] uvd of marks in space, NaN where none is. Raises UserError."""
    uvd = np.full((dataset.joint_number, 3), np.nan)
    for mark, joint in marked_joints(dataset).items():
        if mark in marks:
            uvd[joint] = numbers(marks[mark], (3,), mark)
            if not uvd[joint, 2] > 0:
                raise UserError(f"{mark} is marked where nothing was measured: its depth is {marks[mark][2]}")
    if np.isnan(uvd).all():
        raise UserError("nothing is marked")
    return uvd


def numbers(marks, shape, name):
    """Return marks as an array of this shape. Raises UserError where they are something else."""
    try:
        array = np.array(marks, np.float64)
    except (ValueError, TypeError):
        array = np.empty(0)
    if array.shape != shape or not np.isfinite(array).all():
        raise UserError(f"{name} must be {' x '.join(map(str, shape))} numbers, not {one_line(marks)}")
    return array


def pad_crop(depth_mm, joints_uv):
    """Return a crop [h, w] in the middle of an empty picture, and its marks there as uvd [J, 3].

    All get the hand's depth, the median of what was measured at them. Raises UserError where nothing was.
    """
    size = np.array(depth_mm.shape[::-1])
    column, row = (CANVAS_PX - size) // 2
    if (size > CANVAS_PX).any():
        raise UserError(f"the crop has {size[0]}x{size[1]} px, more than {CANVAS_PX[0]}x{CANVAS_PX[1]}")
    canvas = np.zeros(CANVAS_PX[::-1], depth_mm.dtype)
    canvas[row : row + size[1], column : column + size[0]] = depth_mm
    joints_uv = np.asarray(joints_uv, np.float64)
    columns, rows = np.clip(joints_uv.round().astype(int), 0, size - 1).T
    measured = depth_mm[rows, columns]
    if not measured.any():
        raise UserError("nothing was measured at the marks")
    hand_mm = np.full((len(joints_uv), 1), np.median(measured[measured > 0]))
    return canvas, np.hstack([joints_uv + (column, row), hand_mm])


def score(pose, true_uvd, camera, dataset):
    """Return the Score of a HandPose against marks [J, 3] uvd, NaN where none is.

    Marks lie on the skin, joints some millimetres below it.
    """
    true_xyz = uvd2xyz(true_uvd, camera)
    at_depth_xyz = uvd2xyz(np.hstack([pose.joints_uvd[:, :2], true_uvd[:, 2:]]), camera)
    tips = [chain[-1] for chain in finger_chains(dataset)]
    apart_mm = np.linalg.norm(at_depth_xyz[tips, None, :2] - true_xyz[tips, :2], axis=-1)
    apart_mm[:, np.isnan(true_xyz[tips, 0])] = np.inf
    return Score(
        float(np.linalg.norm(uvd2xyz(pose.center_uvd, camera) - np.nanmean(true_xyz, axis=0))),
        np.linalg.norm(pose.joints_xyz - true_xyz, axis=-1),
        np.linalg.norm(at_depth_xyz - true_xyz, axis=-1),
        [apart_mm[k].argmin() != k for k in range(len(tips)) if np.isfinite(apart_mm[k, k])],
    )


def score_frame(estimator, path, marks, marked, at_marks):
    """Return the Score of one file. Raises UserError where it has no marks or no hand is found."""
    dataset, depth_mm = estimator.dataset, read_depth(path, marked.depth_camera)
    if marked.on_crops:
        joints_uv = numbers(marks["joints_uv"], (dataset.joint_number, 2), "joints_uv")
        depth_mm, true_uvd = pad_crop(depth_mm, joints_uv)
    else:
        true_uvd = marks_uvd(marks, dataset)
    pose = estimator(depth_mm, center_uvd=np.nanmean(true_uvd, axis=0) if at_marks else None)
    if pose.reason:
        raise UserError(pose.reason)
    return score(pose, true_uvd, estimator.camera, dataset)


def score_set(estimator, folder, marked, at_marks=False):
    """Print a line for each frame of a set and one for all; return the Scores."""
    columns, scores = marked_joints(estimator.dataset), []
    names = ("centre", *columns)
    say(f"{'frame':<16}" + "".join(f"{name:>9}" for name in names))
    for name, marks in marked.frames.items():
        try:
            path = folder / (name if name.endswith(".png") else f"{name}.png")
            scores.append(score_frame(estimator, path, marks, marked, at_marks))
        except UserError as error:
            say(f"{name:<16} {error}")
            continue
        off_mm = scores[-1].plane if marked.on_crops else scores[-1].space
        cells = [scores[-1].center, *(off_mm[joint] for joint in columns.values())]
        say(f"{name:<16}" + "".join(f"{'-':>9}" if np.isnan(mm) else f"{mm:9.1f}" for mm in cells))
    say(f"found {len(scores)} of {len(marked.frames)}" + (summary(scores, marked, columns) if scores else ""))
    return scores


def summary(scores, marked, columns):
    """Return the words that sum up a set's Scores."""
    near = sum(one.center <= FOUND_WITHIN_MM for one in scores)
    tips = [joint for mark, joint in columns.items() if mark in FINGERS]
    plane_mm = np.nanmean([one.plane for one in scores])
    tips_mm = np.nanmean([(one.plane if marked.on_crops else one.space)[tips] for one in scores])
    astray = np.concatenate([one.astray for one in scores])
    return (
        f", {near} within {FOUND_WITHIN_MM:.0f} mm of the marks' middle; "
        f"joints in the plane {plane_mm:.1f} mm, "
        f"fingertips {'in the plane' if marked.on_crops else 'in space'} {tips_mm:.1f} mm, "
        f"{astray.sum():.0f} of {len(astray)} tips nearest another finger's"
    )


@torch_errors_explained()
def main(argv=None):
    """Score every set; return 0 where a hand was found in each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--marks", type=Path, nargs="+", required=True, help="JSON files with their frames beside them"
    )
    parser.add_argument("--model", type=Path, help="checkpoint (default: the one that comes with this code)")
    parser.add_argument(
        "--at_marks", action="store_true", help="take the marks' middle for the hand's, instead of finding it"
    )
    parser.add_argument("--turns", **TURNS_OF_MODEL)
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: a GPU where there is one")
    args = parser.parse_args(argv)
    found = []
    for path in args.marks:
        marked = read_marks(path)
        how = dict(hand=marked.hand, turns=args.turns, device=args.device)
        estimator = HandPoseEstimator(args.model, marked.depth_camera.camera, **how)
        if marked.on_crops and marked.joint_order != estimator.dataset.name:
            raise UserError(f"{path} has marks of {marked.joint_order}, {estimator.model} other joints")
        say(f"{path}, {estimator.model}: distances in mm, {marked.hand} hand")
        found.append(score_set(estimator, path.parent, marked, args.at_marks))
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(run(main))
