"""Export a trained network, decoder included, to ONNX or to a torch.export program, and check it.

    python -m tools.export --model Model/HAND17_default_final.pt --format onnx
    python -m tools.export --model Model/HAND17_default_final.pt --format pt2 --batch 1 --data_dir Data/HAND17

Inputs `img` [B, 1, 2L, 2L], `label_img` and `mask` [B, 1, L, L], float32, as `samples.prepare_crop` makes
them; outputs `uvd` [B, J, 3], normalised (`transforms.recover_uvd` turns them into px and mm), and `heatmaps`
[B, J, L, L].
ONNX needs `pip install onnx onnxruntime onnxscript`.
"""

import argparse
import copy
import inspect
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.benchmark import Timer

from datasets import DATASETS
from engine.checkpoints import load_network
from engine.inference import replace_norms
from frames.files import FrameError
from frames.samples import UnlabelledSample, prepare_crop
from frames.transforms import Frame, recover_uvd, uvd2xyz, window_around
from rendering.layouts import render_frames
from utils import HelpFormatter, UserError, atomic_path, run

OPSET = 18
TIMED_RUNS = 10
INPUTS, OUTPUTS = ("img", "label_img", "mask"), ("uvd", "heatmaps")

# Where there is no data set, rendered frames are cut out several times, so far from the middle (px).
CROPS_A_FRAME, MOST_SHIFT_PX = 5, 5


class Decoded(nn.Module):
    """A network reduced to what its last stage predicts: uvd [B, J, 3] and heatmaps [B, J, L, L]."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, img, label_img, mask):
        """Return (uvd, heatmaps)."""
        output = self.network(img, label_img, mask)[-1]
        return output.uvd, output.heatmaps


def make_crops(dataset, label_size, count, data_dir=None):
    """Return `count` UnlabelledSamples: of the data set's test split, or of rendered frames without one.

    Test frames that cannot be used are passed over. Raises UserError where none can.
    """
    sizes = dict(label_size=label_size, image_size=2 * label_size)
    options = dict(dataset="test", test_only=True, path=data_dir, **sizes)
    empty = dataset(lines=[], **options)
    if (empty.root / empty.index_name()).is_file():
        return _test_crops(dataset(**options), count)
    if data_dir is not None:
        raise UserError(f"{data_dir} has no index: run check_dataset.py, or leave --data_dir away")
    rng, crops = np.random.default_rng(0), []
    for frame in render_frames(dataset.name, 0, "test", range(-(-count // CROPS_A_FRAME))):
        for _ in range(CROPS_A_FRAME):
            center_uvd = frame.center_uvd + [*rng.uniform(-MOST_SHIFT_PX, MOST_SHIFT_PX, 2), 0]
            window = window_around(center_uvd, dataset.cube_mm - (dataset.margin_mm or 0), dataset.camera)
            hand = Frame(frame.depth_mm), center_uvd, dataset.cube_mm, dataset.camera
            crops.append(prepare_crop(*hand, window=window, **sizes))
    return crops[:count]


def _test_crops(frames, count):
    crops = []
    for index in range(len(frames)):
        with suppress(FrameError):
            crops.append(frames[index])
        if len(crops) == count:
            break
    if not crops:
        raise UserError(f"no test frame in {frames.root} can be used: run check_dataset.py --force")
    return crops


def export(network, inputs, path, form, dynamic):
    """Write a network as `onnx` or `pt2`; return a function from inputs to (uvd, heatmaps) that runs it.

    `inputs` are example tensors (img, label_img, mask); `dynamic` leaves the batch size open.
    Raises UserError where a package is missing.
    """
    batch = torch.export.Dim("batch", min=1, max=4096)
    shapes = {name: {0: batch} for name in INPUTS} if dynamic else None
    if form == "pt2":
        with torch.no_grad():
            program = torch.export.export(network, inputs, dynamic_shapes=shapes)
        torch.export.save(program, path)
        return torch.export.load(path).module()
    onnxruntime = _import_onnxruntime()
    if "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters:
        raise UserError(f"this torch, {torch.__version__}, is too old to write ONNX: give --format pt2")
    network = copy.deepcopy(network)  # onnxruntime's own instance norm rounds off up to 0.1 mm
    replace_norms(network)
    with warnings.catch_warnings():
        # The exporter warns of its own use of PyTorch, which no user of this tool can mend.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            inputs,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamic_shapes=shapes,
        )
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def call(*tensors):
        arrays = session.run(None, {name: tensor.numpy() for name, tensor in zip(INPUTS, tensors)})
        return tuple(map(torch.from_numpy, arrays))

    return call


def _import_onnxruntime():
    # An optional extra, which nothing else needs.
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install onnx onnxruntime onnxscript") from None
    return onnxruntime


def largest_difference_mm(network, exported, crops, camera, batch):
    """Return the largest distance between joints of two callables on the crops, mm; NaN where a joint is.

    The last batch is filled up with the first crops.
    """
    apart_mm = []
    for start in range(0, len(crops), batch):
        part = [crops[(start + k) % len(crops)] for k in range(batch)]
        samples = UnlabelledSample(*map(torch.stack, zip(*part)))
        joints_xyz = []
        for call in (network, exported):
            uvd = call(*samples[:3])[0].double().numpy()
            uvd = recover_uvd(uvd, samples.box_size, samples.cube_size, samples.com)
            joints_xyz.append(uvd2xyz(uvd, camera))
        apart_mm.append(np.linalg.norm(joints_xyz[0] - joints_xyz[1], axis=-1).max())
    return float(np.max(apart_mm))


def call_ms(call, inputs):
    """Return how long a call takes, ms."""
    timer = Timer(
        "call(*inputs)", globals=dict(call=call, inputs=inputs), num_threads=torch.get_num_threads()
    )
    return 1000 * timer.timeit(TIMED_RUNS).median


def parse(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint")
    parser.add_argument("--format", choices=("onnx", "pt2"), default="onnx", help="what to write")
    parser.add_argument("--batch", default="dynamic", help="a fixed batch size, or dynamic")
    parser.add_argument("--joints", choices=DATASETS, help="whose joints the model predicts")
    parser.add_argument(
        "--data_dir", type=Path, help="data set to check with (default: Data/<joints> or rendered)"
    )
    parser.add_argument("--crops", type=int, default=50, help="crops to check with")
    parser.add_argument("--tolerance", type=float, default=0.05, help="largest difference allowed, mm")
    parser.add_argument("--out", type=Path, help="file (default: the model's name with the new suffix)")
    args = parser.parse_args(argv)
    if args.batch != "dynamic" and not (args.batch.isdecimal() and int(args.batch)):
        raise UserError(f"--batch must be dynamic or a number above 0, not {args.batch}")
    for name in ("crops", "tolerance"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name} must be above 0, not {getattr(args, name)}")
    if args.format == "onnx":
        _import_onnxruntime()
    return args


@torch.inference_mode()
def main(argv=None):
    """Export, check and time as the command line says. Raises UserError where the two disagree."""
    args = parse(argv)
    network = load_network(args.model, args.joints)
    dataset, path = DATASETS[network.dataset], args.out or args.model.with_suffix(f".{args.format}")
    network = Decoded(network)
    crops = make_crops(dataset, network.network.param["label_size"], args.crops, args.data_dir)
    batch = 2 if args.batch == "dynamic" else int(args.batch)
    inputs = tuple(torch.stack([crop[k] for crop in (crops * batch)[:batch]]).clone() for k in range(3))
    with atomic_path(path) as temporary:
        exported = export(network, inputs, temporary, args.format, args.batch == "dynamic")
        apart_mm = largest_difference_mm(network, exported, crops, dataset.camera, batch)
        if not apart_mm <= args.tolerance:  # nor NaN
            raise UserError(
                f"the {args.format} program differs by {apart_mm:.3f} mm from PyTorch, more than "
                f"{args.tolerance} mm: {path} is not written"
            )
    opset = f", opset {OPSET}" if args.format == "onnx" else ""
    print(f"{path}: {args.format}{opset}, batch {args.batch}, {path.stat().st_size / 1e6:.1f} MB")
    print(f"largest difference on {len(crops)} crops {apart_mm:.4f} mm")
    own_ms, exported_ms = call_ms(network, inputs), call_ms(exported, inputs)
    print(f"a batch of {batch}: PyTorch {own_ms:.1f}, {args.format} {exported_ms:.1f} ms")


if __name__ == "__main__":
    sys.exit(run(main))
