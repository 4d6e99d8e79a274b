"""A training run as a whole: from options to checkpoints and logs."""

import math
import secrets
import signal
import sys
import time
import warnings
from argparse import Namespace
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from datasets import DATASETS, MSRADataset
from engine import distributed
from engine.batches import EpochSampler, make_loader, own_part
from engine.checkpoints import load_checkpoint, resolve_device, torch_errors_explained
from engine.full_regression import FullRegression
from engine.log import Log
from engine.loops import Progress, picture_of, train_one_epoch, validate
from engine.recipe import epoch_options, load_weights
from engine.state import (
    RETRY_S,
    RunState,
    Saver,
    checkpoint_path,
    load_state,
    locked,
    run_name,
    write_options,
)
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
    more = dict(rotation_deg=args.rotation_deg, shift_mm=args.shift_mm, erasing=args.erasing)
    train = cls(dataset="train", **options, **using, **more, noise_mm=args.depth_noise)
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
    size = dict(
        stage=args.stages,
        label_size=args.label_size,
        features=args.features,
        level=args.level,
        kernel_size=args.filter_size,
        norm_method=args.norm_method,
    )
    try:
        if args.network == "full":
            network = FullRegression(joints, **size)
        else:
            network = PixelwiseRegression(joints, **size, heatmap_method=args.heatmap_method)
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
    device = resolve_device(args.device, distributed.start(args.device, args.gpu_id))
    with locked(run_name(args)):
        return _train(args, device)


def _train(args, device):
    saved = distributed.from_main(lambda: load_state(args))
    seed = saved["seed"] if saved else distributed.from_main(lambda: args.seed or 1 + secrets.randbits(31))
    args = Namespace(**{**vars(args), "seed": seed})
    torch.manual_seed(seed)
    train_set, train_indices, val_set, val_indices = open_splits(args)
    batch_size = usable_batch_size(args, len(train_indices))
    network = build_network(args, train_set.joint_number, device)
    if args.init and not saved:
        begin_with(network, args.init)
    state = RunState(args, network, (train_set, val_set))
    if saved:
        state.restore(saved)
    sampler = EpochSampler(train_indices, batch_size, seed)
    own_batch = batch_size // distributed.world_size()
    substitutes = len(train_indices) if args.skip_bad else 0
    train_loader = make_loader(train_set, sampler, args, device, own_batch, substitutes)
    val_loader = make_loader(val_set, own_part(val_indices), args, device, own_batch)
    if distributed.is_main():
        write_options(Path("Model", f"{state.run}.yml"), args)
        print(
            f"{state.run}: {len(train_indices)} training and {len(val_indices)} validation frames, "
            f"seed {seed}, {distributed.world_size()} x {device}"
        )
    logs = (
        closing(Log(state.run, state.provenance, state.records)) if distributed.is_main() else nullcontext()
    )
    with noted_signals() as signals, logs as log:
        saver = Saver(args.save_minutes, signals)
        while state.epoch < args.epoch:
            try:
                record = train_epoch(state, train_loader, val_loader, device, saver)
            except UserError as error:
                saver.save(state)
                if unsaved := saver.rescue():
                    raise UserError(f"{error}; {unsaved}") from error
                raise
            end_epoch(state, record, saver)
            if log:
                log.add_epoch(state.records, validation_picture(state, val_loader, device))
        return finish(state, saver, log)


def begin_with(network, path):
    """Give a network the weights of a checkpoint; say which of them it could not take."""
    kept = load_weights(network, path)
    if distributed.is_main():
        anew = f"; these layers begin anew: {', '.join(kept)}" if kept else ""
        print(f"begins with the weights of {path}{anew}")


def usable_batch_size(args, frames):
    """Return --batch_size, or less where there are fewer training frames; say so."""
    most = frames - frames % distributed.world_size()
    if not most:
        raise UserError(f"{frames} training frames are too few for {distributed.world_size()} processes")
    if most < args.batch_size and distributed.is_main():
        print(f"batches of {most}, for there are no more training frames")
    batch_size = min(args.batch_size, most)
    if args.norm_method == "batch" and args.label_size == 2 ** (args.level + 1) and batch_size == 1:
        raise UserError("batch norm of one pixel needs more than one frame: give a larger --label_size")
    return batch_size


def train_epoch(state, train_loader, val_loader, device, saver):
    """Train and validate one epoch, or the rest of one; return its record."""
    args, sampler = epoch_options(state.args, state.epoch + 1), train_loader.sampler
    started = time.perf_counter()
    sampler.epoch, sampler.start = state.epoch, state.progress.step
    shown = dict(unit="step", leave=False, disable=not distributed.is_main())
    steps = train_one_epoch(state.parallel, train_loader, state.optimizer, device, args, state.progress)
    name = f"epoch {state.epoch + 1}"
    for progress in (bar := tqdm(steps, name, sampler.steps, initial=state.progress.step, **shown)):
        bar.set_postfix(loss=f"{progress.loss_sum / max(progress.good_steps, 1):.4f}", refresh=False)
        if state.average and not progress.bad_in_a_row:
            state.average.update_parameters(state.network)
        saver.stop_if_asked(state)
        saver.save_if_due(state)
    if not state.progress.good_steps:
        state.progress = Progress()  # the epoch begins anew once its frames are mended
        raise UserError(f"no step of epoch {state.epoch + 1} could be applied: see the warnings above")
    sums = torch.zeros(4, dtype=torch.float64)
    steps = validate(state.judged, val_loader, device, args, sums)
    for _ in tqdm(steps, "validate", len(val_loader), **shown):
        if saver.signals:
            break  # all processes end their validation before they stop
        saver.save_if_due(state)
    saver.stop_if_asked(state)
    error_mm, loss, frames, refused = distributed.total(sums).tolist()
    if not frames:
        raise UserError("no validation frame could be used")
    return {
        "epoch": state.epoch + 1,
        "loss": state.progress.loss_sum / state.progress.good_steps,
        "val_loss": loss / frames,
        "val_mm": error_mm / frames,
        "lr": state.optimizer.param_groups[0]["lr"],
        "bad_steps": state.progress.bad_steps,
        "refused": state.progress.refused + int(refused),
        "seconds": round(time.perf_counter() - started, 2),
    }


def end_epoch(state, record, saver):
    """Add an epoch's record to the state, and write its checkpoint and the state."""
    with warnings.catch_warnings():
        # A run resumed at an epoch's end takes no step before its schedule's.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        state.scheduler.step()
    state.records.append(record)
    state.epoch += 1
    state.progress = Progress(bad_in_a_row=state.progress.bad_in_a_row)
    if distributed.is_main():
        saver.write(checkpoint_path(state.run, state.epoch), {**state.checkpoint(), "record": record})
        print(f"epoch {state.epoch:>3}  loss {record['loss']:.4f}  val {record['val_mm']:.2f} mm")
    saver.save(state)


def validation_picture(state, val_loader, device):
    """Return a picture of the first validation frame, None where it cannot be used."""
    with suppress(FrameError):
        frames, index = val_loader.dataset.dataset, val_loader.sampler[0]
        return picture_of(state.judged, frames, index, device, state.args)


def finish(state, saver, log):
    """Make the best epoch the final checkpoint; print best and last, return (epoch, best mm, last mm)."""
    best, last = min(state.records, key=_error_mm), state.records[-1]
    if log:
        final, path = (checkpoint_path(state.run, which) for which in ("final", best["epoch"]))
        checkpoint = saver.unsaved.get(path, {})
        if not checkpoint:
            with suppress(UserError):  # it is gone or damaged
                checkpoint = load_checkpoint(path)
        if checkpoint.get("record") != best:
            print(f"WARNING: {path} is not this run's best epoch any more: {final} is the last epoch")
            checkpoint, best = state.checkpoint(), last
        saver.write(final, checkpoint)
        if unsaved := saver.rescue(RETRY_S):
            raise UserError(unsaved)
        log.write_curves(state.records)
        print(
            f"best epoch {best['epoch']}: {best['val_mm']:.2f} mm, last epoch {last['epoch']}: "
            f"{last['val_mm']:.2f} mm; {final} is epoch {best['epoch']}"
        )
    return best["epoch"], best["val_mm"], last["val_mm"]


def _error_mm(record):
    """Return an epoch's validation error, infinite where it is no number."""
    return record["val_mm"] if math.isfinite(record["val_mm"]) else math.inf


@contextmanager
def noted_signals():
    """Yield a list that notes SIGTERM and Ctrl-C: a run ends after its step; at the third, at once."""
    signals = []

    def note(number, _):
        signals.append(number)
        if len(signals) > 2:
            sys.exit(128 + number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def folds(args):
    """Return a copy of the options for each subject that --subject names.

    With `all` and --resume, subjects that had not begun when the run stopped are trained from the start.
    """
    subjects = range(MSRADataset.subjects) if args.subject == "all" else [args.subject]
    options = [Namespace(**{**vars(args), "subject": subject}) for subject in subjects]
    if len(options) > 1 and getattr(args, "resume", None):
        begun = any(checkpoint_path(run_name(fold), "last").is_file() for fold in options)
        for fold in options:
            fold.resume = "auto" if begun else args.resume
    return options
