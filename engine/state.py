"""The state of a training run: what it needs to go on, how it is written, and what it depended on."""

import hashlib
import json
import math
import platform
import signal
import subprocess
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from engine import distributed
from engine.checkpoints import load_checkpoint, random_states, restore_random_states, save_checkpoint
from engine.loops import REPORT_STEPS, Progress
from frames.drawing import write_curves
from utils import Stopped, UserError, atomic_path

# Options that may differ when a run is resumed: they do not change what is computed.
FREE_OPTIONS = {
    "config",
    "data_dir",
    "num_workers",
    "device",
    "gpu_id",
    "epoch",
    "resume",
    "save_minutes",
    "skip_bad",
    "max_bad_steps",
    "compile",
}

STATE_KEYS = "state_dict optimizer scheduler epoch progress records random seed options index".split()


def run_name(args):
    """Return the name that a run's checkpoints, logs and results share (of MSRA's `all` without subject)."""
    fold = f"_subject{args.subject}" if args.dataset == "MSRA" and args.subject != "all" else ""
    return f"{args.dataset}_{args.suffix}{fold}"


def checkpoint_path(run, which):
    """Return the file of a run's checkpoint: an epoch's number, `final` or `last`."""
    return Path("Model", f"{run}_{which}.pt")


def build_optimizer(args, parameters):
    """Return AdamW or SGD as the options ask, fused (see engine.train_step)."""
    shared = dict(lr=args.lr, weight_decay=args.weight_decay, fused=True)
    if args.opt == "sgd":
        sgd = torch.optim.SGD(parameters, momentum=args.beta1, **shared)
        for parameter in sgd.param_groups[0]["params"]:
            # Should the first step be skipped, fused SGD would leave its momentum uninitialised.
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return torch.optim.AdamW(parameters, betas=(args.beta1, args.beta2), **shared)


def lay_like_weights(optimizer):
    """Give an optimiser's moments the memory layout of their weights, as fused steps take for granted.

    A state may come from another device, or from a run without --compile.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if getattr(value, "shape", None) == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


class RunState:
    """All that a run needs to go on where it stopped, and how it is written and read back."""

    def __init__(self, args, network, splits):
        self.run, self.args, self.network = run_name(args), args, network
        self.parallel = network
        if distributed.world_size() > 1:
            self.parallel = DistributedDataParallel(
                network, [args.gpu_id] if args.device != "cpu" and torch.cuda.is_available() else None
            )
        self.optimizer = build_optimizer(args, network.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, args.decay_epoch, args.lr_decay)
        self.epoch, self.records, self.progress = 0, [], Progress()
        self.provenance = provenance(args, splits)
        self.saved_at, self.unsaved, self.board = time.monotonic(), {}, None
        # The signal that this process got, and the one that all processes know of.
        self.signal, self.agreed_signal = 0, 0

    @contextmanager
    def open_logs(self):
        """Keep TensorBoard's log open in the main process."""
        if not distributed.is_main():
            yield
            return
        # TensorBoard takes seconds to import, which no other script should pay.
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.board = SummaryWriter(Path("logs", self.run), purge_step=self.epoch + 1)
        except OSError as error:
            tqdm.write(f"WARNING: no log for TensorBoard: {error}")
        try:
            yield
        finally:
            self.log("close")

    def log(self, method, *values, **options):
        """Call a method of TensorBoard's writer; where its disk is full warn, and log no more there."""
        if self.board is None:
            return
        try:
            getattr(self.board, method)(*values, **options)
        except OSError as error:
            tqdm.write(f"WARNING: TensorBoard's log ends here: {error.strerror or error}")
            self.board = None

    def checkpoint(self):
        """Return the published form of a checkpoint, with the provenance of the run."""
        return {
            "state_dict": self.network.state_dict(),
            "seed": self.args.seed,
            "model_param": self.network.param,
            "dataset": self.args.dataset,
            **self.provenance,
        }

    def due(self, step):
        """Return whether to save after `step`: on a signal, or --save_minutes after the last time.

        Several processes have to agree, which they do once in REPORT_STEPS steps.
        """
        if distributed.world_size() > 1 and step % REPORT_STEPS:
            return False
        return self.agree()

    def agree(self):
        """Return whether some process got a signal, or last saved --save_minutes ago."""
        late = time.monotonic() - self.saved_at > 60 * self.args.save_minutes
        wishes = self.signal, int(late)
        if distributed.world_size() > 1:
            device = next(self.network.parameters()).device
            wishes = distributed.reduce(torch.tensor(wishes, device=device), "max").tolist()
        self.agreed_signal, late = wishes
        return bool(self.agreed_signal or late)

    def save(self, progress):
        """Write Model/<run>_last.pt; raise Stopped when a signal asked for the end."""
        self.progress, self.saved_at = progress, time.monotonic()
        path = checkpoint_path(self.run, "last")
        if distributed.is_main():
            self.write_unsaved()
            state = {
                **self.checkpoint(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "epoch": self.epoch,
                "progress": asdict(progress),
                "records": self.records,
                "random": random_states(),
            }
            with going_on():
                save_checkpoint(path, state)
        if self.agreed_signal:
            raise Stopped(
                f"stopped by {signal.Signals(self.agreed_signal).name} in epoch {self.epoch + 1} after step "
                f"{progress.step}; go on with the same command and --resume",
                128 + self.agreed_signal,
            )

    def restore(self, saved):
        """Take over what `save` wrote. Raises UserError where it does not fit."""
        try:
            self.network.load_state_dict(saved["state_dict"])
            self.optimizer.load_state_dict(saved["optimizer"])
            lay_like_weights(self.optimizer)
            self.scheduler.load_state_dict(saved["scheduler"])
            self.epoch, self.records = saved["epoch"], saved["records"]
            self.progress = Progress(**saved["progress"])
            restore_random_states(saved["random"])
        except Exception as error:  # anything may stand in a changed file
            path, reason = checkpoint_path(self.run, "last"), " ".join(str(error).split())[:120]
            raise UserError(f"{path} does not fit this run: {reason}") from error
        if saved["index"] != self.provenance["index"] and distributed.is_main():
            print("WARNING: the index files changed since the run began: it goes on with other data")

    def write_unsaved(self):
        """Save the epochs that are still to be saved."""
        for path, checkpoint in list(self.unsaved.items()):
            with going_on():
                save_checkpoint(path, checkpoint)
                del self.unsaved[path]

    def end_epoch(self, record):
        """Record an epoch: checkpoint, state, metrics.jsonl, TensorBoard and one line on screen."""
        with warnings.catch_warnings():
            # A run resumed at an epoch's end takes no step before its schedule's.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        self.records.append(record)
        self.epoch += 1
        if distributed.is_main():
            # A copy, for the weights go on changing should the disk be full now.
            self.unsaved[checkpoint_path(self.run, self.epoch)] = {
                **self.checkpoint(),
                "record": record,
                "state_dict": {name: value.clone() for name, value in self.network.state_dict().items()},
            }
            with going_on(), atomic_path(Path("logs", self.run, "metrics.jsonl")) as temporary:
                temporary.write_text("".join(f"{json.dumps(r)}\n" for r in [self.provenance, *self.records]))
            for key in ("loss", "val_loss", "val_mm", "lr"):
                self.log("add_scalar", key, record[key], self.epoch)
            print(f"epoch {self.epoch:>3}  loss {record['loss']:.4f}  val {record['val_mm']:.2f} mm")
        self.agree()
        self.save(Progress(bad_in_a_row=self.progress.bad_in_a_row))

    def finish(self):
        """Make the best epoch the final checkpoint; print best and last, return (epoch, best mm, last mm)."""
        best, last = min(self.records, key=_error_mm), self.records[-1]
        if distributed.is_main():
            final, path = (checkpoint_path(self.run, which) for which in ("final", best["epoch"]))
            if path in self.unsaved or path.is_file():
                save_checkpoint(final, self.unsaved.get(path) or load_checkpoint(path))
            else:
                print(f"WARNING: {path}, the best epoch, is gone: {final} is the last epoch")
                save_checkpoint(final, self.checkpoint())
            write_curves(Path("logs", self.run, "curves.png"), self.records)
            print(
                f"best epoch {best['epoch']}: {best['val_mm']:.2f} mm, last epoch {last['epoch']}: "
                f"{last['val_mm']:.2f} mm; {final} is the best"
            )
        return best["epoch"], best["val_mm"], last["val_mm"]


def _error_mm(record):
    """Return an epoch's validation error, infinite where it is no number."""
    return record["val_mm"] if math.isfinite(record["val_mm"]) else math.inf


def load_state(args):
    """Return the saved state that --resume asks for, or None.

    Raises UserError where there is none, or it was made with other options.
    """
    path = checkpoint_path(run_name(args), "last")
    if args.resume is None:
        if path.is_file():
            print(
                f"WARNING: {path} and its run are written over from here on: stop now to keep them, "
                "go on with them by --resume, or begin another run with --suffix"
            )
        return None
    if args.resume == "auto" and not path.is_file():
        return None
    saved = load_checkpoint(path, STATE_KEYS)
    try:
        _check_state(**{key: saved[key] for key in ("epoch", "seed", "options", "progress", "records")})
    except Exception as error:  # anything may stand in a changed file
        raise UserError(f"{path} is no state of a run ({error}): train anew without --resume") from None
    if saved["epoch"] >= args.epoch:
        print(f"{path} has all of its {saved['epoch']} epochs: nothing is left to train")
    else:
        print(f"resuming from {path}, epoch {saved['epoch'] + 1}, step {saved['progress']['step']}")
    now = resolved_options(args)
    for key, value in saved["options"].items():
        seed_free = key == "seed" and args.seed == 0
        if key in now and key not in FREE_OPTIONS and str(now[key]) != str(value) and not seed_free:
            raise UserError(
                f"--{key} is {now[key]} here and {value} in {path}: give the same, or leave --resume out"
            )
    return saved


def _check_state(epoch, seed, options, progress, records):
    """Raise an error where saved values cannot be those of a run."""
    if not isinstance(options, dict) or not 0 <= seed < 2**32 or epoch != len(records):
        raise ValueError("its options, seed or epoch are none")
    progress = asdict(Progress(**progress))
    float(progress.pop("loss_sum"))
    if not all(isinstance(count, int) and count >= 0 for count in progress.values()):
        raise ValueError("its steps are none")
    for record in records:
        float(record["val_mm"])


@contextmanager
def going_on():
    """Turn a write that fails into a loud warning."""
    try:
        yield
    except UserError as error:
        tqdm.write(f"WARNING: {error}. Training goes on, and the next save tries again")


@contextmanager
def caught_signals(state):
    """Let SIGTERM and SIGINT end the run after the current step instead of at once."""

    def note(number, _):
        state.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def provenance(args, splits):
    """Return what a run's result depends on: options, seed, versions, commit and the index files' hash."""
    digest = hashlib.blake2b(digest_size=16)
    for split in splits:
        with (split.root / split.index_name()).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    commit, here = None, Path(__file__).parents[1]
    with suppress(FileNotFoundError):  # nobody needs git to train
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or None
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }
    return {
        "options": resolved_options(args),
        "versions": versions,
        "commit": commit,
        "index": digest.hexdigest(),
    }


def resolved_options(args):
    """Return the options as plain values that YAML and JSON hold and --config reads."""
    skipped = ("config", "resume", "dataset") if args.dataset == "MSRA" else ("config", "resume")
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if key not in skipped
    }


def write_options(path, args):
    """Write the options as resolved to a YAML file that --config reads."""
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(resolved_options(args), sort_keys=False))
