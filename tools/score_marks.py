"""Measure predicted fingertips and wrist on real frames in which they were marked by hand.

    python -m tools.score_marks --marks recording/annotations.json --model Model/HAND17_default_final.pt

The JSON holds `camera` (fx, fy, u0, v0, depth_unit_mm), `hand` and `frames`: for each frame's name, a PNG
beside the JSON, the marks (`thumb`, `index`, `middle`, `ring`, `pinky`, `wrist`) as u px, v px, depth mm of
the surface.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from frames.cameras import parse_camera, read_depth
from frames.transforms import uvd2xyz
from predict import HandPoseEstimator
from prediction.output import finger_chains
from utils import UserError, run

# In the order of `finger_chains`, whose last joints are the fingertips.
FINGERS = ("thumb", "index", "middle", "ring", "pinky")


def read_marks(path):
    """Return (hand, {frame name: {mark: uvd [3]}}) of a marks file. Raises UserError where it is none."""
    try:
        content = json.loads(Path(path).read_text())
        frames = {
            frame: {mark: np.array(uvd, np.float64).reshape(3) for mark, uvd in marks.items()}
            for frame, marks in content["frames"].items()
        }
        return content.get("hand", "right"), frames
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no marks of frames: {error}") from None


def marked_joints(dataset):
    """Return {mark: joint index}: fingertips, and the wrist where the skeleton starts there."""
    joints = {finger: chain[-1] for finger, chain in zip(FINGERS, finger_chains(dataset))}
    return joints | ({"wrist": 0} if dataset.joint_number == 21 else {})


def score(estimator, depth_mm, marks):
    """Return ({mark: 3D distance mm} of one frame's joints, distance of its centre to the marks' mean mm).

    Marks lie on the skin, joints some millimetres below it. Raises UserError where there are no marks or
    no hand is found.
    """
    if not marks:
        raise UserError("nothing is marked")
    pose = estimator(depth_mm)
    if pose.reason:
        raise UserError(pose.reason)
    marks_xyz = {mark: uvd2xyz(uvd, estimator.camera) for mark, uvd in marks.items()}
    off_mm = {
        mark: float(np.linalg.norm(pose.joints_xyz[joint] - marks_xyz[mark]))
        for mark, joint in marked_joints(estimator.dataset).items()
        if mark in marks
    }
    middle_xyz = np.mean(list(marks_xyz.values()), axis=0)
    return off_mm, float(np.linalg.norm(uvd2xyz(pose.center_uvd, estimator.camera) - middle_xyz))


def main(argv=None):
    """Print a line a frame and the means."""
    parser = argparse.ArgumentParser(description="Measure predictions against marks made by hand.")
    parser.add_argument("--marks", type=Path, required=True, help="JSON file with the frames beside it")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    hand, frames = read_marks(args.marks)
    depth_camera = parse_camera(args.marks)
    estimator = HandPoseEstimator(args.model, depth_camera.camera, hand=hand, device=args.device)
    columns = list(marked_joints(estimator.dataset))
    print(f"{estimator.model}: distances in mm, {hand} hand")
    print(f"{'frame':<16}" + "".join(f"{name:>9}" for name in ("centre", *columns)))
    found, tips_mm = 0, []
    for name, marks in frames.items():
        try:
            off_mm, center_mm = score(
                estimator, read_depth(args.marks.parent / f"{name}.png", depth_camera), marks
            )
        except UserError as error:
            print(f"{name:<16} {error}")
            continue
        found += 1
        tips_mm += [off_mm[finger] for finger in FINGERS if finger in off_mm]
        cells = (f"{off_mm[mark]:9.1f}" if mark in off_mm else f"{'-':>9}" for mark in columns)
        print(f"{name:<16}{center_mm:9.1f}" + "".join(cells))
    mean = f"{np.mean(tips_mm):.1f} mm" if tips_mm else "none"
    print(f"hand found in {found} of {len(frames)} frames, mean fingertip error {mean}")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(run(main))
