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
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.benchmark import Measurement, Timer, timer
from torch.utils.flop_counter import FlopCounterMode

from check_dataset import build_cache, build_index, judge, open_parts
from datasets import DATASETS
from engine.batches import EpochSampler, batches_of, make_loader
from engine.checkpoints import load_network, resolve_device
from engine.inference import COMPILE_FRAMES, moved_mm, prepare
from engine.loops import train_step
from engine.options import parse_train
from engine.state import build_optimizer
from engine.training import build_network
from frames.files import read_bytes
from frames.samples import Sample
from model import losses, spatial_form
from rendering.layouts import write_dataset
from tools.export import make_crops
from utils import atomic_path, run, usable_cores

JOINTS = 21
FRAMES = 16  # of each rendered data set; looped over, so that they are in the page cache
CASES = {  # precision: (command-line words, dtype of the products)
    "float32": ([], torch.float32),
    "bfloat16": (["--mixed_precision"], torch.bfloat16),
}
MODES = {"eager": [], "compiled": ["--compile"]}


class Row(NamedTuple):
    """One line of the table: the median of what was measured, half its interquartile range, a remark."""

    part: str
    value: float
    unit: str
    spread: float
    remark: str = ""


def to_row(timing, part, unit, work=1.0, remark=""):
    """Return a Row of the rate at which a Measurement did `work`, or of its time where the unit is `ms`."""
    value = 1e3 * timing.median if unit == "ms" else work / timing.median
    return Row(part, value, unit, timing.iqr / 2 / timing.median * value, remark)


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
            # Training frames of all eight MSRA subjects, and as many for the rest.
            write_dataset(name, {"train": max(frames, 8), "test": 4}, 1, root, 2)
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
    functions = [
        lambda: [decode_alone(files, i) for i in numbers],
        lambda: [files[i, i] for i in numbers],
        lambda: [judge(source, i % len(source)) for i in numbers],
    ]
    if cached.cache:
        functions.append(lambda: [cached[i, i] for i in numbers])
    decoding, uncached, index, *rest = timed(functions, repeats, time.process_time)
    count = len(numbers)
    yield to_row(index, f"{name} index", "frames/s/core", count)
    yield to_row(decoding, f"{name} files alone", "frames/s/core", count)
    slower = f"{uncached.median / decoding.median:.2f} x the time of the files alone"
    yield to_row(uncached, f"{name} training samples, files", "samples/s/core", count, slower)
    for timing in rest:
        milliseconds = f"{1e3 * timing.median / count:.3f} ms, "
        faster = f"{decoding.median / timing.median:.1f} x the files alone"
        yield to_row(
            timing, f"{name} training samples, cache", "samples/s/core", count, milliseconds + faster
        )


def decode_alone(frames, index):
    """Read and decode a frame's file as OpenCV (or NumPy, for .bin) does, and nothing else."""
    path = str(frames.frame_path(index))
    if frames.suffix == ".png":
        return cv2.imread(path, cv2.IMREAD_UNCHANGED)
    return np.frombuffer(read_bytes(path), "<f4")


def loader_rows(name, root, workers, repeats):
    """Yield Rows of the DataLoader's rate over numbers of workers, with the cache where there is one."""
    dataset = DATASETS[name](path=root, dataset="train", targets=False)
    cpu = torch.device("cpu")
    numbers = np.resize(np.arange(len(dataset)), 1024)
    for count in workers:
        args = argparse.Namespace(num_workers=count)
        loader = make_loader(dataset, EpochSampler(numbers, 32, seed=1), args, cpu, 32)
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
    work = lambda: spatial_form(batch.uvd, batch.label_img, batch.mask)  # noqa: E731
    return to_row(timed([work], repeats)[0], "targets, batch 32", "samples/s", 32)


def limit_flops(device, dtype, repeats):
    """Return the FLOP/s, median and spread, of a large matrix product, which no network exceeds.

    It is done as a 1 x 1 convolution too, by the library that does convolutions; the faster one counts.
    """
    edge = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    pixels, kernels = left.view(1, -1, 64, edge).permute(0, 3, 1, 2), right.T[:, :, None, None].contiguous()
    products = [lambda: left @ right, lambda: torch.nn.functional.conv2d(pixels, kernels)]
    timing = min(timed(products, repeats), key=lambda one: one.median)
    return to_row(timing, "", "FLOP/s", 2 * edge**3)[1:4:2]


def counted_flops(function):
    """Return the floating-point operations of a call's products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def training_rows(device, batch_sizes, precisions, modes, repeats):
    """Yield Rows of one training step by precision, batch size and mode, beside a plain float32 step."""
    for precision in precisions:
        words, dtype = CASES[precision]
        limit, spread = limit_flops(device, dtype, repeats)
        product = f"matrix product, {precision}"
        yield Row(product, limit / 1e9, "GFLOP/s", spread / 1e9, "the arithmetic limit")
        for size in batch_sizes:
            plain = plain_step(device, size)
            flops = counted_flops(plain)
            steps = [training_step(device, size, words + MODES[mode]) for mode in modes]
            base, *timings = timed([plain, *steps], repeats)
            if precision == "float32":
                yield to_row(base, f"training plain, batch {size}", "samples/s", size)
            for mode, step, timing in zip(modes, steps, timings):
                share = f"{flops / timing.median / limit:.0%} of the limit, {peak_memory(device, step)}"
                times = f"{base.median / timing.median:.2f} x the plain step, "
                yield to_row(
                    timing, f"training {precision} {mode}, batch {size}", "samples/s", size, times + share
                )


def plain_network(device):
    """Return the default network as PyTorch makes it: contiguous float32, nothing compiled."""
    return build_network(parse_train("", []), JOINTS, device).to(memory_format=torch.contiguous_format)


def plain_step(device, batch_size):
    """Return a function that takes a step of the plain network with an optimiser that fuses nothing."""
    network = plain_network(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), fused=False)
    batch = random_batch(batch_size, device)

    def step():
        optimizer.zero_grad()
        terms = losses(network(*batch[:3]), batch.uvd)
        terms["coordinate"].backward()
        optimizer.step()

    return step


def training_step(device, batch_size, words):
    """Return a function that takes one optimiser step of the default network on a batch of noise."""
    args = parse_train("", words)
    network = build_network(args, JOINTS, device).train()
    optimizer = build_optimizer(args, network.parameters())
    batch = random_batch(batch_size, device)
    return lambda: train_step(network, optimizer, batch, args)


@torch.no_grad()
def inference_rows(device, network, batch_sizes, modes, repeats):
    """Yield Rows of the latency of one frame, plain and prepared, and of the best batch's throughput."""
    limit, _ = limit_flops(device, torch.float32, repeats)
    most = max(1, *batch_sizes)
    crops = make_crops(DATASETS["HAND17"], network.param["label_size"], most)
    frames = [crops[k % len(crops)] for k in range(most)]
    best = None
    for size in sorted({1, *batch_sizes}):
        inputs = [torch.stack(field).to(device) for field in list(zip(*frames[:size]))[:3]]
        counts = [COMPILE_FRAMES[device.type] if mode == "compiled" else 0 for mode in modes]
        # Whatever its rounding is, it is timed, and said.
        forwards = [network, *(prepare(network, device, count, tolerance_mm=math.inf) for count in counts)]
        works = [lambda forward=forward, inputs=inputs: forward(*inputs) for forward in forwards]
        base, *timings = timed(works, repeats)
        if size == 1:
            flops, exact = counted_flops(works[0]), works[0]()[-1].uvd
            yield to_row(base, "inference plain, one frame", "ms", remark=f"{flops / 1e9:.1f} GFLOP")
        for mode, work, timing in zip(modes, works[1:], timings):
            if size == 1:
                times = f"{base.median / timing.median:.2f} x as fast as plain"
                moved = f"{times}, answers within {moved_mm(exact, work().uvd):.4f} mm"
                yield to_row(timing, f"inference {mode}, one frame", "ms", remark=moved)
            share = f"{mode}, batch {size}, {flops * size / timing.median / limit:.0%} of the float32 limit"
            row = to_row(
                timing, "inference, best batch", "frames/s", size, f"{share}, {peak_memory(device, work)}"
            )
            best = row if best is None or row.value > best.value else best
    yield best


def peak_memory(device, work):
    """Return in words the most memory held: on the GPU during a call of `work`, else by the process ever."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return f"peak {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU"
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of the process"


def all_rows(args):
    """Yield every Row that the options ask for."""
    device = resolve_device(args.device)
    if "loading" in args.parts:
        cv2.setNumThreads(0)
        with tempfile.TemporaryDirectory() as folder:
            for name, root in data_folders(dict(args.data), Path(folder), args.frames):
                yield from loading_rows(name, root, args.repeats)
                yield from loader_rows(name, root, sorted({0, 1, usable_cores()}), max(1, args.repeats // 5))
    if "network" in args.parts:
        batch_sizes = args.batch_sizes or ([32, 64, 128] if device.type == "cuda" else [8])
        yield target_row(device, args.repeats)
        yield from training_rows(device, batch_sizes, args.precisions, args.modes, args.repeats)
        network = load_network(args.model, "HAND17").to(device) if args.model else plain_network(device)
        yield from inference_rows(device, network.eval(), batch_sizes, args.modes, args.repeats)


def format_rows(rows):
    """Return the table as text."""
    width = max(len(row.part) for row in rows)
    return "\n".join(
        f"{row.part:{width}}  {row.value:10.4g} {row.unit:14} +- {row.spread:<9.2g} {row.remark}".rstrip()
        for row in rows
    )


def machine(device):
    """Return what the numbers were measured on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    versions = f"torch {torch.__version__}, OpenCV {cv2.__version__}"
    return f"{platform.machine()}, {os.cpu_count()} cores, {gpu}, {versions}"


def parse(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Time every part of the work, from index to inference.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument(
        "--data", type=_folder, action="append", default=[], metavar="NAME=DIR", help="a data set with index"
    )
    parser.add_argument("--frames", type=int, default=FRAMES, help="training frames of a rendered data set")
    parser.add_argument("--repeats", type=int, default=20, help="measurements of a row, each after a warm-up")
    parser.add_argument("--parts", nargs="+", choices=("loading", "network"), default=["loading", "network"])
    parser.add_argument(
        "--precisions", nargs="+", choices=CASES, default=list(CASES), help="of the training step"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of network")
    parser.add_argument(
        "--model", type=Path, help="checkpoint for inference (default: random weights, which round worse)"
    )
    parser.add_argument("--batch_sizes", nargs="+", type=int, help="default: 32 64 128 on a GPU, else 8")
    return parser.parse_args(argv)


def _folder(text):
    name, separator, folder = text.partition("=")
    if name not in DATASETS or not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR with a NAME of {', '.join(DATASETS)}")
    return name, Path(folder)


def main(argv=None):
    """Measure, print the table and write the JSON."""
    args = parse(argv)
    device = resolve_device(args.device)
    rows = []
    for row in all_rows(args):
        print(format_rows([row]), file=sys.stderr)
        rows.append(row)
    print(machine(device))
    print(format_rows(rows))
    if args.json:
        record = {"machine": machine(device), "rows": [row._asdict() for row in rows]}
        with atomic_path(args.json) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
