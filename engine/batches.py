"""Batches for the loops: sampling order, refused frames, workers and transfer to the device."""

import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from multiprocessing import connection
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info
from tqdm import tqdm

from engine import distributed
from frames.files import FrameError
from utils import UserError, accept_signals, signals_held, usable_cores


class Batch(NamedTuple):
    """Frames of one step: collated samples (None when all were refused), their indices, the FrameErrors."""

    samples: tuple | None
    indices: list
    refused: list


class WorkerDied(UserError):
    """A loading process was killed, or crashed in native code, while it read the frames `indices`."""

    def __init__(self, message, indices):
        super().__init__(message)
        self.indices = indices


class Frames(Dataset):
    """A data set whose refused frames come back as FrameError values instead of ending the worker.

    An item is (index, Sample or UserError). `reading` tells, should one of `workers` die, which
    frame each was at; those in `deadly` are refused unread.
    """

    def __init__(self, dataset, workers):
        self.dataset = dataset
        self.reading = torch.full((workers,), -1, dtype=torch.int64).share_memory_()
        self.deadly = set()

    def __getitem__(self, key):
        index = key[0] if isinstance(key, tuple) else key
        if worker := get_worker_info():
            self.reading[worker.id] = index
        try:
            if index in self.deadly:
                raise FrameError(self.dataset.frame_path(index), "a loading process died while it read this")
            return index, self.dataset[key]
        except UserError as error:
            # From a worker, torch would hand on an exception as a page of text.
            return index, error


def collate(items):
    """Gather what `Frames` returns into a Batch."""
    good = [(index, sample) for index, sample in items if not isinstance(sample, UserError)]
    refused = [error for _, error in items if isinstance(error, UserError)]
    samples = default_collate([sample for _, sample in good]) if good else None
    return Batch(samples, [index for index, _ in good], refused)


class EpochSampler(Sampler):
    """The (index, augmentation seed) of an epoch's frames, in an order that (seed, epoch) alone fix.

    Every process takes its part of each global batch of `batch_size` frames, so that neither the
    number of processes nor a stop after `start` batches changes what a batch holds. The last
    partial batch is dropped.
    """

    def __init__(self, indices, batch_size, seed):
        if batch_size % distributed.world_size():
            raise UserError(
                f"--batch_size {batch_size} is the batch of all processes together: "
                f"it must be divisible by their number, {distributed.world_size()}"
            )
        self.indices, self.batch_size, self.seed = indices, batch_size, seed
        self.epoch, self.start = 0, 0

    @property
    def steps(self):
        """The number of batches in a whole epoch."""
        return len(self.indices) // self.batch_size

    def _keys(self):
        """Return (index, seed) pairs, [steps, processes, batch of one process, 2]."""
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.indices)
        keys = np.stack([order, rng.integers(2**62, size=len(order))], axis=1)
        return keys[: self.steps * self.batch_size].reshape(self.steps, distributed.world_size(), -1, 2)

    def __len__(self):
        return max(self.steps - self.start, 0) * self.batch_size // distributed.world_size()

    def __iter__(self):
        own = self._keys()[self.start :, distributed.rank()].reshape(-1, 2)
        return (tuple(key.tolist()) for key in own)


class PartSampler(Sampler):
    """This process's part of frames of which each is taken once, in order, from batch `start` on.

    `common_steps` is how many whole batches of `batch_size` frames every process has.
    """

    def __init__(self, indices, batch_size):
        world = distributed.world_size()
        self.indices, self.batch_size = indices[distributed.rank() :: world], batch_size
        self.common_steps, self.start = len(indices) // world // batch_size, 0

    def __len__(self):
        return max(len(self.indices) - self.start * self.batch_size, 0)

    def __iter__(self):
        return iter(self.indices[self.start * self.batch_size :].tolist())


def make_loader(dataset, sampler, args, device, batch_size):
    """Return a DataLoader of Batches over what `sampler` (a Sampler or a sequence of indices) yields."""
    workers = min(args.num_workers, -(-len(sampler) // batch_size))
    return DataLoader(
        Frames(dataset, workers),
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
    )


def _start_worker(_):
    # One process a core: OpenCV's own threads would only fight over them.
    cv2.setNumThreads(0)
    accept_signals()


def batches_of(loader):
    """Yield a loader's batches; raise WorkerDied, with the frame being read, where a worker dies.

    Raises any UserError that is not about one frame.
    """
    waiting = False

    def child_ended(*_):
        # Torch's own handler raises in the middle of a step too, which might be half done then.
        if waiting and dead_workers(loader):
            raise RuntimeError("a loading process died")

    try:
        # An iterator that is there has its processes, and may be slow to begin anew.
        with signals_held() if loader._iterator is None else nullcontext():
            iterator = iter(loader)
        if loader.num_workers and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, child_ended)
        while True:
            waiting = True
            child_ended()
            batch = next(iterator, None)
            waiting = False
            if batch is None:
                return
            for error in batch.refused:
                if not isinstance(error, FrameError):
                    raise error
            yield batch
    except (RuntimeError, EOFError, OSError) as error:
        # The last two: a worker died while it handed a batch over, maybe a moment before its end is known.
        waiting = False
        workers = {process.sentinel: process for process in getattr(loader._iterator, "_workers", [])}
        for ended in connection.wait(workers, timeout=2):
            workers[ended].join(timeout=2)
        if not dead_workers(loader):
            raise
        raise _worker_died(loader) from error
    finally:
        waiting = False


@contextmanager
def ending_workers(*loaders):
    """End the loaders' processes on leaving, and give SIGCHLD back.

    What Python does with processes that are left takes seconds for each.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)
        for loader in loaders:
            if loader._iterator is not None:
                loader._iterator._shutdown_workers()
                loader._iterator = None


def dead_workers(loader):
    """Return the loading processes that are no more, {number: process}."""
    workers = getattr(loader._iterator, "_workers", [])
    return {number: process for number, process in enumerate(workers) if not process.is_alive()}


def _worker_died(loader):
    """End what is left of a loader's processes; return the WorkerDied that says what happened."""
    dead, frames = dead_workers(loader), loader.dataset
    loader._iterator._shutdown_workers()
    loader._iterator = None  # the next use must not wait for the dead
    if any(process.exitcode == -signal.SIGTERM for process in dead.values()):
        return WorkerDied("a loading process was ended by SIGTERM", [])
    indices = [index for index in frames.reading[list(dead)].tolist() if index >= 0]
    names = ", ".join(str(frames.dataset.frame_path(index)) for index in indices)
    return WorkerDied(
        f"a loading process died while it read {names or 'nothing yet'} (out of memory? fewer --num_workers)",
        indices,
    )


def to_device(samples, device):
    """Move a batch to the device without waiting for it, on a GPU pictures in channels_last."""
    return type(samples)(*(_moved(field, device) for field in samples))


def _moved(field, device):
    on_gpu = field.ndim == 4 and device.type == "cuda"
    layout = torch.channels_last if on_gpu else torch.preserve_format
    return field.to(device, non_blocking=True, memory_format=layout)


def over_frames(work, frames, title):
    """Yield work(frames, index) for every frame, in order, computed on all cores, with a progress bar.

    Few results are on their way at a time, so that a slow reader of them does not fill the memory.
    """
    cores = usable_cores()
    size = min(256, max(1, len(frames) // (8 * cores)))
    chunks = [range(start, min(start + size, len(frames))) for start in range(0, len(frames), size)]
    pool = ProcessPoolExecutor(cores, initializer=_start_job, initargs=(work, frames))
    pending = deque()
    try:
        with tqdm(total=len(frames), desc=f"{frames.name} {title}", unit="frame") as bar:
            for chunk in [*chunks, *[None] * (2 * cores)]:
                with signals_held():  # it is not long until the next is done
                    pending.append(pool.submit(_run_chunk, chunk) if chunk else None)
                    done = pending.popleft() if len(pending) > 2 * cores else None
                    results = done.result() if done else []
                yield from results
                bar.update(len(results))
    except BrokenProcessPool:
        raise UserError(f"a worker died while it read {frames.root}: is there enough memory?") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_job(work, frames):
    global _job
    accept_signals()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    _job = work, frames


def _run_chunk(indices):
    work, frames = _job
    return [work(frames, index) for index in indices]
