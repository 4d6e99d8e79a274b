"""Export and contact sheets."""

import shutil

import cv2
import numpy as np
import pytest
import torch

from engine.checkpoints import load_network
from model import PixelwiseRegression
from tools import export, show
from utils import UserError


@pytest.fixture(scope="module")
def crops(indexed):
    dataset = export.DATASETS["HAND17"]
    return export.make_crops(dataset, 32, 50, indexed("HAND17"))


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_an_exported_network_gives_the_same_joints(form, model, crops, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    network = export.Decoded(load_network(model))
    inputs = tuple(torch.stack([crops[0][k], crops[1][k]]) for k in range(3))
    path = tmp_path / f"small.{form}"
    with torch.no_grad():
        exported = export.export(network, inputs, path, form, dynamic=True)
        camera = export.DATASETS["HAND17"].camera
        for batch in (1, 3):
            assert export.largest_difference_mm(network, exported, crops, camera, batch) < 0.05
    assert path.stat().st_size > 10_000


@torch.no_grad()
def test_what_is_exported_is_the_last_stage():
    torch.manual_seed(0)
    network = PixelwiseRegression(5, 2, 16, features=32, level=1, norm_method="instance").eval()
    label_img = torch.rand(1, 1, 16, 16) - 0.5
    inputs = torch.rand(1, 1, 32, 32) - 0.5, label_img, (label_img > 0).float()
    first, last = network(*inputs)
    uvd, heatmaps = export.Decoded(network)(*inputs)
    assert torch.equal(uvd, last.uvd) and torch.equal(heatmaps, last.heatmaps)
    assert not torch.allclose(uvd, first.uvd, atol=1e-3)


def test_export_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnx onnxruntime onnxscript"):
        export._import_onnxruntime()


def test_a_torch_that_cannot_write_onnx_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_import_onnxruntime", lambda: None)
    monkeypatch.setattr(torch.onnx, "export", lambda model, args: None)
    with pytest.raises(UserError, match="is too old to write ONNX: give --format pt2"):
        export.export(None, (), tmp_path / "model.onnx", "onnx", True)


def test_frames_that_cannot_be_read_are_passed_over(indexed, tmp_path):
    root = shutil.copytree(indexed("NYU"), tmp_path / "NYU")
    dataset = export.DATASETS["NYU"]
    frames = dataset(path=root, dataset="test", test_only=True, image_size=64, label_size=32)
    expected = frames[1]
    frames.frame_path(0).write_bytes(b"")
    assert torch.equal(export.make_crops(dataset, 32, 1, root)[0].img, expected.img)
    for index in range(len(frames)):
        frames.frame_path(index).write_bytes(b"")
    with pytest.raises(UserError, match="no test frame"):
        export.make_crops(dataset, 32, 1, root)


def test_a_network_that_gives_nan_differs(model, crops):
    network = export.Decoded(load_network(model))
    answers = iter([False, True])

    def broken(*inputs):
        uvd, heatmaps = network(*inputs)
        return (uvd * np.nan if next(answers, False) else uvd), heatmaps

    with torch.no_grad():
        camera = export.DATASETS["HAND17"].camera
        assert np.isnan(export.largest_difference_mm(network, broken, crops[:2], camera, 1))


def test_the_export_tool_prints_difference_and_speed(model, indexed, tmp_path, capsys):
    out = tmp_path / "small.pt2"
    options = ["--format", "pt2", "--data_dir", indexed("HAND17"), "--batch", "2", "--out", out]
    export.main(["--model", str(model), *map(str, options)])
    printed = capsys.readouterr().out
    assert "largest difference" in printed and "a batch of 2: PyTorch" in printed
    fixed = torch.export.load(out).module()
    assert fixed(*(torch.zeros(2, 1, size, size) for size in (64, 32, 32)))[0].shape == (2, 21, 3)
    with pytest.raises(Exception, match="(==|equal to) 2"):
        fixed(*(torch.zeros(3, 1, size, size) for size in (64, 32, 32)))
    with pytest.raises(UserError, match="--batch must be dynamic or a number above 0"):
        export.main(["--model", str(model), "--batch", "many"])


def test_an_export_that_differs_replaces_no_good_one(model, indexed, tmp_path, monkeypatch):
    out = tmp_path / "small.pt2"
    out.write_bytes(b"good")
    monkeypatch.setattr(export, "largest_difference_mm", lambda *_: 5.0)
    options = ["--format", "pt2", "--data_dir", indexed("HAND17"), "--batch", "1", "--out", out]
    with pytest.raises(UserError, match=r"differs by 5.000 mm from PyTorch.*small.pt2 is not written"):
        export.main(["--model", str(model), *map(str, options)])
    assert out.read_bytes() == b"good" and [path.name for path in tmp_path.iterdir()] == ["small.pt2"]


def test_an_export_is_checked_on_50_crops_to_a_twentieth_of_a_millimetre():
    args = export.parse(["--model", "small.pt", "--format", "pt2"])
    assert (args.crops, args.tolerance, args.batch) == (50, 0.05, "dynamic")


def test_crops_are_rendered_where_there_is_no_data_set(workplace):
    crops = export.make_crops(export.DATASETS["ICVL"], 32, 3)
    assert len(crops) == 3 and all(crop.mask.any() for crop in crops)
    assert not torch.equal(crops[0].img, crops[1].img)


def test_a_sheet_shows_frames_beside_their_augmentations(indexed, tmp_path):
    out = tmp_path / "sheet.png"
    root = str(indexed("NYU"))
    show.main(["--dataset", "NYU", "--data_dir", root, "--augment", "--count", "2", "--out", str(out)])
    assert cv2.imread(str(out)).shape == (2 * show.TILE_PX, (1 + show.AUGMENTATIONS) * show.TILE_PX, 3)


def test_augmented_tiles_show_other_crops(indexed):
    dataset = show.DATASETS["NYU"](path=indexed("NYU"), dataset="train", targets=False)
    tiles = show.draw_frame(dataset, 0, True, None, None)
    untitled = [tile[20:].tobytes() for tile in tiles]
    assert len(set(untitled)) == len(untitled) == 1 + show.AUGMENTATIONS


def test_hand17_predictions_are_read_in_the_camera_frame(indexed, tmp_path):
    dataset = show.DATASETS["HAND17"](path=indexed("HAND17"), dataset="val")
    joints_xyz = np.stack([dataset.joints(dataset.line(index)) for index in range(len(dataset))])
    np.savetxt(tmp_path / "predictions.txt", joints_xyz.reshape(len(joints_xyz), -1), fmt="%.3f")
    joints_uvd = show.load_predictions(tmp_path / "predictions.txt", dataset)
    errors_mm = show.mean_errors_mm(dataset, joints_uvd)
    assert list(errors_mm) == list(range(len(dataset))) and max(errors_mm.values()) < 0.01


def test_a_split_without_labels_takes_those_of_a_file(indexed, tmp_path, capsys):
    root = indexed("HAND17")
    dataset = show.DATASETS["HAND17"](path=root, dataset="test", test_only=True)
    joints_xyz = np.random.default_rng(1).normal((0, 0, 500), 30, (len(dataset), 21, 3))
    moved = joints_xyz + 10 * np.arange(len(dataset))[:, None, None] / 3**0.5  # the last frame is the worst
    files = [tmp_path / "labels.txt", tmp_path / "predictions.txt"]
    for path, joints in zip(files, (joints_xyz, moved)):
        np.savetxt(path, joints.reshape(len(dataset), -1), fmt="%.4f")
    errors_mm = show.mean_errors_mm(dataset, *(show.load_predictions(path, dataset) for path in files))
    assert list(errors_mm.values()) == pytest.approx([10 * k for k in range(len(dataset))], abs=0.01)
    joints_xyz[1] = 0  # a frame without labels
    np.savetxt(files[0], joints_xyz.reshape(len(dataset), -1), fmt="%.4f")
    assert 1 not in show.mean_errors_mm(dataset, *(show.load_predictions(path, dataset) for path in files))
    options = ["--dataset", "HAND17", "--data_dir", str(root), "--out", str(tmp_path / "sheet.png")]
    options += ["--labels", str(files[0]), "--predictions", str(files[1])]
    show.main([*options, "--split", "test"])
    assert capsys.readouterr().out.endswith("worst first\n")
    with pytest.raises(UserError, match="--labels goes with"):
        show.main([*options, "--split", "val"])


def test_named_predictions_are_matched_by_their_names(tmp_path, fresh_indexed):
    root = fresh_indexed("HAND17")
    lines = (root / "train.txt").read_text().splitlines()[:2]
    (root / "val.txt").write_text("".join(f"{line}\n" for line in lines))
    dataset = show.DATASETS["HAND17"](path=root, dataset="val")
    (tmp_path / "reversed.txt").write_text("\n".join(reversed(lines)))
    errors_mm = show.mean_errors_mm(dataset, show.load_predictions(tmp_path / "reversed.txt", dataset))
    assert len(errors_mm) == 2 and max(errors_mm.values()) < 0.01
    (tmp_path / "other.txt").write_text("\n".join([lines[0], lines[0]]))
    with pytest.raises(UserError, match="stands in two lines"):
        show.load_predictions(tmp_path / "other.txt", dataset)


def test_predictions_in_another_form_are_not_shown(indexed, tmp_path):
    dataset = show.DATASETS["NYU"](path=indexed("NYU"), dataset="test")
    xyz = np.stack([dataset.uvd2xyz(dataset.joints_uvd(dataset.line(k))) for k in range(len(dataset))])
    np.savetxt(tmp_path / "xyz.txt", xyz.reshape(len(xyz), -1))
    with pytest.raises(UserError, match="xyz.txt: .* cannot be uvd"):
        show.load_predictions(tmp_path / "xyz.txt", dataset)


def test_predictions_are_shown_worst_first(indexed, tmp_path):
    dataset = show.DATASETS["ICVL"](path=indexed("ICVL"), dataset="test")
    joints_uvd = np.stack([dataset.joints_uvd(dataset.line(index)) for index in range(len(dataset))])
    joints_uvd[1, :, 2] += 20
    joints_uvd[2] = 0  # as test.py writes what it could not read
    path = tmp_path / "predictions.txt"
    np.savetxt(path, joints_uvd.reshape(len(joints_uvd), -1), fmt="%.3f")
    errors_mm = show.mean_errors_mm(dataset, show.load_predictions(path, dataset))
    assert errors_mm[0] < 0.01 and errors_mm[1] > 19
    shown = show.choose(dataset, None, 24, errors_mm)
    assert shown[0] == 1 and sorted([*shown, 2]) == list(range(len(dataset)))
    out = tmp_path / "sheet.png"
    options = ["--data_dir", str(indexed("ICVL")), "--predictions", str(path), "--out", str(out)]
    show.main(["--dataset", "ICVL", "--split", "test", *options])
    assert cv2.imread(str(out)) is not None


def test_a_frame_that_cannot_be_read_takes_as_many_tiles(indexed, tmp_path):
    root = shutil.copytree(indexed("NYU"), tmp_path / "NYU")
    dataset = show.DATASETS["NYU"](path=root, dataset="train", targets=False)
    dataset.frame_path(0).write_bytes(b"")
    refused_uvd = np.full((len(dataset), 14, 3), np.nan)
    for augment, joints_uvd, count in ((True, None, 6), (False, refused_uvd, 2), (False, None, 1)):
        for index in (0, 1):
            assert len(show.draw_frame(dataset, index, augment, joints_uvd, None)) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "sheet"], "--out sheet: give a picture's name"),
        (["--out", "sheet.pdf"], "--out sheet.pdf: give a picture's name"),
        (["--index", "99"], "has frames 0 to"),
        (["--augment", "--split", "test"], "--augment goes with"),
        (["--count", "0"], "--count must be above 0"),
        (["--predictions", "absent.txt"], "absent.txt not found"),
    ],
)
def test_show_refuses_what_it_cannot_show(options, message, indexed):
    with pytest.raises(UserError, match=message):
        show.main(["--dataset", "NYU", "--data_dir", str(indexed("NYU")), *options])
