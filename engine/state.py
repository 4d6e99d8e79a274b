"""The state of a training run: what it needs to go on, how it is written, and what it depended on."""

import hashlib
import platform
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from engine import distributed
from engine.checkpoints import load_checkpoint, save_checkpoint
from engine.loops import Progress
from engine.recipe import averaged
from utils import Stopped, UserError, atomic_path, one_line, take_lock

# For so long a run that has ended tries to write what a full disk refused.
RETRY_S = 600

# Options that may differ when a run is resumed: it goes on as the same run, but for rounding and its end.
FREE_OPTIONS = set(
    "config data_dir num_workers device gpu_id epoch resume save_minutes skip_bad max_bad_steps compile "
    "init".split()
)

STATE_KEYS = "state_dict optimizer scheduler epoch progress records seed options index".split()


def run_name(args):
    """Return the name that a run's checkpoints, logs and results share (of MSRA's `all` without subject)."""
    fold = f"_subject{args.subject}" if args.dataset == "MSRA" and args.subject != "all" else ""
    return f"{args.dataset}_{args.suffix}{fold}"


def checkpoint_path(run, which):
    """Return the file of a run's checkpoint: an epoch's number, `final` or `last`."""
    return Path("Model", f"{run}_{which}.pt")


def build_optimizer(args, parameters):
    """Return AdamW or SGD as the options ask, with the fused kernels, which are the fastest."""
    shared = dict(lr=args.lr, weight_decay=args.weight_decay, fused=True)
    if args.opt == "sgd":
        return torch.optim.SGD(parameters, momentum=args.beta1, **shared)
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
    """All that a run needs to go on where it stopped: network, optimiser, schedule, epochs and progress."""

    def __init__(self, args, network, splits):
        self.run, self.args, self.network = run_name(args), args, network
        self.parallel = network
        if distributed.world_size() > 1:
            device = next(network.parameters()).device
            self.parallel = DistributedDataParallel(network, [device] if device.type == "cuda" else None)
        self.optimizer = build_optimizer(args, network.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, args.decay_epoch, args.lr_decay)
        self.average = averaged(network, args.ema)
        self.epoch, self.records, self.progress = 0, [], Progress()
        self.provenance = provenance(args, splits)

    @property
    def judged(self):
        """The network that is validated and saved: with --ema that of the averaged weights."""
        return self.average.module if self.average else self.network

    def checkpoint(self):
        """Return the published form of a checkpoint, with the provenance of the run."""
        return {
            "state_dict": self.judged.state_dict(),
            "seed": self.args.seed,
            "model_param": self.network.param,
            "dataset": self.args.dataset,
            **self.provenance,
        }

    def capture(self):
        """Return what `restore` takes over: a checkpoint and all else that a run goes on from."""
        return {
            **self.checkpoint(),
            "state_dict": self.network.state_dict(),
            "average": self.average and self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "progress": asdict(self.progress),
            "records": self.records,
        }

    def restore(self, saved):
        """Take over what `capture` returned. Raises UserError where it does not fit."""
        try:
            self.network.load_state_dict(saved["state_dict"])
            if self.average:
                self.average.load_state_dict(saved["average"])
            self.optimizer.load_state_dict(saved["optimizer"])
            lay_like_weights(self.optimizer)
            self.scheduler.load_state_dict(saved["scheduler"])
            self.epoch, self.records = saved["epoch"], saved["records"]
            self.progress = Progress(**saved["progress"])
        except Exception as error:  # anything may stand in a changed file
            path, reason = checkpoint_path(self.run, "last"), one_line(error)
            raise UserError(f"{path} does not fit this run: {reason}") from error
        if saved["index"] != self.provenance["index"] and distributed.is_main():
            print("WARNING: the index files changed since the run began: it goes on with other data")


class Saver:
    """Writes a run's checkpoints in the main process: when it is time, and at a signal.

    What a full disk refuses is kept in memory, in `unsaved` by path, and tried again at each write.
    """

    def __init__(self, save_minutes, signals):
        self.save_s, self.signals, self.unsaved = 60 * save_minutes, signals, {}
        self.saved_at = time.monotonic()

    def write(self, path, checkpoint):
        """Write a checkpoint, after those that are still unsaved; warn where it cannot be written."""
        self.unsaved[path] = checkpoint
        self._write_unsaved()
        if path in self.unsaved:
            self.unsaved[path] = deepcopy(checkpoint)  # the weights go on changing

    def _write_unsaved(self, folder=None):
        """Write what is unsaved, to its place or into a folder; return the files written."""
        written = []
        for path, checkpoint in list(self.unsaved.items()):
            try:
                written.append(folder / path.name if folder else path)
                save_checkpoint(written[-1], checkpoint)
                del self.unsaved[path]
            except UserError as error:
                written.pop()
                tqdm.write(f"WARNING: {error}: {path} is not saved yet")
        return written

    def rescue(self, wait_s=0):
        """Try for `wait_s`, or until a signal, to write what is unsaved; then in the temporary folder.

        Return a sentence on what could not be written to its place; none where all was.
        """
        until = time.monotonic() + wait_s
        while self.unsaved and not self.signals and time.monotonic() < until:
            tqdm.write("free some space: what is not saved yet is tried again every few seconds")
            for _ in range(5):
                if not self.signals:
                    time.sleep(1)
            self._write_unsaved()
        if not self.unsaved:
            return ""
        elsewhere = self._write_unsaved(Path(tempfile.gettempdir()))
        moved = f"move {', '.join(map(str, elsewhere))} to Model/. " if elsewhere else ""
        lost = f"NOT SAVED: {', '.join(map(str, self.unsaved))}" if self.unsaved else ""
        return f"the disk is full: {moved}{lost}".rstrip(" .")

    def save(self, state):
        """Write Model/<run>_last.pt."""
        self.saved_at = time.monotonic()
        if distributed.is_main():
            self.write(checkpoint_path(state.run, "last"), state.capture())

    def save_if_due(self, state):
        """Save where --save_minutes have passed since the last time."""
        if time.monotonic() - self.saved_at > self.save_s:
            self.save(state)

    def stop_if_asked(self, state):
        """Once a process got a signal, save and raise Stopped, in all processes after the same step."""
        if not distributed.total(len(self.signals)):
            return
        self.save(state)
        number = self.signals[0] if self.signals else signal.SIGTERM
        unsaved = distributed.from_main(self.rescue)  # nor does a process end before the main one has saved
        raise Stopped(
            f"stopped by {signal.Signals(number).name} in epoch {state.epoch + 1} after step "
            f"{state.progress.step}; {unsaved or 'go on with the same command and --resume'}",
            128 + number,
        )


@contextmanager
def locked(run):
    """Let no other run of this name begin meanwhile. Raises UserError, in all processes, where one has."""
    with ExitStack() as files:
        distributed.from_main(lambda: _lock_file(run, files))
        yield


def _lock_file(run, files):
    """Lock a run's lock file, open until the ExitStack `files` ends."""
    path = Path("Model", f"{run}.lock")
    try:
        path.parent.mkdir(exist_ok=True)
        file = files.enter_context(path.open("a"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    # Unlike flock's, this lock is not handed on to loading processes, which may end after the run.
    take_lock("lockf", file, f"{run} is being trained already: wait, or give another --suffix")


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
    free = FREE_OPTIONS - {"epoch"} if args.lr_schedule == "cosine" else FREE_OPTIONS
    for key, value in saved["options"].items():
        seed_free = key == "seed" and args.seed == 0
        if key in now and key not in free and str(now[key]) != str(value) and not seed_free:
            raise UserError(
                f"--{key} is {now[key]} here and {value} in {path}: give the same, or leave --resume out"
            )
    return saved


def _check_state(epoch, seed, options, progress, records):
    """Raise an error where saved values cannot be those of a run."""
    if not isinstance(options, dict) or not 0 <= seed < 2**32 or epoch != len(records):
        raise ValueError("its options, seed or epoch are invalid")
    progress = asdict(Progress(**progress))
    float(progress.pop("loss_sum"))
    if not all(isinstance(count, int) and count >= 0 for count in progress.values()):
        raise ValueError("its step counts are invalid")
    for record in records:
        float(record["val_mm"])


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
