"""predict.py on a user's own frames: same numbers as test.py and the Python call, sequences, bad input."""

import csv
import struct
import zlib
from itertools import count
from pathlib import Path
from threading import Barrier, Event
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import ON_CPU
from hands import CAMERA, CAMERA_TEXT, CENTER, hand_frame, read_results, save_network, write_png

from datasets import DATASETS
from frames.cameras import PRESETS, parse_camera, read_depth
from frames.drawing import FINGER_COLOURS
from predict import HandPose, HandPoseEstimator, predict_ahead, predict_all


def giant(form):
    """Return a picture file whose header promises more pixels than any memory holds."""
    if form == "png":
        header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 16, 0, 0, 0, 0)
        chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IEND\xaeB`\x82"
    tags = [(256, 2**31 - 1), (257, 2**31 - 1), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (279, 2)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"


@pytest.mark.parametrize("name", ["NYU", "ICVL", "HAND17"])
def test_a_data_sets_own_frame_gives_what_test_py_gives(name, fresh_indexed, script):
    root = fresh_indexed(name)
    cls = DATASETS[name]
    model = save_network(Path("small.pt"), cls.joint_number, dataset=name)
    assert script("test.py", "--dataset", name, "--model", model, *ON_CPU).status == 0
    (result,) = Path("Result").glob("*.txt")
    lines = result.read_text().splitlines()
    dataset = cls(path=root, dataset="test", test_only=True)
    estimator = HandPoseEstimator(model, name, device="cpu")
    for index, line in enumerate(lines):
        numbers = np.array(line.split()[-3 * cls.joint_number :], float).reshape(-1, 3)
        depth_mm = read_depth(dataset.frame_path(index), PRESETS[name])
        pose = estimator(depth_mm, center_uvd=dataset.center_uvd(dataset.line(index)))
        found = pose.joints_xyz if name == "HAND17" else pose.joints_uvd
        np.testing.assert_allclose(found, numbers, atol=1.5e-3)  # test.py writes three decimals


def test_the_script_writes_what_the_call_returns_and_goes_on_after_bad_frames(
    tmp_path, model, estimator, script
):
    folder = tmp_path / "recording"
    write_png(folder / "depth_1.png", hand_frame())
    write_png(folder / "depth_2.png", np.zeros((480, 640), np.uint16))
    write_png(folder / "depth_3.jpg", np.full((480, 640, 3), 90, np.uint8))
    (folder / "depth_4.png").write_bytes(b"")
    np.save(folder / "depth_10.npy", hand_frame(column=330).astype(np.float32))
    options = ["--camera", CAMERA_TEXT, "--model", model, "--device", "cpu", "--plot3d"]
    done = script("predict.py", folder, *options, "--out", tmp_path / "out")
    assert done.status == 3
    assert done.err.count("warning:") == 3 and "Traceback" not in done.err
    assert "2 of 5 frames have joints" in done.out and "frames a second" in done.out
    head, frames = read_results(tmp_path / "out")
    assert (head["version"], head["joints"], head["hand"]) == (2, "HAND17", "right")
    names = [Path(frame["frame"]).stem for frame in frames]
    assert names == ["depth_1", "depth_2", "depth_3", "depth_4", "depth_10"]
    assert [frame["joints"] is None for frame in frames] == [False, True, True, True, False]
    assert all(frame["reason"] for frame in frames[1:4])
    pose = estimator(hand_frame())
    written = frames[0]["joints"]
    np.testing.assert_allclose([joint["xyz"] for joint in written], pose.joints_xyz, atol=0.01)
    np.testing.assert_allclose([joint["confidence"] for joint in written], pose.confidence, atol=1e-3)
    rows = list(csv.DictReader((tmp_path / "out/predictions.csv").open()))
    columns = [("x_mm", "y_mm", "z_mm"), ("u_px", "v_px", "d_mm")]
    in_table = [[[float(row[name]) for name in names] for names in columns] for row in rows[:21]]
    assert in_table == [[joint["xyz"], joint["uvd"]] for joint in written]
    assert len(rows) == 2 * 21 + 3 and rows[21]["reason"] == frames[1]["reason"]
    overlay = cv2.imread(str(tmp_path / "out/overlay/000000_depth_1.png"))
    assert overlay.shape == (480, 640, 3) and (overlay[..., ::-1] == FINGER_COLOURS[4]).all(-1).any()
    assert cv2.imread(str(tmp_path / "out/views/000004_depth_10.png")).shape == (400, 800, 3)
    assert cv2.VideoCapture(str(tmp_path / "out/film.mp4")).read()[0]


@pytest.mark.parametrize(
    "options, call, unit_mm, keywords",
    [
        (["--bbox", "200,100,140,300"], {"bbox": (200, 100, 140, 300)}, 1, {}),  # cuts fingers off
        (["--cube", "120"], {}, 1, {"cube_mm": 120}),
        (["--hand", "left"], {}, 1, {"hand": "left"}),
        (["--turns", "3"], {}, 1, {"turns": 3}),
        (["--depth_unit", "1.25"], {}, 1.25, {}),
    ],
)
def test_options_of_the_script_are_those_of_the_call(
    options, call, unit_mm, keywords, workplace, model, script
):
    depth = hand_frame()
    depth[240:] += depth[240:] // 50
    write_png(Path("frame.png"), depth)
    done = script(
        "predict.py", "frame.png", "--camera", CAMERA_TEXT, "--model", model, "--device", "cpu", *options
    )
    assert done.status == 0, done.err
    found = [joint["xyz"] for joint in read_results()[1][0]["joints"]]
    plain = HandPoseEstimator(model, CAMERA, device="cpu")(depth).joints_xyz
    same = HandPoseEstimator(model, CAMERA, device="cpu", **keywords)(depth * np.float32(unit_mm), **call)
    np.testing.assert_allclose(found, same.joints_xyz, atol=0.01)
    assert np.abs(found - plain).max() > 0.1


def test_within_a_sequence_the_last_centre_is_handed_on(tmp_path):
    files = [[write_png(tmp_path / name / f"{k}.png", hand_frame()) for k in (1, 2)] for name in "ab"]
    asked = []

    def locate(depth_mm, center_uvd, bbox, near_uvd):
        asked.append(near_uvd)
        return HandPose(None, None, None, len(asked))

    estimator = SimpleNamespace(locate=locate, predict=list, device="cpu")
    writer = SimpleNamespace(write=lambda *_: None, out=tmp_path, names=[])
    assert predict_all(estimator, parse_camera(CAMERA_TEXT), files, (None, None), writer) == 4
    assert asked == [None, 1, None, 3]


@pytest.mark.parametrize("hand", ["right", "left"])
def test_within_a_sequence_the_hand_is_looked_for_where_it_was_found(hand, model, tmp_path, monkeypatch):
    files, found_uvd, asked = [write_png(tmp_path / f"{k}.png", hand_frame()) for k in (1, 2)], CENTER, []

    def find_center(frame, camera, near_uvd, bbox):
        asked.append(near_uvd)
        return np.array(found_uvd) - (50, 0, 0)

    monkeypatch.setattr("prediction.estimator.find_center", find_center)
    estimator = HandPoseEstimator(model, CAMERA, hand=hand, device="cpu")
    writer = SimpleNamespace(write=lambda *_: None, out=tmp_path, names=[])
    predict_all(estimator, parse_camera(CAMERA_TEXT), [files], (None, None), writer)
    assert asked[0] is None
    np.testing.assert_allclose(asked[1], np.array(found_uvd) - (50, 0, 0))


def test_a_camera_that_no_picture_is_of_is_a_reason(workplace, model, script):
    write_png(Path("frame.png"), hand_frame())
    done = script("predict.py", "frame.png", "--camera", "30,30,320,240", "--model", model, *ON_CPU[:2])
    assert done.status == 1 and "Traceback" not in done.err
    assert "the camera's fx 30 px would see 169 degrees" in read_results()[1][0]["reason"]


def test_the_next_frame_is_located_while_one_is_predicted(tmp_path):
    files = [write_png(tmp_path / f"{k}.png", hand_frame()) for k in (1, 2, 3)]
    located = [Event() for _ in files]

    def locate(*_):
        number = [event.is_set() for event in located].index(False)
        located[number].set()
        return HandPose(None, None, None, number)

    def predict(places):
        following = min(places[0].center_uvd + 1, 2)
        assert located[following].wait(10)
        return places

    estimator = SimpleNamespace(locate=locate, predict=predict, device="cpu")
    written = []
    writer = SimpleNamespace(
        write=lambda path, _, pose: written.append((path, pose.center_uvd)), out=tmp_path, names=[]
    )
    predict_all(estimator, parse_camera(CAMERA_TEXT), [files], (None, None), writer)
    assert written == [(path, number) for number, path in enumerate(files)]


def test_frames_are_predicted_at_once_and_written_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr("predict.forwards_at_once", lambda device: 2)
    files = [write_png(tmp_path / f"{k}.png", hand_frame()) for k in range(5)]
    both, second_done = Barrier(2), Event()

    def predict(places):
        number = places[0].center_uvd
        if number < 2:  # neither is predicted before the other has begun
            both.wait(10)
        if number == 0:
            assert second_done.wait(10)
        if number == 1:
            second_done.set()
        return places

    places = (HandPose(None, None, None, number) for number in count())
    estimator = SimpleNamespace(locate=lambda *_: next(places), predict=predict, device="cpu")
    ahead = predict_ahead(files, estimator, parse_camera(CAMERA_TEXT), (None, None))
    done = [(path, predicting.result().pose.center_uvd) for path, predicting in ahead]
    assert done == [(path, number) for number, path in enumerate(files)]


def test_pictures_of_an_earlier_run_go(workplace, model, script):
    options = ["--camera", CAMERA_TEXT, "--model", model, "--device", "cpu"]
    for name in ("1.png", "2.png"):
        write_png(Path("recording", name), hand_frame())
    mine = write_png(Path("Result/predict/overlay/mine.png"), np.zeros((2, 2), np.uint8))
    assert script("predict.py", "recording", *options, "--plot3d").status == 0
    assert script("predict.py", "recording/2.png", *options).status == 0
    kept = sorted(str(path.relative_to("Result/predict")) for path in Path("Result/predict").rglob("*.*"))
    assert kept == [
        "overlay/000000_2.png",
        "overlay/mine.png",
        "predictions.csv",
        "predictions.jsonl",
    ]
    assert mine.exists()


def test_the_script_takes_a_presets_name_and_a_center(workplace, model, script):
    write_png(Path("frame.png"), (hand_frame() * 8).astype(np.uint16))
    options = ["--camera", "SR305", "--center", "320,240,510", "--model", model, "--device", "cpu"]
    done = script("predict.py", "frame.png", *options)
    assert done.status == 0, done.err
    head, frames = read_results()
    assert head["depth_unit_mm"] == 0.125
    assert frames[0]["center_uvd"] == [320, 240, 510]
    assert not Path("Result/predict/film.mp4").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frame.png", "--model", "absent.pt"], "absent.pt not found"),
        (["frame.png", "absent.png", "--model", "small.pt"], "absent.png not found: give depth pictures"),
        (["long" * 80 + ".png", "--model", "small.pt"], "long.png not found: give depth pictures"),
        (["frame.png", "--model", "small.pt", "--out", "frame.png"], "--out frame.png is no folder: give an"),
        (["empty", "--model", "small.pt"], "no depth frame"),
        (["frame.png", "--model", "published.pt", "--joints", "NYU"], "21 joints"),
        (
            ["frame.png", "--model", "small.pt", "--joints", "MSRA"],
            "was trained on HAND17, whose joints are not those of MSRA",
        ),
        (["frame.png", "--model", "empty"], "empty is no file"),
        (["frame.png", "--model", "published.pt"], "say with --joints"),
    ],
)
def test_what_cannot_be_used_ends_in_one_line(arguments, message, workplace, model, script):
    write_png(Path("frame.png"), hand_frame())
    Path("empty").mkdir()
    Path("small.pt").write_bytes(model.read_bytes())
    save_network(Path("published.pt"))
    done = script("predict.py", *arguments, "--camera", CAMERA_TEXT)
    assert done.status == 1
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and message in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--camera", "475,475,320"], "expected 4 numbers"),
        (["--camera", "0,475,320,240"], "above 0"),
        (["--camera", "absent.yml"], "cannot be read"),
        (["--camera", CAMERA_TEXT, "--depth_unit", "0"], "--depth_unit must be above 0"),
        (["--camera", CAMERA_TEXT, "--depth_unit", "nan"], "--depth_unit must be above 0"),
        (["--camera", CAMERA_TEXT, "--cube", "-1"], "--cube must be above 0"),
        (["--camera", CAMERA_TEXT, "--center", "1,2"], "expected 3 numbers"),
        (["--camera", CAMERA_TEXT, "--bbox", "1,2,three,4"], "expected 4 numbers"),
        (["--camera", CAMERA_TEXT, "--bbox", "1,2,0,4"], "width and height must be above 0"),
    ],
)
def test_wrong_options_end_with_status_2(arguments, message, workplace, script):
    done = script("predict.py", "frame.png", "--model", "small.pt", *arguments)
    assert done.status == 2
    usage, line = done.err.splitlines()
    assert usage.startswith("usage: ") and line.startswith("predict.py: error: ") and message in line
    assert "--camera" in script("predict.py", "frame.png").err.splitlines()[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("zero.png", np.zeros((480, 640), np.uint16), "the frame is empty"),
        ("grey.png", np.full((480, 640), 90, np.uint8), "found 8-bit grey"),
        ("colour.png", np.full((480, 640, 3), 90, np.uint8), "found 8-bit colour"),
        ("nan.npy", np.full((480, 640), np.nan), "no pixel has a depth"),
        ("text.npy", b"hello", "does not begin as .npy files do"),
        ("negative.npy", np.full((480, 640), -1.0), "negative"),
        ("metres.npy", np.full((480, 640), 0.5), "--depth_unit 1000"),
        ("far_metres.npy", np.pad(np.full((80, 80), 0.5), 200, constant_values=25), "--depth_unit 1000"),
        ("beyond_float32.npy", np.full((480, 640), 1e300), "check unit and byte order"),
        ("damaged.npy", b"\x93NUMPY\x01\x00\x06\x00{'a':(", "the array cannot be read"),
        ("stack.npy", np.ones((2, 480, 640)), "expected 16-bit or float depths"),
        ("objects.npy", np.array([None]), "cannot be read"),
        ("short.bin", b"123", "24 bytes"),
        ("empty.tif", b"", "the file is empty"),
        ("text.tif", b"hello", "does not decode"),
        ("giant.png", giant("png"), "more than any depth camera"),
        ("giant.tif", giant("tif"), "does not decode"),
        ("nothing.png", np.pad(np.full((20, 20), 500, np.uint16), ((220, 240), (300, 320))), "hand"),
    ],
)
def test_a_bad_frame_gets_its_reason(name, content, message, workplace, model, script):
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    elif name.endswith("npy"):
        np.save(name, content, allow_pickle=True)
    else:
        write_png(Path(name), content)
    done = script("predict.py", name, "--camera", CAMERA_TEXT, "--model", model, "--device", "cpu")
    assert done.status == 1
    assert done.err.startswith(f"warning: {name}: ") and done.err.count("\n") == 1 and message in done.err
    frame = read_results()[1][0]
    assert frame["joints"] is None and message in frame["reason"]


def test_a_mistyped_input_leaves_earlier_results(workplace, model, script):
    write_png(Path("frame.png"), hand_frame())
    options = ["--camera", CAMERA_TEXT, "--model", model, "--device", "cpu"]
    assert script("predict.py", "frame.png", *options).status == 0
    before = read_results()
    assert script("predict.py", "frane.png", *options).status == 1
    assert read_results() == before and len(list(Path("Result/predict/overlay").iterdir())) == 1


@pytest.mark.parametrize("video", ["mp4", "gif"])
def test_no_film_is_made_of_frames_that_cannot_be_read(video, workplace, model, script):
    write_png(Path("recording/1.png"), np.full((480, 640), 90, np.uint8))
    Path("recording/2.png").write_bytes(b"")
    options = ["--camera", CAMERA_TEXT, "--model", model, "--device", "cpu", "--video", video]
    done = script("predict.py", "recording", *options)
    assert done.status == 1 and "film" not in done.out
    assert sorted(path.name for path in Path("Result/predict").iterdir()) == [
        "predictions.csv",
        "predictions.jsonl",
    ]
