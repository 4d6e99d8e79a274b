"""A training run as a whole: from options to checkpoints and logs."""

import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from datasets import DATASETS, MSRADataset
from engine import distributed
from engine.batches import EpochSampler, PartSampler, ending_workers, make_loader
from engine.checkpoints import draw_seed, resolve_device, seed_everything, torch_errors_explained
from engine.loops import Progress, picture_of, train_one_epoch, validate
from engine.state import RunState, caught_signals, checkpoint_path, load_state, run_name, write_options
from frames.files import FrameError
from model import PixelwiseRegression
from utils import UserError


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
