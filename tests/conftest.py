"""Golden data sets, the small network that tests train, and the scripts as a user runs them."""

import os

# One thread: the networks here are so small that threads cost more than they save. Set before
# torch is imported, and inherited by the scripts that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import runpy
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hands import CAMERA, save_network
from processes import REPO, Finished

from check_dataset import build_index, check_frame
from predict import HandPoseEstimator

GOLDEN = Path(__file__).resolve().parent / "golden"
SHARED = REPO.parent / "shared"

SMALL_NETWORK = "--label_size 32 --features 32 --level 3 --stages 1".split()
ON_CPU = "--device cpu --num_workers 0".split()
NO_AUGMENTATION = "--using_rotation 0 --using_scale 0 --using_shift 0 --using_flip 0".split()

torch.set_num_threads(1)


@cache
def expected(name):
    """Return the arrays of golden/expected/<name>.npz by name."""
    with np.load(GOLDEN / "expected" / f"{name}.npz") as arrays:
        return dict(arrays)


def copy_golden(name, root):
    """Copy a golden data set to the folder `root`; return it."""
    return shutil.copytree(GOLDEN / name, root)


def refusal(dataset, index):
    """Return why a frame cannot be used, or None where it can."""
    error = check_frame(dataset, index)
    return error and error.reason


def hidden_files(folder):
    """Return the leftovers of atomic writes below a folder."""
    return [path for path in Path(folder).rglob(".*") if path.is_file()]


@pytest.fixture(scope="session")
def indexed(tmp_path_factory):
    """Return a function from a golden data set's name to a copy with its index, not to be changed."""

    @cache
    def build(name):
        root = copy_golden(name, tmp_path_factory.mktemp("indexed") / "Data" / name)
        build_index(name.partition("_")[0], root)
        return root

    return build


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Return a fresh current folder, the place where a user would run the scripts."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fresh(workplace):
    """Return a function that copies a golden data set, without index, to Data/<name>."""
    return lambda name: copy_golden(name, Path("Data", name))


@pytest.fixture
def fresh_indexed(workplace, indexed):
    """Return a function that copies a golden data set with its index to Data/<name>."""
    return lambda name: Path(shutil.copytree(indexed(name), Path("Data", name)))


@pytest.fixture
def script(monkeypatch, capfd):
    """Return a function that runs a script in this process and returns how it Finished.

    Quicker than a process of its own; whatever is not caught, a user would see as a traceback, and
    fails the test.
    """

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(REPO / name), run_name="__main__")
        return Finished(ending.value.code or 0, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def shared():
    """Return the folder of real recordings beside the repository; skip where there is none."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: real recordings are not part of the repository")
    return SHARED


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Return the checkpoint of a small random network for HANDS17's joints."""
    return save_network(tmp_path_factory.mktemp("model") / "small.pt", dataset="HAND17")


@pytest.fixture(scope="session")
def estimator(model):
    """Return the HandPoseEstimator of that network and hands.CAMERA."""
    return HandPoseEstimator(model, CAMERA, device="cpu")
