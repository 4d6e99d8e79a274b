"""Batches for the loops: sampling order, refused frames, loading processes and transfer to the device."""

import signal
import sys
import traceback
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from engine import distributed
from frames.files import FrameError
from utils import UserError, start_worker

# So many frames are tried in place of one that cannot be used.
SUBSTITUTES = 100


@dataclass(frozen=True)
class Batch:
    """Frames of one step: a Sample of batched fields (None without any), their indices, and UserErrors.

    No tuple: PyTorch 2.10 would pin the items of one, of which arrays cannot be, and not call `pin_memory`.
    """

    samples: tuple | None
    indices: list
    refused: list

    def pin_memory(self):
        """Return the batch as tensors in pinned memory, as a DataLoader with `pin_memory` asks for."""
        if self.samples is None:
            return self
        pinned = (torch.from_numpy(field).pin_memory() for field in self.samples)
        return replace(self, samples=type(self.samples)(*pinned))


class Frames(Dataset):
    """A data set whose errors are values: from a worker torch would hand them on as a page of text.

    An item is (index, Sample or None, list of UserErrors). In place of a frame that cannot be used comes
    the next that can, of the first `substitutes` frames, so that batches are full.
    """

    def __init__(self, dataset, substitutes=0):
        self.dataset, self.substitutes = dataset, substitutes

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, None)
        refused, tries = [], min(SUBSTITUTES, self.substitutes) or 1
        for _ in range(tries):
            try:
                return index, self.dataset[index if seed is None else (index, seed)], refused
            except FrameError as error:
                refused.append(error)
                index = (index + 1) % max(self.substitutes, 1)
            except UserError as error:
                return index, None, [error]
        if self.substitutes:
            return index, None, [UserError(f"{refused[0]}; nor can the {tries - 1} frames after it be used")]
        return index, None, refused


def collate(items):
    """Gather what `Frames` returns into a Batch, whose fields are arrays.

    Arrays come from a worker through a pipe. Tensors would come as shared memory by way of a socket, and
    wait for ever where /dev/shm is full, files may not be opened, or the socket's path is too long.
    """
    good = [(index, sample) for index, sample, _ in items if sample is not None]
    fields = zip(*(sample for _, sample in good))
    arrays = [np.stack([field.numpy() for field in values]) for values in fields]
    samples = type(good[0][1])(*arrays) if good else None
    return Batch(samples, [index for index, _ in good], [error for *_, refused in items for error in refused])


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


def own_part(indices):
    """Return this process's part of frames of which each is taken once, in order."""
    return indices[distributed.rank() :: distributed.world_size()].tolist()


def make_loader(dataset, sampler, args, device, batch_size, substitutes=0):
    """Return a DataLoader of Batches over what `sampler` (a Sampler or a sequence of indices) yields."""
    workers = min(args.num_workers, -(-len(sampler) // batch_size))
    return DataLoader(
        Frames(dataset, substitutes),
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
    start_worker()
    # A SIGTERM to the whole process group comes here too, while the main process still needs the batches: the
    # first is passed over. Python ends what is left at its exit by further ones.
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def batches_of(loader):
    """Yield a loader's batches, of tensors.

    Raises any UserError that is not about one frame, and one where the system lets no worker start.
    """
    try:
        iterator = iter(loader)
    except OSError as error:
        _drop_half_made_iterator(error)
        raise UserError(
            f"no loading process can be started ({error}): give fewer --num_workers, or 0; or raise the "
            "limits on open files (ulimit -n), processes (ulimit -u) or /dev/shm"
        ) from error
    for batch in iterator:
        for error in batch.refused:
            if not isinstance(error, FrameError):
                raise error
        samples = batch.samples and type(batch.samples)(*map(torch.as_tensor, batch.samples))
        yield replace(batch, samples=samples)


def _drop_half_made_iterator(error):
    """Free what the error's frames hold: torch's iterator, whose `__del__` would print an AttributeError."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = hook


def to_device(samples, device):
    """Move a batch to the device without waiting for it, on a GPU pictures in channels_last."""
    return type(samples)(*(_moved(field, device) for field in samples))


def _moved(field, device):
    on_gpu = field.ndim == 4 and device.type == "cuda"
    layout = torch.channels_last if on_gpu else torch.preserve_format
    return field.to(device, non_blocking=True, memory_format=layout)
