"""Write contact sheets of a data set: crops with labels, augmentations, or predictions, worst first.

python -m tools.show --dataset NYU --split train --augment
python -m tools.show --dataset ICVL --split test --predictions Result/ICVL_default.txt
python -m tools.show --dataset HAND17 --split val --index 0 17 42
python -m tools.show --dataset HAND17 --split test --predictions Result/HAND17_default.txt --labels labels.txt
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch

from check_dataset import open_part
from datasets import DATASETS
from engine.metrics import PROTOCOLS, has_joints, joint_errors_mm
from evaluate import match_names, read_frames
from frames.drawing import draw_crop, write_picture
from frames.files import FrameError
from frames.transforms import joints_to_crop
from utils import HelpFormatter, UserError, run

SUFFIXES = (".png", ".jpg", ".jpeg")
TILE_PX = 192
COLUMNS = 6
AUGMENTATIONS = 5


def main(argv=None):
    """Write the sheet that the command line asks for."""
    args = parse(argv)
    subject = {"subject": args.subject or 0} if args.dataset == "MSRA" else {}
    dataset = open_part(args.dataset, args.data_dir, args.split, using_flip=True, **subject)
    errors_mm, joints_uvd, labels_uvd = {}, None, None
    if args.predictions:
        labels_uvd = load_predictions(args.labels, dataset) if args.labels else None
        joints_uvd = load_predictions(args.predictions, dataset)
        errors_mm = mean_errors_mm(dataset, joints_uvd, labels_uvd)
    indices = choose(dataset, args.index, args.count, errors_mm)
    tiles = []
    for index in indices:
        tiles += draw_frame(dataset, index, args.augment, joints_uvd, errors_mm.get(index), labels_uvd)
    fold = f"_subject{dataset.subject}" if subject else ""
    path = args.out or Path("Result", "show", f"{args.dataset}_{args.split}{fold}.png")
    write_picture(path, contact_sheet(tiles, 1 + AUGMENTATIONS if args.augment else COLUMNS))
    order = ", worst first" if errors_mm else ", unsorted: this split has no labels" * bool(args.predictions)
    print(f"{path}: {len(indices)} of {len(dataset)} frames{order}")


def parse(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Write contact sheets of a data set and of predictions.", formatter_class=HelpFormatter
    )
    parser.add_argument("--dataset", choices=DATASETS, required=True, help="data set")
    parser.add_argument("--split", choices=("train", "val", "test"), default="train", help="which index")
    parser.add_argument("--subject", type=int, help="held-out subject of MSRA (default: 0)")
    parser.add_argument("--data_dir", type=Path, help="the data set's own folder (default: Data/<dataset>)")
    parser.add_argument("--index", type=int, nargs="+", help="frames, by their line in the index, from 0")
    parser.add_argument("--count", type=int, default=24, help="frames where --index names none")
    parser.add_argument(
        "--augment", action="store_true", help=f"beside each training frame {AUGMENTATIONS} augmentations"
    )
    parser.add_argument("--predictions", type=Path, help="result file of this split: worst frames first")
    parser.add_argument("--labels", type=Path, help="file of labels, for a split that comes without (HAND17)")
    parser.add_argument("--out", type=Path, help="picture (default: Result/show/<dataset>_<split>.png)")
    args = parser.parse_args(argv)
    if args.augment and (args.split != "train" or args.predictions):
        raise UserError("--augment goes with --split train and without --predictions")
    if args.labels and not (args.predictions and args.dataset == "HAND17" and args.split == "test"):
        raise UserError("--labels goes with --dataset HAND17 --split test and --predictions")
    if args.subject is not None and args.dataset != "MSRA":
        raise UserError("--subject goes with --dataset MSRA")
    if args.count < 1:
        raise UserError(f"--count must be above 0, not {args.count}")
    if args.out and args.out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {args.out}: give a picture's name that ends in {', '.join(SUFFIXES)}")
    return args


def load_predictions(path, dataset):
    """Return a result file's joints [N, J, 3], uvd, in the data set's order; NaN where the file has zeros.

    Lines that begin with a frame's name are matched by it. Raises UserError where the file does not fit.
    """
    joints, names = read_frames(path, dataset.joint_number)
    PROTOCOLS[dataset.name].require_form(joints, path)
    if names is not None:
        wanted = [str(dataset.frame_path(index)) for index in range(len(dataset))]
        joints = joints[match_names(names, wanted, path, f"{dataset.name} {dataset.split}")]
    if len(joints) != len(dataset):
        raise UserError(f"{path} has {len(joints)} frames, {dataset.name} {dataset.split} {len(dataset)}")
    joints[~has_joints(joints)] = np.nan
    return dataset.xyz2uvd(joints) if dataset.name == "HAND17" else joints


def mean_errors_mm(dataset, joints_uvd, labels_uvd=None):
    """Return {index: mean joint error in mm} of the frames that have labels and predictions.

    Labels are the index's unless given. The camera is the loaders', as in validation; that of evaluate.py's
    tables differs for ICVL by 0.2%.
    """
    if dataset.test_only and labels_uvd is None:
        return {}
    errors_mm = {}
    for index, predicted_uvd in enumerate(joints_uvd):
        try:
            true_uvd = dataset.joints_uvd(dataset.line(index)) if labels_uvd is None else labels_uvd[index]
        except FrameError:
            continue
        if np.isnan((predicted_uvd, true_uvd)).any():
            continue
        predicted_xyz, true_xyz = dataset.uvd2xyz(predicted_uvd), dataset.uvd2xyz(true_uvd)
        errors_mm[index] = float(joint_errors_mm(predicted_xyz[None], true_xyz[None]).mean())
    return errors_mm


def choose(dataset, indices, count, errors_mm):
    """Return the frames to show: those named, the worst, or some spread over the split."""
    outside = [index for index in indices or [] if not 0 <= index < len(dataset)]
    if outside:
        raise UserError(
            f"--index {outside[0]}: {dataset.name} {dataset.split} has frames 0 to {len(dataset) - 1}"
        )
    if indices:
        return sorted(indices, key=lambda index: -errors_mm.get(index, 0))
    if errors_mm:
        return sorted(errors_mm, key=errors_mm.get, reverse=True)[:count]
    return np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)).tolist()


def draw_frame(dataset, index, augment, joints_uvd, error_mm, labels_uvd=None):
    """Return a frame's tiles, for each as many: crop with labels, then augmentations or the prediction."""
    others = AUGMENTATIONS if augment else int(joints_uvd is not None)
    try:
        sample = dataset.sample(index)
    except FrameError as error:
        return [_titled(_blank(), f"{index} {error.reason}"[:34]), *(_blank() for _ in range(others))]
    label = getattr(sample, "uvd", None)
    if labels_uvd is not None and not np.isnan(labels_uvd[index]).any():
        label = _in_crop(dataset, sample, labels_uvd[index])
    tiles = [_tile(dataset, sample, label, str(index))]
    if augment:
        augmented = [dataset[index, seed] for seed in range(AUGMENTATIONS)]
        tiles += [_tile(dataset, other, other.uvd, f"{index} augmented") for other in augmented]
    elif joints_uvd is not None and np.isnan(joints_uvd[index]).any():
        tiles.append(_titled(_blank(), "not predicted"))
    elif joints_uvd is not None:
        title = "predicted" if error_mm is None else f"predicted {error_mm:.1f} mm"
        tiles.append(_tile(dataset, sample, _in_crop(dataset, sample, joints_uvd[index]), title))
    return tiles


def _in_crop(dataset, sample, uvd):
    size = dataset.image_size
    return torch.from_numpy(
        joints_to_crop(uvd, sample.com.numpy(), float(sample.box_size), size) / (size - 1)
    )


def _tile(dataset, sample, uvd, title):
    uvd, chains = (np.zeros((1, 3)), []) if uvd is None else (uvd.numpy(), dataset.config)
    return _titled(draw_crop(sample.img[0].numpy(), uvd, chains, TILE_PX), title)


def _titled(picture, title):
    cv2.putText(picture, title, (4, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (255, 255, 255), 1, cv2.LINE_AA)
    return picture


def _blank():
    return np.zeros((TILE_PX, TILE_PX, 3), np.uint8)


def contact_sheet(tiles, columns):
    """Return one RGB picture of tiles of one size, so many in a row."""
    tiles = tiles + [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[start : start + columns]) for start in range(0, len(tiles), columns)])


if __name__ == "__main__":
    sys.exit(run(main))
