"""Find the hand in depth frames of any camera and predict its joints, in millimetres and pixels.

python predict.py docs/predict/frame.png --camera SR305
python predict.py recording/ --camera 476,476,313.7,242.8 --depth_unit 0.125 --plot3d
python predict.py frame.npy --camera camera.yml --model Model/mine.pt --center 320,240,600 --hand left

Without --model it takes the model that comes with this code (Model/README.md).
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

import utils  # first: torch reads the threads' settings when it is imported
from engine.inference import limit_threads
from engine.options import parse_predict
from frames.cameras import doubts_about, list_frames, read_depth
from frames.files import FrameError
from prediction.estimator import HandPose, HandPoseEstimator, Place, no_hand
from prediction.output import PredictionWriter
from utils import SOME_FAILED, say

__all__ = ["HandPose", "HandPoseEstimator"]


class Located(NamedTuple):
    """A frame's depth [H, W] mm, or None, doubts about the camera, and what HandPoseEstimator.locate says."""

    depth_mm: np.ndarray | None
    doubts: list
    place: Place | HandPose


def main(argv=None):
    """Predict as the command line says; return the exit status."""
    args = parse_predict(argv)
    sequences = [list_frames(path) if os.path.isdir(path) else [path] for path in args.input]
    total = sum(map(len, sequences))
    how = dict(joints=args.joints, cube_mm=args.cube, hand=args.hand, turns=args.turns, device=args.device)
    estimator = HandPoseEstimator(args.model, args.camera.camera, frames=total, **how)
    limit_threads(estimator.network)
    what = dict(pictures=args.pictures, video=args.video if total > 1 else "none", plot3d=args.plot3d)
    with PredictionWriter(args.out, estimator, args.camera, sequences, **what) as writer:
        good = predict_all(estimator, args.camera, sequences, (args.center, args.bbox), writer)
    if good == total:
        return 0
    return SOME_FAILED if good else 1


def predict_all(estimator, depth_camera, sequences, hint, writer):
    """Predict sequences (lists of files) frame by frame; return how many frames have joints.

    `hint` is (centre uvd, box), both for every frame, None where not known.
    """
    good, count, started, asked = 0, 0, time.perf_counter(), set()
    for files in sequences:
        for path, locating in locate_ahead(files, estimator, depth_camera, hint):
            depth_mm, doubts, place = locating.result()
            for doubt in doubts:
                if doubt not in asked:
                    say(f"warning: {doubt}", sys.stderr)
                asked.add(doubt)
            (pose,) = estimator.predict([place])
            if pose.reason:
                say(f"warning: {path}: {pose.reason}", sys.stderr)
            good, count = good + (pose.reason is None), count + 1
            writer.write(path, depth_mm, pose)
    seconds = time.perf_counter() - started
    speed = f", {count / seconds:.1f} frames a second on {estimator.device}" if good else ""
    say(f"{good} of {count} frames have joints{speed}")
    say(f"{writer.out}: {', '.join(writer.names)}")
    return good


def locate_ahead(files, estimator, depth_camera, hint):
    """Yield each file of a sequence and the future of its Located.

    While a frame is in use, a thread reads the next one and finds the hand there, near where it was.
    """
    near_uvd = None

    def locate(path):
        nonlocal near_uvd
        depth_mm, doubts = None, []
        try:
            depth_mm = read_depth(path, depth_camera)
            doubts = doubts_about(depth_camera, depth_mm.shape[::-1])
            place = estimator.locate(depth_mm, *hint, near_uvd)
        except (FrameError, ValueError) as error:
            place = no_hand(getattr(error, "reason", error))
        near_uvd = place.center_uvd
        return Located(depth_mm, doubts, place)

    with ThreadPoolExecutor(1) as locator:
        ahead = locator.submit(locate, files[0])
        for path, following in zip_longest(files, files[1:]):
            locating, ahead = ahead, following and locator.submit(locate, following)
            yield path, locating


if __name__ == "__main__":
    sys.exit(utils.run(main))
