"""One process or many: torchrun is detected, and everything here does nothing without it."""

import atexit
import gc
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from utils import UserError


def start(device_name, gpu_id):
    """Join the process group that torchrun set up; return the GPU this process is to use."""
    if "RANK" not in os.environ:
        return gpu_id
    on_gpu = device_name != "cpu" and torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if on_gpu and local_rank < torch.cuda.device_count():
        # NCCL sends Python objects by way of the current GPU, which two processes must not share.
        torch.cuda.set_device(local_rank)
    # What still holds the group must go while the interpreter runs: its threads abort if they outlive that.
    atexit.register(gc.collect)
    # Validation of a large split on one rank may keep the others waiting.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=60))
    return local_rank


def stop():
    """Leave the process group."""
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


def reduce(tensor, operation="sum"):
    """Combine a tensor over all processes, in place, by `sum` or `max`; return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[operation])
    return tensor


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
