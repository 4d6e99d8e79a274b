"""Depth cameras by name, number or file, and the depth files that people have, read to millimetres."""

import io
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import yaml

from frames.files import MAX_NUMBER, FrameError, decode_picture, read_bin, read_bytes, read_png, unpack_rgb
from frames.transforms import Camera
from utils import UserError, one_line, say

# In a folder these are taken for frames too, and refused with a reason, rather than passed over.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".bmp", ".webp")

# A nearer hand fills any picture, a farther one is too small to read; no room's middle is so far away.
NEAREST_MM, FARTHEST_MM, ROOM_MM = 150.0, 2000.0, 30000.0

# What depth files hold, in mm: millimetres, metres, RealSense's short-range cameras' unit, tenths, cm.
UNITS_MM = (1.0, 1000.0, 0.125, 0.1, 10.0)

# As uint16 this is what cameras write for "beyond all", not a distance.
SATURATED = 65535


class DepthCamera(NamedTuple):
    """A camera, the mm that a stored depth of 1 means, and its picture's (width, height) or None.

    `packed`: 8-bit colour pictures hold depth as NYU's do, 256 * green + blue. `distorted`: its lens bends
    straight lines, which is not corrected.
    """

    camera: Camera
    unit_mm: float = 1.0
    size_px: tuple | None = None
    packed: bool = False
    distorted: bool = False


SR300 = Camera(475.065948, 475.065857, 315.944855, 245.287079)  # HANDS17 was recorded with one

# The data sets' as their authors give them; for sensors their usual factory values, which differ by some per
# cent from one device to the next: a camera's own intrinsics, as its driver tells them, are better.
PRESETS = {
    "NYU": DepthCamera(Camera(588.037, 587.075, 320, 240), 1.0, (640, 480), packed=True),
    "ICVL": DepthCamera(Camera(241.42, 241.42, 160, 120), 1.0, (320, 240)),
    "MSRA": DepthCamera(Camera(241.42, 241.42, 160, 120), 1.0, (320, 240)),
    "HAND17": DepthCamera(SR300, 1.0, (640, 480)),
    "SR300": DepthCamera(SR300, 0.125, (640, 480)),
    "SR305": DepthCamera(Camera(476.007, 476.007, 313.683, 242.755), 0.125, (640, 480)),
    "D435": DepthCamera(Camera(383.0, 383.0, 320.0, 240.0), 1.0, (640, 480)),
    "KinectV2": DepthCamera(Camera(365.456, 365.456, 254.878, 205.395), 1.0, (512, 424)),
    "AzureKinect": DepthCamera(Camera(504.5, 504.5, 320.0, 333.0), 1.0, (640, 576)),
}

# The words of a camera file, and those of RealSense, Open3D, ROS and OpenCV for the same.
WORDS = {
    "fx": ("fx",),
    "fy": ("fy",),
    "u0": ("u0", "cx", "ppx"),
    "v0": ("v0", "cy", "ppy"),
    "matrix": ("intrinsic_matrix", "camera_matrix", "K", "k"),
    "width": ("width", "image_width"),
    "height": ("height", "image_height"),
    "unit_mm": ("depth_unit_mm", "depth_unit", "unit_mm"),
    "depth_scale": ("depth_scale",),
    "packing": ("packing",),
    "distortion": ("coeffs", "distortion_coefficients", "D", "d"),
    "part": ("binning_x", "binning_y", "roi"),
    # Of the files that hold a camera beside other things: known, and of no use here.
    None: (
        *"format version model joints hand cube_mm turns chains film note frames joint_order".split(),
        *"header distortion_model R r P p rectification_matrix projection_matrix camera_name".split(),
        *"class_name version_major version_minor extrinsic name serial device_name serial_number".split(),
        *"color_format depth_format fps stream_length_usec".split(),
        *"calibration_time nframes board_width board_height square_size aspectRatio flags".split(),
        *"avg_reprojection_error per_view_reprojection_errors extrinsic_parameters".split(),
        *"image_points grid_points".split(),
    ),
}
MEANINGS = {word: meaning for meaning, words in WORDS.items() for word in words}


class OutOfReachError(ValueError):
    """The depths of a picture cannot show a hand, in this unit at least."""


class CameraLoader(yaml.SafeLoader):
    """YAML that may hold OpenCV's matrices, which become the dicts that they are written as."""


CameraLoader.add_constructor("tag:yaml.org,2002:opencv-matrix", yaml.SafeLoader.construct_yaml_map)


def parse_camera(text):
    """Return the DepthCamera that `FX,FY,U0,V0`, a preset's name or a file (YAML, JSON) describes.

    docs/camera.md lists what a file may hold. Raises UserError where the text is none of these.
    """
    for name, preset in PRESETS.items():
        if str(text).lower() == name.lower():
            return preset
    if Path(text).suffix.lower() in (".yml", ".yaml", ".json", ".jsonl"):
        try:
            return _camera_of(_flat(_load(Path(text))))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            reason = one_line(error)
            missing = f"{reason} is missing" if isinstance(error, KeyError) else reason
            raise UserError(f"--camera {text}: {missing} (docs/camera.md: Camera files)") from None
    numbers = split_numbers(text, 4, "--camera", f", a camera file or one of {', '.join(PRESETS)}")
    if min(numbers[:2]) <= 0:
        raise UserError(f"--camera {text}: focal lengths must be above 0")
    return DepthCamera(Camera(*numbers))


def split_numbers(text, count, option, alternatives=""):
    """Return `count` finite floats from an option's comma-separated text. Raises UserError."""
    try:
        numbers = tuple(float(part) for part in str(text).split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise UserError(f"{option} {text}: expected {count} numbers separated by commas{alternatives}")
    return numbers


def _load(path):
    """Return the first document of a YAML or JSON file, or the first line of JSON lines, as a dict."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".jsonl":
            text = text.partition("\n")[0]
        is_json = path.suffix.lower() in (".json", ".jsonl")  # which may be indented by tabs, unlike YAML
        content = json.loads(text) if is_json else next(yaml.load_all(text, CameraLoader), None)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--camera {path} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError("expected lines such as `fx: 475.0`")
    return content


def _flat(options):
    """Return {meaning: value} of a camera file's words. Raises ValueError for an unknown or double one."""
    groups = (options.get(key) for key in ("camera", "intrinsic", "intrinsics"))
    inner = [group for group in groups if isinstance(group, dict)]
    pairs = [pair for group in (options, *inner) for pair in group.items() if pair[1] not in inner]
    found = {}
    for word, value in pairs:
        if word not in MEANINGS:
            known = ", ".join(words[0] for meaning, words in WORDS.items() if meaning)
            raise ValueError(f"{word!r} is not known; known are {known}")
        meaning = MEANINGS[word]
        if meaning == "part":
            whole = [value.get("x_offset"), value.get("y_offset")] if isinstance(value, dict) else [value]
            if any(number not in (None, 0, 1) for number in whole):
                raise ValueError(f"{word} {value}: give the camera of the cut or binned picture itself")
        elif meaning in found and found[meaning] != value:
            raise ValueError(f"{word!r} contradicts a value given before in this file")
        elif meaning:
            found[meaning] = value
    return found


def _camera_of(found):
    """Return the DepthCamera of {meaning: value}. Raises KeyError, TypeError or ValueError."""
    if "matrix" in found:
        rows = found["matrix"]["data"] if isinstance(found["matrix"], dict) else found["matrix"]
        matrix = np.array(rows, float).reshape(3, 3)
        if matrix[2, :2].any():
            matrix = matrix.T  # Open3D's goes column by column
        inside = [matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]]
        if matrix[2].tolist() != [0, 0, 1]:
            raise ValueError("the matrix is not fx 0 u0, 0 fy v0, 0 0 1")
        found = {**dict(zip(("fx", "fy", "u0", "v0"), inside)), **found}
    camera = Camera(*(float(found[name]) for name in Camera._fields))
    unit_mm = float(found.get("unit_mm", 1.0))
    if "depth_scale" in found:
        # RealSense: the metres that 1 means, below 1. Open3D: how many make a metre.
        scale = float(found["depth_scale"])
        unit_mm = float(found.get("unit_mm", 1000 * scale if scale < 1 else 1000 / scale))
    if not (min(camera.fx, camera.fy, unit_mm) > 0 and np.isfinite((*camera, unit_mm)).all()):
        raise ValueError("focal lengths and depth_unit_mm must be above 0")
    size_px = (int(found["width"]), int(found["height"])) if {"width", "height"} & set(found) else None
    packing = str(found.get("packing", "none")).lower()
    if packing not in ("none", "nyu"):
        raise ValueError(f"packing {packing}: expected nyu or none")
    bend = found.get("distortion") or [0]
    bend = bend.get("data", [0]) if isinstance(bend, dict) else bend
    return DepthCamera(camera, unit_mm, size_px, packing == "nyu", bool(np.any(np.array(bend, float))))


def doubts_about(depth_camera, size_px):
    """Return sentences on what is odd about a camera whose pictures have `size_px` (width, height).

    Raises ValueError where it can be no depth camera's.
    """
    camera, doubts = depth_camera.camera, []
    for name, focal_px, principal_px, edge_px in zip("xy", camera[:2], camera[2:], size_px):
        if not edge_px / 8 < focal_px < edge_px * 12:
            view_deg = 2 * np.degrees(np.arctan(edge_px / focal_px / 2))
            raise ValueError(
                f"the camera's f{name} {focal_px:g} px would see {view_deg:.3g} degrees over {edge_px} px: "
                "give focal lengths in px of this picture"
            )
        if abs(principal_px / edge_px - 0.5) > 0.2:
            doubts.append(
                f"the camera's principal point ({camera.u0:g}, {camera.v0:g}) is far from the middle of "
                f"{size_px[0]}x{size_px[1]} px: is it FX,FY,U0,V0 of this very stream and size?"
            )
    if depth_camera.distorted:
        doubts.append("the camera file's lens distortion is not corrected: undistort the pictures first")
    return list(dict.fromkeys(doubts))


def list_frames(path):
    """Return the files of a folder that may be frames, in the order of the numbers in their names.

    Hidden files are passed over; how many others are, is said. Raises UserError where the folder cannot be
    read or holds no frame.
    """
    path = Path(path)
    try:
        files = [file for file in path.iterdir() if not file.name.startswith(".") and file.is_file()]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    frames = [file for file in files if file.suffix.lower() in SUFFIXES + PICTURE_SUFFIXES]
    if not frames:
        raise UserError(f"{path} holds no depth frame: expected files named {', '.join(SUFFIXES)}")
    others = Counter(file.suffix or "no suffix" for file in set(files) - set(frames))
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        say(f"{path}: files that are no frames are passed over: {kinds}", sys.stderr)
    return sorted(frames, key=_natural_order)


def _natural_order(file):
    """Return a sorting key by which 9 comes before 10."""
    parts = re.split(r"([0-9]+)", file.name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def read_depth(path, depth_camera):
    """Return a frame's depth [H, W] in mm, 0 where nothing was measured.

    Reads 16-bit PNG, NYU's packed PNG where the camera is `packed`, TIFF, `.npy` and MSRA's `.bin`; uint16
    where the unit is 1 mm. Raises FrameError where the file is none of these or holds impossible depths.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not os.path.exists(path):  # which is no more than false for a name that is too long
        raise FrameError(path, "the file or folder is missing")
    if suffix not in READERS:
        raise FrameError(
            path, f"{suffix or 'a file without suffix'} holds no depth: give {', '.join(SUFFIXES)}"
        )
    try:
        return check_depth(READERS[suffix](path, depth_camera), depth_camera.unit_mm, depth_camera.size_px)
    except ValueError as error:
        raise FrameError(path, str(error)) from None


def check_depth(depth, unit_mm=1.0, size_px=None):
    """Return a depth picture [H, W] in mm: uint16 as it is, or float32. Never writes to its input.

    NaN and infinities mean "not measured" and become 0. Raises ValueError where it is no depth picture, not
    of `size_px` (width, height), or holds depths that are negative; OutOfReachError where they cannot show a
    hand, as in another unit or byte order.
    """
    depth = np.asarray(depth)
    if depth.ndim != 2 or depth.dtype.kind not in "uif" or depth.dtype.itemsize < 2 or 0 in depth.shape:
        found = f"{depth.dtype} {list(depth.shape)}"
        raise ValueError(f"expected 16-bit or float depths [H, W] of one frame, found {found}")
    height, width = depth.shape
    if size_px not in (None, (width, height)):
        known = "x".join(map(str, size_px))
        raise ValueError(f"the frame has {width}x{height} px, the camera {known}: give this stream's camera")
    _check_range(depth, unit_mm)
    return depth if depth.dtype == np.uint16 and unit_mm == 1 else _scaled(depth, unit_mm)


def _check_range(depth, unit_mm):
    """Raise OutOfReachError where stored depths [H, W] cannot show a hand, and name the unit that would."""
    some = depth[::4, ::4].astype(np.float64)  # enough to tell mm from metres
    stored = some[(some > 0) & np.isfinite(some) & (some != SATURATED)]
    if len(stored) == 0:
        return
    near, middle = np.percentile(stored, (0.1, 50))

    def fits(unit_mm):
        return near * unit_mm <= FARTHEST_MM and NEAREST_MM <= middle * unit_mm <= ROOM_MM

    if fits(unit_mm) and not _bytes_are_swapped(depth):
        return
    where = "near" if middle * unit_mm < NEAREST_MM else "far"
    better = next((f"--depth_unit {unit:g} would fit" for unit in UNITS_MM if fits(unit)), None)
    if _bytes_are_swapped(depth):
        where, better = "rough", "the two bytes of each number seem to be swapped"
    raise OutOfReachError(
        f"the stored depths, median {middle:g}, nearest {near:g}, each {unit_mm:g} mm, are too {where} for "
        f"a hand: {better or 'check unit and byte order'}"
    )


def _bytes_are_swapped(depth):
    """Return whether neighbouring pixels of 16-bit depths lie far closer together once bytes are swapped."""
    if depth.dtype.itemsize != 2 or depth.dtype.kind == "f":
        return False
    rows = depth[::16]
    both = (rows[:, 1:] > 0) & (rows[:, :-1] > 0)
    apart, swapped = (np.abs(np.diff(part.astype(np.int32)))[both] for part in (rows, rows.byteswap()))
    return len(apart) > 100 and np.median(apart) > 100 and np.median(swapped) < np.median(apart) / 20


def _scaled(depth, unit_mm):
    """Return a picture's depths as float32 mm. Raises ValueError where one is negative or absurd."""
    if depth.dtype == np.float32 and unit_mm == 1 and depth.min() >= 0 and depth.max() < MAX_NUMBER:
        return depth  # mostly so, and then that is all there is to look at
    measured = np.isfinite(depth)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is told below
        depth = np.where(measured, depth, 0).astype(np.float32) * np.float32(unit_mm)
    negative, absurd = (depth < 0).sum(), (~(np.abs(depth) < MAX_NUMBER)).sum()
    if absurd or negative:
        what = f"{absurd} depths are beyond any room" if absurd else f"{negative} depths are negative"
        raise ValueError(f"{what}: set what is not measured to 0")
    return depth


def _read_png(path, depth_camera):
    image = read_png(path)
    if image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and depth_camera.packed:
        depth = unpack_rgb(image)
        # NYU's camera measures nothing nearer than 400 mm; a colour map begins with dark blue.
        if image[..., 2].any() or 2 * ((depth > 0) & (depth < 300)).sum() > (depth > 0).sum():
            raise FrameError(path, "the colours are not depth packed as NYU's, 256 * green + blue")
        return depth
    return _require_depth(path, image)


def _read_tiff(path, depth_camera):
    data = read_bytes(path)
    image = decode_picture(path, data)
    try:
        pages = cv2.imdecodemulti(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)[1]
    except cv2.error:
        raise FrameError(path, "a picture after its first does not decode") from None
    if len(pages) > 1:
        raise FrameError(path, f"it holds {len(pages)} pictures: save each as a file of its own")
    return _require_depth(path, image)


def _require_depth(path, image):
    """Return a decoded picture. Raises FrameError where it is 8-bit or coloured."""
    if image.ndim == 2 and image.dtype != np.uint8:
        return image
    kind = f"{8 * image.dtype.itemsize}-bit {'colour' if image.ndim == 3 else 'grey'}"
    advice = "give what the camera measured, before colours" + (
        "; depth packed as NYU's needs --camera NYU or `packing: nyu` in a camera file" * (image.ndim == 3)
    )
    raise FrameError(path, f"expected a 16-bit depth picture, found {kind}: {advice}")


def _read_npy(path, depth_camera):
    data = read_bytes(path)
    if not data.startswith(b"\x93NUMPY"):
        raise FrameError(path, "the array cannot be read: the file does not begin as .npy files do")
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # NumPy reads the header as Python text, and raises whatever comes of that
        raise FrameError(path, f"the array cannot be read: {one_line(error)}") from None


def _read_bin(path, depth_camera):
    width, height = PRESETS["MSRA"].size_px
    part = read_bin(path, (width, height))
    depth = np.zeros((height, width), np.float32)
    depth[part.top : part.rect.bottom, part.left : part.rect.right] = part.depth_mm
    return depth


READERS = {".png": _read_png, ".tif": _read_tiff, ".tiff": _read_tiff, ".npy": _read_npy, ".bin": _read_bin}
SUFFIXES = tuple(READERS)
