"""Synthetic data sets: layouts, the same bytes for a seed, refusals; how the demo trains."""

import errno
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ON_CPU, SMALL_NETWORK, refusal
from processes import run_forked, run_process, server, start, start_script

import demo
from check_dataset import build_index
from datasets import DATASETS
from frames.transforms import xyz2uvd
from rendering import layouts
from rendering.layouts import (
    CHUNK,
    EVERY_SENSOR,
    FINGERS,
    encode,
    frame_path,
    icvl_joints,
    nyu_joints,
    render_frames,
    sensor_of,
    write_dataset,
)
from rendering.scene import draw_scenes
from rendering.sensor import SENSORS
from utils import UserError

COUNTS = {"NYU": (12, 4), "ICVL": (12, 4), "MSRA": (16, 4), "HAND17": (12, 4)}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Write each layout once with one process."""
    folder = tmp_path_factory.mktemp("synthetic")
    for layout, (train, test) in COUNTS.items():
        write_dataset(layout, {"train": train, "test": test}, 7, folder / layout, 1)
    return folder


def files_of(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("layout", COUNTS)
def test_the_checker_accepts_every_frame(layout, roots, tmp_path):
    for name, data in files_of(roots / layout).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    build_index(layout, tmp_path)
    options = dict(path=tmp_path, dataset="test", using_rotation=False, using_shift=False, using_scale=False)
    if layout == "HAND17":
        options["test_only"] = True
    frames = DATASETS[layout](**options)
    assert len(frames) == COUNTS[layout][1]
    assert all(refusal(frames, k) is None for k in range(len(frames)))
    rejected = tmp_path / "rejected.txt"
    assert not rejected.exists() or not rejected.read_text().strip()
    mask = frames[0].mask
    assert 0.05 < mask.mean() < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("layout", COUNTS)
def test_every_script_runs_on_a_rendered_set(layout, workplace):
    """As a user runs them, from rendering to evaluation; the checker accepts at least 98%.

    Each script runs in a new Python for one layout, in forked processes for the others.
    """
    anew = {"NYU": {"synthetic.py", "check_dataset.py", "train.py", "test.py", "evaluate.py"}}
    anew["MSRA"] = {"train_msra.py", "test_msra.py"}

    def call(name, *words):
        run = run_process if name in anew.get(layout, ()) else run_forked
        done = run(name, *words, cwd=workplace)
        assert done.status == 0, done.err
        return done.out

    small = [*SMALL_NETWORK, *ON_CPU, "--epoch", 1, "--batch_size", 16, "--seed", 1]
    call("synthetic.py", "--layout", layout, "--train", 150, "--test", 50, "--out", f"Data/{layout}")
    checked = call("check_dataset.py", "--dataset", layout, "--cache")
    accepted = [int(line.split()[2]) for line in checked.splitlines() if "frames accepted" in line]
    assert sum(accepted) >= 0.98 * 200
    if layout == "MSRA":
        call("train_msra.py", "--subject", 0, *small)
        evaluated = call("test_msra.py", "--subject", 0, *ON_CPU)
    else:
        call("train.py", "--dataset", layout, *small)
        evaluated = call("test.py", "--dataset", layout, *ON_CPU)
    labels = ["--labels", "Data/HAND17/frame/test_annotation.txt"] if layout == "HAND17" else []
    subject = ["--subject", 0] if layout == "MSRA" else []
    results = "Result/MSRA_default_subject0.txt" if layout == "MSRA" else f"Result/{layout}_default.txt"
    again = call("evaluate.py", "--dataset", layout, results, *labels, *subject)
    figures = [line for line in again.splitlines() if line.startswith("mean, mm")]
    assert figures and (layout == "HAND17" or figures[0] in evaluated)


@pytest.mark.parametrize("layout", ["NYU", "ICVL", "MSRA"])
def test_labels_lie_just_under_the_measured_surface(layout, roots):
    build_index(layout, roots / layout)
    frames = DATASETS[layout](
        path=roots / layout,
        dataset="test",
        test_only=False,
        using_rotation=False,
        using_scale=False,
        using_shift=False,
    )
    below_mm = []
    for k in range(len(frames)):
        picture, joints = frames.read(frames.line(k)), frames.joints_uvd(frames.line(k))
        for u, v, d in joints:
            row, column = round(v) - picture.top, round(u) - picture.left
            if 0 <= row < picture.depth_mm.shape[0] and 0 <= column < picture.depth_mm.shape[1]:
                below_mm.append(d - float(picture.depth_mm[row, column]))
    uncovered_mm = [depth for depth in below_mm if depth < 40]  # else another finger is before the joint
    assert len(uncovered_mm) > 0.4 * len(below_mm)
    assert 3 < np.median(uncovered_mm) < 25


def test_the_same_seed_gives_the_same_bytes_on_any_number_of_processes(roots, tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "get_context", lambda _: server())
    write_dataset("NYU", {"train": 12, "test": 4}, 7, tmp_path / "two", 2)
    assert files_of(tmp_path / "two") == {
        name: data
        for name, data in files_of(roots / "NYU").items()
        if name not in ("train.txt", "val.txt", "test.txt", "rejected.txt")
    }


@pytest.mark.parametrize("layout", ["MSRA", "ICVL"])
def test_a_frame_does_not_depend_on_how_many_are_rendered(layout, roots, tmp_path):
    write_dataset(layout, {"train": 9, "test": 3}, 7, tmp_path / "few", 1)
    for split, count in (("train", 9), ("test", 3)):
        for number in range(count):
            name = frame_path(layout, split, number)
            assert (tmp_path / "few" / name).read_bytes() == (roots / layout / name).read_bytes()
    write_dataset(layout, {"train": 9, "test": 3}, 8, tmp_path / "other", 1)
    name = frame_path(layout, "train", 0)
    assert (tmp_path / "few" / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize("name", SENSORS)
def test_another_sensor_measures_a_layout_s_pictures(name):
    sensor, layout = sensor_of("ICVL", name, 0), SENSORS["ICVL"]
    assert (sensor.hand_mm, sensor.noise_per_m2) == (SENSORS[name].hand_mm, SENSORS[name].noise_per_m2)
    assert (sensor.camera, sensor.missing_mm, sensor.left) == (layout.camera, 0, 1)
    near, far = SENSORS[name].hand_mm
    frames = render_frames("ICVL", 5, "train", range(6), name)
    joints_z = np.array([frame.joints_xyz[:, 2] for frame in frames])
    middle_mm = (joints_z.min(1) + joints_z.max(1)) / 2
    assert (middle_mm > near - 0.1).all() and (middle_mm < far + 0.1).all()
    assert any(frame.hand.any() for frame in frames) and frames[0].depth_mm.shape == (240, 320)


def test_every_sensor_takes_its_turn(tmp_path):
    counts = {"train": CHUNK + 1, "test": 1}
    write_dataset("HAND17", counts, 7, tmp_path / "every", 1, EVERY_SENSOR)
    for number in (0, CHUNK):
        name = [*SENSORS][number // CHUNK]
        (frame,) = render_frames("HAND17", 7, "train", range(number, number + 1), name)
        assert (tmp_path / "every" / frame_path("HAND17", "train", number)).read_bytes() == encode(
            "HAND17", frame
        )


def test_the_script_asks_for_the_sensor(tmp_path, script):
    command = "--layout HAND17 --train 2 --test 1 --seed 7 --num_workers 1".split()
    for out, sensor in (("own", []), ("named", ["--sensor", "HAND17"]), ("other", ["--sensor", "MSRA"])):
        assert script("synthetic.py", *command, *sensor, "--out", tmp_path / out).status == 0
    own, named, other = (files_of(tmp_path / out) for out in ("own", "named", "other"))
    assert own == named and own.keys() == other.keys() and own != other


def test_test_and_training_frames_differ(roots):
    assert (roots / "NYU/train/depth_1_0000001.png").read_bytes() != (
        roots / "NYU/test/depth_1_0000001.png"
    ).read_bytes()


def test_the_official_quirks_are_there(roots):
    assert not (roots / "ICVL/icvl_train_list.txt").read_text().endswith("\n")
    centers = (roots / "ICVL/icvl_center_test.txt").read_text().splitlines()
    assert len(centers) == 704 and centers[702] != "0.000 0.000 0.000" == centers[700]
    assert (roots / "MSRA/P1/1/joint.txt").read_text().splitlines()[0] == "1"
    assert all(
        float(z) < 0 for z in (roots / "MSRA/P1/1/joint.txt").read_text().splitlines()[1].split()[2::3]
    )
    assert (roots / "NYU/train/joint_data.mat").read_bytes()[:116] == layouts.MAT_HEADER
    boxes = (roots / "HAND17/frame/BoundingBox.txt").read_text().splitlines()
    labels = (roots / "HAND17/frame/test_annotation.txt").read_text().splitlines()
    assert (
        len(boxes) == len(labels) == 4 and len(boxes[0].split("\t")) == 5 and len(labels[0].split("\t")) == 64
    )


def test_boxes_of_hand17_have_a_width_and_a_height(roots):
    """From the joints to a box's four sides it is the hand's flesh, a few centimetres at most."""
    folder, camera = roots / "HAND17" / "frame", SENSORS["HAND17"].camera
    boxes = np.loadtxt(folder / "BoundingBox.txt", usecols=range(1, 5))
    joints = np.loadtxt(folder / "test_annotation.txt", usecols=range(1, 64)).reshape(-1, 21, 3)
    flesh_mm = []
    for (left, top, width, height), uvd in zip(boxes, xyz2uvd(joints, camera), strict=True):
        low_px, high_px = uvd[:, :2].min(0), uvd[:, :2].max(0)
        flesh_px = np.concatenate([low_px - (left, top), (left + width, top + height) - high_px])
        flesh_mm += [*(flesh_px * uvd[:, 2].min() / camera.fx)]
    assert max(flesh_mm) < 40 and np.mean(np.array(flesh_mm) > 0) > 0.9  # else the arm hides a finger


def test_noise_of_two_frames_differs_where_their_scenes_are_alike(monkeypatch):
    def draw_first(uniform, sensor):
        return draw_scenes(uniform[:1].repeat(len(uniform), 1), sensor)

    monkeypatch.setattr(layouts, "draw_scenes", draw_first)
    first, second = layouts.render_frames("HAND17", 7, "test", range(2))
    np.testing.assert_array_equal(first.joints_xyz, second.joints_xyz)
    both = (first.depth_mm > 0) & (second.depth_mm > 0)
    assert (first.depth_mm != second.depth_mm)[both].mean() > 0.2


def test_centres_of_icvl_go_by_image_number_beyond_10000_too(tmp_path):
    count = 702 + 10_001
    (tmp_path / "Testing").mkdir()
    centers = np.arange(count)[:, None] * np.ones(3)
    layouts.write_labels("ICVL", tmp_path, "test", np.ones((count, 21, 3)), centers, [])
    lines = (tmp_path / "icvl_center_test.txt").read_text().splitlines()
    for number in (0, 1, 701, 1403, 1404, count - 1):
        sequence, place = re.search(r"seq_(.)/image_(\d+)", frame_path("ICVL", "test", number)).groups()
        assert lines[int(place) + 702 * (sequence == "2")].split()[0] == f"{number}.000"


def test_joint_orders_follow_the_skeletons():
    joints = np.zeros((1, 21, 3))
    for k, chain in enumerate(FINGERS.values()):
        joints[0, list(chain), 0] = 100 * k + np.arange(4)  # finger, then joint
    joints[0, 0, 0] = -1
    used = [0, 3, 6, 9, 12, 15, 18, 21, 24, 25, 27, 30, 31, 32]
    assert nyu_joints(joints)[0, used, 0][:11].tolist() == [403, 401, 303, 301, 203, 201, 103, 101, 3, 2, 1]
    assert icvl_joints(joints)[0, 1:, 0].tolist() == [100 * k + j + 0.5 for k in range(5) for j in range(3)]
    for name, order in (("MSRA", layouts.MSRA_ORDER), ("HAND17", layouts.HAND17_ORDER)):
        for k, chain in enumerate(DATASETS[name].config):
            assert joints[0, order, 0][chain].tolist() == [-1, *(100 * k + j for j in range(4))]


def test_bad_arguments_end_in_one_line_and_write_nothing(tmp_path, script):
    result = script("synthetic.py", "--layout", "NYU", "--train", 0, "--out", tmp_path / "none")
    assert result.status == 1 and result.err.count("\n") == 1 and "--train 0" in result.err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_or_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "file").touch()
    counts = {"train": 1, "test": 1}
    (tmp_path / "link").symlink_to("nowhere")
    for taken in ("old", "file", "link"):
        with pytest.raises(UserError, match="exists: give --out"):
            write_dataset("NYU", counts, 1, tmp_path / taken, 1)
    for unwritable in (tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot write"):
            write_dataset("NYU", counts, 1, unwritable, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "old"]


@pytest.mark.parametrize("folder", [".", "..", "/"])
def test_a_folder_without_a_name_exists(folder):
    with pytest.raises(UserError, match="exists"):
        write_dataset("NYU", {"train": 1, "test": 1}, 1, Path(folder), 1)


def test_two_runs_do_not_write_one_folder(tmp_path):
    (tmp_path / "NYU.partial").mkdir()
    with pytest.raises(UserError, match=r"NYU.partial exists: another run"):
        write_dataset("NYU", {"train": 1, "test": 1}, 1, tmp_path / "NYU", 1)
    assert (tmp_path / "NYU.partial").is_dir()


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    write_bytes = Path.write_bytes

    def fill_up(path, data):
        if path.name == "depth_1_0000003.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(UserError, match="No space left"):
        write_dataset("NYU", {"train": 4, "test": 1}, 1, tmp_path / "NYU", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sigterm_leaves_nothing_behind(tmp_path):
    words = "--layout NYU --train 5000 --num_workers 2 --out NYU".split()
    started = start_script("synthetic.py", *words, cwd=tmp_path, output=[os.devnull] * 2)
    while not list(tmp_path.glob("NYU.partial/*/*.png")):
        assert started.is_alive()
        time.sleep(0.05)
    started.terminate()
    started.join(60)
    assert started.exitcode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    assert is_gone(started.pid)


def is_gone(group, seconds=10):
    """Return whether a process group ends in time: Python's own helpers do after the rest."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


# A train.py that writes its process's number and waits; the second process is killed where asked for.
TRAIN = """import os, signal, sys, time
if "killed" in sys.argv:
    sys.exit(0) if os.environ["RANK"] == "0" else os.kill(os.getpid(), signal.SIGKILL)
open(os.environ["RANK"], "w").write(f"{os.getpid()}.")
time.sleep(60)
"""


def run_demo():
    """Run the demo in the current folder, whose train.py it starts twice, without rendering."""
    demo.load_or_render, demo.__file__, demo.usable_cores = lambda: (None, None), "demo.py", lambda: 2
    sys.argv = ["demo.py"]
    return demo.utils.run(demo.main)


def test_the_demo_says_how_its_training_ended(workplace, monkeypatch):
    (workplace / "train.py").write_text(TRAIN)
    monkeypatch.setattr(demo, "__file__", str(workplace / "demo.py"))
    monkeypatch.setattr(demo, "usable_cores", lambda: 2)
    with pytest.raises(UserError, match=r"`python demo.py` goes on .* Model/HAND17_demo_\* is removed"):
        demo.train_on_cores(["killed"])


@pytest.mark.slow
def test_sigterm_ends_the_demo_and_its_training(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    started = start(run_demo, cwd=tmp_path, output=[os.devnull] * 2)
    numbers = [tmp_path / "0", tmp_path / "1"]
    while not all(path.exists() and path.read_text().endswith(".") for path in numbers):
        assert started.is_alive()
        time.sleep(0.02)
    started.terminate()
    started.join(60)
    assert started.exitcode == 128 + signal.SIGTERM
    for path in numbers:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()[:-1]), 0)
