"""Writing what predict.py found, frame by frame: JSON lines, CSV, overlays, a film, views from two sides."""

import csv
import errno
import io
import json
import os
import re
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np

from frames.drawing import draw_skeleton, write_picture
from frames.transforms import Rect, uvd2xyz, window_around
from utils import UserError, atomic_path, take_lock

FORMAT, VERSION = "hand pose", 2

# What a run may list as made by it, and the next one remove.
OWN_PICTURE = re.compile(r"(overlay|views)/[0-9]{6,}_[^/\\]*\.png|film\.(mp4|gif)")

FILM_FPS = 15
GIF_FRAMES = 100
GIF_WIDTH_PX = 320
MOST_POINTS = 4000


class PredictionWriter:
    """A folder of results, each written as its frame comes: what was written stays, however the run ends.

    predictions.jsonl: a first line with `format`, `version` (2), `model`, `joints` (the data set whose joint
    order it is), `hand`, `cube_mm`, `turns`, `camera`, `depth_unit_mm`, `packing`, `chains` (joint indices
    from the palm outwards: thumb to little finger; NYU's sixth is the wrist) and `film` (its file or null);
    then a line a frame: `frame` (its file), `joints` ([J]: `xyz` mm, `uvd` px px mm, `confidence` 0..1) or
    null, `center_uvd` or null, `reason` (null, or why there are no joints), `pictures` (the files made of
    it).
    predictions.csv: a line a joint. overlay/NUMBER_NAME.png, with `plot3d` views/NUMBER_NAME.png, and of a
    sequence film.mp4 or film.gif.

    A context manager; when it begins, the pictures that an earlier run's predictions.jsonl lists go.
    Raises UserError where the folder cannot be written, holds the frames to read, or is another run's.
    """

    def __init__(self, out, estimator, depth_camera, sequences, *, pictures=True, video="mp4", plot3d=False):
        self.out, self.estimator, self.depth_camera = Path(out), estimator, depth_camera
        self.inputs = [path for files in sequences for path in files]
        self.pictures, self.plot3d, self.count = pictures, plot3d, 0
        self.film_name = f"film.{video}" if pictures and video != "none" else None
        self.chains = finger_chains(estimator.dataset)
        self.names = ["predictions.jsonl", "predictions.csv"]  # of what was written
        self._film = None

    def __enter__(self):
        folders = {(self.out / name).resolve() for name in ("overlay", "views")}
        inside = next((path for path in self.inputs if path.parent.resolve() in folders), None)
        if inside:
            raise UserError(f"{inside} lies where --out {self.out} puts pictures: choose another folder")
        if self.film_name and readable(self.out) != str(self.out):
            # OpenCV would end the process.
            raise UserError(
                f"--out {readable(self.out)} is not UTF-8: no film can be written, give --video none"
            )
        with self._explained(), ExitStack() as stack:
            if self.out.exists() and not self.out.is_dir():
                raise UserError(f"--out {self.out} is no folder: give another")
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock(stack)
            earlier = files_of_earlier_run(self.out)
            for name in set(self._own_files()) - set(earlier):
                if os.path.lexists(self.out / name):
                    raise UserError(
                        f"{self.out / name} was not written by an earlier run: give another folder with --out"
                    )
            for name in earlier:
                (self.out / name).unlink(missing_ok=True)
            # Unbuffered, so that a full disk is noticed at the line that it cuts.
            self._json, self._csv = (
                stack.enter_context((self.out / name).open("wb", buffering=0)) for name in self.names
            )
            columns = "frame joint x_mm y_mm z_mm u_px v_px d_mm confidence reason".split()
            self._append(self._head(), [columns])
            self._stack = stack.pop_all()
        return self

    def _lock(self, stack):
        """Keep other runs out of the folder until the stack ends."""
        folder = os.open(self.out, os.O_RDONLY)
        stack.callback(os.close, folder)
        # Folders cannot be opened to be written, which lockf needs.
        take_lock("flock", folder, f"another run writes to {self.out}: wait, or give another --out")

    def _own_files(self):
        """Return the names of all files that the run may write."""
        folders = ["overlay"] * self.pictures + ["views"] * (self.pictures and self.plot3d)
        pictures = [picture_name(number, path) for number, path in enumerate(self.inputs)]
        film = [self.film_name] if self.film_name else []
        return self.names + film + [f"{folder}/{name}" for folder in folders for name in pictures]

    def __exit__(self, *error):
        with self._explained():
            return self._stack.__exit__(*error)

    @contextmanager
    def _explained(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.out}: {error.strerror or error}") from error

    def _head(self):
        estimator = self.estimator
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": readable(estimator.model),
            "joints": estimator.dataset.name,
            "hand": estimator.hand,
            "cube_mm": estimator.cube_mm,
            "turns": estimator.turns,
            "camera": self.depth_camera.camera._asdict(),
            "depth_unit_mm": self.depth_camera.unit_mm,
            "packing": "nyu" if self.depth_camera.packed else "none",
            "chains": self.chains,
            "film": self.film_name,
        }

    def _append(self, record, rows):
        """Add a line of JSON and rows of the table to their files, to each all of it or nothing."""
        table = io.StringIO()
        csv.writer(table).writerows(rows)
        line = json.dumps(record, allow_nan=False) + "\n"
        for file, text in ((self._json, line), (self._csv, table.getvalue())):
            size, data = file.tell(), text.encode()
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise

    def write(self, path, depth_mm, pose):
        """Add a frame: its file, its depth [H, W] mm (None where it could not be read) and HandPose."""
        pictures = {}
        if depth_mm is not None and self.pictures:
            camera, cube_mm = self.depth_camera.camera, self.estimator.cube_mm
            pictures["overlay"] = draw_overlay(depth_mm, pose, self.chains)
            if self.plot3d and pose.reason is None:
                pictures["views"] = draw_views(depth_mm, pose, camera, cube_mm, self.chains)
        name, path = picture_name(self.count, path), readable(path)
        files = {f"{folder}/{name}": picture for folder, picture in pictures.items()}
        with self._explained():
            # Listed first, so that the next run knows them even where this one is killed.
            self._append({"frame": path, **_record(pose), "pictures": list(files)}, _rows(path, pose))
            for file, picture in files.items():
                write_picture(self.out / file, picture)
                self._announce(file.removesuffix(name))
            if self.film_name and files:
                self._add_to_film(pictures["overlay"])
        self.count += 1

    def _add_to_film(self, picture):
        # Begun with the first picture: where no frame can be read there is no film.
        if self._film is None:
            kind = Gif if self.film_name.endswith("gif") else Mp4
            self._film = kind(self.out / self.film_name, len(self.inputs))
            self._stack.callback(self._film.close)
            self._announce(self.film_name)
        self._film.add(picture)

    def _announce(self, name):
        if name not in self.names:
            self.names.append(name)


def picture_name(number, path):
    """Return the name of a frame's picture: its number and as much of its file's name as any disk takes."""
    stem = os.fsencode(Path(path).stem)[:120].decode("utf-8", "replace").replace("\ufffd", "_")
    return f"{number:06d}_{stem}.png"


def readable(path):
    """Return a path as text that every reader takes, where a name is not UTF-8 with its bytes as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def files_of_earlier_run(out):
    """Return the files, as names below the folder `out`, that an earlier run's predictions.jsonl lists."""
    own = ["predictions.jsonl", "predictions.csv"]
    try:
        head, *frames = (out / own[0]).read_bytes().splitlines() or [b"{}"]
        if head != b"{}" and json.loads(head)["format"] != FORMAT:
            return []
        names = [json.loads(head).get("film")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # there is none, or it is not a run's
    for line in frames:
        with suppress(ValueError, KeyError, TypeError):
            names += json.loads(line)["pictures"]
    return own + [name for name in names if isinstance(name, str) and OWN_PICTURE.fullmatch(name)]


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
    """A film, as large as its first picture."""

    def __init__(self, path, total):
        self.path, self.writer, self.size = str(path), None, None

    def add(self, picture):
        """Append an RGB picture."""
        if self.writer is None:
            self.size = picture.shape[1::-1]
            self.writer = cv2.VideoWriter(self.path, cv2.VideoWriter_fourcc(*"mp4v"), FILM_FPS, self.size)
            if not self.writer.isOpened():
                self.writer, what = None, "x".join(map(str, self.size))
                raise UserError(f"this OpenCV writes no MP4 of {what} px: use --video gif or none")
        self.writer.write(cv2.cvtColor(cv2.resize(picture, self.size), cv2.COLOR_RGB2BGR))

    def close(self):
        """End the file. Raises OSError, and removes it, where it is no film: OpenCV tells of no full disk."""
        if self.writer is not None:
            self.writer.release()
            if not cv2.VideoCapture(self.path).isOpened():
                Path(self.path).unlink(missing_ok=True)
                raise OSError(errno.ENOSPC, f"{self.path} is not whole: the disk may be full")


class Gif:
    """A small film, shaped as its first picture; it keeps at most GIF_FRAMES evenly spaced ones in memory."""

    def __init__(self, path, total):
        self.path, self.step, self.count = path, -(-total // GIF_FRAMES), 0
        self.pictures, self.size = [], None

    def add(self, picture):
        """Append an RGB picture if it is one of those shown."""
        if self.count % self.step == 0:
            height, width = picture.shape[:2]
            self.size = self.size or (GIF_WIDTH_PX, max(1, GIF_WIDTH_PX * height // width))
            self.pictures.append(cv2.resize(picture, self.size, interpolation=cv2.INTER_AREA))
        self.count += 1

    def close(self):
        """Write the file, where there was a picture."""
        if self.pictures:
            # Pillow comes with matplotlib and only a GIF needs it.
            from PIL import Image

            first, *others = [Image.fromarray(picture) for picture in self.pictures]
            pace_ms = self.step * 1000 // FILM_FPS
            with atomic_path(self.path) as temporary:
                first.save(temporary, save_all=True, append_images=others, duration=pace_ms, loop=0)
