"""The four data sets' loaders, against what the released programs gave for the golden frames."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import expected, refusal
from torch.utils.data import DataLoader

from check_dataset import build_cache
from datasets import DATASETS, HAND17Dataset, NYUDataset
from engine.metrics import PROTOCOLS, measure_errors
from engine.testing import test_labels_uvd
from frames import samples
from frames.files import FrameError, LineFile, frame_number
from frames.samples import Sample, UnlabelledSample
from frames.transforms import Augmentation, Frame, Rect
from model import spatial_form
from utils import UserError

NAMES = sorted(DATASETS)
test_labels_uvd.__test__ = False  # the library's function only looks like a test


def frames_of(root, split="train", **options):
    """Return a data set of a golden copy; the test split as the released programs read it, unlabelled."""
    return DATASETS[root.name.partition("_")[0]](
        path=root, dataset=split, test_only=split == "test", **options
    )


def golden_augmentation(numbers):
    angle_deg, scale, shift_u, shift_v = numbers
    return Augmentation(angle_deg, scale, (shift_u, shift_v))


def recorded(arrays, prefix):
    """Return the recorded fields of one sample by name."""
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


def assert_plain(sample, wanted):
    """Compare a sample with every recorded field, to the golden data's tolerance; mask exactly."""
    assert set(wanted) == set(sample._fields)
    for field, array in wanted.items():
        found = getattr(sample, field).numpy()
        assert found.dtype == np.float32 and found.shape == array.shape, field
        np.testing.assert_allclose(found, array, atol=0 if field == "mask" else 1e-5, rtol=0, err_msg=field)


def assert_augmented(sample, wanted):
    """Numbers to 1e-4; pictures, which OpenCV warps in other precision, to a mean of 2e-3."""
    assert set(wanted) == set(sample._fields)
    for field, array in wanted.items():
        found = getattr(sample, field).numpy()
        assert found.shape == array.shape, field
        if array.ndim < 3:
            np.testing.assert_allclose(found, array, atol=1e-4, rtol=0, err_msg=field)
        else:
            assert np.abs(found - array).mean() < 2e-3, field


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Golden samples


@pytest.mark.parametrize("name", NAMES)
def test_plain_training_samples_equal_golden(name, indexed):
    frames = frames_of(indexed(name))
    for index in expected(name)["train_index"]:
        assert_plain(frames.sample(index), recorded(expected(name), f"train/{index}/plain/"))


@pytest.mark.parametrize("name", NAMES)
def test_augmented_training_samples_equal_golden(name, indexed):
    frames, augmentation = frames_of(indexed(name)), golden_augmentation(expected(name)["aug"])
    for index in expected(name)["train_index"]:
        sample = frames.sample(index, augmentation)
        assert_augmented(sample, recorded(expected(name), f"train/{index}/aug/"))
        assert not same(sample, frames.sample(index))


@pytest.mark.parametrize("name", NAMES)
def test_test_samples_equal_golden(name, indexed):
    frames = frames_of(indexed(name), "test")
    for index in expected(name)["test_index"]:
        sample = frames[int(index)]
        wanted = recorded(expected(name), f"test/{index}/plain/")
        assert isinstance(sample, UnlabelledSample)
        assert_plain(sample, {field: wanted[field] for field in sample._fields})


@pytest.mark.parametrize("name", ["NYU", "ICVL", "MSRA"])
def test_labelled_test_samples_equal_all_golden_fields(name, indexed):
    frames = DATASETS[name](path=indexed(name), dataset="test")
    for index in expected(name)["test_index"]:
        sample, wanted = frames[int(index)], recorded(expected(name), f"test/{index}/plain/")
        assert set(wanted) <= set(sample._fields)
        for field, array in wanted.items():
            np.testing.assert_allclose(getattr(sample, field).numpy(), array, atol=1e-5, rtol=0)


def test_window_ends_at_twice_the_principal_point(indexed):
    """A hand at the right edge, where HAND17's picture goes on for nine columns."""
    sample = frames_of(indexed("HAND17_edge"), "test").sample(0)
    assert_plain(sample, recorded(expected("HAND17_edge"), "test/0/plain/"))


def test_bounding_box_samples_equal_golden(indexed):
    frames = frames_of(indexed("HAND17"), "test", process_mode="bb")
    for index in expected("HAND17")["test_index"]:
        assert_plain(frames[int(index)], recorded(expected("HAND17"), f"test/{index}/bb/"))


def test_draw_that_moves_a_joint_off_the_grid_gives_the_plain_sample(indexed):
    index, *numbers = expected("MSRA")["fallback"]
    frames, augmentation = frames_of(indexed("MSRA")), golden_augmentation(numbers)
    assert same(frames.sample(int(index), augmentation), frames.sample(int(index)))
    milder = golden_augmentation((numbers[0], 1.0, *numbers[2:]))
    assert not same(frames.sample(int(index), milder), frames.sample(int(index)))


@pytest.mark.parametrize("name", NAMES)
def test_decoded_joints_equal_golden(name, indexed):
    arrays, frames = expected(name), frames_of(indexed(name), "test")
    batch = UnlabelledSample(
        *(
            np.stack([arrays[f"test/{index}/plain/{field}"] for index in arrays["test_index"]])
            for field in UnlabelledSample._fields
        )
    )
    joints_uvd = frames.recover_uvd(arrays["decode/uvd_normalised"], batch)
    np.testing.assert_allclose(joints_uvd, arrays["decode/uvd_image"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(frames.uvd2xyz(joints_uvd), arrays["decode/xyz"], atol=1e-3, rtol=0)


def test_second_nyu_person_gets_the_smaller_cube_one_frame_late(indexed):
    frames = frames_of(indexed("NYU_late"), "val")
    for index, number in enumerate((2441, 2442)):
        assert frame_number(frames.frame_path(index)) == number
        assert_plain(frames[index], recorded(expected("NYU_late"), f"val/{number}/plain/"))
    assert [frames.frame_cube_mm(frames.line(index)) for index in (0, 1)] == [150, 125]


def test_validation_frames_of_hand17_have_their_centres_in_the_training_file(indexed):
    root = indexed("HAND17")
    frames = frames_of(root, "val")
    u, v, d = np.loadtxt(root / "hands17_center_train.txt")[frame_number(frames.frame_path(0)) - 1]
    np.testing.assert_allclose(frames.sample(0).com, (int(u), int(v), d), rtol=1e-6)


def test_real_frame_equals_what_the_released_programs_gave(shared, workplace):
    shutil.copytree(shared / "real" / "nyu", "Data/NYU", ignore=lambda *_: ["expected_val_0.npz"])
    with np.load(shared / "real" / "nyu" / "expected_val_0.npz") as arrays:
        frames = NYUDataset(dataset="val", lines=[str(arrays["line"]).strip()])
        assert_plain(frames[0], recorded(arrays, "val/0/plain/"))
        assert refusal(frames, 0) is None


# Samples and batches


def test_batch_has_named_fields_and_unpacks_in_the_published_order(indexed):
    (batch,) = DataLoader(frames_of(indexed("ICVL")), batch_size=3)
    img, label_img, mask, box_size, cube_size, com, uvd, heatmaps, depthmaps = batch
    assert isinstance(batch, Sample) and batch.uvd is uvd and batch.depthmaps is depthmaps
    assert img.shape == (3, 1, 128, 128) and label_img.shape == mask.shape == (3, 1, 64, 64)
    assert box_size.shape == cube_size.shape == (3,) and com.shape == (3, 3)
    assert uvd.shape == (3, 16, 3) and heatmaps.shape == (3, 16, 64, 64)
    (unlabelled,) = DataLoader(frames_of(indexed("ICVL"), "test"), batch_size=3)
    assert isinstance(unlabelled, UnlabelledSample) and len(unlabelled) == 6


def test_targets_can_be_left_to_the_device(indexed):
    plain, bare = frames_of(indexed("NYU"), "val"), frames_of(indexed("NYU"), "val", targets=False)
    sample = bare[0]
    assert sample.heatmaps.numel() == sample.depthmaps.numel() == 0
    heatmaps, depthmaps = spatial_form(sample.uvd[None], sample.label_img[None], sample.mask[None])
    torch.testing.assert_close(heatmaps[0], plain[0].heatmaps)
    torch.testing.assert_close(depthmaps[0], plain[0].depthmaps)


def test_sizes_follow_the_options(indexed):
    sample = frames_of(indexed("HAND17"), "val", image_size=64, label_size=32, kernel_size=5, sigmoid=1.0)[0]
    assert sample.img.shape == (1, 64, 64) and sample.heatmaps.shape == (21, 32, 32)
    assert len(sample.heatmaps[0].nonzero()) <= 36, "a blur of 5 px reaches 6 x 6 pixels"


@pytest.mark.parametrize("label_size", [16, 32, 64])
def test_a_joint_at_the_rim_is_used_at_any_label_size(label_size, indexed):
    """At 0.488 of the crop from its middle it lies on the grid of 64 px alone."""
    root = indexed("NYU")
    plain = frames_of(root)
    fields = plain.lines[0].split()
    fields[1] = str(plain.sample(0).com[0].item() + 0.488 * (plain.sample(0).box_size.item() - 1))
    frames = frames_of(root, lines=[" ".join(fields)], image_size=2 * label_size, label_size=label_size)
    sample = frames.sample(0)
    assert sample.uvd[0, 0] == pytest.approx(0.488, abs=1e-4)
    assert sample.heatmaps.isfinite().all() and sample.depthmaps.isfinite().all()


@pytest.mark.parametrize("label_size", [16, 64, 128])
@pytest.mark.parametrize("pixels, refused", [(9, True), (10, False)])
def test_ten_hand_pixels_are_enough(pixels, refused, label_size, indexed, monkeypatch):
    """On the published grid, whatever the network's."""
    frames = frames_of(indexed("NYU"), "test", label_size=label_size, image_size=2 * label_size)
    hand = np.zeros((128, 128), np.float32)
    hand[60:62, 40 : 40 + 2 * pixels] = 5
    monkeypatch.setattr(samples, "crop_hand", lambda *_: hand)
    assert (refusal(frames, 0) == "fewer than 10 hand pixels in the crop") == refused


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_empty_crop_is_no_sample(split, indexed, monkeypatch):
    frames = frames_of(indexed("HAND17"), split)
    monkeypatch.setattr(samples, "crop_hand", lambda *_: np.zeros((100, 100), np.float32))
    with pytest.raises(FrameError, match="fewer than 10 hand pixels"):
        frames[0, 1]


@pytest.mark.parametrize("name", NAMES)
def test_data_set_survives_the_way_to_a_worker(name, indexed):
    frames = frames_of(indexed(name), "val")
    assert same(pickle.loads(pickle.dumps(frames))[0], frames[0])


def test_labels_come_back_from_a_sample(indexed):
    for name in NAMES:
        frames = frames_of(indexed(name), "val")
        batch = Sample(*(field[None] for field in frames[0]))
        np.testing.assert_allclose(
            frames.recover_uvd(batch.uvd, batch)[0], frames.joints_uvd(frames.line(0)), atol=1e-3
        )
        np.testing.assert_allclose(
            frames.xyz2uvd(frames.uvd2xyz(frames.joints_uvd(frames.line(0)))),
            frames.joints_uvd(frames.line(0)),
        )


def test_test_labels_are_in_the_order_of_the_index(indexed):
    labels = test_labels_uvd("NYU", indexed("NYU"))
    assert labels.shape == (2, 14, 3)
    line = str(expected("NYU")["test_lines"][1]).split()
    np.testing.assert_allclose(labels[1].ravel(), [float(n) for n in line[1:]])
    assert test_labels_uvd("MSRA", indexed("MSRA")).shape == (9, 21, 3)
    with pytest.raises(UserError, match="no labels"):
        test_labels_uvd("HAND17", indexed("HAND17"))


def test_a_damaged_test_label_is_left_out_of_the_errors_alone(fresh_indexed, capsys):
    root = fresh_indexed("NYU")
    first, second = (root / "test.txt").read_text().splitlines()
    (root / "test.txt").write_text(first + "\n" + second.rpartition(" ")[0] + " nan\n")
    labels = test_labels_uvd("NYU", root)
    assert labels.shape == (2, 14, 3) and labels[0].all() and not labels[1].any()
    assert "its joints are left out of the errors" in capsys.readouterr().out
    errors_mm, _ = measure_errors(PROTOCOLS["NYU"], labels + 1.0, labels)
    assert np.isfinite(errors_mm[0]).all() and not np.isfinite(errors_mm[1:]).any()
    (root / "test.txt").write_text(second.rpartition(" ")[0] + " nan\n")
    with pytest.raises(UserError, match="no other test label of NYU can be read"):
        test_labels_uvd("NYU", root)


def test_labels_need_no_centre_file_beside_a_cache(fresh_indexed):
    root = fresh_indexed("ICVL")
    build_cache("ICVL", root)
    labels = test_labels_uvd("ICVL", root)
    (root / "icvl_center_test.txt").unlink()
    np.testing.assert_array_equal(test_labels_uvd("ICVL", root), labels)


def test_own_camera_is_used(indexed):
    wide = frames_of(indexed("NYU"), "test", fx=300.0, fy=300.0, halfu=320.0, halfv=240.0)
    assert wide.camera == (300, 300, 320, 240)
    assert wide[0].box_size < frames_of(indexed("NYU"), "test")[0].box_size


def test_sampling_twice_gives_the_same(indexed):
    for name in NAMES:
        frames, augmentation = frames_of(indexed(name)), Augmentation(10, 1.1, (1, 2), True)
        augmented, plain = frames.sample(0, augmentation), frames.sample(0)
        assert same(augmented, frames.sample(0, augmentation)) and same(plain, frames.sample(0))


# Augmentation


def test_draws_are_fixed_by_index_and_seed(indexed):
    frames = frames_of(indexed("ICVL"))
    assert same(frames[0, 7], frames[0, 7])
    assert not same(frames[0, 7], frames[0, 8])


def test_bare_index_draws_from_torchs_generator(indexed):
    frames = frames_of(indexed("ICVL"))
    torch.manual_seed(3)
    first, second = frames[0], frames[0]
    torch.manual_seed(3)
    assert same(first, frames[0]) and not same(first, second)


def test_only_the_training_split_is_augmented(indexed):
    for split in ("val", "test"):
        frames = frames_of(indexed("NYU"), split)
        assert same(frames[0, 1], frames[0, 2])


def turned_deg(augmented_uvd, plain_uvd):
    """Return how far each joint's direction from joint 0 turned, degrees, mirroring undone."""
    a, b = (uvd[1:, :2] - uvd[0, :2] for uvd in (augmented_uvd, plain_uvd))
    turns = []
    for mirror in (1, -1):
        direction = a[:, 0] * mirror + 1j * a[:, 1]
        turns.append(np.degrees(np.angle(direction / (b[:, 0] + 1j * b[:, 1]))))
    return min(turns, key=lambda turn: np.abs(turn).max())


@pytest.mark.parametrize("others", [(1, 1, 0), (1, 1, 1), (0, 1, 0), (1, 0, 0), (0, 0, 1)])
def test_rotation_off_means_no_rotation_whatever_else_is_on(others, indexed):
    scale, shift, flip = others
    using = dict(using_scale=scale, using_shift=shift, using_flip=flip)
    still = frames_of(indexed("ICVL"), using_rotation=0, **using)
    turning = frames_of(indexed("ICVL"), using_rotation=1, **using)
    plain = still.sample(0)
    largest_deg, changed = 0, False
    for seed in range(8):
        sample = still[0, seed]
        assert np.abs(turned_deg(sample.uvd.numpy(), plain.uvd.numpy())).max() < 0.05
        changed |= not same(sample, plain)
        turned = turned_deg(turning[0, seed].uvd.numpy(), plain.uvd.numpy())
        largest_deg = max(largest_deg, np.abs(turned).max())
    assert changed, "the other parts still act"
    assert largest_deg > 5


def test_everything_off_is_the_plain_sample(indexed):
    off = dict.fromkeys(("using_rotation", "using_scale", "using_shift", "using_flip"), 0)
    frames = frames_of(indexed("ICVL"), **off)
    assert same(frames[0, 1], frames.sample(0))


@pytest.mark.parametrize("name", NAMES)
def test_flip_mirrors_picture_and_joints(name, indexed):
    """The mirror image of the golden plain sample, to its tolerance."""
    wanted = recorded(expected(name), "train/0/plain/")
    sample = frames_of(indexed(name)).sample(0, Augmentation(flip=True))
    for field in ("img", "label_img", "mask"):
        mirrored = wanted[field][..., ::-1]
        np.testing.assert_allclose(getattr(sample, field), mirrored, atol=1e-5, rtol=0, err_msg=field)
    np.testing.assert_allclose(sample.uvd, wanted["uvd"] * (-1, 1, 1), atol=1e-5, rtol=0)
    np.testing.assert_array_equal(sample.com, wanted["com"])
    peaks = sample.heatmaps.flatten(1).argmax(1)
    columns = (sample.uvd[:, 0] * 63 + 32).numpy()
    assert np.abs((peaks % 64).numpy() - columns).max() < 1.01


def test_flip_happens_for_half_the_draws_and_keeps_the_other_parts(indexed):
    frames = frames_of(indexed("ICVL"), using_rotation=0, using_scale=0, using_shift=0, using_flip=1)
    plain = frames.sample(0)
    flipped = [not same(frames[0, seed], plain) for seed in range(40)]
    assert 8 < sum(flipped) < 32


def test_shift_moves_the_centre_by_at_most_five_px(indexed):
    frames = frames_of(indexed("ICVL"), using_rotation=0, using_scale=0)
    moved = np.stack([(frames[0, seed].com - frames.sample(0).com).numpy() for seed in range(40)])
    assert 3 <= np.abs(moved[:, :2]).max() <= 6 and not moved[:, 2].any()


# Index files


@pytest.mark.parametrize("name", NAMES)
def test_index_is_read_correctly_after_the_folder_moved(name, indexed, tmp_path):
    moved = Path(shutil.copytree(indexed(name), tmp_path / "another disk" / "Data" / name))
    assert same(frames_of(moved, "val")[0], frames_of(indexed(name), "val")[0])
    assert frames_of(moved).frame_path(0).is_relative_to(moved)


@pytest.mark.parametrize("name", NAMES)
def test_index_of_the_released_programs_is_read_as_it_is(name, fresh, workplace):
    """Their lines start with Data/<name>/, wherever the data set is."""
    root = fresh(name)
    fold = "_0" if name == "MSRA" else ""
    arrays = expected(name)
    for split in ("train", "test"):
        lines = [str(line).strip() for line in arrays[f"{split}_lines"]]
        (root / f"{split}{fold}.txt").write_text("\n".join(lines) + "\n")
    elsewhere = root.rename(workplace / name)
    for position, index in enumerate(arrays["train_index"]):
        wanted = recorded(arrays, f"train/{index}/plain/")
        assert_plain(frames_of(elsewhere).sample(position), wanted)
    assert_plain(
        frames_of(elsewhere, "test").sample(0),
        {k: v for k, v in recorded(arrays, "test/0/plain/").items() if k in UnlabelledSample._fields},
    )


@pytest.mark.parametrize("name", NAMES)
def test_backslashes_in_an_index_are_slashes(name, indexed):
    frames = frames_of(indexed(name), "val")
    lines = [line.replace("/", "\\") for line in frames.lines]
    assert same(frames_of(indexed(name), "val", lines=lines)[0], frames[0])


@pytest.mark.parametrize(
    "name, path",
    [
        ("NYU", "../secret.png"),
        ("NYU", "..\\secret.png"),
        ("ICVL", "Training/Depth/../secret.png"),
        ("HAND17", "../../secret.png"),
        ("HAND17", "/secret.png"),
        ("MSRA", "../../secret.bin"),
    ],
)
def test_a_line_names_no_file_outside_the_folder(name, path, workplace):
    frames = DATASETS[name](path="Data", lines=[f"{path} 1 2 3"])
    try:
        assert frames.frame_path(0).resolve().is_relative_to(Path("Data").resolve())
    except FrameError as error:
        assert "leads out of the data set's folder" in str(error)


def test_missing_index_says_what_to_run(workplace):
    with pytest.raises(
        UserError, match="Data/NYU/train.txt not found: run .*check_dataset.py --dataset NYU`"
    ):
        NYUDataset()
    with pytest.raises(UserError, match="--dataset NYU --data_dir elsewhere`"):
        NYUDataset(path="elsewhere")


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("NYU", dict(dataset="dev"), "dataset must be train, val or test"),
        ("NYU", dict(process_mode="bb", dataset="test"), "no process_mode 'bb'"),
        ("HAND17", dict(process_mode="bb", dataset="val"), "no process_mode 'bb'"),
        ("HAND17", dict(dataset="test"), "no labels"),
        ("MSRA", dict(subject=9), "subject must be 0 to 8"),
        ("MSRA", dict(subject="3"), "subject must be 0 to 8"),
    ],
)
def test_impossible_split_is_refused(name, options, message, indexed):
    with pytest.raises(UserError, match=message):
        DATASETS[name](path=indexed(name), **options)


@pytest.mark.parametrize("fold", range(9))
def test_msra_fold_holds_out_one_subject(fold, indexed):
    splits = {s: frames_of(indexed("MSRA"), s, subject=fold) for s in ("train", "val", "test")}
    subjects = {
        split: {frames.frame_path(i).parts[-3] for i in range(len(frames))}
        for split, frames in splits.items()
    }
    assert subjects["test"] == {f"P{fold}"} and subjects["val"] <= {f"P{fold}"}
    assert f"P{fold}" not in subjects["train"] and len(splits["train"]) > 1


# Lines of text files


def lines_of(tmp_path, data, **options):
    path = tmp_path / "lines.txt"
    path.write_bytes(data)
    return list(LineFile(path, **options))


@pytest.mark.parametrize(
    "data, wanted",
    [
        (b"a\nb\n", ["a", "b"]),
        (b"a\nb", ["a", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\r\nb", ["a", "b"]),
        (b"a \t\n b\n", ["a", "b"]),
        (b"a\n\nb\n", ["a", "", "b"]),
        ("é 1\nb".encode(), ["é 1", "b"]),
    ],
)
def test_lines_with_any_ending(tmp_path, data, wanted):
    assert lines_of(tmp_path, data) == wanted


@pytest.mark.parametrize("data", [b"ab\n\ncd\n", b"\r\nab\r\n\r\ncd\r\n\r\n", b"\n\nab\ncd"])
def test_blank_lines_are_skipped_on_request(tmp_path, data):
    assert lines_of(tmp_path, data, skip_blank=True) == ["ab", "cd"]


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\r\n"])
def test_file_without_lines_is_refused(tmp_path, data):
    with pytest.raises(UserError, match="lines.txt .*(is empty|only blank lines)"):
        lines_of(tmp_path, data, skip_blank=True)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("skip_blank", [False, True])
def test_byte_order_marks_are_no_part_of_a_line(tmp_path, encoding, skip_blank):
    text = ("\ufeff" if encoding == "utf-16-be" else "") + "手 1\r\nbb\n\nlast"
    wanted = ["手 1", "bb", "last"] if skip_blank else ["手 1", "bb", "", "last"]
    assert lines_of(tmp_path, text.encode(encoding), skip_blank=skip_blank) == wanted


def test_bytes_that_are_no_text_keep_their_meaning(tmp_path):
    (line,) = lines_of(tmp_path, b"h\xe4nde/a.png 1")
    assert os.fsencode(line) == b"h\xe4nde/a.png 1"


def test_absent_line_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="absent.txt cannot be read"):
        LineFile(tmp_path / "absent.txt")


def test_line_file_is_reopened_where_it_is_unpickled(tmp_path):
    (tmp_path / "lines.txt").write_text("ab\n\ncd\n")
    lines = LineFile(tmp_path / "lines.txt", skip_blank=True)
    again = pickle.loads(pickle.dumps(lines))
    assert list(again) == list(lines) == ["ab", "cd"] and len(again) == 2


def test_frame_error_keeps_its_parts_across_processes():
    error = pickle.loads(pickle.dumps(FrameError(Path("a.png"), "the file is missing")))
    assert (error.frame, error.reason, str(error)) == (
        "a.png",
        "the file is missing",
        "a.png: the file is missing",
    )


@pytest.mark.parametrize("cached", [False, True])
def test_a_centre_shifted_in_millimetres_moves_crop_and_labels_together(cached, indexed, tmp_path):
    root = shutil.copytree(indexed("HAND17"), tmp_path / "HAND17")
    if cached:
        build_cache("HAND17", root)
    frames = HAND17Dataset(path=root, dataset="train", targets=False)
    assert bool(frames.cache) == cached
    plain, moved = frames.sample(0), frames.sample(0, Augmentation(shift_mm=(12.0, -8.0, 20.0)))
    before, after = (frames.uvd2xyz(sample.com.double().numpy()) for sample in (plain, moved))
    np.testing.assert_allclose(after - before, (12, -8, 20), atol=2.5)  # whole pixels
    both = [frames.recover_uvd(s.uvd[None].double(), type(s)(*(f[None] for f in s))) for s in (plain, moved)]
    np.testing.assert_allclose(both[0], both[1], atol=1e-3)
    other = HAND17Dataset(path=root, dataset="train", targets=False, use_cache=not cached)
    for one, another in zip(moved, other.sample(0, Augmentation(shift_mm=(12.0, -8.0, 20.0)))):
        assert torch.equal(one, another)


def test_a_moved_hand_sees_what_a_cache_keeps_and_no_more():
    camera, depth_mm = HAND17Dataset.camera, np.zeros((480, 640), np.uint16)
    depth_mm[200:280, 300:340] = 500
    depth_mm[200:280, 420:440] = 500  # in the picture, but outside the window of the centre file's centre
    window = Rect(250, 150, 400, 350)
    hand = samples.HandFrame(Frame(depth_mm), np.array([320.0, 240, 500]), 150.0, window)
    moved = samples.move_hand(hand, (60.0, 0, 0), 40.0, camera)
    assert moved.frame.rect == Rect(300, 200, 340, 280) and moved.window.right > 420
    assert moved.center_uvd[0] == pytest.approx(320 + 60 * camera.fx / 500)
    assert samples.move_hand(hand, (0.0, 0, 0), 40.0, camera) is hand
    assert samples.move_hand(hand, (60.0, 0, 0), None, camera).window is None
