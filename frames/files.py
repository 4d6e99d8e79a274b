"""Reading text lines and depth frames; what is wrong with a frame is said in a FrameError."""

import math
import os
import struct
import weakref
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from frames.transforms import Frame
from utils import UserError

# A PNG begins with its signature and the chunk that holds width and height; its last chunk is a name and
# the checksum of nothing.
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR", b"IEND\xaeB`\x82"

# Beyond any camera's picture; a file of some MB can claim a hundred times as many.
MAX_PICTURE_PX = 1 << 25

MISSING = "the file is missing"

# Neither px nor mm, and as float32 its square is still a number.
MAX_NUMBER = 1e9

# How a text file may begin, and what it is then: encoding and the type of its units.
BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": ("utf-8", "u1"),
    b"\xff\xfe": ("utf-16-le", "<u2"),
    b"\xfe\xff": ("utf-16-be", ">u2"),
}


class FrameError(UserError):
    """A frame that cannot be used; `frame` names it and `reason` says why."""

    def __init__(self, frame, reason):
        super().__init__(f"{frame}: {reason}")
        self.frame, self.reason = str(frame), reason

    def __reduce__(self):
        return FrameError, (self.frame, self.reason)


class IndexLine(NamedTuple):
    """A line of an index file: where its frame lies, the text of its numbers, its key in a crop cache."""

    path: Path
    numbers: str
    key: int


class LineFile:
    """The lines of a text file, UTF-8 or (with a byte order mark) UTF-16, each read when it is asked for.

    Read by `os.pread`, for processes that were forked share a file's position.
    A million lines cost sixteen bytes each, and a worker that is handed a LineFile opens the file
    anew. No memory map, which would crash the process once the file is cut short. Bytes that are no
    text come back as `os.fsencode` takes them. Raises UserError where the file is missing or empty.
    """

    def __init__(self, path, skip_blank=False):
        self.path, self.skip_blank = Path(path), skip_blank
        try:
            self._file = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            head = os.pread(self._file, 3, 0)
            mark = next(filter(head.startswith, BYTE_ORDER_MARKS), b"")
            encoding, unit = BYTE_ORDER_MARKS.get(mark, ("utf-8", "u1"))
            width, newlines, size = np.dtype(unit).itemsize, [], len(mark)
            while block := os.pread(self._file, 1 << 24, size):
                units = np.frombuffer(block, unit, len(block) // width)
                newlines.append(size + width * np.flatnonzero(units == ord("\n")))
                size += len(block)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        if size == len(mark):
            raise UserError(f"{path} is empty: replace it or build it again")
        ends = np.concatenate([*newlines, [size]])
        starts = np.concatenate([[len(mark)], ends[:-1] + width])
        self._decoding = encoding, "surrogateescape" if encoding == "utf-8" else "replace"
        # A last newline ends a line and begins none; one character or none is a blank (or "\r") line.
        keep = ends - starts > width if skip_blank else starts < size
        self._spans = np.stack([starts, ends], axis=1)[keep]
        if len(self._spans) == 0:
            raise UserError(f"{path} holds only blank lines: replace it or build it again")

    def __len__(self):
        return len(self._spans)

    def __getitem__(self, index):
        start, end = self._spans[index].tolist()
        return os.pread(self._file, end - start, start).decode(*self._decoding).strip()

    def __reduce__(self):
        return LineFile, (self.path, self.skip_blank)


def frame_number(path):
    """Return the number in a frame's name. Raises FrameError where there is none."""
    digits = path.stem.rpartition("_")[2].lstrip("D")
    if not digits.isdecimal():
        raise FrameError(path, "the name holds no frame number")
    return int(digits)


def unpack_rgb(image):
    """Return NYU's depth, 256 * green + blue, as a uint16 [H, W] view of a uint8 picture [H, W, 3]."""
    # Blue and green lie side by side in memory: together they are the little-endian depth.
    return np.ndarray(image.shape[:2], "<u2", image, strides=image.strides[:2])


def read_png(path, size_px=None):
    """Decode a PNG as it is stored: [H, W] or [H, W, 3] (blue, green, red).

    Raises FrameError where the file is missing, empty, cut short, no PNG, or not of `size_px`
    (width, height), which is looked at before the pixels are unpacked.
    """
    data = read_bytes(path)
    if not data.startswith(PNG_START) or data.rfind(PNG_END) < 0:
        raise FrameError(path, "the PNG is cut short or is no PNG")
    width, height = struct.unpack_from(">II", data, len(PNG_START))
    if size_px not in (None, (width, height)):
        raise FrameError(path, f"expected {size_px[0]}x{size_px[1]} px, found {width}x{height}")
    if width * height > MAX_PICTURE_PX:
        raise FrameError(path, f"{width}x{height} px are more than any depth camera has")
    return decode_picture(path, data)


def decode_picture(path, data):
    """Decode a picture file's bytes as they are stored. Raises FrameError where they are no picture."""
    with suppress(cv2.error):  # the header asks for more than any memory holds
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if image is not None:
            return image
    raise FrameError(path, "the picture does not decode")


def read_bytes(path):
    """Return the bytes of a frame's file; FrameError where it is missing, unreadable or empty."""
    try:
        # Without a buffer and its second copy.
        with open(path, "rb", buffering=0) as file:
            data = file.readall()
    except FileNotFoundError:
        raise FrameError(path, MISSING) from None
    except (OSError, ValueError) as error:  # ValueError: the path holds a null byte
        reason = getattr(error, "strerror", None) or error
        raise FrameError(path, f"the file cannot be read: {reason}") from error
    if not data:
        raise FrameError(path, "the file is empty")
    return data


def read_bin(path, size_px):
    """Return the Frame that an MSRA file holds: a rectangle of a picture of `size_px` (width, height).

    Six int32, width, height, left, top, right, bottom, then the rectangle's depths as float32 mm.
    Raises FrameError where the file is missing or damaged.
    """
    data = read_bytes(path)
    if len(data) < 24:
        raise FrameError(path, f"the header needs 24 bytes, the file has {len(data)}")
    width, height, left, top, right, bottom = (int(n) for n in np.frombuffer(data, "<i4", 6))
    if (width, height) != size_px:
        raise FrameError(path, f"expected {size_px} px, the header says {(width, height)}")
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        rectangle = (left, top, right, bottom)
        raise FrameError(path, f"the header's rectangle {rectangle} reaches beyond the picture")
    count = (right - left) * (bottom - top)
    if len(data) != 24 + 4 * count:
        raise FrameError(path, f"the header promises {count} depths, the file holds {(len(data) - 24) / 4:g}")
    depth = np.frombuffer(data, "<f4", offset=24).reshape(bottom - top, right - left)
    if not (np.isfinite(depth).all() and (depth >= 0).all()):
        raise FrameError(path, "a depth is negative or not finite")
    return Frame(depth, left, top)


def parse_numbers(text, count, frame, what):
    """Return `count` finite numbers from blank-separated text; FrameError where there are not."""
    try:
        # Ten times as fast as leaving the conversion of text to NumPy.
        numbers = [float(word) for word in text.split()]
    except ValueError:
        raise FrameError(frame, f"{what} is not numbers: {text[:40]!r}") from None
    if len(numbers) != count:
        raise FrameError(frame, f"{what} has {len(numbers)} numbers, expected {count}")
    if not all(map(math.isfinite, numbers)):
        raise FrameError(frame, f"{what} has a number that is not finite")
    if max(map(abs, numbers)) > MAX_NUMBER:
        raise FrameError(frame, f"{what} is impossible: it has a number beyond {MAX_NUMBER:g}")
    return np.array(numbers)
