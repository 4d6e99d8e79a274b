"""What predict.py writes stays, whatever ends the run, and what others wrote stays as well."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import REPO, hidden_files
from hands import CAMERA, CAMERA_TEXT, hand_frame, read_results, write_png
from processes import start_script

from datasets import DATASETS
from frames.cameras import DepthCamera, parse_camera
from frames.drawing import FINGER_COLOURS
from frames.transforms import Camera
from predict import HandPose
from prediction.output import Gif, Mp4, PredictionWriter, draw_views, finger_chains
from utils import UserError

OPTIONS = ["--camera", CAMERA_TEXT, "--device", "cpu"]


def test_odd_file_names_lose_nothing(workplace, model, script):
    names = ["a_1.png", os.fsdecode(b"h\xe4nde_2.png"), "手" * 80 + "_3.png", "cm1²3.png", "new\nline_4.png"]
    for name in names:
        write_png(Path("recording/x.png"), hand_frame()).rename(Path("recording", name))
    Path("recording/._a_1.png").write_bytes(b"\0\5\26\7Mac OS X")
    done = script("predict.py", "recording", *OPTIONS, "--model", model)
    assert done.status == 0, done.err
    frames = read_results()[1]
    assert len(frames) == 5 and "recording/h\\xe4nde_2.png" in [frame["frame"] for frame in frames]
    assert all(Path("Result/predict", *frame["pictures"]).exists() for frame in frames)
    assert len(list(csv.DictReader(Path("Result/predict/predictions.csv").open(newline="")))) == 5 * 21


def test_a_folder_whose_name_is_not_utf8_gets_results_without_a_film(workplace, model, script):
    folder, out = (os.fsdecode(name) for name in (b"h\xe4nde", b"f\xfcr"))
    for number in (1, 2):
        write_png(Path("recording", f"{number}.png"), hand_frame())
    Path("recording").rename(folder)
    done = script("predict.py", folder, *OPTIONS, "--model", model, "--out", out)
    assert done.status == 1 and "not UTF-8: no film can be written, give --video none" in done.err
    done = script("predict.py", folder, *OPTIONS, "--model", model, "--out", out, "--video", "none")
    assert done.status == 0 and len(list(Path(out, "overlay").iterdir())) == 2


def long_sequence(folder, out, model, count=400):
    """Make a long sequence; return the words that tell predict.py of it."""
    write_png(folder / "0.png", hand_frame())
    for number in range(1, count):
        (folder / f"{number}.png").hardlink_to(folder / "0.png")
    return [folder, *OPTIONS, "--model", model, "--out", out]


def wait_for_frames(out, is_running):
    """Wait until some frames are written."""
    results = out / "predictions.jsonl"
    while not results.exists() or results.read_bytes().count(b"\n") < 4:
        assert is_running()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_what_was_written_stays_however_the_run_ends(number, tmp_path, model):
    words = long_sequence(tmp_path / "in", tmp_path / "out", model)
    process = start_script("predict.py", *words, cwd=tmp_path, output=["printed.txt", "error.txt"])
    wait_for_frames(tmp_path / "out", process.is_alive)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode and "Traceback" not in (tmp_path / "error.txt").read_text()
    frames = read_results(tmp_path / "out")[1]
    assert 3 <= len(frames) < 400 and all(frame["joints"] for frame in frames)
    assert hidden_files(tmp_path / "out") == [] or number == signal.SIGKILL
    if number != signal.SIGKILL:
        assert cv2.VideoCapture(str(tmp_path / "out/film.mp4")).read()[0]


def test_a_closed_pipe_ends_nothing(tmp_path, model):
    folder, out = tmp_path / "in", tmp_path / "out"
    words = long_sequence(folder, out, model, count=8)
    (folder / "a.npy").write_bytes(b"damaged")  # a warning on a closed stream, with the frames still to come
    command = list(map(str, [sys.executable, REPO / "predict.py", *words]))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_frames(out, lambda: process.poll() is None)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=60) == 3
    assert len(read_results(out)[1]) == 9


@pytest.mark.slow
def test_a_full_disk_leaves_whole_lines(tmp_path, model):
    out, error = tmp_path / "out", tmp_path / "error.txt"
    words = [*long_sequence(tmp_path / "in", out, model, count=8), "--no-pictures"]
    process = start_script("predict.py", *words, cwd=tmp_path, output=[os.devnull, error], limit_bytes=9000)
    process.join(100)
    assert process.exitcode == 1 and error.read_text().startswith(f"error: cannot write {out}: ")
    assert (out / "predictions.jsonl").read_bytes().endswith(b"}\n")
    assert 2 <= len(read_results(out)[1]) < 8
    assert (out / "predictions.csv").read_bytes().endswith(b"\r\n")


def test_files_that_no_earlier_run_wrote_stay(workplace, model, script):
    write_png(Path("recording/1.png"), hand_frame())
    options = [*OPTIONS, "--model", model, "--out", "out"]
    mine = [Path("out/overlay/000000_mine.png"), Path("out/views/000001_x.png"), Path("out/film.gif")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    for _ in range(2):
        assert script("predict.py", "recording", *options).status == 0
    assert [path.read_bytes() for path in mine] == [b"mine"] * 3
    Path("out/predictions.jsonl").write_text('{"frames": 3}\n')
    done = script("predict.py", "recording", *options)
    assert (
        done.status == 1 and "was not written by an earlier run: give another folder with --out" in done.err
    )
    for name, more in (("overlay", []), ("views", ["--plot3d"])):
        taken = Path(f"new_{name}/{name}/000000_1.png")
        taken.parent.mkdir(parents=True)
        taken.write_bytes(b"mine")
        done = script("predict.py", "recording", *options[:-1], f"new_{name}", *more)
        assert done.status == 1 and f"{taken} was not written by an earlier run" in done.err
        assert taken.read_bytes() == b"mine" and not Path(f"new_{name}/predictions.jsonl").exists()
    write_png(Path("other/overlay/1.png"), hand_frame())
    done = script("predict.py", "other/overlay", *OPTIONS, "--model", model, "--out", "other")
    assert done.status == 1 and "choose another folder" in done.err


def test_a_forged_list_removes_nothing_else(workplace, model, script):
    write_png(Path("1.png"), hand_frame())
    kept = [Path("keep.txt"), Path("out/sub/keep.png")]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    names = ["../keep.txt", "sub/keep.png", str(Path("keep.txt").resolve()), "overlay/../sub/keep.png", 3]
    lines = [{"format": "hand pose", "film": "../keep.txt"}, {"pictures": names}, {"pictures": 5}, 7]
    Path("out/predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    assert script("predict.py", "1.png", *OPTIONS, "--model", model, "--out", "out").status == 0
    assert all(path.exists() for path in kept)


def test_a_film_that_the_disk_cuts_off_is_told(tmp_path):
    film = Mp4(tmp_path / "film.mp4", 30)
    for shade in range(30):
        film.add(np.full((480, 640, 3), 8 * shade, np.uint8))
    whole = film.writer

    def release():
        whole.release()
        os.truncate(film.path, os.path.getsize(film.path) // 2)

    film.writer = SimpleNamespace(release=release)
    with pytest.raises(OSError, match="film.mp4 is not whole: the disk may be full"):
        film.close()
    assert not (tmp_path / "film.mp4").exists()


def test_a_gif_that_the_disk_cuts_off_leaves_nothing(tmp_path, monkeypatch):
    film = Gif(tmp_path / "film.gif", 2)
    film.add(np.zeros((48, 64, 3), np.uint8))

    def save(image, path, **options):
        path.write_bytes(b"GIF89a")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", save)
    with pytest.raises(UserError, match="cannot write .*film.gif: No space left"):
        film.close()
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_a_film_are_as_large_as_its_first(tmp_path):
    film = Gif(tmp_path / "film.gif", 3)
    for shape in ((48, 64, 3), (640, 1, 3), (1, 640, 3)):
        film.add(np.zeros(shape, np.uint8))
    assert {picture.shape for picture in film.pictures} == {(240, 320, 3)}


def test_a_picture_that_no_mp4_can_show_is_named(tmp_path):
    film = Mp4(tmp_path / "film.mp4", 2)
    with pytest.raises(UserError, match="writes no MP4 of 1x1 px: use --video gif or none"):
        film.add(np.zeros((1, 1, 3), np.uint8))
    film.close()  # has nothing to say


def test_a_folder_takes_one_run_at_a_time(workplace, model, estimator, script):
    write_png(Path("frame.png"), hand_frame())
    with PredictionWriter("out", estimator, parse_camera(CAMERA_TEXT), [[Path("frame.png")]]):
        done = script("predict.py", "frame.png", *OPTIONS, "--model", model, "--out", "out")
    assert done.status == 1 and done.err.count("\n") == 1
    assert "another run writes to out: wait, or give another --out" in done.err
    assert script("predict.py", "frame.png", *OPTIONS, "--model", model, "--out", "out").status == 0


def test_packed_frames_are_read_with_an_earlier_runs_camera(workplace, model, script):
    high, low = divmod(hand_frame(), 256)
    write_png(Path("frame.png"), np.dstack([low, high, 0 * low]).astype(np.uint8))
    options = ["--model", model, "--device", "cpu", "--out"]
    assert script("predict.py", "frame.png", "--camera", "NYU", *options, "out").status == 0
    done = script("predict.py", "frame.png", "--camera", "out/predictions.jsonl", *options, "again")
    assert done.status == 0, done.err
    assert Path("again/predictions.csv").read_text() == Path("out/predictions.csv").read_text()


def test_a_camera_files_unit_and_doubts_reach_the_script(workplace, model, script):
    write_png(Path("frame.png"), (hand_frame() * 8).astype(np.uint16))
    Path("camera.json").write_text(
        '{"fx": 475, "fy": 475, "ppx": 100, "ppy": 239.5, "depth_scale": 0.000125}'
    )
    done = script("predict.py", "frame.png", "--camera", "camera.json", "--model", model, "--device", "cpu")
    assert done.status == 0 and read_results()[0]["depth_unit_mm"] == 0.125
    assert done.err.count("far from the middle") == 1
    results = Path("head.jsonl")
    results.write_text(Path("Result/predict/predictions.jsonl").read_text())
    assert parse_camera(results) == DepthCamera(Camera(475, 475, 100, 239.5), 0.125)


def test_without_pictures_the_results_are_the_same(workplace, model, script):
    for number in (1, 2):
        write_png(Path(f"recording/{number}.png"), hand_frame(column=300 + number))
    for option in ("--pictures", "--no-pictures"):
        assert (
            script("predict.py", "recording", *OPTIONS, "--model", model, option, "--out", option[2:]).status
            == 0
        )
    with_pictures, without = read_results("pictures")[1], read_results("no-pictures")[1]
    assert [frame["joints"] for frame in with_pictures] == [frame["joints"] for frame in without]
    assert sorted(path.name for path in Path("no-pictures").iterdir()) == [
        "predictions.csv",
        "predictions.jsonl",
    ]


def test_a_script_whose_output_nobody_reads_ends_as_sigpipe_would_end_it():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import utils; sys.exit(utils.run(lambda: print('x')))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(REPO)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""


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


def test_chains_go_from_thumb_to_little_finger():
    for name, tips in {"NYU": [8, 6, 4, 2, 0], "MSRA": [20, 4, 8, 12, 16]}.items():
        assert [chain[-1] for chain in finger_chains(DATASETS[name])[:5]] == tips
