"""A flat hand, the camera that sees it, the small network that looks at it, and what predict.py wrote."""

import json
from pathlib import Path

import cv2
import numpy as np
import torch

from engine.checkpoints import save_checkpoint
from frames.transforms import Camera
from model import PixelwiseRegression

CAMERA = Camera(475.0, 475.0, 319.5, 239.5)
CAMERA_TEXT = "475,475,319.5,239.5"
CENTER = (320.0, 240.0, 505.0)


def save_network(path, joints=21, **more):
    """Write the checkpoint of a small random network; return its path."""
    torch.manual_seed(0)
    network = PixelwiseRegression(
        joints, stage=1, label_size=32, features=32, level=2, norm_method="instance"
    )
    save_checkpoint(
        path, {"state_dict": network.state_dict(), "seed": 0, "model_param": network.param, **more}
    )
    return path


def hand_frame(distance_mm=500, column=320, row=240):
    """Return depth [480, 640] in uint16 mm of a flat open hand: a palm, five fingers, a forearm."""
    depth = np.zeros((480, 640), np.uint16)
    scale = 475 / distance_mm
    point = lambda x, y: (round(column + x * scale), round(row + y * scale))  # noqa: E731
    cv2.rectangle(depth, point(-40, -10), point(40, 75), distance_mm, -1)
    for x, y in ((-75, -25), (-38, -95), (-13, -105), (13, -100), (38, -85)):
        base = point(np.clip(x, -35, 35), 20 if x == -75 else -5)
        cv2.line(depth, base, point(x, y), distance_mm, round(16 * scale))
    cv2.line(depth, point(0, 70), point(10, 300), distance_mm, round(55 * scale))
    return depth


def write_png(path, picture):
    """Write a picture; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture)
    return path


def read_results(out="Result/predict"):
    """Return the head and the frames of a folder's predictions.jsonl."""
    head, *frames = map(json.loads, Path(out, "predictions.jsonl").read_text().splitlines())
    return head, frames
