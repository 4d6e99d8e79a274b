"""Damaged or missing files end in one clear line or a counted refusal, never a traceback or half a file."""

import errno
import os
import pickle
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io
import torch
from conftest import GOLDEN, ON_CPU, SMALL_NETWORK, hidden_files, refusal

from datasets import DATASETS
from engine.checkpoints import load_checkpoint
from frames.files import PNG_END, PNG_START, FrameError, frame_number, read_png
from utils import UserError, atomic_path

CHECKPOINT = GOLDEN / "expected" / "instance_softmax.pt"  # of 14 joints, as NYU has
INDEXES = ("train*.txt", "val*.txt", "test.txt", "test_[0-9].txt")


def assert_one_clear_line(done, *words):
    """Check that a script ended with status 1 and one `error:` line that holds all the words."""
    lines = [line for line in done.err.splitlines() if line and "frame/s]" not in line]
    errors = [line for line in lines if line.startswith("error: ")]
    assert done.status == 1 and len(errors) == 1 and "Traceback" not in done.err, done.err
    for word in words:
        assert word in done.err, done.err


def assert_no_index(root):
    assert not any(list(root.glob(pattern)) for pattern in INDEXES) and not hidden_files(root)


def check(script, name, *options):
    return script("check_dataset.py", "--dataset", name, *options)


# Absent and empty files


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_absent_data_folder_says_where_to_put_it(name, workplace, script):
    assert_one_clear_line(check(script, name), f"Data/{name} not found: extract {name} to Data/{name}")
    assert not Path("Data").exists()


LABEL_FILES = [
    ("NYU", "train/joint_data.mat"),
    ("NYU", "test/joint_data.mat"),
    ("ICVL", "Training/labels.txt"),
    ("ICVL", "Testing/test_seq_2.txt"),
    ("MSRA", "P5/1/joint.txt"),
    ("HAND17", "training/Training_Annotation.txt"),
    ("HAND17", "frame/BoundingBox.txt"),
]


@pytest.mark.parametrize("name, label_file", LABEL_FILES)
def test_absent_label_file_is_named(name, label_file, fresh, script):
    root = fresh(name)
    (root / label_file).unlink()
    assert_one_clear_line(check(script, name), f"{root / label_file} not found: extract {name}")
    assert_no_index(root)


@pytest.mark.parametrize("name, label_file", LABEL_FILES)
def test_empty_label_file_is_named(name, label_file, fresh, script):
    root = fresh(name)
    (root / label_file).write_bytes(b"")
    assert_one_clear_line(check(script, name), str(root / label_file))
    assert_no_index(root)


@pytest.mark.parametrize("damage", ["truncated", "random", "other variable", "other shape"])
def test_damaged_joint_data_is_named(damage, fresh, script):
    root = fresh("NYU")
    path = root / "train/joint_data.mat"
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "random":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif damage == "other variable":
        scipy.io.savemat(path, {"joints": np.zeros(3)})
    else:
        scipy.io.savemat(path, {"joint_uvd": np.zeros((3, 5, 14, 3))})
    assert_one_clear_line(check(script, "NYU"), str(path))
    assert_no_index(root)


def test_missing_gesture_count_is_noticed(fresh, script):
    root = fresh("MSRA")
    path = root / "P2/1/joint.txt"
    path.write_text(path.read_text().replace("1\n", "500\n", 1))
    assert_one_clear_line(check(script, "MSRA"), "announces 500 frames and lists 1: extract MSRA again")
    assert_no_index(root)


# Damaged frames: refused and counted, while the rest is used


def depth_png(pixels):
    """Return the bytes of a PNG of an array [H, W] or [H, W, 3]."""
    return cv2.imencode(".png", pixels)[1].tobytes()


def cut(data):
    return data[: len(data) // 2]


PICTURES = {
    "truncated": (cut, "the PNG is cut short or is no PNG"),
    "empty": (lambda data: b"", "the file is empty"),
    "text": (lambda data: b"not a picture at all", "the PNG is cut short or is no PNG"),
    "damaged inside": (
        lambda data: data[:200] + bytes(b ^ 255 for b in data[200:300]) + data[300:],
        "the picture does not decode",
    ),
}


def assert_one_refused(done, root, frame, reason, total):
    """Check that exactly one training frame was refused, for the reason, and the index has the others."""
    accepted = f"train: {total - 1} of {total} frames accepted, 1 refused"
    assert done.status == 0 and accepted in done.out, done.out + done.err
    (path, found), *others = (line.split("\t") for line in (root / "rejected.txt").read_text().splitlines())
    assert all(reason == "no label names this frame" for _, reason in others)
    assert Path(path).name == frame and reason in found and reason in done.out
    assert not hidden_files(root)


@pytest.mark.parametrize("damage", PICTURES)
@pytest.mark.parametrize(
    "name, folder, frame",
    [
        ("NYU", "train", "depth_1_0000002.png"),
        ("ICVL", "Training/Depth/201403121135", "image_0001.png"),
        ("HAND17", "training/images", "image_D00000002.png"),
    ],
)
def test_damaged_picture_is_refused(damage, name, folder, frame, fresh, script):
    root, (change, reason) = fresh(name), PICTURES[damage]
    path = root / folder / frame
    path.write_bytes(change(path.read_bytes()))
    assert_one_refused(check(script, name), root, frame, reason, total=3)


@pytest.mark.parametrize(
    "name, pixels, reason",
    [
        ("NYU", np.zeros((240, 320, 3), np.uint8), "expected 640x480 px, found 320x240"),
        ("NYU", np.zeros((480, 640), np.uint16), "expected an 8-bit RGB picture, found uint16"),
        ("NYU", np.zeros((480, 640), np.uint8), "expected an 8-bit RGB picture, found uint8 (480, 640)"),
        ("ICVL", np.zeros((480, 640), np.uint16), "expected 320x240 px, found 640x480"),
        ("ICVL", np.zeros((240, 320), np.uint8), "expected a 16-bit depth picture, found uint8"),
        ("HAND17", np.zeros((480, 640, 3), np.uint8), "expected a 16-bit depth picture, found uint8"),
    ],
)
def test_picture_of_the_wrong_size_or_depth_is_refused(name, pixels, reason, fresh, script):
    folder, frame = {
        "NYU": ("train", "depth_1_0000002.png"),
        "ICVL": ("Training/Depth/201403121135", "image_0001.png"),
        "HAND17": ("training/images", "image_D00000002.png"),
    }[name]
    root = fresh(name)
    (root / folder / frame).write_bytes(depth_png(pixels))
    assert_one_refused(check(script, name), root, frame, reason, total=3)


def header(*numbers):
    return struct.pack("<6i", *numbers)


BIN_DAMAGE = {
    "fewer depths than promised": (lambda d: d[:-4], "the header promises"),
    "more depths than promised": (lambda d: d + b"\0\0\0\0", "the header promises"),
    "half a depth": (lambda d: d[:-1], "the header promises"),
    "header alone": (lambda d: d[:24], "the header promises"),
    "half a header": (lambda d: d[:13], "the header needs 24 bytes, the file has 13"),
    "empty": (lambda d: b"", "the file is empty"),
    "beyond the right edge": (lambda d: header(320, 240, 300, 0, 330, 1) + bytes(120), "beyond the picture"),
    "beyond the bottom": (lambda d: header(320, 240, 0, 230, 1, 250) + bytes(80), "beyond the picture"),
    "negative corner": (lambda d: header(320, 240, -5, 0, 5, 1) + bytes(40), "beyond the picture"),
    "turned over": (lambda d: header(320, 240, 50, 50, 40, 60) + bytes(400), "beyond the picture"),
    "other picture size": (lambda d: header(640, 480, 0, 0, 1, 1) + bytes(4), "the header says (640, 480)"),
    "not finite": (
        lambda d: d[:24] + struct.pack("<f", np.nan) + d[28:],
        "a depth is negative or not finite",
    ),
    "no depth at all": (lambda d: d[:24] + bytes(len(d) - 24), "the frame is empty"),
}


@pytest.fixture
def msra_frame(fresh):
    """Return the path of P1's only frame and its data set, read by a line, without an index run."""
    root = fresh("MSRA")
    label = " ".join(["0 0 300"] * 21)
    frames = DATASETS["MSRA"](path=root, lines=[f"Data/MSRA/P1/1/000000_depth.bin {label}"])
    return root / "P1/1/000000_depth.bin", frames


@pytest.mark.parametrize("damage", BIN_DAMAGE)
def test_damaged_depth_file_is_refused(damage, msra_frame):
    path, frames = msra_frame
    change, reason = BIN_DAMAGE[damage]
    path.write_bytes(change(path.read_bytes()))
    assert reason in refusal(frames, 0)
    with pytest.raises(FrameError, match="P1/1/000000_depth.bin: "):
        frames.sample(0)


def test_damaged_depth_file_is_counted_by_check_dataset(fresh, script):
    root = fresh("MSRA")
    path = root / "P1/1/000000_depth.bin"
    path.write_bytes(path.read_bytes()[:-4])
    done = check(script, "MSRA")
    # P1 has no other frame, so its own validation split would be empty.
    assert "P1: 0 of 1 frames accepted, 1 refused" in done.out and "the header promises" in done.out
    assert_one_clear_line(done, "val_1.txt of MSRA would be empty")
    assert_no_index(root)


def test_frame_without_depth_is_refused(fresh, script):
    root = fresh("NYU")
    (root / "train/depth_1_0000002.png").write_bytes(depth_png(np.zeros((480, 640, 3), np.uint8)))
    reason = "fewer than 10 hand pixels in the crop"
    assert_one_refused(check(script, "NYU"), root, "depth_1_0000002.png", reason, total=3)


# Damaged label lines


def edit_second_label(text, change):
    """Apply `change` to the fields of the second of some tab- or blank-separated label lines."""
    lines = text.splitlines()
    separator = "\t" if "\t" in lines[1] else " "
    lines[1] = separator.join(change(lines[1].split()))
    return "\n".join(lines) + "\n"


LABEL_DAMAGE = {
    "a missing number": (lambda f: f[:-1], "numbers, expected"),
    "one number too many": (lambda f: [*f, "1.0"], "numbers, expected"),
    "a NaN": (lambda f: [*f[:4], "nan", *f[5:]], "a number that is not finite"),
    "an infinite number": (lambda f: [*f[:4], "1e999", *f[5:]], "a number that is not finite"),
    "a word": (lambda f: [*f[:4], "wrist", *f[5:]], "is not numbers"),
    "a joint far outside": (lambda f: [f[0], "9000", *f[2:]], "a joint lies outside"),
}


@pytest.mark.parametrize("damage", LABEL_DAMAGE)
@pytest.mark.parametrize(
    "name, labels, frame",
    [
        ("ICVL", "Training/labels.txt", "image_0001.png"),
        ("HAND17", "training/Training_Annotation.txt", "image_D00000002.png"),
    ],
)
def test_damaged_label_line_is_refused(damage, name, labels, frame, fresh, script):
    root, (change, reason) = fresh(name), LABEL_DAMAGE[damage]
    path = root / labels
    path.write_text(edit_second_label(path.read_text(), change))
    assert_one_refused(check(script, name), root, frame, reason, total=3)


@pytest.mark.parametrize(
    "name, labels, missing",
    [
        ("ICVL", "Training/labels.txt", "201403121135/image_0777.png"),
        ("HAND17", "training/Training_Annotation.txt", "image_D00000777.png"),
    ],
)
def test_label_of_a_frame_that_does_not_exist_is_refused(name, labels, missing, fresh, script):
    root = fresh(name)
    path = root / labels
    path.write_text(edit_second_label(path.read_text(), lambda f: [missing, *f[1:]]))
    assert_one_refused(check(script, name), root, Path(missing).name, "the file is missing", total=3)


@pytest.mark.parametrize("with_centres", [True, False])
def test_line_that_names_no_frame_is_refused(with_centres, fresh, script):
    root = fresh("HAND17")
    path = root / "training/Training_Annotation.txt"
    path.write_text("rubbish\n" + path.read_text())
    if not with_centres:
        (root / "hands17_center_train.txt").unlink()
    assert_one_refused(check(script, "HAND17"), root, "train.txt line 1", "names no .png file", total=4)


def test_a_frame_without_a_number_is_refused_where_centres_are_computed(fresh, script):
    root = fresh("HAND17")
    (root / "hands17_center_train.txt").unlink()
    images, labels = root / "training/images", root / "training/Training_Annotation.txt"
    (images / "image_D00000002.png").rename(images / "image_x.png")
    labels.write_text(edit_second_label(labels.read_text(), lambda f: ["image_x.png", *f[1:]]))
    assert_one_refused(check(script, "HAND17"), root, "image_x.png", "holds no frame number", total=3)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_impossible_nyu_joint_is_refused(value, fresh, script):
    root = fresh("NYU")
    path = root / "train/joint_data.mat"
    joints = scipy.io.loadmat(path)["joint_uvd"]
    joints[0, 1, 0, 0] = value
    scipy.io.savemat(path, {"joint_uvd": joints})
    reason = "a number that is not finite" if not np.isfinite(value) else "a joint lies outside"
    assert_one_refused(check(script, "NYU"), root, "depth_1_0000002.png", reason, total=3)


def test_damaged_msra_label_is_refused(msra_frame):
    _, frames = msra_frame
    (line,) = frames.lines
    for changed, reason in [
        (line + " 5", "64 numbers, expected 63"),
        (line.replace("300", "nan", 1), "not finite"),
        (line.replace("300", "-300", 1), "a joint behind the camera"),
        ("no file here", "names no .bin file"),
    ]:
        assert reason in refusal(DATASETS["MSRA"](path=frames.root, lines=[changed]), 0)


# Centre files


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda lines: [lines[0], "invalid invalid invalid", lines[2]], "the centre is not numbers"),
        (lambda lines: [lines[0], "invalid", lines[2]], "the centre file says that no hand was found in it"),
        (lambda lines: [lines[0], "nan nan nan", lines[2]], "the centre has a number that is not finite"),
        (lambda lines: [lines[0], "", lines[2]], "the centre has 0 numbers, expected 3"),
        (lambda lines: [lines[0], "300 200", lines[2]], "the centre has 2 numbers, expected 3"),
        (lambda lines: [lines[0], "300 200 0", lines[2]], "the centre is impossible"),
        (lambda lines: [lines[0], "300 200 -700", lines[2]], "the centre is impossible"),
        (lambda lines: [lines[0], "1e30 200 700", lines[2]], "the centre is impossible"),
        (lambda lines: [lines[0], "300 200 0.01", lines[2]], "too near"),
        (lambda lines: [lines[0], "30000 20000 700", lines[2]], "a joint lies outside"),
    ],
)
def test_bad_centre_refuses_its_frame(change, reason, fresh, script):
    root = fresh("NYU")
    path = root / "nyu_center_train.txt"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    assert_one_refused(check(script, "NYU"), root, "depth_1_0000002.png", reason, total=3)


@pytest.mark.parametrize("ending", ["\n", "", "\r\n"])
def test_centre_file_of_one_line_serves_one_frame(ending, fresh, script):
    root = fresh("NYU")
    path = root / "nyu_center_train.txt"
    path.write_bytes(f"{path.read_text().splitlines()[0]}{ending}".encode())
    done = check(script, "NYU")
    assert done.status == 0 and "train: 1 of 3 frames accepted, 2 refused" in done.out
    assert "2  the centre file has no line for this frame" in done.out


def test_empty_centre_file_is_named(fresh, script):
    root = fresh("NYU")
    (root / "nyu_center_train.txt").write_bytes(b"")
    assert_one_clear_line(check(script, "NYU"), "nyu_center_train.txt is empty")
    assert_no_index(root)


# Hands at the border, joints outside


def test_hand_at_the_border_is_used(fresh, script):
    root = fresh("NYU_refusals").rename("Data/NYU")
    assert check(script, "NYU").status == 0
    frames = DATASETS["NYU"](path=root)
    assert frame_number(frames.frame_path(1)) == 9
    sample, center = frames.sample(1), frames.center_uvd(frames.line(1))
    half = float(sample.box_size) / 2
    reach = np.array([center[:2] - half, (640, 480) - center[:2] - half])
    assert (reach < 0).any(), "the crop reaches beyond the picture"
    assert sample.mask.any() and all(torch.isfinite(field).all() for field in sample)


def test_joint_outside_the_cube_in_depth_stays_a_label(indexed):
    """Only the heatmap grid bounds a joint; its depth may lie outside the cube."""
    frames = DATASETS["NYU"](path=indexed("NYU"), dataset="val")
    fields = frames.lines[0].split()
    fields[3] = str(float(fields[3]) + 400)
    deep = DATASETS["NYU"](path=indexed("NYU"), dataset="val", lines=[" ".join(fields)])
    assert deep.sample(0).uvd[0, 2] > 1 and torch.isfinite(deep.sample(0).depthmaps).all()


@pytest.mark.parametrize("shift_px", [-400, 400])
def test_joint_outside_the_cube_in_the_picture_is_refused_on_either_side(shift_px, indexed):
    """A negative grid position once wrapped round to the other edge."""
    frames = DATASETS["NYU"](path=indexed("NYU"), dataset="val")
    for axis in (1, 2):
        fields = frames.lines[0].split()
        fields[axis] = str(float(fields[axis]) + shift_px)
        far = DATASETS["NYU"](path=indexed("NYU"), dataset="val", lines=[" ".join(fields)])
        assert refusal(far, 0) == "a joint lies outside the heatmap grid"


# Training and testing on frames that went bad after the check

TRAIN = ("train.py", "--dataset", "NYU", *ON_CPU, *SMALL_NETWORK, "--epoch", "1")


def test_training_ends_with_the_bad_frames_name_and_no_final_checkpoint(fresh_indexed, script):
    root = fresh_indexed("NYU")
    path = root / "train/depth_1_0000002.png"
    path.write_bytes(cut(path.read_bytes()))
    assert_one_clear_line(script(*TRAIN), str(path), "the PNG is cut short")
    assert not list(Path("Model").glob("*final.pt")) and not hidden_files(".")


def test_label_file_that_is_a_folder_is_named(fresh, script):
    path = fresh("ICVL") / "Training/labels.txt"
    path.unlink()
    path.mkdir()
    done = script("check_dataset.py", "--dataset", "ICVL")
    assert_one_clear_line(done, "Data/ICVL/Training/labels.txt cannot be read")


@pytest.mark.parametrize("text, word", [("", "is empty"), ("\n\n", "only blank lines")])
def test_training_refuses_an_index_without_lines(text, word, fresh_indexed, script):
    (fresh_indexed("NYU") / "train.txt").write_text(text)
    assert_one_clear_line(script(*TRAIN), "Data/NYU/train.txt", word)


def test_training_without_an_index_says_what_to_run(fresh, script):
    fresh("NYU")
    assert_one_clear_line(script(*TRAIN), "Data/NYU/train.txt not found", "check_dataset.py --dataset NYU")
    assert {path.suffix for path in Path("Model").glob("*")} <= {".lock"}


def test_testing_writes_zeros_for_a_bad_frame_and_says_so(fresh_indexed, script):
    root = fresh_indexed("NYU")
    (root / "test/depth_1_0000001.png").unlink()
    done = script("test.py", "--dataset", "NYU", "--model", CHECKPOINT, *ON_CPU)
    assert done.status == 3 and "depth_1_0000001.png" in done.out + done.err
    first, second = np.loadtxt("Result/NYU_default_instance_softmax.txt")
    assert not first.any() and second.any()
    assert "1 frames have no joints (zeros) and are left out" in done.out
    mean_mm = float(done.out.partition("mean, mm")[2].split()[0])
    evaluated = script("evaluate.py", "--dataset", "NYU", "Result/NYU_default_instance_softmax.txt")
    assert "1 frames have no joints" in evaluated.out and f"{mean_mm:.3f}" in evaluated.out
    assert mean_mm < 300, "of the frame that has joints"


def test_testing_without_one_usable_frame_writes_nothing(fresh_indexed, script):
    root = fresh_indexed("NYU")
    for path in root.glob("test/*.png"):
        path.unlink()
    done = script("test.py", "--dataset", "NYU", "--model", CHECKPOINT, *ON_CPU)
    assert_one_clear_line(done, "none of 2 frames can be used", "depth_1_0000001.png")
    assert not Path("Result").exists()


def test_joints_that_are_no_numbers_are_never_written(fresh_indexed, script, monkeypatch):
    fresh_indexed("NYU")
    calls = []

    def overflowing(network, *_):
        def forward(*inputs):
            output = network(*inputs)[-1]
            calls.append(output.uvd[0, 3, 2].fill_(np.inf))
            return output

        return torch.no_grad()(forward)

    monkeypatch.setattr("engine.turns.prepare", overflowing)
    done = script("test.py", "--dataset", "NYU", "--model", CHECKPOINT, *ON_CPU)
    assert calls and done.status == 3 and "the network gives no numbers" in done.out
    first, second = np.loadtxt("Result/NYU_default_instance_softmax.txt")
    assert not first.any() and second.any()


# Checkpoints


def test_checkpoint_of_another_data_set_is_refused(fresh_indexed, script):
    """Though it may have as many joints: their order is another."""
    fresh_indexed("NYU")
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    done = use_checkpoint(script, saved({**checkpoint, "dataset": "ICVL"}))
    assert_one_clear_line(done, "damaged.pt was trained on ICVL, whose joints are not those of NYU")


def test_testing_is_the_work_of_one_process(fresh_indexed, script, monkeypatch):
    fresh_indexed("NYU")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = script("test.py", "--dataset", "NYU", "--model", CHECKPOINT, *ON_CPU)
    assert_one_clear_line(done, "leave torchrun out")


def use_checkpoint(script, data, dataset="NYU"):
    Path("damaged.pt").write_bytes(data)
    done = script("test.py", "--dataset", dataset, "--model", "damaged.pt", *ON_CPU)
    assert not Path("Result").exists()
    return done


def saved(checkpoint):
    torch.save(checkpoint, "saved.pt")
    return Path("saved.pt").read_bytes()


class RunsCode:
    """Would write a file when unpickled."""

    def __reduce__(self):
        return open, ("intruder", "w")


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.999])
def test_truncated_checkpoint_is_refused(share, fresh_indexed, script):
    fresh_indexed("NYU")
    data = CHECKPOINT.read_bytes()
    assert_one_clear_line(use_checkpoint(script, data[: int(share * len(data))]), "damaged.pt")


def test_checkpoint_with_a_flipped_bit_in_its_weights_is_refused(fresh_indexed, script):
    fresh_indexed("NYU")
    data = bytearray(CHECKPOINT.read_bytes())
    weight = torch.load(CHECKPOINT, weights_only=True)["state_dict"]["stages.0.conv.weight"]
    data[data.index(weight.numpy().tobytes())] ^= 1
    assert_one_clear_line(use_checkpoint(script, data), "damaged.pt is damaged", "checksum")


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes_are_no_checkpoint(seed, fresh_indexed, script):
    fresh_indexed("NYU")
    assert_one_clear_line(use_checkpoint(script, np.random.default_rng(seed).bytes(3000)), "damaged.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoint_that_would_run_code_is_refused_unrun(legacy, fresh_indexed, script):
    fresh_indexed("NYU")
    evil = {"state_dict": {}, "model_param": {}, "seed": RunsCode()}
    data = pickle.dumps(evil) if legacy else saved(evil)
    assert_one_clear_line(use_checkpoint(script, data), "damaged.pt", "refused")
    assert not Path("intruder").exists()


def test_checkpoint_of_other_joints_is_refused(fresh_indexed, script):
    fresh_indexed("ICVL")
    done = use_checkpoint(script, CHECKPOINT.read_bytes(), "ICVL")
    assert_one_clear_line(done, "damaged.pt predicts 14 joints, ICVL has 16")


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda c: [1, 2], "is no checkpoint"),
        (lambda c: {"weights": c["state_dict"]}, "has no state_dict and no model_param"),
        (lambda c: {**c, "model_param": {"depth": 3}}, "does not fit"),
        (lambda c: {**c, "model_param": {**c["model_param"], "label_size": 48}}, "does not fit"),
        (lambda c: {**c, "model_param": {**c["model_param"], "features": 64}}, "does not fit"),
        (lambda c: {**c, "state_dict": {}}, "does not fit"),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(change, word, fresh_indexed, script):
    fresh_indexed("NYU")
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    assert_one_clear_line(use_checkpoint(script, saved(change(checkpoint))), "damaged.pt", word)


def test_absent_checkpoint_says_so(fresh_indexed, script):
    fresh_indexed("NYU")
    done = script("test.py", "--dataset", "NYU", *ON_CPU)
    assert_one_clear_line(done, "Model/NYU_default_final.pt not found")
    with pytest.raises(UserError, match="absent.pt not found"):
        load_checkpoint("absent.pt")


# Writing


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "network.pt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("interrupted")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("refused", ["chmod", "fsync"])
def test_what_a_file_system_refuses_besides_writing_is_no_error(refused, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, refused, refuse)
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "a.txt").read_text() == "whole" and not hidden_files(tmp_path)


def test_a_disk_that_is_full_at_the_last_moment_is_an_error(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match="No space left"):
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("whole")
    assert not list(tmp_path.iterdir())


def test_a_picture_of_absurd_size_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "giant.png"
    path.write_bytes(PNG_START + struct.pack(">IIBBBBB", 50_000, 50_000, 16, 0, 0, 0, 0) + PNG_END)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(FrameError, match="50000x50000 px are more than any depth camera has"):
        read_png(path)
    with pytest.raises(FrameError, match="expected 640x480 px, found 50000x50000"):
        read_png(path, (640, 480))


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "Model").write_text("a file where a folder should be")
    with (
        pytest.raises(UserError, match="cannot write .*Model/a.pt"),
        atomic_path(tmp_path / "Model" / "a.pt"),
    ):
        pass
