"""From a data set's official annotations to its index files: read them, check every frame, write.

python check_dataset.py --dataset NYU
python check_dataset.py --dataset HAND17 --data_dir /data/HANDS17 --force
python check_dataset.py --dataset MSRA --cache
"""

import argparse
import random
import sys
from collections import Counter
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import scipy.io
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import DATASETS, MSRADataset
from frames.cache import CacheError, CropCache, lines_of, make_record, settings_of, write_cache
from frames.centers import computed_name, known_centers
from frames.files import MISSING, FrameError, LineFile
from frames.handfinder import find_center, load_classifier
from utils import HelpFormatter, UserError, one_line, run, start_worker, usable_cores, write_lines

NYU_JOINTS = [0, 3, 6, 9, 12, 15, 18, 21, 24, 25, 27, 30, 31, 32]
HAND17_TRAIN_SHARE = 0.95

# The official lists name some frames that were never recorded, fewer than this share.
MANY_MISSING = 0.1

# Where frames lie, to find those that no label names.
FRAME_FILES = {
    "NYU": ["train/depth_1_*.png", "test/depth_1_*.png"],
    "ICVL": ["Training/Depth/*/image_*.png", "Testing/Depth/*/image_*.png"],
    "MSRA": ["P*/*/[0-9]*_depth.bin"],
    "HAND17": ["training/images/image_D*.png", "frame/images/image_D*.png"],
}


def require(path, name, root):
    """Return `path`, one of a data set's official files. Raises UserError where it does not exist."""
    if path.exists():
        return path
    for folder in sorted(root.glob("*/")):
        if path != root and (folder / path.relative_to(root)).exists():
            raise UserError(f"{path} not found, but {folder} has it: give --data_dir {folder}")
    raise UserError(f'{path} not found: extract {name} to {root} (README, "{name}")')


def label_lines(path, name, root):
    """Return the non-blank lines of a label file. UserError where it cannot be read or is empty."""
    return [line for line in LineFile(require(path, name, root)) if line]


def nyu_lines(root, split):
    """Return an index line for every NYU frame of `train` or `test`: path, 14 joints uvd."""
    path = require(root / split / "joint_data.mat", "NYU", root)
    try:
        joints = np.asarray(scipy.io.loadmat(path, variable_names=["joint_uvd"])["joint_uvd"])
    except KeyError:
        raise UserError(f"{path} holds no joint_uvd: extract the NYU archive again") from None
    except NotImplementedError:
        raise UserError(f"{path} is in MATLAB's format 7.3, which SciPy cannot read: save it as v7") from None
    except Exception as error:  # scipy raises errors of any kind at damaged bytes
        reason = one_line(error)
        raise UserError(f"{path} is damaged ({reason}): extract the NYU archive again") from error
    if joints.ndim != 4 or not len(joints) or joints.shape[2:] != (36, 3) or joints.dtype.kind not in "fiu":
        raise UserError(f"{path}: joint_uvd is {joints.dtype} {joints.shape}, expected numbers [3, N, 36, 3]")
    joints = joints[0][:, NYU_JOINTS].reshape(joints.shape[1], -1).astype(np.float64)
    return [
        f"{(root / split).as_posix()}/depth_1_{number:07d}.png {' '.join(map(str, row))}"
        for number, row in enumerate(joints.tolist(), start=1)
    ]


def icvl_lines(root, split):
    """Return an index line for every unrotated ICVL frame: path, then the label file's 16 joints uvd."""
    folder = root / ("Training" if split == "train" else "Testing")
    names = ["labels.txt"] if split == "train" else ["test_seq_1.txt", "test_seq_2.txt"]
    lines = list(chain.from_iterable(label_lines(folder / name, "ICVL", root) for name in names))
    # Training labels with a longer path are rotated copies of other frames.
    plain = [line for line in lines if line.split()[0].replace("\\", "/").count("/") <= 1]
    if len(plain) < len(lines):
        print(f"ICVL {split}: {len(lines) - len(plain)} of {len(lines)} label lines are rotated copies")
    return [f"{folder.as_posix()}/Depth/{line}" for line in plain]


def msra_lines(root, subject):
    """Return an index line for every MSRA frame of a subject: path, 21 joints in the camera frame, mm."""
    lines = []
    for gesture in MSRADataset.gestures:
        folder = root / f"P{subject}" / gesture
        if not folder.is_dir():
            continue
        count, *labels = label_lines(folder / "joint.txt", "MSRA", root)
        if count != str(len(labels)):
            found = f"announces {count[:20]} frames and lists {len(labels)}"
            raise UserError(f"{folder / 'joint.txt'} {found}: extract MSRA again")
        lines += [
            f"{folder.as_posix()}/{number:06d}_depth.bin {_to_camera_frame(label)}"
            for number, label in enumerate(labels)
        ]
    if not lines:
        require(root / f"P{subject}" / MSRADataset.gestures[0] / "joint.txt", "MSRA", root)
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


# MSRA has subjects instead of splits.
READERS = {"NYU": nyu_lines, "ICVL": icvl_lines, "HAND17": hand17_lines}


def open_part(name, root, split, **options):
    """Return the HandDataset of a split, without labels where its test split has none."""
    cls = DATASETS[name]
    test_only = split == "test" and not cls.test_labels
    return cls(path=root, dataset=split, test_only=test_only, targets=False, **options)


def open_parts(name, root):
    """Return the parts that a data set is distributed in, {name: HandDataset of all its frames}.

    Raises UserError where an official file is missing or damaged.
    """
    require(root, name, root)
    if name == "MSRA":
        subjects = range(MSRADataset.subjects)
        return {
            f"P{s}": open_part(name, root, "test", subject=s, lines=msra_lines(root, s)) for s in subjects
        }
    read = READERS[name]
    return {split: open_part(name, root, split, lines=read(root, split)) for split in ("train", "test")}


def for_each_frame(work, dataset, title):
    """Yield work(dataset, index) for every frame, in order, computed on all cores, with a progress bar."""
    cores = usable_cores()
    size = min(256, max(1, len(dataset) // (8 * cores)))
    collate = partial(_work_on, work, dataset)
    options = dict(num_workers=cores, collate_fn=collate, worker_init_fn=start_worker)
    try:
        with tqdm(total=len(dataset), desc=f"{dataset.name} {title}", unit="frame") as bar:
            for results in DataLoader(range(len(dataset)), size, **options):
                yield from results
                bar.update(len(results))
    except (RuntimeError, OSError) as error:
        reason = one_line(error)
        raise UserError(
            f"a process that reads {dataset.root} ended ({reason}): with too little memory, use fewer cores "
            "(taskset -c 0 python check_dataset.py ...)"
        ) from error


def _work_on(work, dataset, indices):
    return [work(dataset, index) for index in indices]


def check_frame(dataset, index):
    """Return the FrameError that says why frame `index` cannot be used, or None where it can."""
    try:
        dataset.sample(index)
    except FrameError as error:
        return error


def computed_center(dataset, index):
    """Return a centre file's line for frame `index`, of the hand that is found in it."""
    try:
        return "{:.3f} {:.3f} {:.3f}".format(*find_center(dataset.read(dataset.line(index)), dataset.camera))
    except (FrameError, ValueError):
        return "invalid"


def compute_missing_centers(split, dataset):
    """Compute the centre file of a split that has none; say where one has too few lines."""
    if dataset.margin_mm is None:
        return
    given = [dataset.root / name for name in dataset.center_names()]
    absent = [path for path in given if not path.is_file()]
    if not absent:
        lines = len(dataset.centers[0])
        if lines < len(dataset):
            print(
                f"WARNING: {given[0]} has {lines} lines for {len(dataset)} frames: where one is lost, "
                "those after it are of other frames"
            )
        return
    computed = [path.with_name(computed_name(path.name)) for path in given]
    print(
        f"{absent[0]} not found: computing centres (of the hand found) into {computed[0]}; published results "
        "use the distributed file"
    )
    load_classifier()  # where it is missing, here rather than in every process
    centers, paths = {}, []
    for index, center in enumerate(for_each_frame(computed_center, dataset, f"centres {split}")):
        with suppress(FrameError):  # a line that names no frame, or one without a number, is refused later
            line = dataset.line(index)
            number = dataset.center_line(line) if len(computed) == 1 else len(paths)
            centers[number] = center
            paths.append("/".join(line.path.parts[-2:]))
    for path in computed[1:]:
        write_lines(path, paths)
    last = max(centers, default=0)
    write_lines(computed[0], (centers.get(number, "invalid") for number in range(last + 1)))


def unlabelled_frames(name, root, parts):
    """Return a line for each frame that no label names; print their number, and what else is not used."""
    named = set()
    for dataset in parts.values():
        used = set()
        for line in lines_of(dataset, range(len(dataset))):
            named.add(hash(line.path))
            with suppress(FrameError):
                used.add(dataset.center_line(line) if dataset.centers else None)
        for centers in dataset.centers[:1]:
            unused = len(known_centers(centers, set(range(len(centers))) - used))
            if unused:
                print(f"WARNING: {unused} of {len(centers)} lines of {centers.path} are of no labelled frame")
    found = chain.from_iterable(root.glob(pattern) for pattern in FRAME_FILES.get(name, []))
    unlabelled = sorted(path for path in found if hash(path) not in named)
    if unlabelled:
        print(f"WARNING: {len(unlabelled)} frames have no label and are not used: {unlabelled[0]} ...")
    if name == "MSRA":
        folders = [f"P{s}/{g}" for s in range(MSRADataset.subjects) for g in MSRADataset.gestures]
        absent = [folder for folder in folders if not (root / folder).is_dir()]
        if absent:
            print(f"WARNING: {len(absent)} of {len(folders)} gestures are missing: {' '.join(absent[:20])}")
    return [f"{path}\tno label names this frame" for path in unlabelled]


def build_index(name, root, force=False):
    """Validate a data set and write its index files and rejected.txt; print what was refused and why.

    Does nothing where all index files exist, unless `force`. Raises UserError where an official
    file is missing or no training frame can be used; then no index file is written.
    """
    folds = [f"_{s}" for s in range(MSRADataset.subjects)] if name == "MSRA" else [""]
    files = [root / f"{split}{fold}.txt" for fold in folds for split in ("train", "val", "test")]
    if all(file.is_file() for file in files) and not force:
        _check_first_frame(name, root)
        print(f"{name}: all index files are in {root}; --force builds them again")
        return
    parts, refusals = open_parts(name, root), {}
    for part, dataset in parts.items():
        compute_missing_centers(part, dataset)
        refusals[part] = list(for_each_frame(check_frame, dataset, f"check {part}"))
    _report(name, parts, refusals)
    refused = [f"{error.frame}\t{error.reason}" for error in chain(*refusals.values()) if error]
    write_lines(root / "rejected.txt", refused + unlabelled_frames(name, root, parts))
    indexes = {"MSRA": _msra_indexes, "HAND17": _hand17_indexes}.get(name, _plain_indexes)(parts, refusals)
    for file, lines in indexes.items():
        if not lines:
            reason = f"no frame of {root} can be used (reasons above)"
            raise UserError(f"{file} of {name} would be empty: {reason}")
    for file, lines in indexes.items():
        write_lines(root / file, lines)
        print(f"{root / file}: {len(lines)} frames")


def _check_first_frame(name, root):
    """Raise UserError where an index is another data set's, or its frames are gone."""
    dataset = DATASETS[name](path=root, dataset="train", use_cache=False)
    path = dataset.frame_path(0)
    if not path.is_file():
        index = root / dataset.index_name()
        raise UserError(f"{path} not found, which {index} names: is that {name}? --force builds it again")


def _accepted(part, parts, refusals):
    return [line for line, error in zip(parts[part].lines, refusals[part], strict=True) if error is None]


def _plain_indexes(parts, refusals):
    train, val = (_accepted(part, parts, refusals) for part in parts)
    return {"train.txt": train, "val.txt": val, "test.txt": parts["test"].lines}


def _msra_indexes(parts, refusals):
    accepted, indexes = {part: _accepted(part, parts, refusals) for part in parts}, {}
    for subject, (part, dataset) in enumerate(parts.items()):
        others = [lines for other, lines in accepted.items() if other != part]
        indexes[f"train_{subject}.txt"] = list(chain.from_iterable(others))
        indexes[f"val_{subject}.txt"] = accepted[part]
        # The official lists name frames that were never recorded.
        indexes[f"test_{subject}.txt"] = [
            line for index, line in enumerate(dataset.lines) if dataset.frame_path(index).is_file()
        ]
    return indexes


def _hand17_indexes(parts, refusals):
    accepted = _accepted("train", parts, refusals)
    random.Random(0).shuffle(accepted)
    count = int(HAND17_TRAIN_SHARE * len(accepted))
    return {"train.txt": accepted[:count], "val.txt": accepted[count:], "test.txt": parts["test"].lines}


def _report(name, parts, refusals):
    for part, dataset in parts.items():
        reasons = Counter(error.reason for error in refusals[part] if error)
        kept = " (test.txt keeps them)" if reasons and part == "test" else ""
        print(
            f"{name} {part}: {len(dataset) - reasons.total()} of {len(dataset)} frames accepted, "
            f"{reasons.total()} refused{kept}"
        )
        for reason, count in reasons.most_common():
            print(f"  {count:>7}  {reason}")
        if reasons[MISSING] > MANY_MISSING * len(dataset):
            print(f"WARNING: was {name} extracted to its end? Many frames of {part} have a label and no file")


def build_cache(name, root, force=False):
    """Write the crop caches of a data set whose index files are in place; print their size.

    Leaves a cache that serves the index as it is, unless `force`. Raises UserError where the disk is full.
    """
    for file, group in _cache_groups(name, root).items():
        path, settings = root / file, settings_of(group[0])
        lines = chain.from_iterable(lines_of(dataset, range(len(dataset))) for dataset in group)
        if path.is_file() and not force:
            try:
                CropCache(path, settings).check(lines)
                print(f"{path} is in place; --force builds it again")
                continue
            except CacheError as error:
                print(f"{path}: {error}; it is built again")
        made = (for_each_frame(make_record, dataset, f"cache {dataset.index_name()}") for dataset in group)
        count = write_cache(path, settings, filter(None, chain.from_iterable(made)))
        size = path.stat().st_size
        print(f"{path}: {count} frames, {size / 1e6:.1f} MB, {size / max(count, 1) / 1e3:.1f} kB a frame")


def _cache_groups(name, root):
    """Return, for each cache file, the splits whose frames it holds; those left out are parts of these."""
    options = [{"split": split} for split in (*DATASETS[name].training_splits, "test")]
    if name == "MSRA":
        options = [{"split": "test", "subject": subject} for subject in range(MSRADataset.subjects)]
    groups = {}
    for option in options:
        dataset = open_part(name, root, use_cache=False, **option)
        groups.setdefault(dataset.cache_name(), []).append(dataset)
    return groups


def main():
    """Parse the command line and build the index, and the crop cache where asked for."""
    parser = argparse.ArgumentParser(
        description="Validate a data set and write its index files.", formatter_class=HelpFormatter
    )
    parser.add_argument("--dataset", choices=DATASETS, default="NYU", help="data set")
    parser.add_argument("--data_dir", type=Path, help="the data set's own folder (default: Data/<dataset>)")
    parser.add_argument("--force", action="store_true", help="build again what is in place")
    parser.add_argument("--cache", action="store_true", help="also write the hands alone: they load faster")
    args = parser.parse_args()
    root = args.data_dir or Path("Data", args.dataset)
    build_index(args.dataset, root, args.force)
    if args.cache:
        build_cache(args.dataset, root, args.force)


if __name__ == "__main__":
    sys.exit(run(main))
