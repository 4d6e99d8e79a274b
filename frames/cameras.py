"""Depth cameras by name or number, and the depth files that people have, read to millimetres."""

import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from datasets import DATASETS, MSRADataset
from frames.files import MAX_NUMBER, FrameError, decode_picture, read_bin, read_bytes, read_png, unpack_rgb
from frames.transforms import Camera
from utils import UserError

SUFFIXES = (".png", ".tif", ".tiff", ".npy", ".bin")

# In a folder these are taken for frames too, and refused with a reason, rather than passed over.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".bmp", ".webp")

# No camera measures as near as 50 mm, and no room is 50 m deep: below this a frame's median is in metres.
METRES_BELOW = 50.0


class DepthCamera(NamedTuple):
    """A camera, the mm that a stored depth of 1 means, and its picture's (width, height) or None."""

    camera: Camera
    unit_mm: float = 1.0
    size_px: tuple | None = None


# The data sets' own; for sensors their usual factory values, which differ by some per cent from one
# device to the next: a camera's own intrinsics, as its driver tells them, are better.
PRESETS = {
    **{name: DepthCamera(cls.camera, 1.0, cls.image_size_px) for name, cls in DATASETS.items()},
    "SR300": DepthCamera(DATASETS["HAND17"].camera, 0.125, (640, 480)),
    "SR305": DepthCamera(Camera(476.007, 476.007, 313.683, 242.755), 0.125, (640, 480)),
    "D435": DepthCamera(Camera(383.0, 383.0, 320.0, 240.0), 1.0, (640, 480)),
    "KinectV2": DepthCamera(Camera(365.456, 365.456, 254.878, 205.395), 1.0, (512, 424)),
    "AzureKinect": DepthCamera(Camera(504.5, 504.5, 320.0, 333.0), 1.0, (640, 576)),
}


def parse_camera(text):
    """Return the DepthCamera that `FX,FY,U0,V0`, a preset's name or a YAML (or JSON) file describes.

    The file holds fx, fy, u0, v0 (px) and may hold depth_unit_mm, width and height, at its top or
    below `camera`. Raises UserError where the text is none of these.
    """
    for name, preset in PRESETS.items():
        if str(text).lower() == name.lower():
            return preset
    if Path(text).suffix.lower() in (".yml", ".yaml", ".json"):
        return _read_camera(Path(text))
    numbers = parse_numbers(text, 4, "--camera")
    if min(numbers[:2]) <= 0:
        raise UserError(f"--camera {text}: focal lengths must be above 0")
    return DepthCamera(Camera(*numbers))


def parse_numbers(text, count, option):
    """Return `count` finite floats from comma-separated text. Raises UserError."""
    try:
        numbers = tuple(float(part) for part in str(text).split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not np.isfinite(numbers).all():
        known = f", a YAML file or one of {', '.join(PRESETS)}" if option == "--camera" else ""
        raise UserError(f"{option} {text}: expected {count} numbers separated by commas{known}")
    return numbers


def _read_camera(path):
    try:
        options = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--camera {path} cannot be read: {' '.join(str(error).split())[:120]}") from error
    options = options.get("camera", options) if isinstance(options, dict) else {}
    try:
        fx, fy, u0, v0 = (float(options[key]) for key in ("fx", "fy", "u0", "v0"))
        unit_mm = float(options.get("depth_unit_mm", 1.0))
        size_px = (int(options["width"]), int(options["height"])) if "width" in options else None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--camera {path}: expected numbers fx, fy, u0 and v0 (px): {type(error).__name__} {error}"
        ) from None
    if not (fx > 0 and fy > 0 and unit_mm > 0 and np.isfinite((fx, fy, u0, v0, unit_mm)).all()):
        raise UserError(f"--camera {path}: focal lengths and depth_unit_mm must be above 0")
    return DepthCamera(Camera(fx, fy, u0, v0), unit_mm, size_px)


def list_frames(path):
    """Return the files of a folder that may be frames, in the order of the numbers in their names.

    Raises UserError where the folder cannot be read or holds none.
    """
    path = Path(path)
    try:
        files = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES + PICTURE_SUFFIXES]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not files:
        raise UserError(f"{path} holds no depth frame: expected files named {', '.join(SUFFIXES)}")
    return sorted(
        files, key=lambda file: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", file.name)]
    )


def read_depth(path, depth_camera):
    """Return a frame's depth [H, W] in mm, 0 where nothing was measured.

    Reads 16-bit and NYU-style PNG, TIFF, `.npy` and MSRA's `.bin`; uint16 where the unit is 1 mm.
    Raises FrameError where the file is none of these or holds impossible depths.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    reader = {
        ".png": _read_png,
        ".tif": _read_tiff,
        ".tiff": _read_tiff,
        ".npy": _read_npy,
        ".bin": _read_bin,
    }
    if not path.exists():
        raise FrameError(path, "the file or folder is missing")
    if suffix not in reader:
        raise FrameError(
            path, f"{suffix or 'a file without suffix'} holds no depth: give {', '.join(SUFFIXES)}"
        )
    try:
        return check_depth(reader[suffix](path), depth_camera.unit_mm, depth_camera.size_px)
    except ValueError as error:
        raise FrameError(path, str(error)) from None


def check_depth(depth, unit_mm=1.0, size_px=None):
    """Return a depth picture [H, W] in mm: uint16 as it is, or float32. Never writes to its input.

    Raises ValueError where it is no depth picture, not of `size_px` (width, height), in metres, or
    holds negative or undefined depths.
    """
    depth = np.asarray(depth)
    if depth.ndim != 2 or depth.dtype.kind not in "uif" or depth.dtype.itemsize < 2 or 0 in depth.shape:
        found = f"{depth.dtype} {list(depth.shape)}"
        raise ValueError(f"expected 16-bit or float depths [H, W] of one frame, found {found}")
    height, width = depth.shape
    if size_px not in (None, (width, height)):
        known = "x".join(map(str, size_px))
        raise ValueError(f"the frame has {width}x{height} px, the camera {known}: give this stream's camera")
    if depth.dtype != np.uint16 or unit_mm != 1:
        depth = _scaled(depth, unit_mm)
    some = depth[::3, ::3]  # enough to tell mm from metres
    measured = some[some > 0]
    if len(measured) and np.median(measured) < METRES_BELOW:
        raise ValueError(
            f"the median depth is {np.median(measured):g} mm, too near for a camera: "
            "for metres give --depth_unit 1000, in Python multiply by 1000"
        )
    return depth


def _scaled(depth, unit_mm):
    """Return a picture's depths as float32 mm. Raises ValueError where one is negative or undefined."""
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is told below
        depth = depth.astype(np.float32, copy=False)
        depth = depth if unit_mm == 1 else depth * np.float32(unit_mm)
    undefined, negative = (~(np.abs(depth) < MAX_NUMBER)).sum(), (depth < 0).sum()
    if undefined:
        raise ValueError(
            f"{undefined} depths are not finite or beyond any room: set what is not measured to 0"
        )
    if negative:
        raise ValueError(f"{negative} depths are negative: set what is not measured to 0")
    return depth


def _read_png(path):
    image = read_png(path)
    if image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and not image[..., 2].any():
        return unpack_rgb(image)
    if image.dtype != np.uint16 or image.ndim != 2:
        raise FrameError(path, _not_depth(image))
    return image


def _read_tiff(path):
    image = decode_picture(path, read_bytes(path))
    if image.ndim != 2 or image.dtype == np.uint8:
        raise FrameError(path, _not_depth(image))
    return image


def _not_depth(image):
    kind = "colour" if image.ndim == 3 else "grey"
    return f"expected a 16-bit depth picture, found {8 * image.dtype.itemsize}-bit {kind}"


def _read_npy(path):
    data = io.BytesIO(read_bytes(path))
    try:
        return np.load(data, allow_pickle=False)
    except Exception as error:  # NumPy reads the header as Python text, and raises whatever comes of that
        raise FrameError(path, f"the array cannot be read: {' '.join(str(error).split())[:80]}") from None


def _read_bin(path):
    part = read_bin(path, MSRADataset.image_size_px)
    width, height = MSRADataset.image_size_px
    depth = np.zeros((height, width), np.float32)
    depth[part.top : part.rect.bottom, part.left : part.rect.right] = part.depth_mm
    return depth
