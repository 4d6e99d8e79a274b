"""docs/contributing.md's example: a fifth data set, from its files to a trained and tested epoch."""

import importlib.util
import re

import numpy as np
import pytest
from conftest import REPO

import check_dataset
import datasets
from engine.metrics import PROTOCOLS
from engine.options import parse_test, parse_train
from engine.testing import test_and_evaluate as evaluate_test_split
from engine.training import train
from rendering.layouts import write_dataset

SMALL = "--suffix mine --features 32 --label_size 16 --level 2 --stages 1 --batch_size 4 --epoch 1 --seed 1"
HERE = "--device cpu --num_workers 0"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Make a module of the page's lines, and enter what it defines into the tables."""
    lines = [
        "from check_dataset import label_lines",
        "from datasets import HandDataset",
        "from frames.transforms import Camera",
    ]
    blocks = re.findall(
        r"runs these lines -->\n```python\n(.*?)```", (REPO / "docs/contributing.md").read_text(), re.S
    )
    assert len(blocks) == 2
    path = tmp_path / "mine.py"
    path.write_text("\n".join([*lines, *blocks]))
    spec = importlib.util.spec_from_file_location("mine", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(datasets.DATASETS, "MINE", module.MineDataset)
    monkeypatch.setitem(check_dataset.READERS, "MINE", module.mine_lines)
    monkeypatch.setitem(check_dataset.FRAME_FILES, "MINE", ["train/frame_*.png", "test/frame_*.png"])
    uvd = PROTOCOLS["HAND17"]._replace(is_uvd=True)
    monkeypatch.setitem(PROTOCOLS, "MINE", uvd)
    return module


def write_files(root):
    """Write rendered hands as the page's tree has them."""
    rendered = root.with_name("rendered")
    write_dataset("HAND17", {"train": 12, "test": 4}, 3, rendered, 1)
    sources = {
        "train": ("training/Training_Annotation.txt", "training/images"),
        "test": ("frame/test_annotation.txt", "frame/images"),
    }
    for split, (labels, images) in sources.items():
        folder = root / split
        folder.mkdir(parents=True)
        text = (rendered / labels).read_text().replace("image_D0000", "frame_")
        (folder / "labels.txt").write_text(text)
        for path in (rendered / images).iterdir():
            path.rename(folder / path.name.replace("image_D0000", "frame_"))


def test_the_example_is_checked_trained_and_tested(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "Data" / "MINE"
    write_files(root)

    check_dataset.build_index("MINE", root)
    assert "MINE train: 1" in capsys.readouterr().out  # 10 to 12 of 12 frames
    assert (root / "mine_center_train_computed.txt").is_file()

    dataset = example.MineDataset(path=root, dataset="train")
    sample = dataset.sample(0)
    joints_uvd = dataset.recover_uvd(
        sample.uvd[None].numpy(),
        sample._replace(
            box_size=sample.box_size[None], cube_size=sample.cube_size[None], com=sample.com[None]
        ),
    )
    np.testing.assert_allclose(dataset.uvd2xyz(joints_uvd[0]), dataset.joints(dataset.line(0)), atol=1e-2)

    train(parse_train("", ["--dataset", "MINE", *SMALL.split(), *HERE.split()]))
    evaluate_test_split(parse_test("", ["--dataset", "MINE", "--suffix", "mine", *HERE.split()]))
    assert "mean, mm" in capsys.readouterr().out
