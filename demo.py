"""Predict a frame, then show the whole job on rendered hands: render, check, train, test, and leave pictures.

python demo.py
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

import utils  # first: torch reads the threads' settings when it is imported
from check_dataset import build_cache, build_index
from datasets import HAND17Dataset
from engine.checkpoints import load_network, resolve_device
from engine.loops import picture_of
from engine.metrics import PROTOCOLS, joint_errors_mm
from engine.options import parse_test, parse_train
from engine.state import checkpoint_path, run_name
from engine.testing import test
from engine.training import open_splits
from evaluate import plot_errors, read_joints
from frames.cameras import parse_camera, read_depth
from frames.drawing import draw_crop, write_picture
from frames.transforms import joints_to_crop
from prediction.estimator import SHIPPED_MODEL, HandPoseEstimator
from prediction.output import draw_overlay, finger_chains
from rendering.layouts import write_dataset
from utils import UserError, usable_cores

FRAME, CAMERA = Path(__file__).with_name("docs") / "predict" / "frame.png", "SR305"
DATA = Path("Data", "synthetic", "HAND17")
PICTURES = Path("Result", "demo")
FRAMES = {"train": 4000, "test": 200}
COMMON = ["--dataset", "HAND17", "--data_dir", str(DATA), "--suffix", "demo", "--device", "cpu"]
# A network with a hundredth of the published one's arithmetic, and a schedule to match.
TRAINING = [
    *("--features", "48", "--label_size", "16", "--level", "2", "--stages", "1", "--alpha", "0.5"),
    *("--epoch", "9", "--decay_epoch", "4", "--lr_decay", "0.3", "--lr", "3e-3", "--batch_size", "16"),
    *("--kernel_size", "3", "--sigmoid", "0.5"),  # of maps of 16 px: 7 px would be half a hand
    *("--using_rotation", "0", "--using_scale", "0", "--using_shift", "0"),  # fresh frames are as cheap
    *("--num_workers", "0", "--seed", "1", "--resume", "auto"),
]


def show_shipped():
    """Predict the frame that comes with this code by the model that comes with it; write the picture."""
    estimator = HandPoseEstimator(camera=CAMERA, device="cpu")
    depth_mm = read_depth(FRAME, parse_camera(CAMERA))
    pose = estimator(depth_mm)
    picture = draw_overlay(depth_mm, pose, finger_chains(estimator.dataset))
    write_picture(PICTURES / "shipped.png", picture)
    print(f"{PICTURES / 'shipped.png'}: {FRAME.name} and the joints that {estimator.model.name} predicts")


def mean_pose(train_set, test_set):
    """Return the joints [N, J, 3] xyz that the mean training pose gives at each test frame's centre, mm."""

    def centers(frames):
        return frames.uvd2xyz(
            np.stack([frames.center_uvd(frames.line(index)) for index in range(len(frames))])
        )

    joints_xyz = np.stack([train_set.joints(train_set.line(index)) for index in range(len(train_set))])
    pose = (joints_xyz - centers(train_set)[:, None]).mean(axis=0)
    return centers(test_set)[:, None] + pose


def load_or_render():
    """Return the rendered data set's train and test splits, rendered and checked unless they exist."""
    if not DATA.exists():
        print(f"rendering {FRAMES['train']} training and {FRAMES['test']} test frames into {DATA}")
        write_dataset("HAND17", FRAMES, 1, DATA, usable_cores())
    build_index("HAND17", DATA)
    build_cache("HAND17", DATA)
    return HAND17Dataset(path=DATA, dataset="train"), HAND17Dataset(path=DATA, dataset="test", test_only=True)


def train_on_cores(words):
    """Run train.py in two processes where there are two cores: small products gain little from threads.

    Raises UserError where it fails.
    """
    count, script = min(2, usable_cores()), Path(__file__).with_name("train.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    training = subprocess.Popen([*launcher, script, *words], env={"OMP_NUM_THREADS": "1"} | os.environ)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # training gets it too, and saves its state first
    try:
        status = training.wait()
    finally:
        signal.signal(signal.SIGINT, before)
        training.terminate()
        training.wait()
    if status:
        raise UserError(
            "training did not end well: see above. `python demo.py` goes on from where it was, or begins "
            "anew once Model/HAND17_demo_* is removed"
        )


def draw_frames(dataset, rows_uvd, columns=6):
    """Return an RGB picture of the first crops, a row for each of `rows_uvd` (joints [N, J, 3] uvd)."""
    rows = []
    for joints_uvd in rows_uvd:
        tiles = []
        for index in range(columns):
            sample = dataset.sample(index)
            uvd = joints_to_crop(
                joints_uvd[index], sample.com.numpy(), sample.box_size.item(), dataset.image_size
            )
            tiles.append(draw_crop(sample.img[0].numpy(), uvd / (dataset.image_size - 1), dataset.config))
        rows.append(np.hstack(tiles))
    return np.vstack(rows)


def main():
    """Run the demo; what exists from an earlier run is used again."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()  # --help, and nothing else
    show_shipped()
    train_set, test_set = load_or_render()
    options = parse_train("", [*COMMON, *TRAINING])
    train_on_cores([*COMMON, *TRAINING])
    predicted_uvd = {
        "network": test(parse_test("", COMMON)).joints_uvd,
        "model that ships": test(parse_test("", [*COMMON, "--model", str(SHIPPED_MODEL)])).joints_uvd,
    }
    true_xyz = read_joints(DATA / "frame" / "test_annotation.txt", test_set.joint_number)
    predicted_xyz = {name: test_set.uvd2xyz(uvd) for name, uvd in predicted_uvd.items()}
    predicted_xyz["mean pose"] = mean_pose(train_set, test_set)
    errors_mm = {name: joint_errors_mm(xyz, true_xyz) for name, xyz in predicted_xyz.items()}
    rows_uvd = (test_set.xyz2uvd(true_xyz), *predicted_uvd.values())
    write_picture(PICTURES / "frames.png", draw_frames(test_set, rows_uvd))
    plot_errors(PICTURES / "errors.png", errors_mm, PROTOCOLS["HAND17"].joint_names, "Rendered hands")
    network = load_network(checkpoint_path(run_name(options), "final"), "HAND17")
    _, _, val_set, _ = open_splits(options)
    picture = picture_of(network, val_set, 0, resolve_device("cpu"), options)
    write_picture(PICTURES / "heatmaps.png", picture)
    for name, error_mm in errors_mm.items():
        print(
            f"{name}: mean error {error_mm.mean():.1f} mm on {len(error_mm)} frames that were not trained on"
        )
    print("pictures: frames.png (true joints; the network's; those of the model that ships), errors.png and")
    print(f"heatmaps.png in {PICTURES}")


if __name__ == "__main__":
    sys.exit(utils.run(main))
