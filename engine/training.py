"""A training run and a test run as a whole: from options to checkpoints, logs and result files."""

import os
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from datasets import DATASETS, MSRADataset, test_labels_uvd
from engine import distributed
from engine.batches import EpochSampler, PartSampler, ending_workers, make_loader
from engine.checkpoints import (
    draw_seed,
    load_checkpoint,
    resolve_device,
    seed_everything,
    torch_errors_explained,
)
from engine.loops import Progress, picture_of, predict, train_one_epoch, validate
from engine.metrics import PROTOCOLS, format_table, joint_errors_mm, summarise
from engine.state import RunState, caught_signals, checkpoint_path, load_state, run_name, write_options
from frames.files import FrameError
from model import PixelwiseRegression, from_checkpoint
from utils import UserError, atomic_path


def open_splits(args):
    """Return (train set, its indices, validation set, its indices) as the options ask."""
    cls = DATASETS[args.dataset]
    options = dict(
        path=args.data_dir,
        sigmoid=args.sigmoid,
        kernel_size=args.kernel_size,
        targets=False,
        label_size=args.label_size,
        image_size=2 * args.label_size,
    )
    if cls is MSRADataset:
        options["subject"] = args.subject
    using = {name: getattr(args, name) for name in vars(args) if name.startswith("using_")}
    train = cls(dataset="train", **options, **using)
    if not args.holdout:
        val = cls(dataset="val", **options)
        return train, np.arange(len(train)), val, np.arange(len(val))
    kept = len(train) - round(args.holdout * len(train))
    if not 0 < kept < len(train):
        raise UserError(f"--holdout {args.holdout} leaves no frame on one side of {len(train)}")
    val = cls(dataset="train", **options, **dict.fromkeys(using, 0))
    return train, np.arange(kept), val, np.arange(kept, len(train))


def build_network(args, joints, device):
    """Return the network that the options describe, on the device. Raises UserError for an impossible one."""
    try:
        network = PixelwiseRegression(
            joints,
            stage=args.stages,
            label_size=args.label_size,
            features=args.features,
            level=args.level,
            kernel_size=args.filter_size,
            norm_method=args.norm_method,
            heatmap_method=args.heatmap_method,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    if distributed.world_size() > 1 and args.norm_method == "batch":
        if device.type != "cuda":
            raise UserError(
                "batch norm is synchronised between GPUs only: use --norm_method instance on CPUs"
            )
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if device.type != "cpu" or args.compile:
        # Not on a CPU otherwise: instance norm's copies cost more there than the convolutions gain.
        network = network.to(memory_format=torch.channels_last)
    network = network.to(device)
    if args.compile:
        network.compile(dynamic=False)  # the one shape of training and the few of validation
    return network


@torch_errors_explained()
def train(args):
    """Train and validate as the options say; return (best epoch, its error mm, last error mm).

    Writes Model/<run>_<epoch>.pt, Model/<run>_last.pt (for --resume), Model/<run>_final.pt (the best
    epoch), Model/<run>.yml and logs/<run>/. Raises UserError for what the user can mend, Stopped
    after a signal.
    """
    args.gpu_id = distributed.start(args.device, args.gpu_id)
    try:
        device = resolve_device(args.device, args.gpu_id)
        saved = distributed.from_main(lambda: load_state(args))
        args.seed = saved["seed"] if saved else distributed.from_main(lambda: args.seed or draw_seed())
        seed_everything(args.seed)
        train_set, train_indices, val_set, val_indices = open_splits(args)
        batch_size = usable_batch_size(args, len(train_indices))
        network = build_network(args, train_set.joint_number, device)
        state = RunState(args, network, (train_set, val_set))
        if saved:
            state.restore(saved)
        sampler = EpochSampler(train_indices, batch_size, args.seed)
        own_batch = batch_size // distributed.world_size()
        train_loader = make_loader(train_set, sampler, args, device, own_batch)
        val_loader = make_loader(val_set, PartSampler(val_indices, own_batch), args, device, own_batch)
        if distributed.is_main():
            write_options(Path("Model", f"{state.run}.yml"), args)
            print(
                f"{state.run}: {len(train_indices)} training and {len(val_indices)} validation frames, "
                f"seed {args.seed}, {distributed.world_size()} x {device}"
            )
        with state.open_logs(), caught_signals(state), ending_workers(train_loader, val_loader):
            while state.epoch < args.epoch:
                train_epoch(state, train_loader, val_loader, device)
        return state.finish()
    finally:
        distributed.stop()


def usable_batch_size(args, frames):
    """Return --batch_size, or less where there are fewer training frames; say so."""
    most = frames - frames % distributed.world_size()
    if not most:
        raise UserError(f"{frames} training frames are too few for {distributed.world_size()} processes")
    if most < args.batch_size and distributed.is_main():
        print(f"batches of {most}, for there are no more training frames")
    return min(args.batch_size, most)


def train_epoch(state, train_loader, val_loader, device):
    """Train and validate one epoch, or the rest of one, and record it."""
    args, started = state.args, time.perf_counter()
    train_loader.sampler.epoch = state.epoch
    try:
        own = dict(progress=state.progress, state=state)
        train_one_epoch(state.parallel, train_loader, state.optimizer, device, args, **own)
        if not state.progress.good_steps:
            state.progress = Progress()  # the epoch begins anew once its frames are mended
            raise UserError(f"no step of epoch {state.epoch + 1} could be applied: see the warnings above")
        val_mm, val_loss = validate(state.network, val_loader, device, args, state.progress, state)
    except (UserError, RuntimeError):  # torch raises RuntimeError where another process or the GPU is lost
        # A signal to the whole process group ends the loading processes, maybe before it is looked at.
        state.agreed_signal = state.signal
        state.save(state.progress)
        raise
    state.end_epoch(
        {
            "epoch": state.epoch + 1,
            "loss": state.progress.loss_sum / state.progress.good_steps,
            "val_loss": val_loss,
            "val_mm": val_mm,
            "lr": state.scheduler.get_last_lr()[0],
            "bad_steps": state.progress.bad_steps,
            "refused": state.progress.refused,
            "seconds": round(time.perf_counter() - started, 2),
        }
    )
    if distributed.is_main():
        with suppress(FrameError):
            index = int(val_loader.sampler.indices[0])
            picture = picture_of(state.network, val_loader.dataset.dataset, index, device, args)
            state.log("add_image", "true and predicted", picture, state.epoch, dataformats="HWC")


def folds(args):
    """Return a copy of the options for each subject that --subject names.

    Of `all`, those that were not begun when the others stopped begin where --resume asks to go on.
    """
    subjects = range(MSRADataset.subjects) if args.subject == "all" else [args.subject]
    options = [Namespace(**{**vars(args), "subject": subject}) for subject in subjects]
    if len(options) > 1 and getattr(args, "resume", None):
        begun = any(checkpoint_path(run_name(fold), "last").is_file() for fold in options)
        for fold in options:
            fold.resume = "auto" if begun else args.resume
    return options


def require_trained_on(dataset, checkpoint, path):
    """Raise UserError where a checkpoint, read from `path`, says that another data set's joints are its."""
    says = checkpoint.get("dataset") or dataset
    if says != dataset:
        raise UserError(f"{path} was trained on {says}, whose joints are not those of {dataset}")


def load_network(path, joints):
    """Build the network of a checkpoint file. Raises UserError where it is damaged or has other joints."""
    return network_from(load_checkpoint(path), path, joints)


def network_from(checkpoint, path, joints):
    """Build the network of a checkpoint read from `path`. Raises UserError as `load_network` does."""
    try:
        _check_size(checkpoint)
        network = from_checkpoint(checkpoint)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this network: {' '.join(str(error).split())[:120]}") from error
    if network.joints != joints:
        raise UserError(f"{path} predicts {network.joints} joints, this data set has {joints}")
    return network


def _check_size(checkpoint):
    """Raise ValueError where `model_param` is not that of the weights: it might ask for all memory."""
    param, weights = checkpoint["model_param"], checkpoint["state_dict"]
    sizes = {
        "features": len(weights["stages.0.conv.weight"]),
        "label_size": weights["stages.0.plane_regression.filter"].shape[-1],
        "kernel_size": weights["conv.0.weight"].shape[-1],
    }
    wrong = [f"{name} {param[name]}" for name, size in sizes.items() if param.get(name, size) != size]
    if param["stage"] * (param["level"] + 1) > len(weights):
        wrong.append(f"stage {param['stage']} and level {param['level']}")
    if wrong:
        raise ValueError(f"the weights are not those of {', '.join(wrong)}")


@torch_errors_explained()
def test(args):
    """Predict a test split, write Result/<run>.txt and print the speed and, with labels, the errors.

    Returns (result lines, joints uvd, labels uvd or None). Raises UserError for what the user can mend.
    """
    device = resolve_device(args.device, args.gpu_id)
    cls, run = DATASETS[args.dataset], run_name(args)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("test.py and test_msra.py run in one process: leave torchrun out")
    path = args.model or checkpoint_path(run, args.seed)
    checkpoint = load_checkpoint(path)
    require_trained_on(args.dataset, checkpoint, path)
    network = network_from(checkpoint, path, cls.joint_number)
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
