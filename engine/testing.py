"""A test run as a whole: from a checkpoint file to result lines and the table of errors."""

import os
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets import DATASETS, MSRADataset, test_labels_uvd
from engine.batches import batches_of, ending_workers, make_loader, to_device
from engine.checkpoints import load_network, resolve_device, torch_errors_explained
from engine.inference import prepare
from engine.metrics import PROTOCOLS, format_table, joint_errors_mm, summarise
from engine.state import checkpoint_path, run_name
from engine.training import folds
from frames.files import FrameError
from utils import UserError, atomic_path


def predict(network, dataset, args, device):
    """Return joints [N, J, 3] uvd (px, mm) of every frame of a data set, and the refused frames' errors.

    A refused frame's joints are zero, so that rows stay aligned with the data set.
    """
    forward = prepare(network, device, len(dataset))
    loader = make_loader(dataset, range(len(dataset)), args, device, args.batch_size)
    joints_uvd, refused = np.zeros((len(dataset), dataset.joint_number, 3)), []
    bar = tqdm(total=len(dataset), desc=f"predict {dataset.name}", unit="frame", leave=False)
    with bar, ending_workers(loader):
        for batch in batches_of(loader):
            refused += batch.refused
            if batch.samples is not None:
                samples = to_device(batch.samples, device)
                uvd = forward(samples.img, samples.label_img, samples.mask).uvd.cpu()
                joints_uvd[batch.indices] = dataset.recover_uvd(uvd, batch.samples)
            bar.update(len(batch.indices) + len(batch.refused))
    return joints_uvd, refused


@torch_errors_explained()
def test(args):
    """Predict a test split, write Result/<run>.txt and print the speed and, with labels, the errors.

    Returns (result lines, joints uvd, labels uvd or None). Raises UserError for what the user can mend.
    """
    device = resolve_device(args.device, args.gpu_id)
    cls, run = DATASETS[args.dataset], run_name(args)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("test.py and test_msra.py run in one process: leave torchrun out")
    network = load_network(args.model or checkpoint_path(run, args.seed), args.dataset)
    label_size = network.param["label_size"]
    fold = {"subject": args.subject} if cls is MSRADataset else {}
    dataset = cls(
        path=args.data_dir,
        dataset="test",
        test_only=True,
        process_mode=args.process_mode,
        label_size=label_size,
        image_size=2 * label_size,
        **fold,
    )
    started = time.perf_counter()
    joints_uvd, refused = predict(network, dataset, args, device)
    print(f"{run}: {len(dataset) / (time.perf_counter() - started):.1f} frames a second on {device}")
    for error in refused[:10]:
        print(f"warning: {error}; its joints are written as zeros, which count as such in the errors")
    if len(refused) > 10:
        print(f"warning: so are those of {len(refused) - 10} more frames")
    lines = result_lines(dataset, joints_uvd)
    write_results(Path("Result", f"{run}.txt"), lines)
    labels_uvd = None
    if args.dataset != "HAND17":
        try:
            labels_uvd = test_labels_uvd(args.dataset, args.data_dir, **fold)
        except FrameError as error:
            print(f"warning: {error}; no errors are printed")
    return lines, joints_uvd, labels_uvd


def test_and_evaluate(args):
    """Test as the options say and print the evaluation table; MSRA's `all` merges the nine subjects.

    The merged result file is in the community's order: subject, gesture, frame.
    """
    if args.dataset != "MSRA":
        results, title = [test(args)], run_name(args)
    else:
        results = [test(fold) for fold in folds(args)]
        title = run_name(args) if len(results) == 1 else f"MSRA_{args.suffix}"
    parts, _, labels_uvd = zip(*results)
    lines = sum(parts, [])
    if len(results) > 1:
        write_results(Path("Result", f"{title}.txt"), lines)
    if all(labels is not None for labels in labels_uvd):
        protocol, labels_uvd = PROTOCOLS[args.dataset], np.concatenate(labels_uvd)
        # The numbers as written: evaluate.py prints the same table of the file, to the last digit.
        joints_uvd = np.array([line.split() for line in lines], dtype=np.float64).reshape(labels_uvd.shape)
        error_mm = joint_errors_mm(protocol.to_xyz(joints_uvd), protocol.to_xyz(labels_uvd))
        print(format_table({title: summarise(error_mm, protocol.split)}, protocol.joint_names))


def result_lines(dataset, joints_uvd):
    """Return the lines of a result file: uvd, or HAND17's file name and xyz."""
    if dataset.name != "HAND17":
        return [
            " ".join(f"{n:.3f}" for n in frame) for frame in joints_uvd.reshape(len(joints_uvd), -1).tolist()
        ]
    joints_xyz = dataset.uvd2xyz(joints_uvd).reshape(len(joints_uvd), -1) + 0.0  # no "-0.000"
    return [
        "\t".join([f"frame\\images\\{dataset.frame_path(index).name}", *(f"{n:.3f}" for n in frame)])
        for index, frame in enumerate(joints_xyz.tolist())
    ]


def write_results(path, lines):
    """Write a result file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines))
    print(f"{path}: {len(lines)} frames")
