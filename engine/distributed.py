"""One process or many: torchrun is detected, and everything here does nothing without it."""

import atexit
import gc
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from utils import UserError


def start(device_name, gpu_id):
    """Join the process group that torchrun set up, until the script ends; return the GPU to be used."""
    if "RANK" not in os.environ:
        return gpu_id
    gpu_id = int(os.environ.get("LOCAL_RANK", 0))
    if dist.is_initialized():
        return gpu_id
    on_gpu = device_name != "cpu" and torch.cuda.is_available()
    if on_gpu and gpu_id < torch.cuda.device_count():
        # NCCL sends Python objects by way of the current GPU, which two processes must not share.
        torch.cuda.set_device(gpu_id)
    # Validation of a large split on one rank may keep the others waiting.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=60))
    atexit.register(stop)
    return gpu_id


def stop():
    """Leave the process group."""
    gc.collect()  # what still holds the group has threads, which abort if they outlive the interpreter
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """Return this process's number, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Return the number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """Return whether this process logs and saves."""
    return rank() == 0


def total(value):
    """Return a number's sum over all processes, or a tensor of them; every process must call this."""
    if not dist.is_initialized():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.as_tensor(value, dtype=torch.float64, device=device).clone()
    dist.all_reduce(tensor)
    return tensor.cpu() if isinstance(value, torch.Tensor) else tensor.item()


def from_main(function):
    """Call a function in the main process; return its plain Python value, or raise its UserError, in all."""
    value = error = None
    if is_main():
        try:
            value = function()
        except UserError as raised:
            error = raised
    box = [value, error]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    value, error = box
    if error is not None:
        raise error
    return value
