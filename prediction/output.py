"""Writing what predict.py found, frame by frame: JSON, CSV, overlays, a film, views from two sides."""

import csv
import json
import os
from contextlib import ExitStack
from pathlib import Path

import cv2
import numpy as np

from frames.drawing import draw_skeleton, write_picture
from frames.transforms import Rect, uvd2xyz, window_around
from utils import UserError, atomic_path

VERSION = 1
FILM_FPS = 15
GIF_FRAMES = 100
GIF_WIDTH_PX = 320
MOST_POINTS = 4000


class PredictionWriter:
    """A folder of results, written while frames come, so that memory does not grow with them.

    predictions.json: `format`, `version` (1), `model`, `joints` (the data set whose joint order it
    is), `hand`, `cube_mm`, `camera`, `depth_unit_mm`, `chains` (joint indices from the palm outwards:
    thumb to little finger; NYU's sixth is the wrist), and `frames`, one line each: `frame` (its file),
    `joints` ([J]: `xyz` mm, `uvd` px px mm, `confidence` 0..1) or null, `center_uvd` or null, `reason`
    (null, or why there are no joints). predictions.csv: a line a joint. overlay/NUMBER_NAME.png, and
    with `plot3d` views/NUMBER_NAME.png. A sequence of which a frame can be read also makes film.mp4 or
    film.gif.

    A context manager: the files take their names, and pictures of an earlier run go, when it ends without
    an error.
    Raises UserError where the folder cannot be written.
    """

    def __init__(self, out, estimator, depth_camera, total, video="mp4", plot3d=False):
        self.out, self.estimator, self.depth_camera = Path(out), estimator, depth_camera
        self.total, self.plot3d, self.count = total, plot3d, 0
        self.video = video if total > 1 else "none"
        self.chains = finger_chains(estimator.dataset)
        self.names = ["prediction.output.json", "prediction.output.csv"]  # of what was written
        self._film = None

    def __enter__(self):
        with ExitStack() as stack:
            self._json, self._csv = (
                stack.enter_context(stack.enter_context(atomic_path(self.out / name)).open("w", newline=""))
                for name in self.names
            )
            lines = (f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in self._head().items())
            self._json.write("{\n" + "".join(lines) + ' "frames": [')
            self._table = csv.writer(self._csv)
            self._table.writerow("frame joint x_mm y_mm z_mm u_px v_px d_mm confidence reason".split())
            self._began_ns = os.fstat(self._json.fileno()).st_mtime_ns
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        if error[0] is None:
            self._json.write("\n ]\n}\n")
        handled = self._stack.__exit__(*error)
        if error[0] is None:
            self._remove_older()
        return handled

    def _remove_older(self):
        """Remove the pictures and films of an earlier run, which the new files do not speak of."""
        for pattern in ("overlay/??????_*.png", "views/??????_*.png", "film.mp4", "film.gif"):
            for path in self.out.glob(pattern):
                if path.stat().st_mtime_ns < self._began_ns:
                    path.unlink()

    def _head(self):
        estimator = self.estimator
        return {
            "format": "hand pose",
            "version": VERSION,
            "model": str(estimator.model),
            "joints": estimator.dataset.name,
            "hand": estimator.hand,
            "cube_mm": estimator.cube_mm,
            "camera": self.depth_camera.camera._asdict(),
            "depth_unit_mm": self.depth_camera.unit_mm,
            "chains": self.chains,
        }

    def write(self, path, depth_mm, pose):
        """Add a frame: its file, its depth [H, W] mm (None where it could not be read) and HandPose."""
        self._json.write(",\n  " if self.count else "\n  ")
        self._json.write(json.dumps({"frame": str(path), **_record(pose)}))
        self._table.writerows(_rows(path, pose))
        if depth_mm is not None:
            name, camera = f"{self.count:06d}_{Path(path).stem}.png", self.depth_camera.camera
            picture = draw_overlay(depth_mm, pose, self.chains)
            self._write_picture("overlay/", name, picture)
            if self.video != "none":
                self._add_to_film(picture)
            if self.plot3d and pose.reason is None:
                views = draw_views(depth_mm, pose, camera, self.estimator.cube_mm, self.chains)
                self._write_picture("views/", name, views)
        self.count += 1

    def _write_picture(self, folder, name, picture):
        write_picture(self.out / folder / name, picture)
        self._announce(folder)

    def _add_to_film(self, picture):
        # Begun with the first picture: where no frame can be read there is no film.
        if self._film is None:
            name = f"film.{self.video}"
            path = self._stack.enter_context(atomic_path(self.out / name))
            self._film = self._stack.enter_context({"mp4": Mp4, "gif": Gif}[self.video](path, self.total))
            self._announce(name)
        self._film.add(picture)

    def _announce(self, name):
        if name not in self.names:
            self.names.append(name)


def finger_chains(dataset):
    """Return a data set's chains, joint indices from the palm outwards: thumb to little finger first."""
    chains = dataset.config
    if dataset.name == "NYU":
        # Its skeleton, as published, calls the fingers the other way round than its labels have them.
        return [chains[0], *chains[4:0:-1], *chains[5:]]
    return chains


def _record(pose):
    if pose.reason is not None:
        return {"joints": None, "center_uvd": None, "reason": pose.reason}
    joints = [
        {"xyz": _rounded(xyz), "uvd": _rounded(uvd), "confidence": round(float(confidence), 4)}
        for xyz, uvd, confidence in zip(pose.joints_xyz, pose.joints_uvd, pose.confidence)
    ]
    return {"joints": joints, "center_uvd": _rounded(pose.center_uvd), "reason": None}


def _rounded(numbers):
    return [round(float(number), 3) for number in numbers]


def _rows(path, pose):
    if pose.reason is not None:
        return [[path, *[""] * 8, pose.reason]]
    return [
        [path, joint, *_rounded(xyz), *_rounded(uvd), round(float(confidence), 4), ""]
        for joint, (xyz, uvd, confidence) in enumerate(zip(pose.joints_xyz, pose.joints_uvd, pose.confidence))
    ]


def draw_overlay(depth_mm, pose, chains):
    """Return an RGB picture of a frame [H, W] in mm: depth in colour, skeleton by finger, or the reason."""
    measured = depth_mm[depth_mm > 0]
    near, far = np.percentile(measured[:: 1 + len(measured) // 10000], (1, 99)) if len(measured) else (0, 1)
    shade = np.clip((far - depth_mm.astype(np.float32)) / max(far - near, 1) * 255, 0, 255).astype(np.uint8)
    picture = cv2.cvtColor(cv2.applyColorMap(shade, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB) // 2
    picture[depth_mm == 0] = 0
    if pose.reason is None:
        return draw_skeleton(picture, pose.joints_uvd[:, :2], chains)
    return _titled(picture, pose.reason)


def draw_views(depth_mm, pose, camera, cube_mm, chains, size=400):
    """Return an RGB picture [size, 2 * size, 3] of points and skeleton from the camera and the right."""
    center_xyz = uvd2xyz(pose.center_uvd, camera)
    height, width = depth_mm.shape
    part = window_around(pose.center_uvd, cube_mm, camera).intersect(Rect(0, 0, width, height))
    depth = depth_mm[part.top : part.bottom, part.left : part.right].astype(np.float64)
    rows, columns = np.nonzero((depth > 0) & (np.abs(depth - center_xyz[2]) < cube_mm))
    step = 1 + len(rows) // MOST_POINTS
    rows, columns = rows[::step], columns[::step]
    points = uvd2xyz(np.stack([columns + part.left, rows + part.top, depth[rows, columns]], axis=-1), camera)
    views = []
    for title, axes in (("from the camera", (0, 1)), ("from the right", (2, 1))):
        picture = np.full((size, size, 3), 255, np.uint8)
        to_px = size / (2 * cube_mm)
        places = ((points - center_xyz)[:, axes] * to_px + size / 2).astype(int)
        places = places[((places >= 0) & (places < size)).all(1)]
        picture[places[:, 1], places[:, 0]] = 150
        draw_skeleton(picture, (pose.joints_xyz - center_xyz)[:, axes] * to_px + size / 2, chains)
        views.append(_titled(picture, title, (60, 60, 60)))
    return np.hstack(views)


def _titled(picture, text, colour=(255, 255, 255)):
    cv2.putText(picture, text, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, 1, cv2.LINE_AA)
    return picture


class Mp4:
    """A film, as large as its first picture; a context manager."""

    def __init__(self, path, total):
        self.path, self.writer, self.size = str(path), None, None

    def __enter__(self):
        return self

    def add(self, picture):
        """Append an RGB picture."""
        if self.writer is None:
            self.size = picture.shape[1::-1]
            self.writer = cv2.VideoWriter(self.path, cv2.VideoWriter_fourcc(*"mp4v"), FILM_FPS, self.size)
            if not self.writer.isOpened():
                raise UserError("this OpenCV writes no MP4: use --video gif or none")
        self.writer.write(cv2.cvtColor(cv2.resize(picture, self.size), cv2.COLOR_RGB2BGR))

    def __exit__(self, *error):
        if self.writer is not None:
            self.writer.release()


class Gif:
    """A small film of at most GIF_FRAMES evenly spaced pictures, which is all it keeps in memory."""

    def __init__(self, path, total):
        self.path, self.step, self.pictures, self.count = path, -(-total // GIF_FRAMES), [], 0

    def __enter__(self):
        return self

    def add(self, picture):
        """Append an RGB picture if it is one of those shown."""
        if self.count % self.step == 0:
            height, width = picture.shape[:2]
            small = cv2.resize(
                picture, (GIF_WIDTH_PX, GIF_WIDTH_PX * height // width), interpolation=cv2.INTER_AREA
            )
            self.pictures.append(small)
        self.count += 1

    def __exit__(self, *error):
        if self.pictures and error[0] is None:
            # Pillow comes with matplotlib and only a GIF needs it.
            from PIL import Image

            first, *others = [Image.fromarray(picture) for picture in self.pictures]
            pace_ms = self.step * 1000 // FILM_FPS
            first.save(self.path, save_all=True, append_images=others, duration=pace_ms, loop=0)
