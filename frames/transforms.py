"""Camera geometry, hand crop and augmentation as pure functions on NumPy arrays."""

import math
from typing import NamedTuple

import cv2
import numpy as np

SHIFT_PX = 5.0
ROTATION_DEG = 30.0
SCALE_RANGE = (0.8, 1.2)
ERASED_EDGE = (0.1, 0.4)  # of an erased rectangle, over the crop's

# A hand so near that its crop exceeds this is a wrong centre, and would not fit in memory.
MAX_BOX_PX = 4096


class Camera(NamedTuple):
    """A pinhole camera: focal lengths and principal point, px."""

    fx: float
    fy: float
    u0: float
    v0: float


class Rect(NamedTuple):
    """Pixel rectangle; right and bottom are exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    def intersect(self, other):
        """Return the common rectangle, of zero size where there is none."""
        left, top = max(self.left, other.left), max(self.top, other.top)
        return Rect(
            left, top, max(left, min(self.right, other.right)), max(top, min(self.bottom, other.bottom))
        )


class Frame(NamedTuple):
    """A depth picture, or the part of one whose first pixel is column `left`, row `top`.

    `depth_mm` is [h, w], uint16 or float32, 0 where nothing was measured.
    """

    depth_mm: np.ndarray
    left: int = 0
    top: int = 0

    @property
    def rect(self):
        """The pixels of the picture that this frame holds."""
        height, width = self.depth_mm.shape
        return Rect(self.left, self.top, self.left + width, self.top + height)

    def within(self, part):
        """Return the depths, a view, of a Rect that lies inside the frame."""
        return self.depth_mm[
            part.top - self.top : part.bottom - self.top, part.left - self.left : part.right - self.left
        ]


class Augmentation(NamedTuple):
    """One explicit augmentation: rotation in degrees, scale, shift of the centre in px, mirror.

    Beyond the published ones: shift of the centre in mm (x, y, z), the rectangle that is emptied (left, top,
    width, height over the crop's edge, or None), noise on what was measured (standard deviation in mm, seed).
    """

    angle_deg: float = 0.0
    scale: float = 1.0
    shift_px: tuple = (0.0, 0.0)
    flip: bool = False
    shift_mm: tuple = (0.0, 0.0, 0.0)
    erased: tuple | None = None
    noise: tuple = (0.0, 0)


def xyz2uvd(xyz, camera):
    """Project camera-frame points [..., 3] in mm to (column px, row px, depth mm)."""
    xyz = np.asarray(xyz)
    x, y, z = xyz[..., 0], xyz[..., 1], xyz[..., 2]
    return np.stack([x * camera.fx / z + camera.u0, y * camera.fy / z + camera.v0, z], axis=-1)


def uvd2xyz(uvd, camera):
    """Back-project (column px, row px, depth mm) [..., 3] to camera-frame points in mm."""
    uvd = np.asarray(uvd)
    u, v, d = uvd[..., 0], uvd[..., 1], uvd[..., 2]
    return np.stack([(u - camera.u0) * d / camera.fx, (v - camera.v0) * d / camera.fy, d], axis=-1)


def window_around(center_uvd, half_mm, camera):
    """Return the Rect that reaches `half_mm` to each side of a centre at the centre's depth."""
    u, v, d = (float(c) for c in center_uvd)
    half_u, half_v = half_mm / d * camera.fx, half_mm / d * camera.fy
    return Rect(int(u - half_u), int(v - half_v), int(u + half_u), int(v + half_v))


def box_size_px(center_d_mm, cube_mm, camera):
    """Return the edge, an even number of px, of the crop that shows the whole cube.

    Raises ValueError where the centre has no finite depth or is so near that the crop is absurd.
    """
    if not (np.isfinite(center_d_mm) and center_d_mm > 0):
        raise ValueError(f"centre depth {center_d_mm:g} mm is not a positive number")
    half_px = cube_mm / center_d_mm
    edge_px = half_px * camera.fx + half_px * camera.fy
    if not edge_px < MAX_BOX_PX:
        raise ValueError(
            f"centre depth {center_d_mm:g} mm is too near: its crop would be {edge_px:.0f} px wide"
        )
    return 2 * (max(int(edge_px), 2) // 2)


def crop_hand(frame, center_uvd, box_px, cube_mm, window=None):
    """Cut the cube around a centre out of a frame.

    `center_uvd` is (column, row, depth mm) with whole-numbered column and row; pixels outside
    `window` (a Rect), the frame, or the depth range centre +- cube are zero.
    Returns float32 [box_px, box_px], depth relative to the centre, mm.
    """
    u, v, d = int(center_uvd[0]), int(center_uvd[1]), float(center_uvd[2])
    left, top = u - box_px // 2, v - box_px // 2
    part = Rect(left, top, left + box_px, top + box_px).intersect(frame.rect)
    if window is not None:
        part = part.intersect(window)
    depth = frame.within(part).astype(np.float32)
    hand = _in_cube(depth, d, cube_mm)
    depth -= np.float32(d)
    crop = np.zeros((box_px, box_px), np.float32)
    np.multiply(
        depth, hand, out=crop[part.top - top : part.bottom - top, part.left - left : part.right - left]
    )
    return crop


def hand_part(frame, center_d_mm, cube_mm, window=None):
    """Return the smallest part of a frame that holds every pixel `crop_hand` may keep, at any shift in px."""
    part = frame.rect if window is None else frame.rect.intersect(window)
    hand = _in_cube(frame.within(part).astype(np.float32), float(center_d_mm), cube_mm)
    rows, columns = np.flatnonzero(hand.any(axis=1)), np.flatnonzero(hand.any(axis=0))
    if len(rows) == 0:
        return Frame(frame.depth_mm[:0, :0])
    part = Rect(
        part.left + int(columns[0]),
        part.top + int(rows[0]),
        part.left + int(columns[-1]) + 1,
        part.top + int(rows[-1]) + 1,
    )
    return Frame(frame.within(part), part.left, part.top)


def _in_cube(depth, center_d_mm, cube_mm):
    """Return the mask of what was measured strictly between the cube's front and back; depth is float32."""
    return (depth > max(center_d_mm - cube_mm, 0.0)) & (depth < center_d_mm + cube_mm)


def resize(image, size):
    """Resize [H, W] bilinearly, in OpenCV's convention, to [size, size]."""
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)


def draw_augmentation(
    rng,
    rotation=True,
    scale=True,
    shift=True,
    flip=False,
    *,
    rotation_deg=ROTATION_DEG,
    shift_mm=0.0,
    erasing=0.0,
    noise_mm=0.0,
):
    """Draw one Augmentation from `rng`, which has `random()`; a part that is off stays neutral.

    `rotation_deg` is the largest angle, `shift_mm` the largest shift of the centre along each axis, `erasing`
    the share of crops that lose a rectangle, `noise_mm` the noise's standard deviation.
    Every part consumes its draws also when off, so that switching one leaves the others alike.
    """
    angle, factor, shift_u, shift_v, mirrored = (rng.random() for _ in range(5))
    *shift_xyz, erased, width, height, left, top, seed = (rng.random() for _ in range(9))
    smallest, largest = SCALE_RANGE
    edges = [ERASED_EDGE[0] + (ERASED_EDGE[1] - ERASED_EDGE[0]) * edge for edge in (width, height)]
    corner = [place * (1 - edge) for place, edge in zip((left, top), edges)]
    return Augmentation(
        rotation_deg * (2 * angle - 1) if rotation else 0.0,
        smallest + (largest - smallest) * factor if scale else 1.0,
        (SHIFT_PX * (2 * shift_u - 1), SHIFT_PX * (2 * shift_v - 1)) if shift else (0.0, 0.0),
        flip and mirrored < 0.5,
        tuple(shift_mm * (2 * part - 1) for part in shift_xyz) if shift_mm else (0.0, 0.0, 0.0),
        (*corner, *edges) if erased < erasing else None,
        (noise_mm, int(seed * 2**32)) if noise_mm else (0.0, 0),
    )


def augment_image(image, augmentation):
    """Mirror, turn and scale a crop [S, S] about pixel (S // 2, S // 2); relative depths scale too.

    Then noise is added to what was measured, and last a rectangle is emptied. The depths are in mm.
    """
    if augmentation.flip:
        image = np.ascontiguousarray(image[:, ::-1])
    size = image.shape[0]
    if augmentation.angle_deg != 0 or augmentation.scale != 1:
        matrix = cv2.getRotationMatrix2D((size // 2, size // 2), augmentation.angle_deg, augmentation.scale)
        image = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR) * np.float32(
            augmentation.scale
        )
    if augmentation.noise[0]:
        noise = np.random.default_rng(augmentation.noise[1]).standard_normal(image.shape, np.float32)
        image = image + noise * np.float32(augmentation.noise[0]) * (image != 0)
    if augmentation.erased:
        left, top, width, height = (round(size * part) for part in augmentation.erased)
        image = image.copy()
        image[top : top + height, left : left + width] = 0
    return image


def augment_joints(uvd, augmentation):
    """Apply what `augment_image` does to joints [J, 3] relative to the centre (px of the crop, mm)."""
    angle, scale = math.radians(augmentation.angle_deg), augmentation.scale
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    mirror = -1 if augmentation.flip else 1
    return uvd @ np.array([[mirror * cos, -mirror * sin, 0], [sin, cos, 0], [0, 0, scale]])


def joints_to_crop(joints_uvd, center_uvd, box_px, image_size):
    """Return joints [J, 3] relative to the centre: px of the `image_size` crop, and mm."""
    stretch = (image_size - 1) / (box_px - 1)
    return (np.asarray(joints_uvd, np.float64) - center_uvd) * (stretch, stretch, 1)


def recover_uvd(uvd, box_px, cube_mm, center_uvd):
    """Turn normalised joints [..., J, 3] back into (column px, row px, depth mm) of the frame.

    `box_px` and `cube_mm` are [...], `center_uvd` is [..., 3].
    """
    box_px, cube_mm = np.asarray(box_px)[..., None], np.asarray(cube_mm)[..., None]
    scale = np.stack([box_px - 1, box_px - 1, cube_mm], axis=-1)
    return np.asarray(uvd) * scale + np.asarray(center_uvd)[..., None, :]


def center_of_mass(frame):
    """Return mean column, mean row and mean depth of the non-zero pixels, uvd.

    Raises ValueError where there are none.
    """
    rows, columns = np.nonzero(frame.depth_mm)
    if len(rows) == 0:
        raise ValueError("the frame is empty")
    depth = frame.depth_mm[rows, columns]
    return np.array([columns.mean() + frame.left, rows.mean() + frame.top, depth.mean(dtype=np.float64)])


def cut_bounding_box(frame, bbox):
    """Keep the hand in a bounding box (left, top, width, height; px): drop what lies far behind it.

    The mean depth of the box, then of what is nearer than that plus 100 mm, then cut 100 mm
    behind the second mean, as the HANDS17 frame task is commonly prepared.
    Raises ValueError where the box holds no depth.
    """
    left, top, width, height = (int(b) for b in bbox)
    part = Rect(left, top, left + width, top + height).intersect(frame.rect)
    depth = frame.within(part).astype(np.float32)
    if not depth.any():
        raise ValueError("the bounding box holds no depth")
    near = depth[(depth != 0) & (depth <= depth[depth != 0].mean(dtype=np.float64) + 100)]
    return Frame(
        np.where(depth <= near.mean(dtype=np.float64) + 100, depth, np.float32(0)), part.left, part.top
    )
