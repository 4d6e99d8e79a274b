"""Crop cache: what a sample needs of each frame, in one file that loads many times faster than the pictures.

A split's frames are one source where they are read alike: `train.cache` and `test.cache` (HAND17's
val is in the first, NYU's and ICVL's in the second); MSRA's nine subjects are one, `frames.cache`,
because its folds share them. A frame is found by a hash of its index line without the prefix that
is not trusted, so a cache serves every split, moves with its data set, and an index with other
labels does not find it.

`train.cache` holds the records, one after the other: `record_type`, then the depths of the smallest
rectangle around the pixels inside the cube (where no augmentation has moved it), row by row, uint16 where
they are whole mm and else float32. `train.cache.npy` is written after it and holds two NumPy arrays: the
settings as JSON, and INDEX_TYPE sorted by key. Damage in either shows in a record's checksum. A record
also holds its file's size and time of change: a frame that changed since is read from its file. Some
frames are compared when a cache is opened already, so that one of another data set is not used at all.
"""

import json
import os
import sys
import weakref
import zlib
from array import array
from contextlib import suppress
from hashlib import blake2b

import numpy as np
from numpy.lib.recfunctions import repack_fields
from tqdm import tqdm

from frames.files import FrameError
from frames.samples import HandFrame
from frames.transforms import Frame, hand_part
from utils import UserError, atomic_path, check_command

VERSION = 3
INDEX_TYPE = np.dtype([("key", "<u8"), ("offset", "<u8"), ("bytes", "<u4"), ("crc32", "<u4")])
DEPTH_TYPES = (np.dtype("<u2"), np.dtype("<f4"))

# So many frames, spread over an index, are compared with its cache when that is opened.
CHECKED_FRAMES = 64

_noticed = set()


class CacheError(UserError):
    """Why a cache cannot be used."""


def record_type(joints):
    """Return the dtype of what stands before a record's depths; joints are NaN where unknown."""
    return np.dtype(
        [
            ("left", "<u2"),
            ("top", "<u2"),
            ("width", "<u2"),
            ("height", "<u2"),
            ("depth_type", "<u8"),  # index into DEPTH_TYPES
            ("file_stamp", "<u8", 2),  # see file_stamp
            ("center_uvd", "<f8", 3),
            ("joints_uvd", "<f8", (joints, 3)),
        ]
    )


def line_key(text):
    """Return the 64-bit key of an index line's trusted part."""
    digest = blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def index_path(path):
    """Return where the index of the cache at `path` lies."""
    return path.with_name(f"{path.name}.npy")


def file_stamp(path):
    """Return a file's size in bytes and time of change in whole seconds from 1970, which archives keep."""
    status = os.stat(path)
    return status.st_size, max(0, int(status.st_mtime))


def has_changed(path, stamp):
    """Return whether a file has another `file_stamp`. A cache stands in for files that are gone."""
    try:
        return tuple(stamp.tolist()) != file_stamp(path)
    except OSError:
        return False


def settings_of(dataset):
    """Return what a cache must have been made with to serve a HandDataset, as JSON holds it."""
    digest = blake2b(digest_size=16)
    for lines in dataset.centers:
        digest.update(lines.path.read_bytes())
    return {
        "format": VERSION,
        "data set": dataset.name,
        "camera": [float(number) for number in dataset.camera],
        "cube": float(dataset.cube_mm),
        "margin": dataset.margin_mm,
        "joints": dataset.joint_number,
        "centre file": digest.hexdigest(),
    }


def make_record(dataset, index):
    """Return (key, record) of a HandDataset's frame; the record is empty where only the file will do.

    None where the index line names no frame.
    """
    try:
        line = dataset.line(index)
    except FrameError:
        return None
    try:
        hand = dataset.locate(line)
        part = hand_part(hand.frame, hand.center_uvd[2], hand.cube_mm, hand.window)
    except (FrameError, ValueError):
        return line.key, b""
    if not part.depth_mm.size:
        return line.key, b""
    joints_uvd = None
    with suppress(FrameError):
        joints_uvd = dataset.joints_uvd(line) if not dataset.test_only else None
    return line.key, _pack(part, hand.center_uvd, joints_uvd, file_stamp(line.path), dataset.joint_number)


def _pack(frame, center_uvd, joints_uvd, stamp, joints):
    depth = frame.depth_mm
    whole = depth.dtype == np.uint16 or depth.max() < 2**16 and (depth == np.floor(depth)).all()
    record = np.zeros((), record_type(joints))
    record["left"], record["top"], record["depth_type"] = frame.left, frame.top, 0 if whole else 1
    record["height"], record["width"] = depth.shape
    record["file_stamp"], record["center_uvd"] = stamp, center_uvd
    record["joints_uvd"] = np.nan if joints_uvd is None else joints_uvd
    return record.tobytes() + depth.astype(DEPTH_TYPES[record["depth_type"]]).tobytes()


def write_cache(path, settings, records):
    """Write a cache of (key, record) pairs in one pass; return how many frames it holds.

    Keeps some bytes a frame in memory. Raises UserError where the disk is full; then, and after an
    interruption, `path` is what it was.
    """
    numbers, end = array("Q"), 0
    with atomic_path(index_path(path)) as index, atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            for key, record in records:
                numbers.extend((key, end, len(record), zlib.crc32(record)))
                end += file.write(record + bytes(-len(record) % 8))
        columns = np.array(numbers, "<u8").reshape(-1, 4)
        keys, first = np.unique(columns[:, 0], return_index=True)
        table = np.empty(len(keys), INDEX_TYPE)
        for column, name in enumerate(INDEX_TYPE.names):
            table[name] = columns[first, column]
        with index.open("wb") as file:
            np.save(file, np.array(json.dumps({**settings, "bytes": end})))
            np.save(file, table)
    return int((table["bytes"] > 0).sum())


class CropCache:
    """A cache file; a worker that is handed one opens the file anew.

    Read, not mapped: a map would crash the process once the file is cut short.
    Raises CacheError where the file is damaged or was made for other `settings`.
    """

    def __init__(self, path, settings):
        self.path, self.settings, self.usable = path, settings, True
        try:
            self._file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            with index_path(path).open("rb") as file:
                made_for = json.loads(np.load(file, allow_pickle=False).item())
                table = np.load(file, allow_pickle=False)
            changed = [name for name in settings if made_for.get(name) != settings[name]]
            size = made_for["bytes"]
        except OSError as error:
            raise CacheError(f"it cannot be read: {error.strerror} ({error.filename})") from error
        except Exception as error:  # NumPy and JSON raise errors of any kind at damaged bytes
            raise CacheError("its index is damaged") from error
        if changed:
            raise CacheError(f"it was made for another {' and '.join(changed)}")
        if table.dtype != INDEX_TYPE or os.fstat(self._file).st_size != size:
            raise CacheError("it is damaged or not complete")
        # Keys by themselves are searched faster.
        self._keys = np.ascontiguousarray(table["key"])
        self._places = repack_fields(table[["offset", "bytes", "crc32"]])
        self._type = record_type(settings["joints"])

    def __reduce__(self):
        return open_cache, (self.path, self.settings)

    def __len__(self):
        return len(self._keys)

    def _find(self, key):
        """Return (offset, bytes, crc32) of a frame's record, or None."""
        row = int(np.searchsorted(self._keys, np.uint64(key)))
        return self._places[row].item() if row < len(self) and self._keys[row] == key else None

    def check(self, lines):
        """Raise CacheError where a frame of these IndexLines is unknown, or its file has changed."""
        for line in lines:
            place = self._find(line.key)
            if place is None:
                raise CacheError("it was made for another index")
            offset, size, _ = place
            head = os.pread(self._file, self._type.itemsize, offset) if size else b""
            if len(head) == self._type.itemsize:
                if has_changed(line.path, np.frombuffer(head, self._type)[0]["file_stamp"]):
                    raise CacheError(f"{line.path} has changed since it was made")

    def read(self, line, cube_mm):
        """Return the HandFrame of an IndexLine; None where the file must be read instead.

        Says so once where the key is unknown, the record is damaged, or the file has changed.
        """
        if not self.usable:
            return None
        place = self._find(line.key)
        if place is None:
            self._notice("it lacks some frames of this index, which are read from their files")
            return None
        offset, size, crc32 = place
        if not size:
            return None
        data = b""
        with suppress(OSError):
            data = os.pread(self._file, size, offset)
        if len(data) != size or zlib.crc32(data) != crc32:
            self.usable = False
            self._notice("a record is damaged; from here on frames are read from their files")
            return None
        left, top, width, height, kind, stamp, center_uvd, joints_uvd = np.frombuffer(data, self._type, 1)[0]
        if has_changed(line.path, stamp):
            self._notice(f"{line.path} has changed since it was made; such frames are read from their files")
            return None
        depth = np.frombuffer(data, DEPTH_TYPES[kind], offset=self._type.itemsize)
        frame = Frame(depth.reshape(height, width), int(left), int(top))
        return HandFrame(frame, center_uvd, cube_mm, None, None if np.isnan(joints_uvd[0, 0]) else joints_uvd)

    def _notice(self, reason):
        notice(self.path, self.settings, reason)


def cache_of(dataset):
    """Return the CropCache of a HandDataset, or None; some frames, spread over its index, are compared."""
    path = dataset.root / dataset.cache_name()
    if not path.is_file():
        return None
    spread = np.linspace(0, len(dataset) - 1, min(len(dataset), CHECKED_FRAMES), dtype=int)
    return open_cache(path, settings_of(dataset), lines_of(dataset, spread.tolist()))


def lines_of(dataset, indices):
    """Yield those of a HandDataset's IndexLines that name a frame."""
    for index in indices:
        with suppress(FrameError):
            yield dataset.line(index)


def open_cache(path, settings, lines=()):
    """Return the CropCache at `path`, or None after a notice where it cannot be used.

    `lines` are IndexLines of frames that it has to know as they are.
    """
    try:
        cache = CropCache(path, settings)
        cache.check(lines)
    except CacheError as error:
        notice(path, settings, f"{error}; frames are read from their files")
        return None
    return cache


def notice(path, settings, reason):
    """Say on stderr, once a process and file, that a cache is not used as it is."""
    if path not in _noticed:
        _noticed.add(path)
        command = check_command(settings["data set"], path.parent)
        line = f"notice: {path}: {reason}; `{command} --cache --force` builds it again"
        tqdm.write(line, file=sys.stderr)  # not into the line of a progress bar
