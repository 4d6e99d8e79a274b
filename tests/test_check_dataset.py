"""check_dataset.py: which frames enter the index, what it says about the others, and computed centres."""

import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from conftest import GOLDEN, expected, hidden_files, refusal
from processes import start_script

from datasets import DATASETS
from frames import handfinder

NAMES = sorted(DATASETS)


def indexes_of(root):
    """Return {file name: its text} of the index files in a data set's folder."""
    return {
        path.name: path.read_text()
        for path in root.glob("*.txt")
        if path.name.startswith(("train", "val", "test"))
    }


def rejected_by_frame(root):
    """Return {frame's file name: reason} from rejected.txt."""
    pairs = (line.split("\t") for line in (root / "rejected.txt").read_text().splitlines())
    return {Path(path).name: reason for path, reason in pairs}


# Index files


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_index_lines_equal_golden_apart_from_the_folder(name, split, indexed):
    root, fold = indexed(name), "_0" if name == "MSRA" else ""
    lines = (root / f"{split}{fold}.txt").read_text().splitlines()
    found = [line.replace(f"{root.as_posix()}/", f"Data/{name}/") for line in lines]
    wanted = [str(line).strip() for line in expected(name)[f"{split}_lines"]]
    assert [found[i] for i in expected(name)[f"{split}_index"]] == wanted
    assert all(line.startswith(f"{root.as_posix()}/") for line in lines) or name == "HAND17"


def test_lines_carry_the_folder_as_it_was_given(fresh, script):
    fresh("NYU")
    assert script("check_dataset.py", "--dataset", "NYU").status == 0
    wanted = [str(line).strip() for line in expected("NYU")["train_lines"]]
    assert Path("Data/NYU/train.txt").read_text().splitlines() == wanted


def test_nyu_val_is_the_usable_part_of_test(indexed):
    texts = indexes_of(indexed("NYU_late"))
    assert len(texts["test.txt"].splitlines()) == 2442
    numbers = [line.split(".png")[0][-7:] for line in texts["val.txt"].splitlines()]
    assert numbers == ["0002441", "0002442"]


def test_icvl_skips_rotated_copies_and_blank_lines(indexed):
    labels = (GOLDEN / "ICVL/Training/labels.txt").read_text()
    assert "22-5/" in labels
    assert indexes_of(indexed("ICVL"))["train.txt"].count("\n") == 3
    assert not (indexed("ICVL") / "rejected.txt").read_text(), "skipped, not refused"


def test_msra_folds_hold_out_one_subject_in_subject_order(indexed):
    texts = indexes_of(indexed("MSRA"))
    assert len(texts) == 27
    for fold in range(9):
        train = [line.split("/")[-3] for line in texts[f"train_{fold}.txt"].splitlines()]
        assert train == [f"P{s}" for s in range(9) if s != fold and f"P{s}" in train]
        assert all(f"P{fold}/" in line for line in texts[f"test_{fold}.txt"].splitlines())


def test_msra_frames_that_were_never_recorded_are_in_no_index(fresh, script):
    root = fresh("MSRA")
    gone = root / "P4/1/000000_depth.bin"
    count, label = (root / "P4/1/joint.txt").read_text().split("\n", 1)
    (root / "P4/1/joint.txt").write_text(f"2\n{label.strip()}\n{label.strip()}\n")
    done = script("check_dataset.py", "--dataset", "MSRA")
    assert done.status == 0 and "P4: 1 of 2 frames accepted, 1 refused" in done.out
    assert (root / "test_4.txt").read_text().count("\n") == 1 and gone.exists()
    assert rejected_by_frame(root) == {"000001_depth.bin": "the file is missing"}


def test_hand17_training_frames_are_shuffled_and_split(fresh, script):
    """Forty copies of the golden frames, so that 95 % is not all."""
    root = fresh("HAND17")
    labels = (root / "training/Training_Annotation.txt").read_text().splitlines()
    centers = (root / "hands17_center_train.txt").read_text().splitlines()
    for number in range(4, 41):
        copied = labels[number % 3].split("\t")
        source = root / "training/images" / copied[0]
        copied[0] = f"image_D{number:08d}.png"
        shutil.copy(source, root / "training/images" / copied[0])
        labels.append("\t".join(copied))
        centers.append(centers[number % 3])
    (root / "training/Training_Annotation.txt").write_text("\n".join(labels) + "\n")
    (root / "hands17_center_train.txt").write_text("\n".join(centers) + "\n")
    assert script("check_dataset.py", "--dataset", "HAND17").status == 0
    random.Random(0).shuffle(labels)
    texts = indexes_of(root)
    assert texts["train.txt"].splitlines() == labels[:38]
    assert texts["val.txt"].splitlines() == labels[38:]
    assert texts["test.txt"] == (root / "frame/BoundingBox.txt").read_text()


# Refused frames

REASONS = {
    2: "fewer than 10 hand pixels",
    3: "a joint lies outside",
    4: "a joint lies outside",
    5: "the file is missing",
    6: "the PNG is cut short",
    7: "the centre has a number that is not finite",
    8: "fewer than 10 hand pixels",
    10: "fewer than 10 hand pixels",
}


def test_unusable_frames_are_refused_counted_and_named(fresh, script):
    root = fresh("NYU_refusals").rename("Data/NYU")
    done = script("check_dataset.py")
    assert done.status == 0 and "NYU train: 2 of 10 frames accepted, 8 refused" in done.out
    numbers = [int(line.split(".png")[0][-7:]) for line in (root / "train.txt").read_text().splitlines()]
    assert numbers == [1, 9]
    rejected = rejected_by_frame(root)
    assert len(rejected) == 8
    for number, reason in REASONS.items():
        assert rejected[f"depth_1_{number:07d}.png"].startswith(reason)
        assert rejected[f"depth_1_{number:07d}.png"] in done.out
    assert "      3  fewer than 10 hand pixels in the crop" in done.out


# What is not read, and files in another form


def test_frames_and_centres_without_a_label_are_counted_and_named(fresh, script):
    root = fresh("HAND17")
    images = root / "training/images"
    shutil.copy(images / "image_D00000001.png", images / "image_D00000099.png")
    (root / "hands17_center_train.txt").open("a").write("300 200 600\n300 200 601\ninvalid\n")
    done = script("check_dataset.py", "--dataset", "HAND17")
    assert done.status == 0 and "train: 3 of 3 frames accepted" in done.out
    assert f"WARNING: 1 frames have no label and are not used: {images / 'image_D00000099.png'}" in done.out
    assert f"2 of 6 lines of {root / 'hands17_center_train.txt'} are of no labelled frame" in done.out
    assert rejected_by_frame(root) == {"image_D00000099.png": "no label names this frame"}


def test_missing_gestures_are_named(fresh, script):
    fresh("MSRA")
    out = script("check_dataset.py", "--dataset", "MSRA").out
    assert "WARNING: 144 of 153 gestures are missing: P0/2 P0/3 " in out


def test_rotated_copies_are_counted(fresh, script):
    fresh("ICVL")
    out = script("check_dataset.py", "--dataset", "ICVL").out
    assert "label lines are rotated copies" in out


def test_an_archive_extracted_in_part_is_questioned(fresh, script):
    root = fresh("ICVL")
    next((root / "Training/Depth").rglob("image_0001.png")).unlink()
    assert "was ICVL extracted to its end?" in script("check_dataset.py", "--dataset", "ICVL").out


def test_a_nested_folder_is_pointed_out(fresh, script):
    root = fresh("NYU")
    shutil.move(root, "inner")
    root.mkdir()
    shutil.move("inner", root / "dataset")
    done = script("check_dataset.py")
    assert done.status == 1 and "give --data_dir Data/NYU/dataset" in done.err


def test_matlabs_newer_format_is_told_as_such(fresh, script):
    root = fresh("NYU")
    head = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM"
    (root / "train/joint_data.mat").write_bytes(head.ljust(512) + b"\x89HDF\r\n\x1a\n" + bytes(100))
    done = script("check_dataset.py")
    assert done.status == 1 and "MATLAB's format 7.3" in done.err and "damaged" not in done.err


@pytest.mark.parametrize("up", [1, -1])
@pytest.mark.parametrize("name", ["NYU", "HAND17"])
def test_centres_in_the_camera_frame_are_told_as_such(name, up, fresh, script):
    """With y downwards, or upwards as some programs have it."""
    root = fresh(name)
    for path in root.glob("*_center_t*.txt"):
        xyz = DATASETS[name](path=root, lines=[]).uvd2xyz(np.loadtxt(path, ndmin=2)) * (1, up, 1)
        np.savetxt(path, xyz, fmt="%.3f")
    done = script("check_dataset.py", "--dataset", name)
    assert done.status == 1 and "holds xyz in mm" in done.err and not (root / "train.txt").exists()


def test_text_files_with_byte_order_marks_give_the_same_index(fresh, script):
    for name in NAMES:
        root = fresh(name)
        script("check_dataset.py", "--dataset", name)
        before = indexes_of(root)
        for path in [*root.rglob("*label*.txt"), *root.rglob("joint.txt"), *root.rglob("*[xn].txt")]:
            path.write_text(path.read_text(), encoding="utf-16" if "center" in path.name else "utf-8-sig")
        script("check_dataset.py", "--dataset", name, "--force")
        assert {file: text.lstrip("\ufeff") for file, text in indexes_of(root).items()} == before


def test_a_folder_whose_name_is_no_text(fresh, script):
    root = Path(os.fsdecode(b"h\xe4nde"))
    fresh("NYU").rename(root)
    done = script("check_dataset.py", "--data_dir", root)
    assert done.status == 0 and "train.txt: 3 frames" in done.out
    assert (root / "train.txt").read_bytes().startswith(b"h\xe4nde/train/depth_1_0000001.png ")
    assert refusal(DATASETS["NYU"](path=root), 0) is None


# Running again


def test_second_run_does_nothing_and_says_so(fresh, script):
    root = fresh("NYU")
    script("check_dataset.py", "--dataset", "NYU")
    mine = (root / "train.txt").read_text().splitlines()[-1]
    (root / "train.txt").write_text(mine)
    done = script("check_dataset.py", "--dataset", "NYU")
    assert done.status == 0 and "all index files are in Data/NYU; --force builds them again" in done.out
    assert (root / "train.txt").read_text() == mine


def test_index_of_another_data_set_is_noticed(fresh, script):
    root = fresh("NYU")
    script("check_dataset.py", "--dataset", "NYU")
    done = script("check_dataset.py", "--dataset", "ICVL", "--data_dir", root)
    assert done.status == 1 and done.err.startswith("error: ") and "is that ICVL?" in done.err


def test_centre_file_that_lost_a_line_is_noticed(fresh, script):
    root = fresh("NYU")
    path = root / "nyu_center_train.txt"
    assert "WARNING" not in script("check_dataset.py", "--dataset", "NYU").out
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    done = script("check_dataset.py", "--dataset", "NYU", "--force")
    assert f"WARNING: {path} has 2 lines for 3 frames" in done.out


def test_force_and_a_missing_index_file_build_again(fresh, script):
    root = fresh("NYU")
    script("check_dataset.py", "--dataset", "NYU")
    whole = indexes_of(root)
    (root / "train.txt").write_text("a line of mine\n")
    assert script("check_dataset.py", "--dataset", "NYU", "--force").status == 0
    assert indexes_of(root) == whole
    (root / "val.txt").unlink()
    assert script("check_dataset.py", "--dataset", "NYU").status == 0
    assert indexes_of(root) == whole and not hidden_files(root)


# Stopping


@pytest.fixture
def long_check(fresh_indexed):
    """Return a function that starts a check of 3,000 frames, returned as soon as some are done."""

    def start(*options):
        root = fresh_indexed("HAND17")
        for lines in (root / "training/Training_Annotation.txt", root / "train.txt"):
            lines.write_text(lines.read_text() * 1_000)
        words, err = ["--dataset", "HAND17", *options], Path("err.txt")
        process = start_script("check_dataset.py", *words, cwd=Path.cwd(), output=[os.devnull, err])
        while not (err.exists() and re.search(r" [1-9]\d*/\d{4} ", err.read_text())):
            assert process.is_alive(), err.read_text()
            time.sleep(0.02)
        return process

    return start


def left_of_session(leader):
    """Return the processes of the session that a process led; loading processes have groups of their own."""
    left = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                left.append(int(stat.parent.name))
    return left


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_its_processes_and_writes_nothing(number, long_check):
    """To the whole group, as from a terminal or a batch system."""
    process = long_check("--force")
    before = Path("Data/HAND17/train.txt").stat()
    os.killpg(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number and "Traceback" not in Path("err.txt").read_text()
    assert not left_of_session(process.pid)
    assert Path("Data/HAND17/train.txt").stat() == before and not hidden_files("Data")


def test_killing_it_leaves_no_process_behind(long_check):
    """Not even one whose results, a cache's records, nobody reads any more."""
    process = long_check("--cache")
    process.kill()
    process.join()
    deadline = time.monotonic() + 20
    while (left := left_of_session(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for number in left:
        os.kill(number, signal.SIGKILL)
    assert not left


# Computed centres


@pytest.mark.parametrize("name", ["NYU", "ICVL", "HAND17"])
def test_missing_centre_files_are_computed_and_said_to_be(name, fresh, script):
    root = fresh(name)
    given = {path.name: np.loadtxt(path, ndmin=2) for path in root.glob("*_center_*.txt")}
    for path in [*root.glob("*_center_*.txt"), *root.glob("icvl_train_list.txt")]:
        path.unlink()
    done = script("check_dataset.py", "--dataset", name)
    assert done.status == 0 and done.out.count("computing centres") == 2
    assert not any((root / file).exists() for file in given), "the distributed names stay free"
    for file, centers in given.items():
        computed = (root / file.replace(".txt", "_computed.txt")).read_text().splitlines()
        assert (
            f"{root / file} not found" in done.out and f"{file.replace('.txt', '_computed.txt')}" in done.out
        )
        known = [k for k in range(len(computed)) if computed[k] != "invalid"]
        assert known == [k for k in range(len(centers)) if centers[k].any()]
        for k in known:
            found = np.array(computed[k].split(), float)
            assert np.abs(found - centers[k])[2] < 60, "within the hand"
    frames = DATASETS[name](path=root, dataset="val")
    assert all(refusal(frames, index) is None for index in range(len(frames)))


def test_without_the_finders_weights_centres_are_not_computed(fresh, script, tmp_path, monkeypatch):
    root = fresh("ICVL")
    (root / "icvl_center_train.txt").unlink()
    monkeypatch.setattr(handfinder, "WEIGHTS", tmp_path / "nowhere.pt")
    handfinder.load_classifier.cache_clear()
    done = script("check_dataset.py", "--dataset", "ICVL")
    assert done.status == 1 and done.err.startswith("error: the hand finder's ") and "nowhere.pt" in done.err
    assert done.err.count("\n") == 1 and not (root / "train.txt").exists()


def test_distributed_centres_go_before_computed_ones(fresh_indexed):
    root = fresh_indexed("NYU")
    (root / "nyu_center_train_computed.txt").write_text("300 200 700\n" * 3)
    frames = DATASETS["NYU"](path=root, dataset="train")
    distributed = np.loadtxt(root / "nyu_center_train.txt")
    np.testing.assert_array_equal([frames.center_uvd(frames.line(index)) for index in range(3)], distributed)


def test_icvl_centre_file_without_its_list_is_not_trusted(fresh, script):
    """Without the list nobody knows which frame a line belongs to."""
    root = fresh("ICVL")
    (root / "icvl_train_list.txt").unlink()
    done = script("check_dataset.py", "--dataset", "ICVL")
    assert done.status == 0 and "icvl_train_list.txt not found: computing centres" in done.out
    assert (root / "icvl_train_list_computed.txt").read_text().count("\n") == 3


def test_repeated_path_in_the_icvl_list_keeps_its_first_line(fresh, script):
    root = fresh("ICVL")
    paths = (root / "icvl_train_list.txt").read_text().splitlines()
    (root / "icvl_train_list.txt").write_text("\n".join([*paths, paths[0]]))
    with (root / "icvl_center_train.txt").open("a") as file:
        file.write("1.0 1.0 1.0\n")
    assert script("check_dataset.py", "--dataset", "ICVL").status == 0
    frames = DATASETS["ICVL"](path=root, dataset="train")
    np.testing.assert_array_equal(frames.sample(0).com, expected("ICVL")["train/0/plain/com"])


def test_joint_data_of_many_cameras_uses_the_first(fresh, script):
    root = fresh("NYU")
    path = root / "train/joint_data.mat"
    joints = scipy.io.loadmat(path)["joint_uvd"]
    joints[1:] = np.nan
    scipy.io.savemat(path, {"joint_uvd": joints})
    assert "train: 3 of 3 frames accepted" in script("check_dataset.py", "--dataset", "NYU").out
