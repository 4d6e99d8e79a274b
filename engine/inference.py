"""The fastest exact forward pass that a device offers, for all that runs a trained network: `prepare`."""

import copy
import os
import threading
import warnings
from functools import cache

import torch
from torch import nn
from tqdm import tqdm

from engine.winograd import as_winograd, is_worth_it
from model import StageOutput
from utils import one_line, usable_cores

# The answer may move by this much between two ways to compute it. uv spans two cubes of about 150 mm.
TOLERANCE_MM = 0.05
CUBE_MM = 150.0

# Threads of a network no wider than this wait for each other about as long as they work.
NARROW = 64

# So many frames repay the minute or more that compiling takes; a narrow network's graph is nearly as fast.
COMPILE_FRAMES = {"cpu": 3000, "cuda": 30000}
COMPILE_NARROW = 15000


def limit_threads(network):
    """Let this process use one thread for a narrow network; OMP_NUM_THREADS in the environment wins."""
    if network.param["features"] <= NARROW and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def forwards_at_once(device):
    """Return how many threads may run a network at a time: on a CPU as many as PyTorch leaves cores for."""
    return max(1, usable_cores() // torch.get_num_threads()) if torch.device(device).type == "cpu" else 1


class PlainInstanceNorm(nn.Module):
    """Instance norm in passes that keep channels_last, where torch's own makes contiguous copies."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x):
        """Normalise each channel of [B, F, H, W] over its pixels."""
        x = x - _mean(x)
        scale = self.weight[:, None, None] * torch.rsqrt(_mean(x.square()) + self.eps)
        return torch.addcmul(self.bias[:, None, None], x, scale)


def _mean(x):
    """Return the mean over a picture's pixels, [B, F, 1, 1].

    Compiled and exported code adds all numbers to one: row by row it rounds less, and stays in the
    processor's cache.
    """
    if torch.compiler.is_compiling():
        return x.mean(3, keepdim=True).mean(2, keepdim=True)
    return x.mean((2, 3), keepdim=True)


def replace_norms(network):
    """Put a PlainInstanceNorm in the place of every instance norm of a network."""
    replace(network, lambda module: isinstance(module, nn.InstanceNorm2d), PlainInstanceNorm)


def prepare(network, device, frames=0, tolerance_mm=TOLERANCE_MM):
    """Return a function (img, label_img, mask) -> the last stage's StageOutput, on `device`.

    The network is copied, not changed. It runs in channels_last; single frames on a CPU as a recorded graph;
    on a GPU in bfloat16 or TF32; compiled where `frames`, the number still to come (0: unknown), repays it.
    What may round otherwise is used once it has been seen on the first batch to move no coordinate by
    `tolerance_mm`. Several threads may call it.
    """
    network = copy.deepcopy(network).to(device, memory_format=torch.channels_last).eval()
    if device.type == "cpu":
        replace_norms(network)
    run, choosing = None, threading.Lock()

    @torch.inference_mode()
    def forward(img, label_img, mask):
        nonlocal run
        inputs = [x.to(memory_format=torch.channels_last) for x in (img, label_img, mask)]
        if run is None:
            with choosing:
                if run is None:
                    run, exact = fastest(network, inputs, frames, tolerance_mm)
                    return exact
        return last_stage(run, inputs)

    return forward


def fastest(network, inputs, frames, tolerance_mm):
    """Return the fastest way to run a network that moves nothing by the tolerance, and the exact answer."""
    # TF32 is how torch by itself rounds what a GPU's convolutions read.
    run = within(lambda: torch.backends.cudnn.flags(enabled=True, allow_tf32=False), network)
    exact = last_stage(run, inputs)
    for make in faster_forwards(network, inputs, frames):
        try:
            faster = make()
            if moved_mm(exact.uvd, last_stage(faster, inputs).uvd) < tolerance_mm:
                return faster, exact
        except (RuntimeError, AttributeError) as error:  # no compiler, Python.h, Triton or torch.jit
            reason = one_line(error)
            tqdm.write(f"warning: a faster way was passed over: {type(error).__name__} ({reason})")
    return run, exact


def faster_forwards(network, inputs, frames):
    """Return functions that make a forward pass which may be faster for so many frames, fastest first."""
    device = inputs[0].device
    single = len(inputs[0]) == 1 and frames != 1  # of a batch Python takes a small share of the time
    graph_is_fast = device.type == "cpu" and single and network.param["features"] <= NARROW
    compiling = frames >= (COMPILE_NARROW if graph_is_fast else COMPILE_FRAMES[device.type])
    if compiling:
        tqdm.write(f"compiling the network, which {frames} forward passes repay")
    fast = cache(lambda: compile_for(network, inputs) if compiling else network)
    if device.type == "cpu":
        return [fast] * compiling + [lambda: recorded(network, inputs)] * single
    half = lambda: within(lambda: torch.autocast(device.type, torch.bfloat16), fast())  # noqa: E731
    return [half, fast] if torch.cuda.get_device_capability(device) >= (8, 0) else [fast]


def within(context, network):
    """Return a function that runs the network within a context that context() makes."""

    def forward(*inputs):
        with context():
            return network(*inputs)

    return forward


class LastStage(nn.Module):
    """The last stage's output of a network, as the plain tuple that a graph can have."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *inputs):
        """Return what the network does for img, label_img and mask."""
        return tuple(self.network(*inputs)[-1])


def recorded(network, inputs):
    """Return the network as a graph, recorded on such inputs, which runs without Python's lock.

    That takes 0.7 of the time for a narrow network, and another thread's Python does not hold it up.
    """
    with warnings.catch_warnings():
        # Deprecated, but all that PyTorch has instead needs a compiler.
        warnings.simplefilter("ignore", DeprecationWarning)
        graph = torch.jit.trace(LastStage(network).eval(), inputs, check_trace=False)
    return lambda *batch: [StageOutput(*graph(*batch))]


def compile_for(network, inputs):
    """Return a function that runs the network compiled for such inputs, and others as it is.

    On a CPU a network with wide convolutions takes frames one by one, so that what WinogradConv keeps stays
    in the processor's cache. Raises RuntimeError, there at once, without a working compiler.
    """
    on_cpu = inputs[0].device.type == "cpu"
    other = copy.deepcopy(network)
    if on_cpu and replace(other, is_worth_it, as_winograd):
        return one_by_one(compile_frozen(other, [x[:1] for x in inputs]))
    compiled = compile_frozen(network, inputs) if on_cpu else torch.compile(network, dynamic=False)
    return lambda *batch: (compiled if batch[0].shape == inputs[0].shape else network)(*batch)


def compile_frozen(network, inputs):
    """Return the last stage of the network compiled for inputs like these, its weights built in."""
    compiled = torch.compile(lambda *x: network(*x)[-1:], dynamic=False)
    with torch._inductor.config.patch(freezing=True):  # as an option of torch.compile it comes too late
        compiled(*inputs)
    return compiled


def one_by_one(network):
    """Return a function that runs the network on each frame of a batch; it gives the last stage alone."""

    def forward(*inputs):
        outputs = [network(*frame)[-1] for frame in zip(*(x.split(1) for x in inputs))]
        return outputs if len(outputs) == 1 else [StageOutput(*map(torch.cat, zip(*outputs)))]

    return forward


def last_stage(network, inputs):
    """Return the network's last StageOutput as float32."""
    return StageOutput(*(x.float() for x in network(*inputs)[-1]))


def moved_mm(uvd, other):
    """Return the largest difference of two answers [B, J, 3], normalised, in mm of the usual cube."""
    return float(((uvd - other).abs() * uvd.new_tensor([2, 2, 1]) * CUBE_MM).max())


def replace(module, is_meant, make):
    """Put make(child) in the place of every child below a module that is meant; return how many were."""
    count = 0
    for name, child in module.named_children():
        if is_meant(child):
            setattr(module, name, make(child))
            count += 1
        else:
            count += replace(child, is_meant, make)
    return count
