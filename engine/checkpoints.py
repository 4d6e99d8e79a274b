"""Devices, and checkpoint files: written whole, read without running anything in them."""

import io
import pickle
import re
from contextlib import contextmanager
from pathlib import Path

import torch

from datasets import DATASETS
from engine.full_regression import COORDINATES_BIAS, FullRegression, label_size_of
from model import PixelwiseRegression
from utils import UserError, atomic_path, load_torch, one_line, require_file

DEVICES = ("auto", "cpu", "cuda")

# What DataParallel and torch.compile put before the names of weights.
WRAPPERS = re.compile(r"((module|_orig_mod)\.)+")

NO_MEMORY = "memory is too short for this: end other programs, or raise the limit that was set"


@contextmanager
def torch_errors_explained():
    """Turn torch's errors about missing resources or a dead process into UserErrors."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory is full: give a smaller --batch_size, where there is one, or another --device"
        ) from error
    except MemoryError as error:
        raise UserError(NO_MEMORY) from error
    except RuntimeError as error:
        if any(word in str(error) for word in ("DefaultCPUAllocator", "bad_alloc")):
            raise UserError(NO_MEMORY) from error
        if "DataLoader worker" in str(error):
            raise UserError(
                f"{one_line(error)}: where memory is short, give fewer --num_workers; "
                "where /dev/shm is small, enlarge it or give --num_workers 0"
            ) from error
        if torch.distributed.is_initialized() and any(word in str(error) for word in ("peer", "NCCL")):
            raise UserError("another process of this run ended: its own message says why") from error
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = one_line(error)
        raise UserError(f"compiling failed ({reason}): leave --compile out, or install a compiler") from error


def resolve_device(name, gpu_id=0):
    """Return the torch device for one of DEVICES. Raises UserError for others, or without such a GPU."""
    if name not in DEVICES:
        raise UserError(f"device must be {', '.join(DEVICES)}, not {name!r}")
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if not 0 <= gpu_id < torch.cuda.device_count():
        raise UserError(f"device {name}, GPU {gpu_id}: PyTorch sees {torch.cuda.device_count()} GPUs")
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
        checkpoint = load_torch(path)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is no checkpoint, or holds more than weights and was refused unread"
        ) from error
    except Exception as error:  # torch and zipfile raise errors of any kind at changed bytes
        raise UserError(
            f"{path} is damaged ({one_line(error) or 'empty'}): copy or train it again"
        ) from error
    absent = [key for key in needed if not isinstance(checkpoint, dict) or key not in checkpoint]
    if absent:
        raise UserError(f"{path} is no checkpoint of this network: it has no {' and no '.join(absent)}")
    return checkpoint


def load_network(path, dataset=None):
    """Return the network of a published or own checkpoint file, on the CPU and ready to predict.

    `dataset` names the data set whose joints it must predict. Without it the checkpoint says which, or the
    number of joints, or the file's name (MSRA_default_final.pt); either way it is `network.dataset` then.
    Raises UserError as `read_network`, and where the joints are another data set's.
    """
    network, checkpoint = read_network(path)
    network.dataset = _dataset_of(checkpoint, Path(path), network.joints, dataset)
    return network


def read_network(path):
    """Return the network of a checkpoint file, of any data set's joints, on the CPU, and the checkpoint.

    Raises UserError where the file is damaged, is another network's, or has weights that are not finite.
    """
    checkpoint = load_checkpoint(path)
    try:
        weights = {WRAPPERS.sub("", name): value for name, value in checkpoint["state_dict"].items()}
        if COORDINATES_BIAS in weights:
            cls, joints = FullRegression, len(weights[COORDINATES_BIAS]) // 3
        else:
            cls, joints = PixelwiseRegression, len(weights["stages.0.plane_regression.conv.9.bias"])
        _check_size(weights, checkpoint["model_param"])
        network = cls(joints, **checkpoint["model_param"])
        network.load_state_dict(weights)
    except Exception as error:  # anything may stand in the place of weights and sizes
        raise UserError(f"{path} does not fit this network: {one_line(error)}") from error
    bad = next((name for name, value in weights.items() if not value.isfinite().all()), None)
    if bad:
        raise UserError(f"{path} holds weights that are not finite ({bad}): take an earlier epoch")
    return network.eval(), checkpoint


def _check_size(weights, param):
    """Raise ValueError where `model_param` contradicts the weights: a forged size could fill the memory."""
    sizes = {
        "features": len(weights["stages.0.conv.weight"]),
        "kernel_size": weights["conv.0.weight"].shape[-1],
    }
    if COORDINATES_BIAS in weights:
        sizes["label_size"] = label_size_of(weights, param)
    else:
        sizes["label_size"] = weights["stages.0.plane_regression.filter"].shape[-1]
    wrong = [f"{name} {param[name]}" for name, size in sizes.items() if param.get(name, size) != size]
    if param["stage"] * (param["level"] + 1) > len(weights):
        wrong.append(f"stage {param['stage']} and level {param['level']}")
    if wrong:
        raise ValueError(f"the weights are not those of {', '.join(wrong)}")


def _dataset_of(checkpoint, path, joints, dataset):
    """Return the name of the data set whose joints a checkpoint has. Raises UserError, as `load_network`."""
    says = checkpoint.get("dataset")
    if not isinstance(says, str | None):
        raise UserError(f"{path} is damaged: its data set's name is no text")
    fitting = [name for name, cls in DATASETS.items() if cls.joint_number == joints]
    named = path.name.partition("_")[0]
    name = dataset or says or (fitting[0] if len(fitting) == 1 else named)
    if name not in DATASETS:
        raise UserError(f"{path} predicts {joints} joints: say with --joints which data set's they are")
    if says and says != name:
        raise UserError(f"{path} was trained on {says}, whose joints are not those of {name}")
    if name not in fitting:
        needed = DATASETS[name].joint_number
        raise UserError(f"{path} predicts {joints} joints, {name} has {needed}")
    return name
