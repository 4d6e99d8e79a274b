"""A frame's crop as the network takes it: its named fields, and the one way to make it."""

from typing import NamedTuple

import numpy as np
import torch

from frames.transforms import (
    Augmentation,
    Frame,
    Rect,
    augment_image,
    box_size_px,
    crop_hand,
    hand_part,
    resize,
    uvd2xyz,
    window_around,
    xyz2uvd,
)

MIN_HAND_PIXELS = 10

# The published sizes: on these a frame is judged, so that its use does not depend on the network's.
IMAGE_SIZE, LABEL_SIZE = 128, 64


class HandFrame(NamedTuple):
    """What a sample is made of: a frame, the hand's middle (uvd) and half the edge of the cube around it.

    Pixels outside `window` count as empty; None: all count. `joints_uvd` is [J, 3], or None where unknown.
    """

    frame: Frame
    center_uvd: np.ndarray
    cube_mm: float
    window: Rect | None = None
    joints_uvd: np.ndarray | None = None


def move_hand(hand, shift_mm, margin_mm, camera):
    """Return a HandFrame whose middle is moved by (x, y, z) mm, and with it the window, if it has one.

    `margin_mm` is how much narrower than the cube the window is, None where there is none.
    """
    if not any(shift_mm):
        return hand
    center_uvd = xyz2uvd(uvd2xyz(hand.center_uvd, camera) + shift_mm, camera)
    window = None
    if margin_mm is not None:
        window = window_around(center_uvd, hand.cube_mm - margin_mm, camera)
    # As much as a crop cache keeps of a frame, so that a sample does not depend on there being one.
    part = hand_part(hand.frame, hand.center_uvd[2], hand.cube_mm, hand.window)
    return hand._replace(frame=part, center_uvd=center_uvd, window=window)


class Sample(NamedTuple):
    """One crop, or a batch of them with a leading dimension; depths are over the cube, relative to com.

    img [1, S, S]; label_img and mask [1, L, L]; box_size px and cube_size mm: scalars; com [3]:
    (column, row, depth mm); uvd [J, 3] normalised; heatmaps and depthmaps [J, L, L].
    """

    img: torch.Tensor
    label_img: torch.Tensor
    mask: torch.Tensor
    box_size: torch.Tensor
    cube_size: torch.Tensor
    com: torch.Tensor
    uvd: torch.Tensor
    heatmaps: torch.Tensor
    depthmaps: torch.Tensor


class UnlabelledSample(NamedTuple):
    """The first six fields of a Sample: what is known without labels."""

    img: torch.Tensor
    label_img: torch.Tensor
    mask: torch.Tensor
    box_size: torch.Tensor
    cube_size: torch.Tensor
    com: torch.Tensor


def prepare_crop(
    frame,
    center_uvd,
    cube_mm,
    camera,
    *,
    window=None,
    image_size=IMAGE_SIZE,
    label_size=LABEL_SIZE,
    augmentation=Augmentation(),  # noqa: B008 (a named tuple cannot change)
):
    """Return the network's input for one hand, an UnlabelledSample.

    `frame` is a Frame in mm, `center_uvd` the hand's middle (column px, row px, depth mm; column and
    row are truncated), `cube_mm` half the edge of the cube around it. Pixels outside `window` (a
    Rect) count as empty. Raises ValueError for an impossible depth of the centre, and where too few
    pixels of a hand are in the crop.
    """
    box_px = box_size_px(center_uvd[2], cube_mm, camera)
    com = np.array([int(center_uvd[0]), int(center_uvd[1]), center_uvd[2]])
    crop = crop_hand(frame, com, box_px, cube_mm, window)
    image, label_image = _pictures(crop, augmentation, image_size, label_size)
    mask = label_image != 0
    if label_size > LABEL_SIZE or np.count_nonzero(mask) < MIN_HAND_PIXELS:
        _, judged = _pictures(crop, augmentation, IMAGE_SIZE, LABEL_SIZE)
        if np.count_nonzero(judged) < MIN_HAND_PIXELS:
            raise ValueError(f"fewer than {MIN_HAND_PIXELS} hand pixels in the crop")
    return UnlabelledSample(
        _channel(image / np.float32(cube_mm)),
        _channel(label_image / np.float32(cube_mm)),
        _channel(mask),
        to_tensor(box_px),
        to_tensor(cube_mm),
        to_tensor(com),
    )


def _pictures(crop, augmentation, image_size, label_size):
    """Return a crop, augmented, at both sizes."""
    image = augment_image(resize(crop, image_size), augmentation)
    return image, resize(image, label_size)


def to_tensor(values):
    """Return numbers or an array as a float32 tensor."""
    # Four times as fast as torch.tensor, which looks at every element's type.
    return torch.from_numpy(np.asarray(values, np.float32))


def _channel(image):
    return to_tensor(image[None])
