"""Seeds, devices and checkpoint files."""

import io
import os
import pickle
import random
import struct
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from utils import UserError, atomic_path, require_file

# What torch and zipfile raise at a file whose bytes were changed.
DAMAGE = (
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    AssertionError,
    OverflowError,
    MemoryError,
    OSError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


@contextmanager
def torch_errors_explained():
    """Turn what torch raises for a full GPU or for a missing compiler into a UserError."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError("the GPU's memory is full: give a smaller --batch_size or another device") from error
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(f"compiling failed ({reason}): leave --compile out, or install a compiler") from error


def draw_seed():
    """Return a seed that was never asked for, to be recorded."""
    return int.from_bytes(os.urandom(4), "little") % (2**31 - 1) + 1


def seed_everything(seed):
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def resolve_device(name, gpu_id=0):
    """Return the torch device for `auto`, `cpu` or `cuda`. Raises UserError where there is no such GPU."""
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if not 0 <= gpu_id < torch.cuda.device_count():
        raise UserError(f"--device cuda --gpu_id {gpu_id}: torch sees {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(gpu_id)  # where pinned memory and questions about "the" GPU go
    return torch.device("cuda", gpu_id)


def save_checkpoint(path, checkpoint):
    """Write a checkpoint dict atomically. Raises UserError where it cannot be written."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path, needed=("state_dict", "model_param")):
    """Read a checkpoint dict on the CPU; nothing in the file is executed.

    Raises UserError where the file is missing, damaged, not a checkpoint, or wants to run code.
    """
    path = Path(path)
    require_file(path, "train first, or name a checkpoint that exists")
    try:
        _verify(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is no checkpoint, or holds more than weights and was refused unread"
        ) from error
    except DAMAGE as error:
        raise UserError(
            f"{path} is damaged ({' '.join(str(error).split())[:80] or 'empty'}): copy or train it again"
        ) from error
    absent = [key for key in needed if not isinstance(checkpoint, dict) or key not in checkpoint]
    if absent:
        raise UserError(f"{path} is no checkpoint of this network: it has no {' and no '.join(absent)}")
    return checkpoint


def _verify(path):
    """Compare a checkpoint's weights with their checksums, which torch does not; raise one of DAMAGE."""
    if not zipfile.is_zipfile(path):
        return  # written by an old torch, without checksums
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"wrong checksum of {damaged}")


def random_states():
    """Return the state of every random generator as plain values and tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_random_states(states):
    """Take over what `random_states` returned."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
