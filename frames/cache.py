"""Crop cache: what a sample needs of each frame, in one file per source of frames.

A split's frames are one source where they are read alike: `train.cache` and `test.cache` (HAND17's
val is in the first, NYU's and ICVL's in the second); MSRA's nine subjects are one, `frames.cache`,
because its folds share them. A frame is found by a hash of its index line without the prefix that
is not trusted, so a cache serves every split, moves with its data set, and an index with other
labels does not find it.

    header   4096 bytes: b"HANDCROP", version, CRC-32 of what follows, JSON padded with blanks
    records  one a frame, in the order of the index: `record_type`, then its depth, row by row
    table    uint64: all keys, ascending; each one's offset; each one's bytes, 0: read the frame's file

A record holds the pixels inside the cube, which no augmentation moves, as uint16 where they are
whole mm and else as float32. All is little-endian and aligned to be mapped into memory. The header
is written last. A record also holds its file's size and time of change: a frame that changed since
is read from its file. Some frames are compared when a cache is opened already, so that one of another
data set is not used at all.
"""

import json
import os
import struct
import sys
import weakref
import zlib
from array import array
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from frames.files import FrameError
from frames.transforms import Frame, hand_part
from utils import UserError, atomic_path, check_command

MAGIC, VERSION = b"HANDCROP", 2
HEADER_BYTES = 4096
PREAMBLE = struct.Struct("<8sII")
DEPTH_TYPES = (np.dtype("<u2"), np.dtype("<f4"))

_noticed = set()


class CacheError(UserError):
    """Why a cache cannot be used."""


class Crop(NamedTuple):
    """A cached frame: its pixels inside the cube, its centre (uvd), its labels [J, 3] uvd or None."""

    frame: Frame
    center_uvd: np.ndarray
    joints_uvd: np.ndarray | None


def record_type(joints):
    """Return the dtype of what stands before a record's depth; joints are NaN where unknown."""
    return np.dtype(
        [
            ("crc32", "<u4"),  # of all that follows it
            ("left", "<u2"),
            ("top", "<u2"),
            ("width", "<u2"),
            ("height", "<u2"),
            ("depth_type", "<u4"),  # index into DEPTH_TYPES
            ("file_stamp", "<u8", 2),  # see file_stamp
            ("center_uvd", "<f8", 3),
            ("joints_uvd", "<f8", (joints, 3)),
        ]
    )


def line_key(text):
    """Return the 64-bit key of an index line's trusted part."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def file_digest(paths):
    """Return a hash, hexadecimal, of files' contents."""
    digest = blake2b(digest_size=16)
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def file_stamp(path):
    """Return a file's size in bytes and time of change in whole seconds, which archives keep."""
    status = os.stat(path)
    return status.st_size, int(status.st_mtime)


def has_changed(path, stamp):
    """Return whether a file has another `file_stamp`. A cache stands in for files that are gone."""
    try:
        return tuple(stamp.tolist()) != file_stamp(path)
    except OSError:
        return False


def make_record(frames, index):
    """Return (key, record) of a HandDataset's frame; the record is empty where only the file will do."""
    key = frames.cache_key(index)
    try:
        frame, center_uvd, window = frames.locate(index)
        part = hand_part(frame, center_uvd[2], frames.cube_of(index), window)
    except FrameError:
        return key, b""
    if not part.depth_mm.size:
        return key, b""
    try:
        joints_uvd = np.nan if frames.test_only else frames.joints_uvd(index)
    except FrameError:
        joints_uvd = np.nan
    return key, _pack(part, file_stamp(frames.frame_path(index)), center_uvd, joints_uvd, frames.joint_number)


def _pack(frame, stamp, center_uvd, joints_uvd, joints):
    depth = frame.depth_mm
    whole = depth.dtype == np.uint16 or depth.max() < 2**16 and (depth == np.floor(depth)).all()
    kind = 0 if whole else 1
    record = np.zeros((), record_type(joints))
    record["left"], record["top"], record["depth_type"] = frame.left, frame.top, kind
    record["height"], record["width"] = depth.shape
    record["file_stamp"], record["center_uvd"], record["joints_uvd"] = stamp, center_uvd, joints_uvd
    body = record.tobytes()[4:] + depth.astype(DEPTH_TYPES[kind]).tobytes()
    return struct.pack("<I", zlib.crc32(body)) + body


def write_cache(path, settings, records):
    """Write a cache of (key, record) pairs in one pass; return how many frames it holds.

    Keeps some bytes a frame in memory. Raises UserError where the disk is full; then, and after an
    interruption, `path` is what it was.
    """
    keys, spans, end = array("Q"), array("Q"), HEADER_BYTES
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(bytes(HEADER_BYTES))
        for key, record in records:
            keys.append(key)
            spans.extend((end, len(record)))
            end += file.write(record + bytes(-len(record) % 8))
        keys, first = np.unique(np.array(keys, "<u8"), return_index=True)
        offsets, sizes = np.array(spans, "<u8").reshape(-1, 2)[first].T
        table = np.stack([keys, offsets, sizes]).tobytes()
        file.write(table)
        header = {
            "settings": settings,
            "count": len(keys),
            "table": end,
            "table_crc32": zlib.crc32(table),
            "bytes": file.tell(),
        }
        text = json.dumps(header).encode().ljust(HEADER_BYTES - PREAMBLE.size)
        file.seek(0)
        file.write(PREAMBLE.pack(MAGIC, VERSION, zlib.crc32(text)) + text)
    return int((sizes > 0).sum())


class CropCache:
    """A cache file; a worker that is handed one opens the file anew.

    Read, not mapped: a map would crash the process once the file is cut short.
    Raises CacheError where the file is damaged or was made for other `settings`.
    """

    def __init__(self, path, settings):
        self.path, self.settings, self.usable = Path(path), settings, True
        try:
            self._file = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            header = self._header()
            table = os.pread(self._file, header["bytes"] - header["table"], header["table"])
        except OSError as error:
            raise CacheError(f"it cannot be read: {error.strerror}") from error
        if zlib.crc32(table) != header["table_crc32"] or len(table) != 24 * header["count"]:
            raise CacheError("its table is damaged")
        # JSON has no tuples.
        if header["settings"] != json.loads(json.dumps(settings)):
            changed = [key for key in settings if header["settings"].get(key) != settings[key]]
            raise CacheError(f"it was made for another {' and '.join(changed) or 'data set'}")
        self._keys, self._offsets, self._sizes = np.frombuffer(table, "<u8").reshape(3, -1)
        self._type = record_type(settings["joints"])

    def _header(self):
        head = os.pread(self._file, HEADER_BYTES, 0)
        if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
            raise CacheError("it is no crop cache, or was not completed")
        _, version, crc32 = PREAMBLE.unpack_from(head)
        if version != VERSION:
            raise CacheError(f"its version is {version}, expected {VERSION}")
        if zlib.crc32(head[PREAMBLE.size :]) != crc32:
            raise CacheError("its header is damaged")
        header = json.loads(head[PREAMBLE.size :])
        size = os.fstat(self._file).st_size
        if header["bytes"] != size:
            raise CacheError(f"it has {size} bytes, its header says {header['bytes']}")
        return header

    def __reduce__(self):
        return open_cache, (self.path, self.settings)

    def __len__(self):
        return len(self._keys)

    def __contains__(self, key):
        return self._find(key) is not None

    def _find(self, key):
        row = int(np.searchsorted(self._keys, np.uint64(key)))
        return row if row < len(self._keys) and self._keys[row] == key else None

    def check(self, frames):
        """Raise CacheError where one of (key, path) pairs is unknown, or its file is another than it was."""
        for key, path in frames:
            row = self._find(key)
            if row is None:
                raise CacheError("it was made for another index")
            if self._sizes[row]:
                head = os.pread(self._file, self._type.itemsize, int(self._offsets[row]))
                if has_changed(path, np.frombuffer(head, self._type, 1)["file_stamp"][0]):
                    raise CacheError(f"{path} has changed since it was made")

    def read(self, key, path):
        """Return the Crop of the frame at `path`; None where the file must be read instead.

        Says so once where the key is unknown, the record is damaged, or the file has changed.
        """
        if not self.usable:
            return None
        row = self._find(key)
        if row is None:
            self._notice("it lacks some frames of this index, which are read from their files")
            return None
        if not self._sizes[row]:
            return None
        return self._read_record(int(self._offsets[row]), int(self._sizes[row]), path)

    def _notice(self, reason):
        notice(self.path, self.settings, reason)

    def _read_record(self, offset, size, path):
        try:
            data = os.pread(self._file, size, offset)
        except OSError:
            data = b""
        if len(data) != size or zlib.crc32(memoryview(data)[4:]) != int.from_bytes(data[:4], "little"):
            self.usable = False
            self._notice("a record is damaged; from here on frames are read from their files")
            return None
        record = np.frombuffer(data, self._type, 1)[0]
        _, left, top, width, height, kind, stamp, center_uvd, joints_uvd = record
        if has_changed(path, stamp):
            self._notice(f"{path} has changed since it was made; such frames are read from their files")
            return None
        depth = np.frombuffer(data, DEPTH_TYPES[kind], offset=self._type.itemsize)
        frame = Frame(depth.reshape(height, width), int(left), int(top))
        return Crop(frame, center_uvd, None if np.isnan(joints_uvd[0, 0]) else joints_uvd)


def open_cache(path, settings, frames=()):
    """Return the CropCache at `path`, or None after a notice where it cannot be used for this index.

    `frames` are (key, path) of some of the index's frames, which it has to know as they are.
    """
    try:
        cache = CropCache(path, settings)
        cache.check(frames)
    except CacheError as error:
        notice(path, settings, f"{error}; frames are read from their files")
        return None
    return cache


def notice(path, settings, reason):
    """Say on stderr, once a process and file, that a cache is not used as it is."""
    if path not in _noticed:
        _noticed.add(path)
        command = check_command(settings["dataset"], path.parent)
        line = f"notice: {path}: {reason}; `{command} --cache --force` builds it again"
        tqdm.write(line, file=sys.stderr)  # not into the line of a progress bar
