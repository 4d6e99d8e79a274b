"""Files of hand centres: a line of column px, row px and depth mm for each frame."""

from contextlib import suppress

import numpy as np

from frames.files import FrameError, LineFile, parse_numbers
from frames.transforms import xyz2uvd
from utils import UserError, check_command

# Far beyond any picture (px) or working distance (mm).
MAX_CENTER = 1e5


def computed_name(name):
    """Return the name of the file that check_dataset computes where a centre file is missing."""
    return name.replace(".txt", "_computed.txt")


def open_centers(dataset):
    """Return a split's LineFiles of `center_names`: those that others distribute, or else computed ones.

    Empty for a data set without centre files. Raises UserError where there are neither.
    """
    if dataset.margin_mm is None:
        return []
    names = dataset.center_names()
    for candidates in (names, [computed_name(name) for name in names]):
        if all((dataset.root / name).is_file() for name in candidates):
            files = [LineFile(dataset.root / name) for name in candidates]
            if looks_like_xyz(files[0], dataset.camera, dataset.picture_px):
                raise UserError(
                    f"{files[0].path} holds xyz in mm: expected the centres' column px, row px and depth mm; "
                    "project them, or move the file away to have centres computed"
                )
            return files
    missing = next(name for name in names if not (dataset.root / name).is_file())
    raise UserError(
        f"{dataset.root / missing} not found: put it there, or run "
        f"`{check_command(dataset.name, dataset.root)} --force`, which computes centres from the frames"
    )


def read_center(lines, number, path):
    """Return the centre (uvd) of the frame at `path` from line `number`, None for none. Raises FrameError."""
    if number is None or not 0 <= number < len(lines):
        raise FrameError(path, "the centre file has no line for this frame")
    return parse_center(lines[number], path)


def parse_center(text, path):
    """Return the centre (uvd) that a line of a centre file gives the frame at `path`. Raises FrameError."""
    if text == "invalid":
        raise FrameError(path, "the centre file says that no hand was found in it")
    center_uvd = parse_numbers(text, 3, path, "the centre")
    if center_uvd[2] < 1e-3 or max(map(abs, center_uvd.tolist())) > MAX_CENTER:
        raise FrameError(path, "the centre is impossible: {:g} {:g} {:g}".format(*center_uvd))
    return center_uvd


def known_centers(lines, numbers):
    """Return the centres [N, 3] of those lines `numbers` that hold one."""
    centers = []
    for number in numbers:
        with suppress(FrameError):
            centers.append(parse_center(lines[number], lines.path))
    return np.array(centers).reshape(-1, 3)


def looks_like_xyz(lines, camera, picture_px):
    """Return whether centres make sense as mm in the camera's frame, and many of them not as px."""
    spread = np.linspace(0, len(lines) - 1, min(len(lines), 200), dtype=int)
    centers = known_centers(lines, spread.tolist())
    if not len(centers):
        return False
    mirrored = centers * (1, -1, 1)  # with y upwards

    def in_picture(uvd):
        return ((uvd[:, :2] >= 0) & (uvd[:, :2] < picture_px)).all(axis=1)

    as_xyz = in_picture(xyz2uvd(centers, camera)) | in_picture(xyz2uvd(mirrored, camera))
    return (as_xyz & ~in_picture(centers)).mean() > 0.2
