"""The crop cache: the same samples as from the files, and no use of a stale or damaged one."""

import errno
import json
import os
import pickle
import shutil
import tracemalloc

import cv2
import numpy as np
import pytest
import torch
from conftest import ON_CPU, SMALL_NETWORK, expected, hidden_files, refusal

from check_dataset import build_cache
from datasets import DATASETS
from frames import cache
from frames.cache import CropCache, write_cache
from frames.files import LineFile
from frames.transforms import Augmentation
from utils import UserError

NAMES = list(DATASETS)
AUGMENTATION = Augmentation(angle_deg=23.0, scale=1.1, shift_px=(4.6, -4.9), flip=True)


@pytest.fixture(autouse=True)
def _forget_notices(monkeypatch):
    monkeypatch.setattr(cache, "_noticed", set())


@pytest.fixture
def cached(fresh_indexed):
    """Return a function that gives a data set's folder with index and cache."""

    def build(name):
        root = fresh_indexed(name)
        build_cache(name.partition("_")[0], root)
        return root

    return build


def splits(name, root, **options):
    """Yield every split of a data set."""
    for split in ("train", "val", "test"):
        unlabelled = name == "HAND17" and split == "test"
        yield DATASETS[name](path=root, dataset=split, targets=False, test_only=unlabelled, **options)


def assert_same(samples, others):
    """Compare two samples bit for bit."""
    for name, values, other in zip(samples._fields, samples, others, strict=True):
        assert (values == other).all(), name


def delete_frames(root):
    """Delete every frame's file, so that only a cache can serve."""
    for pattern in ("*.png", "*.bin"):
        for path in root.rglob(pattern):
            path.unlink()


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_the_same_as_from_the_files(cached, name):
    root = cached(name)
    plain = [[s.sample(i) for i in range(len(s))] for s in splits(name, root, use_cache=False)]
    turned = [[s.sample(i, AUGMENTATION) for i in range(len(s))] for s in splits(name, root, use_cache=False)]
    delete_frames(root)
    for split, samples, augmented in zip(splits(name, root), plain, turned):
        for index in range(len(split)):
            assert_same(split.sample(index), samples[index])
            assert_same(split.sample(index, AUGMENTATION), augmented[index])


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_those_of_the_released_programs(cached, name):
    root, golden = cached(name), expected(name)
    delete_frames(root)
    train = DATASETS[name](path=root, dataset="train", targets=False)
    for index in golden["train_index"]:
        sample = train.sample(int(index))
        for field in ("img", "label_img", "mask", "com", "uvd"):
            error = np.abs(getattr(sample, field).numpy() - golden[f"train/{index}/plain/{field}"]).max()
            assert error < 1e-5, field


def test_fractions_of_a_millimetre_are_kept(fresh_indexed):
    root = fresh_indexed("MSRA")
    path = root / "P1/1/000000_depth.bin"
    header, depth_mm = path.read_bytes()[:24], np.fromfile(path, "<f4", offset=24)
    depth_mm[depth_mm > 0] += 0.5
    path.write_bytes(header + depth_mm.tobytes())
    options = dict(path=root, dataset="val", subject=1, targets=False)
    plain = DATASETS["MSRA"](**options, use_cache=False).sample(0)
    build_cache("MSRA", root)
    delete_frames(root)
    assert_same(DATASETS["MSRA"](**options).sample(0), plain)


def test_msra_folds_share_one_cache(cached):
    root = cached("MSRA")
    assert [path.name for path in root.glob("*.cache")] == ["frames.cache"]
    delete_frames(root)
    for subject in range(9):
        for split in splits("MSRA", root, subject=subject):
            assert all(split.sample(index) is not None for index in range(len(split)))


def test_refused_test_frames_are_refused_alike(cached):
    root = cached("NYU_late")
    with_cache, without = (
        DATASETS["NYU"](path=root, dataset="test", use_cache=use, targets=False) for use in (True, False)
    )
    assert with_cache.cache is not None
    for index in (0, 1000):
        assert refusal(with_cache, index) == refusal(without, index)
        assert refusal(without, index) is not None
    assert_same(with_cache.sample(2441), without.sample(2441))
    assert float(with_cache.sample(2441).cube_size) == 125


def test_bounding_box_mode_reads_the_files(cached):
    root = cached("HAND17")
    frames = DATASETS["HAND17"](path=root, dataset="test", test_only=True, process_mode="bb")
    assert frames.cache is None
    frames.sample(0)


def flip(path, at):
    """Invert one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def make_older(root):
    """Give a cache the number of the format before."""
    path = root / "train.cache.npy"
    with path.open("rb") as file:
        settings, table = json.loads(np.load(file).item()), np.load(file)
    with path.open("wb") as file:
        np.save(file, np.array(json.dumps({**settings, "format": cache.VERSION - 1})))
        np.save(file, table)


def change_labels(root):
    lines = (root / "train.txt").read_text().splitlines()
    (root / "train.txt").write_text("".join(f"{line[:-1]}{(int(line[-1]) + 1) % 10}\n" for line in lines))


DAMAGES = {
    "cut short": lambda root: (root / "train.cache").write_bytes((root / "train.cache").read_bytes()[:-9]),
    "empty": lambda root: (root / "train.cache").write_bytes(b""),
    "another file": lambda root: shutil.copy(root / "train.txt", root / "train.cache"),
    "record": lambda root: [flip(root / "train.cache", at) for at in range(4000, 74000, 5000)],
    "no table": lambda root: (root / "train.cache.npy").unlink(),
    "empty table": lambda root: (root / "train.cache.npy").write_bytes(b""),
    "another table": lambda root: shutil.copy(root / "train.txt", root / "train.cache.npy"),
    "magic of the table": lambda root: flip(root / "train.cache.npy", 0),
    "settings": lambda root: flip(root / "train.cache.npy", 300),
    "older format": make_older,
    "table": lambda root: flip(root / "train.cache.npy", -1),
    "cut table": lambda root: os.truncate(table := root / "train.cache.npy", table.stat().st_size - 9),
    "index": change_labels,
    "centre file": lambda root: (root / "nyu_center_train.txt").write_text("300 200 700\n" * 3),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_stale_or_damaged_cache_is_not_used_and_said_once(cached, capfd, damage):
    root = cached("NYU")
    DAMAGES[damage](root)
    capfd.readouterr()
    frames, plain = (
        DATASETS["NYU"](path=root, dataset="train", targets=False, use_cache=use) for use in (True, False)
    )
    for _ in range(2):
        for index in range(len(frames)):
            assert_same(frames.sample(index), plain.sample(index))
    notices = capfd.readouterr().err.splitlines()
    assert len(notices) == 1 and "train.cache" in notices[0] and "--cache --force" in notices[0]


@pytest.mark.parametrize("change", ["other bytes", "later"])
def test_frames_that_changed_since_are_read_from_their_files(cached, script, change, capfd):
    root = cached("HAND17")
    path = sorted((root / "training/images").glob("*.png"))[0]
    if change == "other bytes":
        status = path.stat()
        assert cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_UNCHANGED) + np.uint16(1))
        os.utime(path, (status.st_atime, status.st_mtime))
    else:
        os.utime(path, (0, 1))
    assert DATASETS["HAND17"](path=root, dataset="train").cache is None
    notice = capfd.readouterr().err
    assert f"{path} has changed since" in notice and "--cache --force" in notice
    assert script("check_dataset.py", "--dataset", "HAND17", "--cache").status == 0
    assert DATASETS["HAND17"](path=root, dataset="train").cache is not None


def test_frames_dated_before_1970_are_cached(cached, script):
    root = cached("HAND17")
    os.utime(sorted((root / "training/images").glob("*.png"))[0], (-5, -5))
    done = script("check_dataset.py", "--dataset", "HAND17", "--cache")
    assert done.status == 0, done.err
    assert DATASETS["HAND17"](path=root, dataset="train").cache is not None


def test_a_frame_that_changes_under_an_open_cache_is_read_from_its_file(cached, capfd):
    root = cached("HAND17")
    frames, plain = (
        DATASETS["HAND17"](path=root, dataset="train", targets=False, use_cache=use) for use in (True, False)
    )
    path = frames.frame_path(1)
    assert cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_UNCHANGED) + np.uint16(1))
    os.utime(path, (0, 1))
    capfd.readouterr()
    for index in [*range(len(frames))] * 2:
        assert_same(frames.sample(index), plain.sample(index))
    notices = capfd.readouterr().err.splitlines()
    assert len(notices) == 1 and f"{path} has changed since" in notices[0] and frames.cache.usable


def test_a_cache_stands_in_for_files_that_are_gone(cached):
    root = cached("ICVL")
    frames = DATASETS["ICVL"](path=root, dataset="train")
    before = frames.sample(0)
    shutil.rmtree(root / "Training/Depth")
    (root / "Training/Depth").touch()
    again = DATASETS["ICVL"](path=root, dataset="train").sample(0)
    assert all(torch.equal(one, other) for one, other in zip(before, again))


def test_other_settings_do_not_use_the_cache(cached, capfd):
    root = cached("NYU")
    for options in ({"cube_size": 140}, {"fx": 600.0}):
        assert DATASETS["NYU"](path=root, dataset="train", **options).cache is None
    assert "another cube" in capfd.readouterr().err


def test_check_dataset_leaves_a_good_cache_and_rebuilds_a_stale_one_or_by_force(cached, script):
    root = cached("NYU")
    before = (root / "train.cache").stat()
    assert "is in place" in script("check_dataset.py", "--dataset", "NYU", "--cache").out
    assert (root / "train.cache").stat().st_mtime_ns == before.st_mtime_ns
    assert "is in place" not in script("check_dataset.py", "--dataset", "NYU", "--cache", "--force").out
    assert (root / "train.cache").stat().st_ino != before.st_ino
    change_labels(root)
    done = script("check_dataset.py", "--dataset", "NYU", "--cache")
    assert done.status == 0 and "another index; it is built again" in done.out and "notice" not in done.err
    assert DATASETS["NYU"](path=root, dataset="train").cache is not None
    assert not hidden_files(root)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_disk_full_or_interruption_leaves_what_was_there(tmp_path, error):
    def records():
        yield 1, b"0" * 100
        raise error

    path = tmp_path / "train.cache"
    for before in (None, b"older"):
        if before:
            path.write_bytes(before)
        with pytest.raises((UserError, KeyboardInterrupt)):
            write_cache(path, {"joints": 1}, records())
        assert (path.read_bytes() if path.exists() else None) == before
        assert not hidden_files(tmp_path)


def test_a_worker_opens_the_file_anew(cached):
    frames = DATASETS["NYU"](path=cached("NYU"), dataset="train", targets=False)
    handed = pickle.dumps(frames)
    assert len(handed) < 4000
    assert_same(pickle.loads(handed).sample(0), frames.sample(0))


def test_a_million_frames_need_a_few_bytes_each(tmp_path):
    lines = 50_000
    line = "image_D{:08d}.png" + "\t123.4567" * 63 + "\n"
    (tmp_path / "train.txt").write_text("".join(line.format(number) for number in range(lines)))
    write_cache(tmp_path / "train.cache", {"joints": 21}, ((key, b"x") for key in range(lines)))
    tracemalloc.start()
    index = LineFile(tmp_path / "train.txt", skip_blank=True)
    opened = CropCache(tmp_path / "train.cache", {"joints": 21})
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) == len(opened) == lines
    assert held < 45 * lines


@pytest.mark.slow
def test_training_ends_at_the_same_error(cached, script):
    root, errors = cached("NYU"), []
    options = "--epoch 2 --batch_size 2 --seed 3".split()
    for suffix in ("cache", "files"):
        done = script("train.py", "--suffix", suffix, *options, *SMALL_NETWORK, *ON_CPU)
        assert done.status == 0, done.err
        log = root.parent.parent / "logs" / f"NYU_{suffix}" / "metrics.jsonl"
        records = map(json.loads, log.read_text().splitlines())
        errors.append([record["val_mm"] for record in records if "val_mm" in record])
        for path in root.glob("*.cache"):
            path.unlink()
    assert len(errors[0]) == 2
    assert errors[0] == pytest.approx(errors[1], abs=1e-4)
