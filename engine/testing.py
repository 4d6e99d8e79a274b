"""A test run as a whole: from a checkpoint file to result lines and the table of errors."""

import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from datasets import DATASETS, MSRADataset
from engine.batches import batches_of, make_loader, to_device
from engine.checkpoints import load_network, resolve_device, torch_errors_explained
from engine.metrics import PROTOCOLS, format_table, measure_errors, summarise
from engine.state import checkpoint_path, run_name
from engine.training import folds
from engine.turns import prepare_turned
from frames.files import FrameError
from utils import SOME_FAILED, UserError, write_lines


class Tested(NamedTuple):
    """A test run's result lines, joints [N, J, 3] uvd, labels (the same, or None), and the refused frames."""

    lines: list
    joints_uvd: np.ndarray
    labels_uvd: np.ndarray | None
    refused: list


def predict(network, dataset, args, device):
    """Return joints [N, J, 3] uvd (px, mm) of every frame of a data set, and the refused frames' errors.

    A refused frame's joints are zero, so that rows stay aligned with the data set.
    """
    forward = prepare_turned(network, device, len(dataset), args.turns)
    loader = make_loader(dataset, range(len(dataset)), args, device, args.batch_size)
    joints_uvd, refused = np.zeros((len(dataset), dataset.joint_number, 3)), []
    bar = tqdm(total=len(dataset), desc=f"predict {dataset.name}", unit="frame", leave=False)
    with bar:
        for batch in batches_of(loader):
            refused += batch.refused
            if batch.samples is not None:
                samples = to_device(batch.samples, device)
                uvd = forward(samples.img, samples.label_img, samples.mask).uvd.cpu()
                for index, frame_uvd in zip(batch.indices, dataset.recover_uvd(uvd, batch.samples)):
                    if np.isfinite(frame_uvd).all():
                        joints_uvd[index] = frame_uvd
                    else:
                        refused.append(FrameError(dataset.frame_path(index), "the network gives no numbers"))
            bar.update(len(batch.indices) + len(batch.refused))
    return joints_uvd, refused


def result_name(args):
    """Return the name of a test run's result file; what is not the default adds to it."""
    run = run_name(args) + "_bb" * (args.process_mode == "bb") + f"_{args.turns}turns" * (args.turns > 1)
    if args.model:
        return f"{run}_{args.model.stem}"
    return run if args.seed == "final" else f"{run}_{args.seed}"


@torch_errors_explained()
def test(args):
    """Predict a test split, write its result file and print the speed; return what was Tested.

    Raises UserError for what the user can mend, and where no frame can be used.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("test.py and test_msra.py run in one process: leave torchrun out")
    device = resolve_device(args.device, args.gpu_id)
    network = load_network(args.model or checkpoint_path(run_name(args), args.seed), args.dataset)
    label_size = network.param["label_size"]
    fold = {"subject": args.subject} if args.dataset == "MSRA" else {}
    dataset = DATASETS[args.dataset](
        path=args.data_dir,
        dataset="test",
        test_only=True,
        process_mode=args.process_mode,
        label_size=label_size,
        image_size=2 * label_size,
        **fold,
    )
    started, name = time.perf_counter(), result_name(args)
    joints_uvd, refused = predict(network, dataset, args, device)
    if len(refused) == len(dataset):
        raise UserError(f"{name}: none of {len(dataset)} frames can be used: {refused[0]}")
    print(f"{name}: {len(dataset) / (time.perf_counter() - started):.1f} frames a second on {device}")
    warn_of(refused, "its joints are written as zeros")
    lines = result_lines(dataset, joints_uvd)
    write_results(Path("Result", f"{name}.txt"), lines)
    labels_uvd = test_labels_uvd(args.dataset, args.data_dir, **fold) if dataset.test_labels else None
    return Tested(lines, joints_uvd, labels_uvd, refused)


def warn_of(errors, result):
    """Print what is wrong with the first ten frames, what comes of it, and how many more there are."""
    for error in errors[:10]:
        print(f"warning: {error}; {result}")
    if len(errors) > 10:
        print(f"warning: so are those of {len(errors) - 10} more frames")


def test_and_evaluate(args):
    """Test as the options say and print the evaluation table; return the exit status, 3 for refused frames.

    MSRA's `all` merges the nine subjects; the merged result file is in the community's order: subject,
    gesture, frame.
    """
    results = [test(fold) for fold in (folds(args) if args.dataset == "MSRA" else [args])]
    title = result_name(args)
    lines = [line for result in results for line in result.lines]
    refused = sum(len(result.refused) for result in results)
    labels_uvd = [result.labels_uvd for result in results]
    if len(results) > 1:
        write_results(Path("Result", f"{title}.txt"), lines)
    if all(labels is not None for labels in labels_uvd):
        protocol, labels_uvd = PROTOCOLS[args.dataset], np.concatenate(labels_uvd)
        # The numbers as written: evaluate.py prints the same table of the file, to the last digit.
        joints_uvd = np.array([line.split() for line in lines], dtype=np.float64).reshape(labels_uvd.shape)
        error_mm, split = measure_errors(protocol, joints_uvd, labels_uvd)
        print(format_table({title: summarise(error_mm, split)}, protocol.joint_names))
        if refused:
            print(f"{title}: {refused} frames have no joints (zeros) and are left out")
    return SOME_FAILED if refused else 0


def result_lines(dataset, joints_uvd):
    """Return the lines of a result file: uvd, or HAND17's file name and xyz."""
    is_hand17 = dataset.name == "HAND17"
    joints = dataset.uvd2xyz(joints_uvd) if is_hand17 else joints_uvd
    # z: no "-0.000"
    frames = [[f"{n:z.3f}" for n in frame] for frame in joints.reshape(len(joints), -1).tolist()]
    if not is_hand17:
        return [" ".join(frame) for frame in frames]
    names = (f"frame\\images\\{dataset.frame_path(index).name}" for index in range(len(frames)))
    return ["\t".join([name, *frame]) for name, frame in zip(names, frames)]


def write_results(path, lines):
    """Write a result file atomically."""
    write_lines(path, lines)
    print(f"{path}: {len(lines)} frames")


def test_parts(name, data_dir=None, subject=None):
    """Return the test split of a data set as a list: MSRA without a `subject` is all nine in order.

    Raises UserError where the index is missing, or (HAND17) the data set has no test labels.
    """
    if not DATASETS[name].test_labels:
        raise UserError(f"{name}'s test frames have no labels: give a file with --labels")
    folds = [{}]
    if name == "MSRA":
        folds = [{"subject": s} for s in (range(MSRADataset.subjects) if subject is None else [subject])]
    what = dict(path=data_dir, dataset="test", test_only=True, use_cache=False)
    return [DATASETS[name](**what, **fold) for fold in folds]


def test_labels_uvd(name, data_dir=None, subject=None):
    """Return the labels [N, J, 3] of `test_parts`, uvd, in the order of the result file.

    A damaged label is named and becomes zeros, which evaluation leaves out. Raises UserError as `test_parts`,
    and where all are damaged.
    """
    labels_uvd, damaged = [], []
    for part in test_parts(name, data_dir, subject):
        for index in range(len(part)):
            try:
                labels_uvd.append(part.joints_uvd(part.line(index)))
            except FrameError as error:
                damaged.append(error)
                labels_uvd.append(np.zeros((part.joint_number, 3)))
    if len(damaged) == len(labels_uvd):
        raise UserError(f"{damaged[0]}; no other test label of {name} can be read either")
    warn_of(damaged, "its joints are left out of the errors")
    return np.stack(labels_uvd)
