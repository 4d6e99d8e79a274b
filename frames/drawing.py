"""Pictures of crops, skeletons and heatmaps, and their files."""

import cv2
import numpy as np

from model import grid_position
from utils import atomic_path

# One colour a finger, RGB: thumb, index, middle, ring, little, palm.
FINGER_COLOURS = (
    (230, 60, 50),
    (245, 170, 40),
    (90, 190, 70),
    (50, 150, 230),
    (160, 90, 210),
    (140, 140, 140),
)


def colour_depth(image):
    """Return an RGB uint8 [H, W, 3] picture of relative depth [H, W] (over the cube); 0 is black."""
    shade = np.clip((1 - image) * 127.5, 0, 255).astype(np.uint8)
    picture = cv2.cvtColor(cv2.applyColorMap(shade, cv2.COLORMAP_BONE), cv2.COLOR_BGR2RGB)
    picture[image == 0] = 0
    return picture


def draw_skeleton(picture, joints_px, chains):
    """Draw finger chains over an RGB picture, in place; joints_px is [J, 2], (column, row).

    Joints that are NaN are drawn in a corner, infinite ones nowhere.
    """
    joints_px = np.clip(np.nan_to_num(joints_px), -1e4, 1e4)
    points = [tuple(int(c) for c in point) for point in np.round(joints_px * 16)]
    width = max(1, picture.shape[0] // 128)
    for chain, colour in zip(chains, FINGER_COLOURS):
        for start, end in zip(chain, chain[1:]):
            cv2.line(picture, points[start], points[end], colour, width, cv2.LINE_AA, shift=4)
        for joint in chain:
            cv2.circle(picture, points[joint], 24 * width, colour, -1, cv2.LINE_AA, shift=4)
    return picture


def draw_crop(image, uvd, chains, size=256):
    """Return an RGB [size, size, 3] picture of a crop [S, S] with normalised joints uvd [J, 3]."""
    picture = cv2.resize(colour_depth(image), (size, size), interpolation=cv2.INTER_NEAREST)
    own = image.shape[0]
    joints_px = (grid_position(np.asarray(uvd)[:, :2], own) + 0.5) * (size / own) - 0.5
    return draw_skeleton(picture, joints_px, chains)


def draw_heatmaps(heatmaps, size=256):
    """Return an RGB [size, size, 3] picture of the brightest of heatmaps [J, L, L] at each pixel."""
    peaks = heatmaps.max(axis=(1, 2), keepdims=True)
    strongest = (heatmaps / np.maximum(peaks, 1e-12)).max(axis=0)
    coloured = cv2.applyColorMap((strongest * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return cv2.cvtColor(cv2.resize(coloured, (size, size)), cv2.COLOR_BGR2RGB)


def draw_comparison(image, true, predicted, chains, size=256):
    """Return one RGB picture: true beside predicted skeleton, and below them their heatmaps.

    `true` and `predicted` are (uvd [J, 3] normalised, heatmaps [J, L, L]).
    """
    columns = [
        np.vstack([draw_crop(image, uvd, chains, size), draw_heatmaps(heatmaps, size)])
        for uvd, heatmaps in (true, predicted)
    ]
    return np.hstack(columns)


def write_picture(path, picture, options=()):
    """Write an RGB uint8 picture atomically; the suffix chooses the format, `options` are OpenCV's."""
    with atomic_path(path) as temporary:
        # cv2.imwrite does not tell when the disk is full.
        temporary.write_bytes(cv2.imencode(path.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)[1])
