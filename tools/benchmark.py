"""Time every part of the work, from index to inference, and set it beside what the machine allows.

    python -m tools.benchmark
    python -m tools.benchmark --data NYU=/data/NYU --data HAND17=/data/HANDS17 --json benchmark.json
    python -m tools.benchmark --device cuda --parts network

Data sets that are not named with --data are rendered, small, into a temporary folder.
"""

import argparse
import json
import math
import os
import platform
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.benchmark import Measurement, Timer, timer
from torch.utils.flop_counter import FlopCounterMode

from check_dataset import build_cache, build_index, check_frame, open_parts
from datasets import DATASETS
from engine.batches import EpochSampler, batches_of, make_loader
from engine.checkpoints import DEVICES, load_network, resolve_device
from engine.inference import COMPILE_FRAMES, moved_mm, prepare
from engine.loops import train_step
from engine.options import parse_train
from engine.state import build_optimizer
from engine.training import build_network
from frames.files import read_bytes
from frames.samples import Sample
from model import spatial_form
from rendering.layouts import FEWEST, write_dataset
from tools.export import make_crops
from utils import HelpFormatter, atomic_path, run, usable_cores

JOINTS = 21
FRAMES = 16  # of each rendered data set; looped over, so that they are in the page cache
PRECISIONS = {"float32": [], "bfloat16": ["--mixed_precision"]}  # words for train.py's command line
MODES = {"eager": [], "compiled": ["--compile"]}


class Row(NamedTuple):
    """One line of the table: the median of what was measured, half its interquartile range, a remark."""

    part: str
    value: float
    unit: str
    spread: float
    remark: str = ""

    def __str__(self):
        return (
            f"{self.part:38}  {self.value:10.4g} {self.unit:14} +- {self.spread:<9.2g} {self.remark}".rstrip()
        )


def to_row(timing, part, unit, work, remark=""):
    """Return a Row of the rate at which a Measurement did `work`."""
    rate = work / timing.median
    return Row(part, rate, unit, timing.iqr / 2 / timing.median * rate, remark)


def timed(functions, repeats, clock=timer):
    """Return a Measurement for each function; they take turns, so that a busy machine slows all alike."""
    timers = [
        Timer("work()", globals={"work": work}, timer=clock, num_threads=torch.get_num_threads())
        for work in functions
    ]
    # With no least time a turn is one call, after one that warms up.
    turns = [[one.blocked_autorange(min_run_time=0) for one in timers] for _ in range(repeats)]
    return [Measurement.merge(measured)[0] for measured in zip(*turns)]


def data_folders(given, folder, frames):
    """Yield (name, root) of every data set: the folders given, and rendered ones."""
    for name in DATASETS:
        root = given.get(name)
        if root is None:
            root = folder / name
            write_dataset(name, {"train": max(frames, FEWEST[name][0]), "test": 4}, 1, root, 2)
            build_index(name, root)
            build_cache(name, root)
        yield name, root


def loading_rows(name, root, repeats):
    """Yield Rows of one data set on one core: index, files alone, samples without and with cache."""
    files, cached = (
        DATASETS[name](path=root, dataset="train", targets=False, use_cache=use) for use in (False, True)
    )
    numbers = range(min(FRAMES, len(files)))
    source = next(iter(open_parts(name, root).values()))
    works = {
        "files alone": lambda: [decode_alone(files, i) for i in numbers],
        "training samples, files": lambda: [files[i, i] for i in numbers],
        "index": lambda: [check_frame(source, i % len(source)) for i in numbers],
    }
    if cached.cache:
        works["training samples, cache"] = lambda: [cached[i, i] for i in numbers]
    timings = timed(works.values(), repeats, time.process_time)
    alone = timings[0].median
    for part, timing in zip(works, timings):
        remark = f"{1e3 * timing.median / len(numbers):.3f} ms, {timing.median / alone:.2f} x the files alone"
        yield to_row(timing, f"{name} {part}", "frames/s/core", len(numbers), remark)


def decode_alone(frames, index):
    """Read and decode a frame's file as OpenCV (or NumPy, for .bin) does, and nothing else."""
    path = str(frames.frame_path(index))
    if frames.suffix == ".png":
        return cv2.imread(path, cv2.IMREAD_UNCHANGED)
    return np.frombuffer(read_bytes(path), "<f4")


def loader_rows(name, root, repeats):
    """Yield Rows of the DataLoader's rate over numbers of workers, with the cache where there is one."""
    dataset = DATASETS[name](path=root, dataset="train", targets=False)
    numbers = np.resize(np.arange(len(dataset)), 1024)
    for count in sorted({0, 1, usable_cores()}):
        args = argparse.Namespace(num_workers=count)
        loader = make_loader(dataset, EpochSampler(numbers, 32, seed=1), args, torch.device("cpu"), 32)
        (timing,) = timed([lambda loader=loader: sum(1 for _ in batches_of(loader))], repeats)
        yield to_row(timing, f"{name} DataLoader, {count} workers", "samples/s", len(numbers))


def random_batch(size, device):
    """Return a batch of crops and labels on the device, filled with noise."""
    generator = torch.Generator().manual_seed(0)
    img = torch.rand(size, 1, 128, 128, generator=generator) - 0.5
    label_img = torch.rand(size, 1, 64, 64, generator=generator) - 0.5
    uvd = (torch.rand(size, JOINTS, 3, generator=generator) - 0.5) * 0.8
    empty = torch.empty(size, 0)
    fields = img, label_img, (label_img > 0).float(), empty, empty, empty, uvd, empty, empty
    return Sample(*(field.to(device) for field in fields))


def target_row(device, repeats):
    """Return the Row of making heatmaps and depth maps on the device."""
    batch = random_batch(32, device)
    (timing,) = timed([lambda: spatial_form(batch.uvd, batch.label_img, batch.mask)], repeats)
    return to_row(timing, "targets, batch 32", "samples/s", 32)


def limit_row(device, precision, repeats):
    """Return the Row of a large matrix product, whose rate no network exceeds.

    It is done as a 1 x 1 convolution too, by the library that does convolutions; the faster one counts.
    """
    edge = 8192 if device.type == "cuda" else 2048
    dtype = getattr(torch, precision)
    left, right = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    pixels, kernels = left.view(1, -1, 64, edge).permute(0, 3, 1, 2), right.T[:, :, None, None].contiguous()
    products = [lambda: left @ right, lambda: torch.nn.functional.conv2d(pixels, kernels)]
    timing = min(timed(products, repeats), key=lambda one: one.median)
    return to_row(timing, f"matrix product, {precision}", "GFLOP/s", 2e-9 * edge**3, "the arithmetic limit")


def counted_gflop(function):
    """Return the floating-point operations of a call's products and convolutions, in 10^9."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e9


def training_rows(device, batch_sizes, precisions, modes, limits, repeats):
    """Yield Rows of one training step by batch size, precision and mode, beside a plain float32 step."""
    cases = [(precision, mode) for precision in precisions for mode in modes]
    for size in batch_sizes:
        plain = plain_network(device)
        unfused = torch.optim.AdamW(plain.parameters(), fused=False)
        steps = [training_step(plain, unfused, size, parse_train("", []))]
        for precision, mode in cases:
            args = parse_train("", PRECISIONS[precision] + MODES[mode])
            network = build_network(args, JOINTS, device)
            steps.append(training_step(network, build_optimizer(args, network.parameters()), size, args))
        gflop = counted_gflop(steps[0])
        base, *timings = timed(steps, repeats)
        yield to_row(base, f"training plain, batch {size}", "samples/s", size)
        for (precision, mode), timing in zip(cases, timings):
            times = f"{base.median / timing.median:.2f} x the plain step"
            share = f"{gflop / timing.median / limits[precision].value:.0%} of the limit"
            part = f"training {precision} {mode}, batch {size}"
            yield to_row(timing, part, "samples/s", size, f"{times}, {share}")


def plain_network(device):
    """Return the default network as PyTorch makes it: contiguous float32, nothing compiled."""
    return build_network(parse_train("", []), JOINTS, device).to(memory_format=torch.contiguous_format)


def training_step(network, optimizer, batch_size, args):
    """Return a function that takes one optimiser step of a network on a batch of noise."""
    batch = random_batch(batch_size, next(network.parameters()).device)
    network.train()
    return lambda: train_step(network, optimizer, batch, args)


@torch.no_grad()
def inference_rows(device, network, batch_sizes, modes, limit, repeats):
    """Yield Rows of inference by batch size, plain and prepared; what `prepare` rounds is said."""
    crops = make_crops(DATASETS["HAND17"], network.param["label_size"], max(batch_sizes))
    for size in sorted({1, *batch_sizes}):
        inputs = [torch.stack(field).to(device) for field in list(zip(*crops[:size]))[:3]]
        frames = {"eager": 0, "compiled": COMPILE_FRAMES[device.type]}
        forwards = [prepare(network, device, frames[mode], tolerance_mm=math.inf) for mode in modes]
        works = [partial(forward, *inputs) for forward in (network, *forwards)]
        gflop, exact = counted_gflop(works[0]), works[0]()[-1].uvd
        base, *timings = timed(works, repeats)
        plain = f"{1e3 * base.median:.1f} ms, {gflop:.1f} GFLOP"
        yield to_row(base, f"inference plain, batch {size}", "frames/s", size, plain)
        for mode, work, timing in zip(modes, works[1:], timings):
            share = f"{gflop / timing.median / limit.value:.0%} of the float32 limit"
            times = f"{1e3 * timing.median:.1f} ms, {base.median / timing.median:.2f} x as fast as plain"
            moved = f"{times}, {share}, answers within {moved_mm(exact, work().uvd):.4f} mm"
            yield to_row(timing, f"inference {mode}, batch {size}", "frames/s", size, moved)


def all_rows(args, device):
    """Yield every Row that the options ask for."""
    if "loading" in args.parts:
        cv2.setNumThreads(0)
        with tempfile.TemporaryDirectory() as folder:
            for name, root in data_folders(dict(args.data), Path(folder), args.frames):
                yield from loading_rows(name, root, args.repeats)
                yield from loader_rows(name, root, max(1, args.repeats // 5))
    if "network" in args.parts:
        batch_sizes = args.batch_sizes or ([32, 64, 128] if device.type == "cuda" else [8])
        wanted = dict.fromkeys(("float32", *args.precisions))
        limits = {precision: limit_row(device, precision, args.repeats) for precision in wanted}
        yield from limits.values()
        yield target_row(device, args.repeats)
        yield from training_rows(device, batch_sizes, args.precisions, args.modes, limits, args.repeats)
        network = load_network(args.model, "HAND17").to(device) if args.model else plain_network(device)
        limit = limits["float32"]
        yield from inference_rows(device, network.eval(), batch_sizes, args.modes, limit, args.repeats)


def machine(device):
    """Return what the numbers were measured on, and the most memory that was held."""
    if device.type == "cuda":
        gpu, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
    else:
        gpu, peak = "no GPU", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024  # Linux counts kB, macOS bytes
    versions = f"torch {torch.__version__}, OpenCV {cv2.__version__}"
    return f"{platform.machine()}, {os.cpu_count()} cores, {gpu}, {versions}, peak {peak / 2**30:.2f} GiB"


def parse(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Time every part of the work, from index to inference.", formatter_class=HelpFormatter
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: a GPU where there is one")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument(
        "--data", type=_folder, action="append", default=[], metavar="NAME=DIR", help="a data set with index"
    )
    parser.add_argument("--frames", type=int, default=FRAMES, help="training frames of a rendered data set")
    parser.add_argument("--repeats", type=int, default=20, help="measurements of a row, each after a warm-up")
    parts = ("loading", "network")
    parser.add_argument("--parts", nargs="+", choices=parts, default=[*parts], help="of the work")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="of the training step"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of the network")
    parser.add_argument(
        "--model", type=Path, help="checkpoint for inference (default: random weights, which round worse)"
    )
    parser.add_argument("--batch_sizes", nargs="+", type=int, help="default: 32 64 128 on a GPU, else 8")
    args = parser.parse_args(argv)
    if min(args.frames, args.repeats, *(args.batch_sizes or [])) < 1:
        parser.error("--frames, --repeats and --batch_sizes must be 1 or more")
    return args


def _folder(text):
    name, separator, folder = text.partition("=")
    if name not in DATASETS or not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR with a NAME of {', '.join(DATASETS)}")
    return name, Path(folder)


def main(argv=None):
    """Measure, print the table and write the JSON."""
    args = parse(argv)
    device, rows = resolve_device(args.device), []
    for row in all_rows(args, device):
        print(row, flush=True)
        rows.append(row)
    print(machine(device))
    if args.json:
        record = {"machine": machine(device), "rows": [row._asdict() for row in rows]}
        with atomic_path(args.json) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
