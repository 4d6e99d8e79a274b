"""Cameras as people describe them, and what is taken for depth: units, packings, files that are none."""

import json
import struct

import cv2
import numpy as np
import pytest
import yaml
from hands import CAMERA, CAMERA_TEXT, hand_frame, write_png

from datasets import DATASETS
from frames.cameras import (
    PRESETS,
    DepthCamera,
    check_depth,
    doubts_about,
    list_frames,
    parse_camera,
    read_depth,
)
from frames.files import FrameError
from frames.transforms import Camera, Frame
from utils import UserError

OWN = Camera(600.0, 601.0, 320.0, 240.0)


SIZED = {"width": 640, "height": 480}
ROWS = [600, 0, 320, 0, 601, 240, 0, 0, 1]
COLUMNS = [600, 0, 0, 0, 601, 0, 320, 240, 1]

# Of each form an example, and the mm of a stored 1, the size and the other fields that it gives.
FORMS = {
    "our own": (
        {"fx": 600, "fy": 601, "u0": 320, "v0": 240, "depth_unit_mm": 0.25, **SIZED},
        0.25,
        (640, 480),
    ),
    "the option's word": ({"fx": 600, "fy": 601, "cx": 320, "cy": 240, "depth_unit": 0.25}, 0.25, None),
    "the unit beside": (
        {"camera": {"fx": 600, "fy": 601, "u0": 320, "v0": 240}, "depth_unit_mm": 0.25},
        0.25,
        None,
    ),
    "RealSense": (
        {
            **{"ppx": 320, "ppy": 240, "fx": 600, "fy": 601, "depth_scale": 0.000125, **SIZED},
            **{"model": "brown_conrady", "coeffs": [0, 0, 0, 0, 0]},
        },
        0.125,
        (640, 480),
    ),
    "Open3D": ({"intrinsic_matrix": COLUMNS, "depth_scale": 1000.0, **SIZED}, 1.0, (640, 480)),
    "Open3D's view": (
        {"class_name": "A", "extrinsic": [1], "intrinsic": {"intrinsic_matrix": COLUMNS, **SIZED}},
        1.0,
        (640, 480),
    ),
    "ROS, calibrated": (
        {
            **{
                "image_width": 640,
                "image_height": 480,
                "camera_name": "depth",
                "distortion_model": "plumb_bob",
            },
            **{"camera_matrix": {"rows": 3, "cols": 3, "data": ROWS}},
            **{"distortion_coefficients": {"rows": 1, "cols": 5, "data": [0.1, 0, 0, 0, 0]}},
        },
        1.0,
        (640, 480),
        {"distorted": True},
    ),
    "ROS, a message": (
        {
            **{"header": {"seq": 1}, **SIZED, "D": [0, 0], "K": ROWS, "R": [1], "P": [1]},
            **{"binning_x": 0, "binning_y": 0, "roi": {"x_offset": 0, "y_offset": 0, "height": 0}},
        },
        1.0,
        (640, 480),
    ),
    "rows": (
        {"camera_matrix": [ROWS[:3], ROWS[3:6], ROWS[6:]], "packing": "nyu"},
        1.0,
        None,
        {"packed": True},
    ),
}


def test_a_calibration_that_opencv_wrote_is_read(tmp_path):
    path = tmp_path / "calibration.yml"
    file = cv2.FileStorage(str(path), cv2.FILE_STORAGE_WRITE)
    file.write("nframes", 20)
    file.write("image_width", 640)
    file.write("image_height", 480)
    file.write("camera_matrix", np.reshape(ROWS, (3, 3)).astype(np.float64))
    file.write("distortion_coefficients", np.zeros((5, 1)))
    file.write("avg_reprojection_error", 0.3)
    file.release()
    assert parse_camera(path) == DepthCamera(OWN, 1.0, (640, 480))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["json", "yml"])
def test_camera_files_of_every_usual_form_are_read(form, suffix, tmp_path):
    content, unit_mm, size_px, *more = FORMS[form]
    path = tmp_path / f"camera.{suffix}"
    as_json, as_yaml = json.dumps(content, indent="\t"), yaml.safe_dump(content) + "---\n"
    path.write_text(as_json if suffix == "json" else as_yaml)
    assert parse_camera(path) == DepthCamera(OWN, unit_mm, size_px, **(more[0] if more else {}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("fx: 600\n", "'fy' is missing"),
        ("- 600\n", "expected lines such as"),
        (
            "fx: 600\nfy: 601\nu0: 320\nv0: 240\ndepth_units: 0.125\n",
            "'depth_units' is not known",
        ),
        ("camera: {fx: 600, fy: 601, u0: 320, v0: 240}\nunit: 0.125\n", "'unit' is not known"),
        ("fx: 600\nfy: 601\nu0: 320\nv0: 240\ncx: 100\n", "'cx' contradicts a value"),
        (
            "camera: {fx: 6, fy: 6, u0: 3, v0: 2, depth_unit_mm: 1}\ndepth_unit_mm: 0.125\n",
            "contradicts a value",
        ),
        ("fx: 600\nfy: 601\nu0: 320\nv0: 240\nwidth: 640\n", "'height' is missing"),
        ("fx: 600\nfy: 0\nu0: 320\nv0: 240\n", "above 0"),
        ("fx: 600\nfy: 601\nu0: .nan\nv0: 240\n", "above 0"),
        ("fx: 600\nfy: 601\nu0: 320\nv0: 240\nwidth: .inf\nheight: 480\n", "cannot convert float infinity"),
        ("K: [0, 0, 0, 0, 0, 0, 0, 0, 0]\n", "the matrix is not"),
        ("K: [1, 2, 3]\n", "cannot reshape"),
        ("K: [600, 0, 320, 0, 601, 240, 0, 0, 1]\nbinning_x: 2\n", "binned"),
        ("fx: 600\nfy: 601\nu0: 320\nv0: 240\npacking: jet\n", "expected nyu or none"),
    ],
)
def test_a_camera_file_that_is_not_understood_is_refused(content, message, tmp_path):
    path = tmp_path / "camera.yml"
    path.write_text(content)
    with pytest.raises(UserError, match=f"camera.yml.*{message}"):
        parse_camera(path)


def test_presets_have_their_sensors_units():
    assert {name: preset.unit_mm for name, preset in PRESETS.items() if preset.unit_mm != 1} == {
        "SR300": 0.125,
        "SR305": 0.125,
    }
    assert [name for name, preset in PRESETS.items() if preset.packed] == ["NYU"]


def test_a_camera_that_cannot_be_the_pictures_is_questioned_or_refused():
    assert doubts_about(DepthCamera(CAMERA), (640, 480)) == []
    (doubt,) = doubts_about(DepthCamera(CAMERA), (320, 240))
    assert "principal point (319.5, 239.5) is far from the middle of 320x240 px" in doubt
    assert "distortion" in doubts_about(DepthCamera(CAMERA, distorted=True), (640, 480))[0]
    for focal in (0.74, 3.6, 475000):
        with pytest.raises(ValueError, match="give focal lengths in px"):
            doubts_about(DepthCamera(CAMERA._replace(fx=focal)), (640, 480))


def scene(unit_mm=1.0, dtype=np.float32):
    """Return a hand half a metre away before a wall at 0.9 m, with a sensor's noise, stored in a unit."""
    noise = np.random.default_rng(0).normal(0, 2, (480, 640))
    depth_mm = np.where(hand_frame() > 0, hand_frame(), 900) + noise
    return (depth_mm / unit_mm).astype(dtype)


@pytest.mark.parametrize(
    ("stored", "unit_mm", "advice"),
    [
        (scene(), 0.125, "--depth_unit 1 would fit"),
        (scene(), 1000, "too far for a hand: --depth_unit 1 would fit"),
        (scene(1000), 1, "median 0.8.*too near for a hand: --depth_unit 1000 would fit"),
        (scene(1000), 0.125, "--depth_unit 1000 would fit"),
        (scene(0.125, np.uint16), 1, "nearest 39.*too far for a hand: --depth_unit 0.125 would fit"),
        (scene(1, np.uint16).byteswap(), 1, "bytes of each number seem to be swapped"),
        (scene(0.125, np.uint16).byteswap(), 0.125, "bytes of each number seem to be swapped"),
        (scene() + 4000, 1, "too far for a hand: "),
    ],
)  # fmt: skip
def test_advice_on_units_follows_from_the_stored_numbers(stored, unit_mm, advice):
    with pytest.raises(ValueError, match=advice):
        check_depth(stored, unit_mm)


def test_depth_in_its_own_unit_is_taken():
    for unit_mm, dtype in ((1, np.uint16), (0.125, np.uint16), (1000, np.float64), (1, ">u2")):
        np.testing.assert_allclose(check_depth(scene(unit_mm, dtype), unit_mm), scene(), atol=1.01)
    saturated = scene(1, np.uint16)
    saturated[:, :400] = 65535  # "nothing measured", as some cameras store it
    check_depth(saturated)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("suffix", [".npy", ".tif"])
@pytest.mark.parametrize("unit_mm", [1000.0, 1.0])
def test_what_is_not_finite_was_not_measured(value, suffix, unit_mm, tmp_path):
    depth = (hand_frame() / unit_mm).astype(np.float32)
    stored, path = np.where(depth == 0, np.float32(value), depth), tmp_path / f"frame{suffix}"
    np.save(path, stored) if suffix == ".npy" else cv2.imwrite(str(path), stored)
    read = read_depth(path, DepthCamera(CAMERA, unit_mm))
    np.testing.assert_allclose(read, hand_frame(), atol=1e-3)


@pytest.mark.parametrize("name", ["JET", "WINTER", "TURBO", "BONE"])
def test_a_picture_through_a_colour_map_is_no_depth(name, tmp_path):
    grey = cv2.convertScaleAbs(hand_frame(), alpha=0.03)
    path = write_png(tmp_path / "depth.png", cv2.applyColorMap(grey, getattr(cv2, f"COLORMAP_{name}")))
    with pytest.raises(FrameError, match="found 8-bit colour: give what the camera measured"):
        read_depth(path, DepthCamera(CAMERA))
    with pytest.raises(FrameError, match="not depth packed as NYU's"):
        read_depth(path, PRESETS["NYU"])


def test_further_pages_of_a_tiff_are_not_dropped_in_silence(tmp_path):
    path = tmp_path / "pages.tif"
    assert cv2.imwritemulti(str(path), [hand_frame(), hand_frame(600)])
    with pytest.raises(FrameError, match="it holds 2 pictures"):
        read_depth(path, DepthCamera(CAMERA))


def test_a_tiff_whose_second_page_is_damaged_is_refused_like_any_bad_frame(tmp_path):
    path = tmp_path / "pages.tif"
    assert cv2.imwritemulti(str(path), [hand_frame(), hand_frame(600)])
    data = bytearray(path.read_bytes())
    (first,) = struct.unpack_from("<I", data, 4)
    (second,) = struct.unpack_from("<I", data, first + 2 + 12 * struct.unpack_from("<H", data, first)[0])
    tags = [second + 2 + 12 * entry for entry in range(struct.unpack_from("<H", data, second)[0])]
    bits = next(tag for tag in tags if struct.unpack_from("<H", data, tag)[0] == 258)
    struct.pack_into("<H", data, bits + 8, 3)
    path.write_bytes(data)
    with pytest.raises(FrameError, match="a picture after its first does not decode"):
        read_depth(path, DepthCamera(CAMERA))


def test_a_folders_frames_come_in_the_order_of_their_numbers_and_others_are_named(tmp_path, capfd):
    names = [
        "f10.png",
        "f1.png",
        "f9.png",
        "cm1²3.png",
        "f١.png",
        "._f9.png",
        ".hidden.png",
        "notes.txt",
        "a.raw",
        "b.raw",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_frames(tmp_path)] == [
        "cm1²3.png",
        "f1.png",
        "f9.png",
        "f10.png",
        "f١.png",
    ]
    assert "passed over: 2 .raw, 1 .txt" in capfd.readouterr().err
    with pytest.raises(UserError, match="cannot be read"):
        list_frames(tmp_path / "notes.txt")


def test_every_kind_of_file_is_read_to_millimetres(tmp_path, indexed):
    depth = hand_frame()
    millimetres = parse_camera(CAMERA_TEXT)
    nyu = cv2.merge(
        [(depth & 255).astype(np.uint8), (depth >> 8).astype(np.uint8), np.zeros_like(depth, np.uint8)]
    )
    np.save(tmp_path / "metres.npy", depth / 1000)
    files = {
        write_png(tmp_path / "depth.png", depth): 1.0,
        write_png(tmp_path / "nyu.png", nyu): 1.0,
        write_png(tmp_path / "depth.tiff", depth.astype(np.float32)): 1.0,
        write_png(tmp_path / "eighths.png", depth * 8): 0.125,
        tmp_path / "metres.npy": 1000.0,
    }
    for path, unit_mm in files.items():
        camera = millimetres._replace(unit_mm=unit_mm, packed=path.stem == "nyu")
        np.testing.assert_allclose(read_depth(path, camera), depth, atol=1e-3)
    msra = DATASETS["MSRA"](path=indexed("MSRA"), dataset="test", test_only=True)
    whole, part = read_depth(msra.frame_path(0), PRESETS["MSRA"]), msra.read(msra.line(0))
    assert whole.shape == (240, 320)
    assert whole[part.top, part.left] == part.depth_mm[0, 0] and whole.sum() == part.depth_mm.sum()


def test_bytes_behind_the_end_of_a_png_do_no_harm(tmp_path):
    path = write_png(tmp_path / "depth.png", hand_frame())
    path.write_bytes(path.read_bytes() + bytes(32))
    np.testing.assert_array_equal(read_depth(path, parse_camera(CAMERA_TEXT)), hand_frame())


def test_presets_look_through_the_middle_of_their_pictures():
    for name, (camera, _, (width, height), *_) in PRESETS.items():
        assert abs(camera.u0 / width - 0.5) < 0.09 and abs(camera.v0 / height - 0.5) < 0.09, name


def test_cameras_come_from_presets_and_numbers():
    assert parse_camera("kinectv2") is PRESETS["KinectV2"]
    assert parse_camera(CAMERA_TEXT) == DepthCamera(CAMERA)


def test_checked_depth_is_not_copied_where_it_is_millimetres():
    depth = hand_frame()
    depth.setflags(write=False)
    assert check_depth(depth) is depth
    assert Frame(depth).rect.right == 640
