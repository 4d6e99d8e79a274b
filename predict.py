"""Find the hand in depth frames of any camera and predict its joints, in millimetres and pixels.

python predict.py docs/predict/frame.png --camera SR305
python predict.py recording/ --camera 476,476,313.7,242.8 --depth_unit 0.125 --plot3d
python predict.py frame.npy --camera camera.yml --model Model/mine.pt --center 320,240,600 --hand left

Without --model it takes the model that comes with this code (Model/README.md).
"""

import os
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

import utils  # first: torch reads the threads' settings when it is imported
from engine.checkpoints import torch_errors_explained
from engine.inference import forwards_at_once, limit_threads
from engine.options import parse_predict
from frames.cameras import doubts_about, list_frames, read_depth
from frames.files import FrameError
from prediction.estimator import HandPose, HandPoseEstimator, no_hand
from prediction.output import PredictionWriter
from utils import SOME_FAILED, UserError, say

__all__ = ["HandPose", "HandPoseEstimator"]


class Predicted(NamedTuple):
    """A frame's depth [H, W] mm, None where it cannot be read, doubts about the camera, and the HandPose."""

    depth_mm: np.ndarray | None
    doubts: list
    pose: HandPose


@torch_errors_explained()
def main(argv=None):
    """Predict as the command line says; return the exit status."""
    args = parse_predict(argv)
    for path in args.input:
        if not os.path.exists(path):
            raise UserError(f"{path} not found: give depth pictures, or folders of them")
    sequences = [list_frames(path) if os.path.isdir(path) else [path] for path in args.input]
    total = sum(map(len, sequences))
    how = dict(joints=args.joints, cube_mm=args.cube, hand=args.hand, turns=args.turns, device=args.device)
    estimator = HandPoseEstimator(args.model, args.camera.camera, frames=total, **how)
    limit_threads(estimator.network)
    what = dict(pictures=args.pictures, video=args.video if total > 1 else "none", plot3d=args.plot3d)
    with PredictionWriter(args.out, estimator, args.camera, sequences, **what) as writer:
        good = predict_all(estimator, args.camera, sequences, (args.center, args.bbox), writer)
    say(f"{writer.out}: {', '.join(writer.names)}")
    if good == total:
        return 0
    return SOME_FAILED if good else 1


def predict_all(estimator, depth_camera, sequences, hint, writer):
    """Predict sequences (lists of files) frame by frame; return how many frames have joints.

    `hint` is (centre uvd, box), both for every frame, None where not known.
    """
    good, count, started, asked = 0, 0, time.perf_counter(), set()
    for files in sequences:
        for path, predicting in predict_ahead(files, estimator, depth_camera, hint):
            depth_mm, doubts, pose = predicting.result()
            for doubt in doubts:
                if doubt not in asked:
                    say(f"warning: {doubt}", sys.stderr)
                asked.add(doubt)
            if pose.reason:
                say(f"warning: {path}: {pose.reason}", sys.stderr)
            good, count = good + (pose.reason is None), count + 1
            writer.write(path, depth_mm, pose)
    seconds = time.perf_counter() - started
    speed = f", {count / seconds:.1f} frames a second on {estimator.device}" if good and count > 1 else ""
    say(f"{good} of {count} frames have joints{speed}")
    return good


def predict_ahead(files, estimator, depth_camera, hint):
    """Yield each file of a sequence and the future of its Predicted.

    A thread reads frame after frame and finds the hand there, near where it was; others predict its joints,
    of as many frames at once as there is room for on the device.
    """
    near_uvd, at_once = None, forwards_at_once(estimator.device)

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
        return depth_mm, doubts, place

    def predict(locating):
        depth_mm, doubts, place = locating.result()
        return Predicted(depth_mm, doubts, *estimator.predict([place]))

    with ThreadPoolExecutor(1) as locator, ThreadPoolExecutor(at_once) as predictor:
        ahead = deque()
        for path in files:
            ahead.append((path, predictor.submit(predict, locator.submit(locate, path))))
            if len(ahead) > at_once:
                yield ahead.popleft()
        yield from ahead


if __name__ == "__main__":
    sys.exit(utils.run(main))
