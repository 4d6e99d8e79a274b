"""The script and the Python call on a user's own frames: same numbers as test.py, hands, files, bad input."""

import csv
import json
import struct
import zlib
from itertools import count
from pathlib import Path
from threading import Barrier, Event
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import ON_CPU

from datasets import DATASETS
from engine.checkpoints import load_network, save_checkpoint
from frames.cameras import PRESETS, DepthCamera, check_depth, list_frames, parse_camera, read_depth
from frames.drawing import FINGER_COLOURS
from frames.samples import prepare_crop
from frames.transforms import Camera, Frame
from model import PixelwiseRegression, StageOutput
from predict import HandPose, HandPoseEstimator, predict_ahead, predict_all
from prediction.estimator import middle_of_hand
from prediction.output import Gif, draw_views, finger_chains
from utils import UserError

CAMERA = Camera(475.0, 475.0, 319.5, 239.5)
CAMERA_TEXT = "475,475,319.5,239.5"
CENTER = (320.0, 240.0, 505.0)

ESTIMATOR = "prediction.estimator"


def giant(form):
    """Return a picture file whose header promises more pixels than any memory holds."""
    if form == "png":
        header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 16, 0, 0, 0, 0)
        chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IEND\xaeB`\x82"
    tags = [(256, 2**31 - 1), (257, 2**31 - 1), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (279, 2)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"


def save_network(path, joints=21, **more):
    """Write the checkpoint of a small random network; return its path."""
    torch.manual_seed(0)
    network = PixelwiseRegression(
        joints, stage=1, label_size=32, features=32, level=2, norm_method="instance"
    )
    save_checkpoint(
        path, {"state_dict": network.state_dict(), "seed": 0, "model_param": network.param, **more}
    )
    return path


def hand_frame(distance_mm=500, column=320, row=240):
    """Return depth [480, 640] in uint16 mm of a flat open hand: a palm, five fingers, a forearm."""
    depth = np.zeros((480, 640), np.uint16)
    scale = 475 / distance_mm
    point = lambda x, y: (round(column + x * scale), round(row + y * scale))  # noqa: E731
    cv2.rectangle(depth, point(-40, -10), point(40, 75), distance_mm, -1)
    for x, y in ((-75, -25), (-38, -95), (-13, -105), (13, -100), (38, -85)):
        base = point(np.clip(x, -35, 35), 20 if x == -75 else -5)
        cv2.line(depth, base, point(x, y), distance_mm, round(16 * scale))
    cv2.line(depth, point(0, 70), point(10, 300), distance_mm, round(55 * scale))
    return depth


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("model") / "small.pt", dataset="HAND17")


@pytest.fixture(scope="session")
def estimator(model):
    return HandPoseEstimator(model, CAMERA, device="cpu")


def write_png(path, picture):
    """Write a picture; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture)
    return path


def read_results(out="Result/predict"):
    """Return the head and the frames of a folder's predictions.jsonl."""
    head, *frames = map(json.loads, Path(out, "predictions.jsonl").read_text().splitlines())
    return head, frames


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


def test_the_crop_is_the_data_sets_to_the_last_bit(fresh_indexed):
    sizes = {"image_size": 64, "label_size": 32}
    dataset = DATASETS["NYU"](path=fresh_indexed("NYU"), dataset="test", test_only=True, **sizes)
    estimator = HandPoseEstimator(save_network(Path("small.pt"), 14, dataset="NYU"), "NYU", device="cpu")
    depth_mm = read_depth(dataset.frame_path(0), PRESETS["NYU"])
    own = estimator.locate(depth_mm, dataset.center_uvd(dataset.line(0))).crop
    for ours, theirs in zip(own, dataset.sample(0), strict=True):
        assert torch.equal(ours, theirs)


def test_a_mirrored_frame_of_a_left_hand_gives_mirrored_joints(model, estimator):
    depth_mm = hand_frame()
    right = estimator(depth_mm)
    left = HandPoseEstimator(model, CAMERA, hand="left", device="cpu")(depth_mm[:, ::-1])
    np.testing.assert_allclose(left.joints_xyz, right.joints_xyz * (-1, 1, 1), atol=0.01)
    np.testing.assert_allclose(left.joints_uvd[:, 0], 639 - right.joints_uvd[:, 0], atol=0.01)
    np.testing.assert_allclose(left.center_uvd, right.center_uvd * (-1, 1, 1) + (639, 0, 0), atol=0.01)


@pytest.mark.parametrize("hand, column", [("right", 300), ("left", 339)])
def test_the_hand_is_looked_for_where_it_was(hand, column, model, monkeypatch):
    asked = []
    monkeypatch.setattr(
        f"{ESTIMATOR}.find_center", lambda frame, camera, near, bbox: asked.append(near) or CENTER
    )
    HandPoseEstimator(model, CAMERA, hand=hand, device="cpu")(hand_frame(), near_uvd=(300, 200, 490))
    np.testing.assert_array_equal(asked, [(column, 200, 490)])


@pytest.mark.parametrize("off_mm, moves", [(20, False), (30, True)])
def test_a_second_crop_is_cut_where_the_first_prediction_is_far_from_the_first(
    off_mm, moves, estimator, monkeypatch
):
    first, other = CENTER, (320 + off_mm / 505 * 475, 240.0, 505.0)
    monkeypatch.setattr(f"{ESTIMATOR}.find_center", lambda *_: first)
    monkeypatch.setattr(f"{ESTIMATOR}.middle_of_hand", lambda crop, uvd: np.array(other))
    found = estimator(hand_frame()).center_uvd
    np.testing.assert_array_equal(found, other if moves else first)
    for hint in ({"center_uvd": first}, {"bbox": (200, 100, 240, 300)}):
        np.testing.assert_array_equal(estimator(hand_frame(), **hint).center_uvd, first)


def test_confidence_is_the_share_of_the_heatmap_near_the_joint(model, monkeypatch):
    """A pixel of this map is 9.7 mm: 15 mm reach to its eight neighbours."""
    estimator = HandPoseEstimator(model, CAMERA, device="cpu")
    heatmaps = torch.zeros(1, 21, 32, 32)
    for row, column, share in ((16, 16, 0.5), (16, 17, 0.2), (17, 15, 0.1), (16, 18, 0.2)):
        heatmaps[:, :, row, column] = share
    output = StageOutput(heatmaps, heatmaps, torch.zeros(1, 21, 3))
    monkeypatch.setattr(estimator, "_forward", lambda *_: output)
    np.testing.assert_allclose(estimator(hand_frame()).confidence, 0.8, rtol=1e-6)


def test_a_batch_gives_what_single_frames_give(estimator):
    frames = [hand_frame(), hand_frame(600, 250, 200), np.zeros((480, 640), np.uint16)]
    poses = estimator.batch(frames)
    assert poses[2].joints_xyz is None and "empty" in poses[2].reason
    for pose, frame in zip(poses[:2], frames):
        assert pose.joints_xyz.shape == (21, 3) and pose.confidence.shape == (21,)
        assert ((pose.confidence >= 0) & (pose.confidence <= 1.001)).all()
        np.testing.assert_allclose(pose.joints_xyz, estimator(frame).joints_xyz, atol=0.05)


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


def test_the_right_view_shows_depth_to_its_right():
    """What lies 60 mm behind the centre is 80 of 400 px off the middle of a cube of 300 mm."""
    depth_mm, center_xyz = hand_frame(), np.array([0.0, 0.0, 500.0])
    joints_xyz = np.repeat([center_xyz + (0, 0, 60)], 21, axis=0)
    pose = HandPose(joints_xyz, None, None, np.array([319.5, 239.5, 500.0]))
    views = draw_views(depth_mm, pose, CAMERA, 150, DATASETS["HAND17"].config)
    for view, column in ((views[:, :400], 200), (views[:, 400:], 280)):
        assert abs(np.nonzero((view == FINGER_COLOURS[4]).all(-1))[1].mean() - column) < 1


def test_a_gif_keeps_few_pictures_in_memory(tmp_path):
    gif = Gif(tmp_path / "film.gif", 250)
    for _ in range(250):
        gif.add(np.zeros((48, 64, 3), np.uint8))
    assert 80 < len(gif.pictures) <= 100


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


def test_the_joints_of_an_unnamed_checkpoint_come_from_their_number_or_the_files_name(tmp_path):
    msra = save_network(tmp_path / "MSRA_default_subject0_final.pt")
    assert load_network(msra).dataset == "MSRA"
    assert load_network(msra, "HAND17").dataset == "HAND17"
    assert load_network(save_network(tmp_path / "any.pt", joints=16)).dataset == "ICVL"


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


def test_a_place_without_a_hand_gets_its_reason(estimator):
    depth_mm = hand_frame()
    near = np.full((480, 640), 500, np.uint16)
    near[200:260, 280:360] = 30
    patch = np.zeros((480, 640), np.uint16)
    patch[240:252, 320:332] = 500
    for pose, message in (
        (estimator(depth_mm, center_uvd=(20, 20, 500)), "fewer than 10 hand pixels"),
        (estimator(patch, center_uvd=(320, 240, 505)), "fewer than 10 hand pixels"),
        (estimator(depth_mm, center_uvd=(320, 240, 3)), "too near"),
        (estimator(near, bbox=(300, 220, 20, 20)), "too near"),
        (estimator(depth_mm, bbox=(0, 0, 20, 20)), "no depth"),
    ):
        assert pose.joints_xyz is None and message in pose.reason


@pytest.mark.parametrize(("distance_mm", "where"), [(2500, "too far"), (100, "too near")])
def test_a_frame_in_which_no_hand_can_be_costs_no_other_frame(distance_mm, where, estimator):
    empty = np.full((480, 640), distance_mm, np.uint16)
    found, none = estimator.batch([hand_frame(), empty])
    np.testing.assert_array_equal(found.joints_xyz, estimator(hand_frame()).joints_xyz)
    assert none.joints_xyz is None and where in none.reason


@pytest.mark.parametrize("depth_mm", [0, 0.001, 1])
def test_a_hint_nearer_than_any_hand_does_no_harm(depth_mm, estimator):
    pose = estimator(hand_frame(), near_uvd=(320, 240, depth_mm))
    np.testing.assert_allclose(pose.center_uvd, estimator(hand_frame()).center_uvd, atol=10)
    specks = hand_frame()
    specks[20:30, 20:30] = 1
    estimator(specks, bbox=(10, 10, 30, 30))


def test_a_second_crop_that_cannot_be_leaves_the_first(estimator, monkeypatch):
    monkeypatch.setattr(f"{ESTIMATOR}.middle_of_hand", lambda crop, uvd: np.array([320.0, 240.0, 1.0]))
    assert estimator(hand_frame()).reason is None


def test_a_mistyped_input_leaves_earlier_results(workplace, model, script):
    write_png(Path("frame.png"), hand_frame())
    options = ["--camera", CAMERA_TEXT, "--model", model, "--device", "cpu"]
    assert script("predict.py", "frame.png", *options).status == 0
    before = read_results()
    assert script("predict.py", "frane.png", *options).status == 1
    assert read_results() == before and len(list(Path("Result/predict/overlay").iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cube_mm": -3}, "cube must be above 0 and below 2000 mm, not -3"),
        ({"cube_mm": np.nan}, "not nan"),
        ({"turns": 1.5}, "turns must be 1 to 12, not 1.5"),
        ({"turns": "2"}, "turns must be 1 to 12, not '2'"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda, not 'tpu'"),
    ],
)
def test_what_an_estimator_cannot_be_is_said(options, message, model):
    with pytest.raises(UserError, match=message):
        HandPoseEstimator(model, CAMERA, **{"device": "cpu"} | options)


@pytest.mark.parametrize("hint", [{"center_uvd": (320, 240)}, {"near_uvd": [3]}, {"bbox": (200, 100, 140)}])
def test_hints_of_too_few_numbers_are_the_reason(hint, estimator):
    assert "must be " in estimator(hand_frame(), **hint).reason


@pytest.mark.parametrize("hand", ["right", "left"])
def test_hints_may_be_arrays(hand, model):
    estimator = HandPoseEstimator(model, CAMERA, hand=hand, device="cpu")
    depth_mm = hand_frame()
    depth_mm[240:] += depth_mm[240:] // 50  # not flat: what lies at the centre's depth counts as empty
    for name, hint in (("centers_uvd", (320, 240, 505)), ("bboxes", (200, 100, 240, 300))):
        pose, same = (estimator.batch([depth_mm], **{name: [h]})[0] for h in (hint, np.array(hint)))
        assert pose.reason is None
        np.testing.assert_array_equal(pose.joints_xyz, same.joints_xyz)
    pose = estimator.batch([depth_mm], np.array([[320, 240, 505]]))[0]
    assert pose.reason is None


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


def test_a_frame_of_another_size_than_the_cameras_is_refused(tmp_path, model):
    depth_mm = np.full((240, 320), 500, np.uint16)
    path = write_png(tmp_path / "small.png", depth_mm)
    with pytest.raises(UserError, match="320x240 px, the camera 640x480"):
        read_depth(path, PRESETS["D435"])
    with pytest.raises(ValueError, match="320x240 px, the camera 640x480"):
        HandPoseEstimator(model, "D435", device="cpu")(depth_mm)
    with pytest.raises(ValueError, match="480x640 px, the camera 640x480"):
        check_depth(np.full((640, 480), 500, np.uint16), size_px=(640, 480))


def test_presets_look_through_the_middle_of_their_pictures():
    for name, (camera, _, (width, height), *_) in PRESETS.items():
        assert abs(camera.u0 / width - 0.5) < 0.09 and abs(camera.v0 / height - 0.5) < 0.09, name


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


def test_chains_go_from_thumb_to_little_finger():
    for name, tips in {"NYU": [8, 6, 4, 2, 0], "MSRA": [20, 4, 8, 12, 16]}.items():
        assert [chain[-1] for chain in finger_chains(DATASETS[name])[:5]] == tips


def test_cameras_come_from_presets_and_numbers():
    assert parse_camera("kinectv2") is PRESETS["KinectV2"]
    assert parse_camera(CAMERA_TEXT) == DepthCamera(CAMERA)


def test_frames_come_in_the_order_of_their_numbers(tmp_path):
    for name in ("f10.png", "f9.png", "f1.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in list_frames(tmp_path)] == ["f1.png", "f9.png", "f10.png"]
    with pytest.raises(UserError, match="cannot be read"):
        list_frames(tmp_path / "notes.txt")


def test_checked_depth_is_not_copied_where_it_is_millimetres():
    depth = hand_frame()
    depth.setflags(write=False)
    assert check_depth(depth) is depth
    assert Frame(depth).rect.right == 640


def test_the_hand_is_the_surface_within_25_mm_of_the_predicted_joints():
    """Two strips: one behind the joint, one 45 mm beside it, which belongs to something else."""
    depth_mm = np.zeros((240, 320), np.uint16)
    depth_mm[110:130, 150:170] = 410
    depth_mm[110:130, 190:200] = 410
    camera = parse_camera("MSRA").camera
    crop = prepare_crop(Frame(depth_mm), np.array([165, 120, 400]), 125, camera)
    joint = np.array([[-5 / 151, 0, 0.08]])
    middle = middle_of_hand(crop, joint)
    np.testing.assert_allclose(middle, (159.5, 119.5, 410), atol=3)


def test_second_crop_goes_around_the_surface_near_the_first_prediction():
    depth_mm = np.zeros((240, 320), np.uint16)
    depth_mm[100:140, 150:190] = 410
    camera = parse_camera("MSRA").camera
    crop = prepare_crop(Frame(depth_mm), np.array([160, 115, 400]), 125, camera)
    middle = middle_of_hand(crop, np.array([[0.07, 0.03, 0.08]]))
    np.testing.assert_allclose(middle, (169.5, 119.5, 410), atol=2)


@pytest.mark.parametrize("margin_px", [0, 40, 80])
def test_a_box_with_a_margin_gives_the_place_that_the_box_alone_gives(margin_px, estimator):
    """A wall behind the hand comes into the box with its margin."""
    depth_mm, columns = hand_frame(), np.nonzero(hand_frame()[:330])[1]
    depth_mm[depth_mm == 0] = 900
    left, width = columns.min(), np.ptp(columns)
    box = (left - margin_px, 130 - margin_px, width + 2 * margin_px, 190 + 2 * margin_px)
    center_uvd = estimator(depth_mm, bbox=box).center_uvd
    np.testing.assert_allclose(center_uvd, (316, 235, 500), atol=14)


@pytest.mark.parametrize("hand", ["right", "left"])
def test_a_box_that_can_only_be_two_corners_is_named(hand, model):
    estimator, depth_mm = HandPoseEstimator(model, CAMERA, hand=hand, device="cpu"), hand_frame()
    for corners in ((250, 130, 400, 430), (300, 130, 500, 320)):
        left, top, right, bottom = corners
        reason = estimator(depth_mm, bbox=corners).reason
        assert f"for two corners give {left},{top},{right - left},{bottom - top}" in reason
    for box in ((200, 100, 240, 300), (-40, -40, 720, 560)):
        assert estimator(depth_mm, bbox=box).reason is None
    assert "above 0" in estimator(depth_mm, bbox=(200, 100, -240, 300)).reason


def test_an_answer_that_is_not_finite_is_none(model, monkeypatch):
    estimator = HandPoseEstimator(model, CAMERA, device="cpu")
    nothing = torch.full((1, 21, 3), torch.nan)
    output = StageOutput(torch.ones(1, 21, 32, 32), torch.ones(1, 21, 32, 32), nothing)
    monkeypatch.setattr(estimator, "_forward", lambda *_: output)
    pose = estimator(hand_frame(), center_uvd=CENTER)
    assert pose.joints_xyz is None and "not finite" in pose.reason


@pytest.mark.parametrize("hand", ["right", "left"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_hint_that_is_no_number_is_the_reason(hand, wrong, model):
    estimator = HandPoseEstimator(model, CAMERA, hand=hand, device="cpu")
    for place in ((wrong, 240, 600), (320, wrong, 600), (320, 240, wrong)):
        assert estimator(hand_frame(), center_uvd=place).reason.startswith("the centre (")
        assert estimator(hand_frame(), near_uvd=place).reason.startswith("the place before (")
