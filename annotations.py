"""From the official annotation files to index files: read, validate every frame, write."""

import random
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from typing import NamedTuple

import numpy as np
import scipy.io
from scipy.io.matlab import MatReadError

from datasets import DATASETS, MSRADataset
from engine.batches import over_frames
from frames.cache import make_record, open_cache, write_cache
from frames.files import FrameError, LineFile
from frames.handfinder import find_center
from utils import UserError, accept_signals, atomic_path, signals_held

NYU_JOINTS = [0, 3, 6, 9, 12, 15, 18, 21, 24, 25, 27, 30, 31, 32]
MSRA_GESTURES = "1 2 3 4 5 6 7 8 9 I IP L MP RP T TIP Y".split()
HAND17_TRAIN_SHARE = 0.95
MAT_ERRORS = (
    MatReadError,
    BrokenProcessPool,
    ValueError,
    TypeError,
    IndexError,
    OSError,
    OverflowError,
    MemoryError,
    NameError,
    AttributeError,
    AssertionError,
    RuntimeError,
    zlib.error,
)

TREES = {
    "NYU": """train/joint_data.mat  train/depth_1_0000001.png ...
test/joint_data.mat   test/depth_1_0000001.png ...
nyu_center_train.txt  nyu_center_test.txt  (computed when missing)""",
    "ICVL": """Training/labels.txt    Training/Depth/201403121135/image_0000.png ...
Testing/test_seq_1.txt  Testing/test_seq_2.txt
Testing/Depth/test_seq_1/image_0000.png ...
icvl_train_list.txt  icvl_center_train.txt  icvl_center_test.txt  (computed when missing)""",
    "MSRA": """P0/1/joint.txt  P0/1/000000_depth.bin ...
... P0 to P8, each with the folders 1 2 3 4 5 6 7 8 9 I IP L MP RP T TIP Y""",
    "HAND17": """training/Training_Annotation.txt  training/images/image_D00000001.png ...
frame/BoundingBox.txt             frame/images/image_D00000001.png ...
hands17_center_train.txt  hands17_center_test.txt  (computed when missing)""",
}


class Source(NamedTuple):
    """Frames that are judged together: their data set (whose `lines` they are) and the split's name."""

    frames: object
    split: str


def require(path, name, root):
    """Return `path`; raise UserError with the expected folder tree where it does not exist."""
    if not path.exists():
        tree = "\n".join(f"  {line}" for line in TREES[name].splitlines())
        raise UserError(
            f'{path} not found: extract {name} to {root} (README, "{name}"), so that it holds\n{tree}'
        )
    return path


def read_lines(path, name, root):
    """Return the non-blank lines of a label file. UserError where it cannot be read or is empty."""
    try:
        text = require(path, name, root).read_text(errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty: extract {name} again")
    return lines


def nyu_lines(root, split):
    """Return an index line for every NYU frame of `train` or `test`: path, 14 joints uvd."""
    path = require(root / split / "joint_data.mat", "NYU", root)
    try:
        # A damaged file can crash scipy, so it is read in another process.
        with ProcessPoolExecutor(1, initializer=accept_signals) as pool:
            with signals_held():  # it takes seconds
                joints = pool.submit(_load_joints, path).result()
    except KeyError:
        raise UserError(f"{path} holds no joint_uvd: extract the NYU archive again") from None
    except MAT_ERRORS as error:
        reason = " ".join(str(error).split())[:80]
        raise UserError(f"{path} is damaged ({reason}): extract the NYU archive again") from error
    if joints.ndim != 4 or not len(joints) or joints.shape[2:] != (36, 3) or joints.dtype.kind not in "fiu":
        raise UserError(f"{path}: joint_uvd is {joints.dtype} {joints.shape}, expected numbers [3, N, 36, 3]")
    joints = joints[0][:, NYU_JOINTS].reshape(joints.shape[1], -1).astype(np.float64)
    return [
        f"{(root / split).as_posix()}/depth_1_{number:07d}.png {' '.join(map(str, row))}"
        for number, row in enumerate(joints.tolist(), start=1)
    ]


def _load_joints(path):
    return np.asarray(scipy.io.loadmat(path, variable_names=["joint_uvd"])["joint_uvd"])


def icvl_lines(root, split):
    """Return an index line for every unrotated ICVL frame: path, then the label file's 16 joints uvd."""
    folder = root / ("Training" if split == "train" else "Testing")
    names = ["labels.txt"] if split == "train" else ["test_seq_1.txt", "test_seq_2.txt"]
    lines = [line for name in names for line in read_lines(folder / name, "ICVL", root)]
    # Training labels with a longer path are rotated copies of other frames.
    return [f"{folder.as_posix()}/Depth/{line}" for line in lines if line.split()[0].count("/") == 1]


def msra_lines(root, subject):
    """Return an index line for every MSRA frame of a subject: path, 21 joints in the camera frame, mm."""
    lines = []
    for gesture in MSRA_GESTURES:
        folder = root / f"P{subject}" / gesture
        if not folder.is_dir():
            continue
        count, *labels = read_lines(folder / "joint.txt", "MSRA", root)
        if count != str(len(labels)):
            raise UserError(
                f"{folder / 'joint.txt'} announces {count[:20]} frames and lists {len(labels)}: "
                "extract MSRA again"
            )
        lines += [
            f"{folder.as_posix()}/{number:06d}_depth.bin {_to_camera_frame(label)}"
            for number, label in enumerate(labels)
        ]
    if not lines:
        require(root / f"P{subject}" / MSRA_GESTURES[0] / "joint.txt", "MSRA", root)
    return lines


def _to_camera_frame(label):
    """Turn y and z of a joint.txt line back; a damaged line stays as it is, for the frame check to refuse."""
    try:
        numbers = [float(n) for n in label.split()]
    except ValueError:
        return label
    return " ".join(str(n if axis % 3 == 0 else -n) for axis, n in enumerate(numbers))


def hand17_lines(root, split):
    """Return HAND17's annotation (or test bounding box) lines as they are."""
    name = "frame/BoundingBox.txt" if split == "test" else "training/Training_Annotation.txt"
    return LineFile(require(root / name, "HAND17", root), skip_blank=True)


def sources(name, root):
    """Return the Sources of a data set. Raises UserError where an official file is missing or damaged."""
    require(root, name, root)
    cls = DATASETS[name]
    if name == "MSRA":
        return [
            Source(
                cls(path=root, dataset="test", subject=s, lines=msra_lines(root, s), targets=False), f"P{s}"
            )
            for s in range(MSRADataset.subjects)
        ]
    read = {"NYU": nyu_lines, "ICVL": icvl_lines, "HAND17": hand17_lines}[name]
    return [
        Source(
            cls(
                path=root,
                dataset=split,
                lines=read(root, split),
                targets=False,
                test_only=name == "HAND17" and split == "test",
            ),
            split,
        )
        for split in ("train", "test")
    ]


def index_names(name):
    """Return the names of the index files that a data set has when it is checked."""
    folds = [f"_{s}" for s in range(MSRADataset.subjects)] if name == "MSRA" else [""]
    return [f"{split}{fold}.txt" for fold in folds for split in ("train", "val", "test")]


def build_index(name, root, force=False):
    """Validate a data set and write its index files and rejected.txt; print what was refused and why.

    Does nothing where all index files exist, unless `force`. Raises UserError where an official
    file is missing or no training frame can be used; then no index file is written.
    """
    missing = [file for file in index_names(name) if not (root / file).is_file()]
    if not missing and not force:
        _check_first_frame(name, root)
        print(f"{name}: all index files are in {root}; --force builds them again")
        return
    found = sources(name, root)
    refusals = {}
    for source in found:
        _complete_centers(source)
        refusals[source.split] = list(over_frames(_refusal, source.frames, f"check {source.split}"))
    _report(name, found, refusals)
    _write_lines(
        root / "rejected.txt",
        [
            f"{_name(source.frames, i)}\t{reason}"
            for source in found
            for i, reason in enumerate(refusals[source.split])
            if reason
        ],
    )
    indexes = {
        "NYU": _plain_indexes,
        "ICVL": _plain_indexes,
        "MSRA": _msra_indexes,
        "HAND17": _hand17_indexes,
    }[name](found, refusals)
    for file, lines in indexes.items():
        if not lines:
            raise UserError(
                f"{file} of {name} would be empty: no frame of {root} can be used (reasons above)"
            )
    for file, lines in indexes.items():
        _write_lines(root / file, lines)
        print(f"{root / file}: {len(lines)} frames")


def _check_first_frame(name, root):
    """Raise UserError where an index is another data set's, or its frames are gone."""
    frames = DATASETS[name](path=root, dataset="train", use_cache=False)
    path = frames.frame_path(0)
    if not path.is_file():
        index = root / frames.index_name()
        raise UserError(f"{path} not found, which {index} names: is that {name}? --force builds it again")


def _plain_indexes(found, refusals):
    train, test = found
    return {
        "train.txt": _accepted(train, refusals),
        "val.txt": _accepted(test, refusals),
        "test.txt": list(test.frames.lines),
    }


def _msra_indexes(found, refusals):
    indexes = {}
    for subject, held_out in enumerate(found):
        others = [line for source in found if source is not held_out for line in _accepted(source, refusals)]
        indexes[f"train_{subject}.txt"] = others
        indexes[f"val_{subject}.txt"] = _accepted(held_out, refusals)
        # The official lists name frames that were never recorded.
        indexes[f"test_{subject}.txt"] = [
            line for i, line in enumerate(held_out.frames.lines) if held_out.frames.frame_path(i).is_file()
        ]
    return indexes


def _hand17_indexes(found, refusals):
    train, test = found
    accepted = _accepted(train, refusals)
    random.Random(0).shuffle(accepted)
    count = int(HAND17_TRAIN_SHARE * len(accepted))
    return {"train.txt": accepted[:count], "val.txt": accepted[count:], "test.txt": list(test.frames.lines)}


def _accepted(source, refusals):
    return [
        line
        for line, reason in zip(source.frames.lines, refusals[source.split], strict=True)
        if reason is None
    ]


def _report(name, found, refusals):
    for source in found:
        reasons = Counter(reason for reason in refusals[source.split] if reason)
        total = len(source.frames)
        kept = " (test.txt keeps them)" if reasons and source.split == "test" else ""
        print(
            f"{name} {source.split}: {total - sum(reasons.values())} of {total} frames accepted, "
            f"{sum(reasons.values())} refused{kept}"
        )
        for reason, count in reasons.most_common():
            print(f"  {count:>7}  {reason}")


def _write_lines(path, lines):
    with atomic_path(path) as temporary, temporary.open("w") as file:
        file.writelines(f"{line}\n" for line in lines)


def _complete_centers(source):
    """Compute the centre file of a split that has none."""
    frames = source.frames
    if frames.margin_mm is None:
        return
    given = frames.center_files(computed=False)
    absent = [path for path in given if not path.is_file()]
    if not absent:
        lines = len(LineFile(given[0]))
        if lines < len(frames):
            print(
                f"WARNING: {given[0]} has {lines} lines for {len(frames)} frames: where one is lost, "
                "those after it are of other frames"
            )
        return
    computed = frames.center_files(computed=True)
    print(
        f"{absent[0]} not found: computing centres (of the hand found) into {computed[0]}; published results "
        "use the distributed file"
    )
    # A line whose frame has no readable name, or no file, is refused by the frame check later.
    found = {
        i: center
        for i, center in enumerate(over_frames(_center, frames, f"centres {source.split}"))
        if center != "invalid" and _is_numbered(frames, i)
    }
    if len(computed) == 2:
        numbers = range(len(found))
        paths = ["/".join(frames.frame_path(i).parts[-2:]) for i in found]
        _write_lines(computed[1], paths)
    else:
        numbers = [frames.center_line(i) for i in found]
    lines = ["invalid"] * (max(numbers, default=0) + 1)
    for number, center in zip(numbers, found.values()):
        lines[number] = center
    _write_lines(computed[0], lines)


def build_cache(name, root, force=False):
    """Write the crop caches of a data set whose index files are in place; print their size.

    Leaves a cache that serves the index as it is, unless `force`. Raises UserError where the disk is full.
    """
    for file, group in _cache_sources(name, root).items():
        path, settings = root / file, group[0].cache_settings()
        known = chain.from_iterable(frames.cache_frames(range(len(frames))) for frames in group)
        if path.is_file() and not force and open_cache(path, settings, known):
            print(f"{path} is in place; --force builds it again")
            continue
        records = chain.from_iterable(
            over_frames(make_record, frames, f"cache {frames.index_name()}") for frames in group
        )
        count = write_cache(path, settings, records)
        size = path.stat().st_size
        print(f"{path}: {count} frames, {size / 1e6:.1f} MB, {size / max(count, 1) / 1e3:.1f} kB a frame")


def _cache_sources(name, root):
    """Return, for each cache file, the splits whose frames it holds; those left out are parts of these."""
    options = [{"dataset": split} for split in ("train", "test")]
    if name == "MSRA":
        options = [{"dataset": "test", "subject": subject} for subject in range(MSRADataset.subjects)]
    elif name == "HAND17":
        options = [{"dataset": "train"}, {"dataset": "val"}, {"dataset": "test", "test_only": True}]
    groups = {}
    for option in options:
        frames = DATASETS[name](path=root, targets=False, use_cache=False, **option)
        groups.setdefault(frames.cache_name(), []).append(frames)
    return groups


def _name(frames, index):
    """Return the path of a frame, or where the line stands that names none."""
    try:
        return frames.frame_path(index)
    except FrameError as error:
        return error.frame


def _is_numbered(frames, index):
    try:
        frames.number(index)
    except FrameError:
        return False
    return True


def _refusal(frames, index):
    return frames.refusal(index)


def _center(frames, index):
    try:
        return "{:.3f} {:.3f} {:.3f}".format(*find_center(frames.read(index), frames.camera))
    except (FrameError, ValueError):
        return "invalid"
