"""Errors, atomic files, logs and pictures, shared by all scripts."""

import os
import shlex
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np

# One colour a finger, RGB: thumb, index, middle, ring, little, palm.
FINGER_COLOURS = (
    (230, 60, 50),
    (245, 170, 40),
    (90, 190, 70),
    (50, 150, 230),
    (160, 90, 210),
    (140, 140, 140),
)

# What ends a run from outside.
ENDING = (signal.SIGINT, signal.SIGTERM)

# Temporary files that nobody has written to for so long are nobody's.
SWEEP_S = 3600
_swept = {}


class UserError(Exception):
    """What the user can mend: the message says in one line what, where and what to do."""


class Stopped(Exception):
    """The run ended early, on request and in order; `status` is the exit status that says so."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


def run(main):
    """Run a script's `main`; return its exit status: 1 with one line on stderr after a UserError.

    SIGTERM ends it by way of every `finally`, as Ctrl-C does.
    """
    # What OpenCV has to say of a damaged picture is said in an error.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def signals_held():
    """Hold Ctrl-C and SIGTERM back: what they raise amid a fork is lost, and amid a lock's release an error.

    Processes begun meanwhile pass over them until they call `accept_signals`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    caught = []
    before = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in caught:
            signal.raise_signal(number)


def accept_signals():
    """In a process begun by the main one: leave Ctrl-C, which comes to all, to that; let SIGTERM end this.

    By SIGTERM Python ends, at its exit, those that are left.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def usable_cores():
    """Return how many cores this process may use, which on a cluster are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def require_file(path, advice):
    """Raise UserError, which ends in `advice`, where there is no file at `path`."""
    if not path.is_file():
        raise UserError(f"{path} {'is no file' if path.exists() else 'not found'}: {advice}")


def check_command(name, root):
    """Return the command that checks the data set in folder `root`, as error messages name it."""
    where = [] if Path(root) == Path("Data", name) else ["--data_dir", str(root)]
    return shlex.join(["python", "check_dataset.py", "--dataset", name, *where])


@contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed.

    Raises UserError where the folder cannot be written or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        naming = dict(prefix=f".{path.stem}.", suffix=f".part{path.suffix}")
        handle, name = tempfile.mkstemp(dir=path.parent, **naming)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _remove_leftovers(folder):
    """Remove what killed writers left in a folder, looked for once in a while; one at work is younger."""
    now = time.time()
    if now - _swept.get(folder, 0) < SWEEP_S:
        return
    _swept[folder] = now
    for leftover in folder.glob(".*.????????.part*"):
        with suppress(FileNotFoundError):
            if now - leftover.stat().st_mtime > SWEEP_S:
                leftover.unlink()


def colour_depth(image):
    """Return an RGB uint8 [H, W, 3] picture of relative depth [H, W] (over the cube); 0 is black."""
    shade = np.clip((1 - image) * 127.5, 0, 255).astype(np.uint8)
    picture = cv2.cvtColor(cv2.applyColorMap(shade, cv2.COLORMAP_BONE), cv2.COLOR_BGR2RGB)
    picture[image == 0] = 0
    return picture


def draw_skeleton(picture, joints_px, chains):
    """Draw finger chains over an RGB picture, in place; joints_px is [J, 2], (column, row).

    Joints that are not finite are drawn in a corner.
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
    joints_px = (np.asarray(uvd)[:, :2] * (own - 1) + own // 2 + 0.5) * (size / own) - 0.5
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


def write_picture(path, picture):
    """Write an RGB uint8 picture atomically; the suffix chooses the format."""
    with atomic_path(path) as temporary:
        # cv2.imwrite does not tell when the disk is full.
        temporary.write_bytes(cv2.imencode(path.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1])


def write_curves(path, records):
    """Write a figure of loss and validation error over the epochs of a metrics log."""
    # matplotlib takes a second to import, which no other step of a script should pay.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = [record["epoch"] for record in records]
    for axes, key, label in zip(
        figure.subplots(1, 2), ("loss", "val_mm"), ("training loss", "validation error, mm")
    ):
        axes.plot(epochs, [record[key] for record in records], marker=".")
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
