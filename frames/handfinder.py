"""Finding the hand in a depth frame: a small network scores places on every surface."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import nn

from frames.cameras import FARTHEST_MM
from frames.transforms import Camera, center_of_mass, cut_bounding_box, uvd2xyz, xyz2uvd
from utils import UserError, load_torch, one_line

WEIGHTS = Path(__file__).parents[1] / "Model" / "handfinder.pt"  # tools/train_handfinder.py makes it

# All is looked for in a picture of about this focal length, px: 4 mm a pixel half a metre away.
COARSE_FOCAL_PX = 120

# Two neighbouring pixels further apart in depth than this belong to two surfaces.
JUMP_MM = 40.0

# Radius of the largest disc that fits in a hand: seen from its edge to a broad palm (61 mm in a real frame).
PALM_RADIUS_MM = (10.0, 80.0)
SAME_PLACE_MM = 30.0

# The classifier sees a place's surroundings, so far to each side and in depth, as a crop of so many pixels.
REACH_MM, CROP_PX = 200.0, 40
SCORED_THRICE = 2  # so many places
LEAST_DEPTH_MM = 80.0  # no middle is taken to be nearer

# The last score of a place is the mean over its neighbours and their mirror images, which tells hands from
# what is none better than one. The least one of a hand was chosen on rendered frames with and without.
NEIGHBOURS_MM = np.array(
    [(0, 0, 0), (12, 0, 0), (-12, 0, 0), (0, 12, 0), (0, -12, 0), (0, 0, 15), (0, 0, -15)], np.float64
)
LEAST_SCORE = 0.7

# Surely a hand: whatever scores higher is no better.
SURE = 6.0

# A place gains so much where the hand was in the frame before, and needs no score there; farther away
# less, from this distance on nothing. Less than SURE, so that a hand elsewhere wins over what is none.
TRACK_BONUS, TRACK_MM = 3.0, 180.0

# What the hint of a box is worth: a place loses so much from its middle to its edge.
BOX_MALUS = 4.0

# The middle is halfway between what the classifier says and the middle of the surface so near to that.
SURFACE_MM = 90.0

SQUARE = np.ones((3, 3), np.uint8)


class HandClassifier(nn.Module):
    """Scores how surely crops [N, 1, 40, 40] show a hand (logit [N]), and tells where its middle is.

    The middle is relative to the crop's, [N, 3], in units of REACH_MM.
    """

    def __init__(self, widths=(16, 24, 32, 48)):
        super().__init__()
        layers, inputs = [], 1
        for width in widths:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
            inputs = width
        edge = CROP_PX // 2 ** len(widths)
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(inputs * edge**2, 64), nn.ReLU(), nn.Linear(64, 4)
        )

    def forward(self, crops):
        """Return (logit, offset)."""
        output = self.layers(crops)
        return output[:, 0], output[:, 1:]


class Picture(NamedTuple):
    """A coarse depth picture and how wide its surfaces are."""

    depth_mm: np.ndarray  # [h, w]
    camera: Camera
    radius_mm: np.ndarray  # [h, w] of the largest disc around each pixel that stays on its surface


def find_center(frame, camera, near_uvd=None, bbox=None):
    """Find the hand; return its middle, uvd: half-way from the classifier's answer to its surface's mean.

    Every place where a surface is as wide as a palm is scored, and the best ones twice more where they
    said that the hand's middle is; the highest mean of the three scores wins. `near_uvd` is where the hand
    was in the frame before: places near it are preferred, unless one elsewhere is clearly better. `bbox`
    (left, top, width, height; px) holds the hand for sure. Raises ValueError, with the reason, where there
    is no hand.
    """
    picture, hints = coarse_picture(frame, camera), np.zeros((0, 3))
    if not picture.radius_mm.any():
        raise ValueError("the frame is empty")
    hint_uvd = near_uvd
    if bbox is not None:
        bbox = np.asarray(bbox, np.float64)
        hint_uvd = center_of_mass(cut_bounding_box(frame, bbox))
    if hint_uvd is not None:
        hints = uvd2xyz(np.maximum([hint_uvd], (-np.inf, -np.inf, LEAST_DEPTH_MM)), camera)
    score, places = classify(picture, hints)
    if near_uvd is None or bbox is not None or score[0] < SURE:  # else nothing elsewhere could win
        others = classify(picture, candidates(picture))
        score, places = (np.concatenate(both) for both in zip((score, places), others))
    if len(places) == 0:
        raise ValueError("no surface is as large as a hand")
    likeliest = np.lexsort((score, np.minimum(score, SURE) + hinted(places, camera, hints, bbox)[0]))
    likeliest = likeliest[::-1][:SCORED_THRICE]
    again, places = classify(picture, places[likeliest])
    around = (places[:, None] + NEIGHBOURS_MM).reshape(-1, 3)
    last, middles = (
        part.reshape(len(places), -1, *part.shape[1:]).mean(1)
        for part in classify(picture, around, mirrored=True)
    )
    score = (score[likeliest] + again + last) / 3
    worth, needed = hinted(places, camera, hints, bbox)
    best = np.lexsort((score, np.minimum(score, SURE) + worth, last >= needed))[-1]
    middle = middles[best]
    if last[best] < needed[best]:
        if bbox is None:
            raise ValueError("nothing in the frame looks like a hand")
        middle = hints[0]
    return xyz2uvd((middle + surface_around(picture, middle, camera, bbox)) / 2, camera)


def hinted(places, camera, hints, bbox):
    """Return what a hint adds to the scores of places [N, 3] xyz, and the last score needed there, both [N].

    `hints` [0 or 1, 3] xyz is where the hand was, or the middle of what is in a box.
    """
    if bbox is not None:
        off = off_box(places, camera, bbox)
        return -2 * BOX_MALUS * off, np.where(off < 0.5, -np.inf, np.inf)
    nearness = np.zeros(len(places))
    if len(hints):
        nearness = np.maximum(1 - np.linalg.norm(places - hints, axis=1) / TRACK_MM, 0)
    return TRACK_BONUS * nearness, LEAST_SCORE * (1 - nearness)


def off_box(xyz, camera, bbox):
    """Return how far [N] points [N, 3] lie from the middle of a box, over its edge: 0.5 on its border."""
    return np.abs((xyz2uvd(xyz, camera)[:, :2] - bbox[:2]) / bbox[2:] - 0.5).max(1)


def surface_around(picture, place, camera, bbox=None):
    """Return the middle (xyz) of the surface within SURFACE_MM of a place and in a box, else the place."""
    depth_mm = picture.depth_mm
    rows, columns = np.nonzero((depth_mm > 0) & (np.abs(depth_mm - place[2]) < SURFACE_MM))
    points = uvd2xyz(np.stack([columns, rows, depth_mm[rows, columns]], -1), picture.camera)
    near = np.square(points - place).sum(1) < SURFACE_MM**2
    if bbox is not None:
        near &= off_box(points, camera, bbox) <= 0.5
    return points[near].mean(0) if near.any() else place


def coarse_picture(frame, camera):
    """Return the Picture of a Frame: every n-th pixel, specks removed, one pixel of nothing around it."""
    step = max(1, round(camera.fx / COARSE_FOCAL_PX))
    depth = frame.depth_mm[step // 2 :: step, step // 2 :: step].astype(np.float32)
    depth = cv2.medianBlur(np.pad(depth, 1), 3)  # the frame's border ends a surface, as a hole does
    u0, v0 = camera.u0 - frame.left, camera.v0 - frame.top
    small = Camera(
        camera.fx / step, camera.fy / step, (u0 - step // 2) / step + 1, (v0 - step // 2) / step + 1
    )
    nearest = cv2.erode(np.where(depth > 0, depth, np.float32(np.inf)), SQUARE)
    inside = (depth > 0) & (depth - nearest < JUMP_MM)
    radius_px = cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 3)
    return Picture(depth, small, radius_px * depth / (small.fx * small.fy) ** 0.5)


def candidates(picture):
    """Return places [N, 3] xyz in the middle of what is as wide as a palm, the widest first."""
    radius_mm = picture.radius_mm
    low, high = PALM_RADIUS_MM
    peaks = (radius_mm == cv2.dilate(radius_mm, np.ones((5, 5), np.uint8))) & (radius_mm > low)
    rows, columns = np.nonzero(peaks & (radius_mm < high) & (picture.depth_mm < FARTHEST_MM))
    order = np.argsort(-radius_mm[rows, columns], kind="stable")
    rows, columns = rows[order], columns[order]
    xyz = uvd2xyz(np.stack([columns, rows, picture.depth_mm[rows, columns]], -1), picture.camera)
    kept = np.zeros((0, 3))
    for place in xyz:
        if (np.square(kept - place).sum(1) > SAME_PLACE_MM**2).all():
            kept = np.concatenate([kept, [place]])
    return kept


def crops_around(picture, places):
    """Return the classifier's crops [N, CROP_PX, CROP_PX] at places [N, 3] xyz: -1 near, 1 far or nothing."""
    crops = np.empty((len(places), CROP_PX, CROP_PX), np.float32)
    for crop, (u, v, d) in zip(crops, xyz2uvd(places, picture.camera)):
        edge = max(2, round(2 * REACH_MM * picture.camera.fx / d))
        left, top = round(u - edge / 2), round(v - edge / 2)
        columns, rows = slice(max(0, left), max(0, left + edge)), slice(max(0, top), max(0, top + edge))
        part = picture.depth_mm[rows, columns]
        relative = np.full((edge, edge), 1, np.float32)
        seen = np.clip((part - np.float32(d)) / np.float32(REACH_MM), -1, 1)
        seen[part == 0] = 1
        row, column = rows.start - top, columns.start - left
        relative[row : row + part.shape[0], column : column + part.shape[1]] = seen
        cv2.resize(relative, (CROP_PX, CROP_PX), dst=crop, interpolation=cv2.INTER_AREA)
    return crops


@lru_cache
def load_classifier():
    """Return the trained HandClassifier. Raises UserError where its file is missing or damaged."""
    network, advice = HandClassifier(), "restore it with git, or run `python -m tools.train_handfinder`"
    try:
        network.load_state_dict(load_torch(WEIGHTS)["state_dict"])
    except Exception as error:  # torch raises errors of any kind at changed bytes
        raise UserError(f"the hand finder's {WEIGHTS} cannot be used ({one_line(error)}): {advice}") from None
    return network.eval().to(memory_format=torch.channels_last)  # twice as fast


@torch.inference_mode()
def classify(picture, places, mirrored=False):
    """Return the score of places [N, 3] xyz and the middles of the hands seen there, [N, 3] xyz mm.

    With `mirrored` they are the means over each place's crop and its mirror image.
    """
    crops = torch.from_numpy(crops_around(picture, places))[:, None]
    if mirrored:
        crops = torch.cat([crops, crops.flip(3)])
    logits, offsets = load_classifier()(crops.contiguous(memory_format=torch.channels_last))
    logits = logits.double().numpy().reshape(1 + mirrored, len(places))
    offsets = offsets.double().numpy().reshape(1 + mirrored, len(places), 3)
    offsets[1:, :, 0] *= -1
    middles = places + REACH_MM * offsets.mean(0)
    middles[:, 2] = np.maximum(middles[:, 2], LEAST_DEPTH_MM)
    return logits.mean(0), middles
