"""Finding the hand in a depth frame by its size, its shape and its place at the end of an arm."""

from typing import NamedTuple

import cv2
import numpy as np

from transforms import uvd2xyz, xyz2uvd

# All is measured on a picture of about this focal length, px: 4 mm a pixel half a metre away.
COARSE_FOCAL_PX = 120

# Two neighbouring pixels further apart in depth than this belong to two surfaces.
JUMP_MM = 40.0

# The largest disc that fits into a palm, a fist or a hand seen from its edge has about such a radius.
PALM_RADIUS_MM = (10.0, 60.0)

# What lies within REACH of a hand's middle is looked at; a hand itself stays within HAND.
REACH_MM, HAND_MM = 170.0, 120.0

# A forearm is thicker than a finger (radius of the largest disc), and still there beyond the hand.
ARM_RADIUS_MM, BEYOND_HAND_MM = 16.0, 105.0

# The wrist lies about so far from the middle of a hand's surface.
WRIST_MM = 70.0

REFINE_STEPS = 4
SQUARE = np.ones((3, 3), np.uint8)
SAME_PLACE_MM = 30.0
SURFACE_MM2 = (2000.0, 45000.0)

# What makes a surface a hand: the weights of its _Shape, fitted (conditional logistic regression) on 605
# rendered frames of four sensors, a third of them with bars, tables and specks added. And what a place
# loses for each mm that it lies behind the nearest.
WEIGHTS = np.array([1.6, -0.28, -0.33, 3.5, 4.55, -8.1, -3.7])
FARTHER_PER_MM = 0.0105
LEAST_LIKENESS = -1.5

# What a place gains where the hand was in the frame before; nothing from this distance on.
TRACK_BONUS, TRACK_MM = 3.0, 180.0


class _Picture(NamedTuple):
    """A coarse depth picture: points xyz [3, h, w] mm, which pixels lie inside a surface and which hold
    nothing, radius (mm) of the largest disc around each that stays on its surface, focal length (px)."""

    xyz: np.ndarray
    inside: np.ndarray
    empty: np.ndarray
    radius_mm: np.ndarray
    focal_px: float


class _Shape(NamedTuple):
    """What tells hands from other surfaces: area within three distances (1000 mm2), share that is too thick
    and too far out for a palm, logarithm of the outline's raggedness (0: a disc), share of the convex hull
    that is filled, length along the picture's border (100 mm)."""

    area_60: float
    area_100: float
    area_160: float
    thick: float
    ragged: float
    solid: float
    border: float


class _Patch(NamedTuple):
    """The surface within reach of a place: rows and columns [N] of its pixels in the picture, and their
    points [3, N] mm, distance to the place (mm), disc radius (mm) and area (mm2)."""

    rows: np.ndarray
    columns: np.ndarray
    points: np.ndarray
    distance_mm: np.ndarray
    radius_mm: np.ndarray
    area_mm2: np.ndarray


def find_center(frame, camera, near_uvd=None):
    """Find the hand; return the middle of its surface (mean column, row, depth), uvd.

    Every place where a surface is as wide as a palm is moved to the middle of the hand that would
    be there: the mass within a hand's reach, without what lies beyond the wrist if an arm leads
    away. Then the place wins that is most like a hand in size and outline, and the nearer one of
    equals. `near_uvd` is where the hand was in the frame before; places near it are preferred.
    Raises ValueError, with the reason, where there is no hand.
    """
    picture = _coarse(frame, camera)
    if not picture.inside.any():
        raise ValueError("the frame is empty")
    places = _places(picture)
    if not places:
        raise ValueError("no surface is as large as a hand")
    xyz = np.array([middle for middle, _ in places], np.float64)
    likeness = np.array([shape for _, shape in places]) @ WEIGHTS
    if near_uvd is not None:
        away_mm = np.linalg.norm(xyz - uvd2xyz(near_uvd, camera), axis=1)
        likeness += TRACK_BONUS * np.maximum(1 - away_mm / TRACK_MM, 0)
    best = (likeness - FARTHER_PER_MM * np.minimum(xyz[:, 2] - xyz[:, 2].min(), 500)).argmax()
    if likeness[best] < LEAST_LIKENESS:
        raise ValueError("nothing in the frame looks like a hand")
    return xyz2uvd(xyz[best], camera)


def _coarse(frame, camera):
    step = max(1, round(camera.fx / COARSE_FOCAL_PX))
    depth = frame.depth_mm[step // 2 :: step, step // 2 :: step].astype(np.float32)
    depth = cv2.medianBlur(np.pad(depth, 1), 3)  # the frame's border ends a surface, as a hole does
    height, width = depth.shape
    columns = (np.arange(width, dtype=np.float32) - 1) * step + step // 2 + frame.left
    rows = (np.arange(height, dtype=np.float32) - 1) * step + step // 2 + frame.top
    ray_x, ray_y = (columns - camera.u0) / camera.fx, (rows - camera.v0) / camera.fy
    xyz = np.stack([ray_x * depth, ray_y[:, None] * depth, depth])
    nearest = cv2.erode(np.where(depth > 0, depth, np.float32(np.inf)), SQUARE)
    inside = (depth > 0) & (depth - nearest < JUMP_MM)
    focal_px = (camera.fx * camera.fy) ** 0.5 / step
    radius_mm = cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 3) * depth / focal_px
    return _Picture(xyz, inside, depth == 0, radius_mm, focal_px)


def _places(picture):
    """Return the (middle xyz [3], _Shape) of every surface that a hand might be."""
    radius_mm = picture.radius_mm
    peaks = (radius_mm == cv2.dilate(radius_mm, np.ones((5, 5), np.uint8))) & (radius_mm > PALM_RADIUS_MM[0])
    places, seen = [], np.zeros((0, 3))
    for row, column in np.argwhere(peaks & (radius_mm < PALM_RADIUS_MM[1])):
        xyz = picture.xyz[:, row, column]
        if (np.square(seen - xyz).sum(1) < SAME_PLACE_MM**2).any():
            continue
        middle, patch = _refine(picture, row, column)
        known = (np.square(seen - middle).sum(1) < SAME_PLACE_MM**2).any()
        seen = np.concatenate([seen, [xyz, middle]])
        if not known and SURFACE_MM2[0] < patch.area_mm2.sum() < SURFACE_MM2[1]:
            places.append((middle, _describe(patch, picture.inside.shape)))
    return places


def _refine(picture, row, column):
    """Move from a pixel of a surface to the middle of the hand around it; return it and its patch."""
    xyz = picture.xyz[:, row, column]
    patch = _patch(picture, xyz, row, column)
    for _ in range(REFINE_STEPS):
        kept = _hand_part(patch, xyz)
        if not (kept.any() and patch.area_mm2.sum() < SURFACE_MM2[1]):
            break
        xyz = np.average(patch.points[:, kept], axis=1, weights=patch.area_mm2[kept])
        closest = _squared_length(patch.points, xyz).argmin()
        patch = _patch(picture, xyz, patch.rows[closest], patch.columns[closest])
    return xyz, patch


def _squared_length(points, origin):
    x, y, z = points[0] - origin[0], points[1] - origin[1], points[2] - origin[2]
    return x * x + y * y + z * z


def _patch(picture, xyz, row, column):
    """Return the part of the surface at a pixel that lies within reach of a point."""
    half = int(REACH_MM * picture.focal_px / xyz[2] * 1.25) + 1
    top, left = max(0, row - half), max(0, column - half)
    window = np.s_[top : row + half + 1, left : column + half + 1]
    distance_mm = np.sqrt(_squared_length(picture.xyz[:, *window], xyz))
    near = picture.inside[window] & (distance_mm < REACH_MM)
    near[row - top, column - left] = True
    # Sensors lose a few pixels beside every edge, also of one finger before another: bridge such gaps.
    bridged = cv2.dilate(near.view(np.uint8), SQUARE) * (near | picture.empty[window])
    _, labels = cv2.connectedComponents(bridged, connectivity=4)
    rows, columns = np.nonzero(near & (labels == labels[row - top, column - left]))
    distance_mm = distance_mm[rows, columns]
    rows, columns = rows + top, columns + left
    points = picture.xyz[:, rows, columns]
    area_mm2 = np.square(points[2] / picture.focal_px)
    return _Patch(rows, columns, points, distance_mm, picture.radius_mm[rows, columns], area_mm2)


def _hand_part(patch, xyz):
    """Return which points of a patch are the hand's if its middle is at xyz: none beyond the wrist."""
    hand = patch.distance_mm < HAND_MM
    arm = (patch.distance_mm > BEYOND_HAND_MM) & (patch.radius_mm > ARM_RADIUS_MM)
    if patch.area_mm2[arm].sum() < 300:
        return hand
    weight = patch.area_mm2[arm] * (1 - BEYOND_HAND_MM / patch.distance_mm[arm])
    way = (patch.points[:, arm] - xyz[:, None]) @ weight
    return hand & (way @ (patch.points - xyz[:, None]) < WRIST_MM * np.linalg.norm(way))


def _describe(patch, shape):
    """Return the _Shape of a patch in a picture of so many (rows, columns)."""
    areas = [patch.area_mm2[patch.distance_mm < limit].sum() / 1000 for limit in (60, 100, 160)]
    arm = (patch.distance_mm > 60) & (patch.radius_mm > 14)
    thick = patch.area_mm2[arm].sum() / patch.area_mm2.sum()
    near = patch.distance_mm < HAND_MM
    rows, columns = patch.rows - patch.rows.min(), patch.columns - patch.columns.min()
    hand = np.zeros((rows.max() + 1, columns.max() + 1), np.uint8)
    hand[rows[near], columns[near]] = 1
    outlines, _ = cv2.findContours(hand, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return _Shape(*areas, thick, ragged=0, solid=1, border=0)
    length_px = sum(cv2.arcLength(outline, True) for outline in outlines)
    hull_px = cv2.contourArea(cv2.convexHull(np.concatenate(outlines)))
    ragged = np.log(np.clip(length_px**2 / (4 * np.pi * near.sum()), 1, 8))
    beside = (patch.rows <= 1) | (patch.columns <= 1)
    beside |= (patch.rows >= shape[0] - 2) | (patch.columns >= shape[1] - 2)
    border = np.sqrt(patch.area_mm2[beside & (patch.distance_mm < 100)]).sum() / 100
    return _Shape(*areas, thick, ragged, min(near.sum() / max(hull_px, 1), 1.2), border)
