"""Rendered data sets in the official on-disk layouts of NYU, ICVL, MSRA and HAND17.

A frame depends on nothing but the seed, its split and its number: not on how many frames are rendered, nor on
how many processes render them.
"""

import io
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import scipy.io
import torch
from tqdm import tqdm

from datasets import ICVLDataset, MSRADataset
from frames.transforms import xyz2uvd
from rendering.hand import joints_xyz
from rendering.scene import SCENE_COLUMNS, draw_scenes, render_scene
from rendering.sensor import SENSORS, Sensor, measure
from utils import UserError, start_worker

SPLITS = ("train", "test")
CHUNK = 25  # frames that one task renders
EVERY_SENSOR = "every"
# Training and test frames, so that no subject or sequence is empty.
FEWEST = {"NYU": (1, 1), "ICVL": (1, 2), "MSRA": (8, 1), "HAND17": (1, 1)}
# Three times as fast as OpenCV's defaults at this level, and smaller.
PNG_OPTIONS = [
    *(cv2.IMWRITE_PNG_COMPRESSION, 1),
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE),
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP),
]
MAT_HEADER = b"MATLAB 5.0 MAT-file, synthetic hands".ljust(116)  # scipy would write the time of day

# Which of the 21 joints of hand.py are a finger's, from the base to the tip.
NAMES = ("thumb", "index", "middle", "ring", "little")
FINGERS = {name: range(1 + 4 * k, 5 + 4 * k) for k, name in enumerate(NAMES)}
MSRA_ORDER = [0, *(j for name in (*NAMES[1:], "thumb") for j in FINGERS[name])]
HAND17_ORDER = [0, *(1 + 4 * k for k in range(5)), *(j for chain in FINGERS.values() for j in chain[1:])]


class Rendered(NamedTuple):
    """A frame: what the sensor measured, which pixels are the hand's, joints in the camera frame, centre."""

    depth_mm: np.ndarray  # [height, width] float32, sensor.missing_mm where nothing was measured
    hand: np.ndarray  # [height, width] bool, those of its pixels whose depth was measured within 30 mm
    joints_xyz: np.ndarray  # [21, 3] mm
    center_uvd: np.ndarray  # [3] mean of the hand's pixels in the exact picture; zeros where it is hidden
    rect: tuple  # left, top, width, height of these pixels


def sensor_of(layout: str, sensor_name: str | None, number: int) -> Sensor:
    """Return what measures frame `number` of a layout: SENSORS[sensor_name], but in the layout's pictures.

    None: the layout's own; EVERY_SENSOR: all of SENSORS in turn, CHUNK frames each. Widths given in pixels
    stay as many pixels.
    """
    own, names = SENSORS[layout], [*SENSORS]
    if sensor_name == EVERY_SENSOR:
        sensor_name = names[number // CHUNK % len(names)]
    pictures = {name: getattr(own, name) for name in ("camera", "size_px", "unit_mm", "missing_mm", "left")}
    return SENSORS[sensor_name or layout]._replace(**pictures)


def render_frames(
    layout: str, seed: int, split: str, numbers: range, sensor_name: str | None = None
) -> list[Rendered]:
    """Render frames `numbers` (from 0, of one CHUNK) of a split, all by `sensor_of` the first of them."""
    sensor = sensor_of(layout, sensor_name, numbers[0])
    generators = [np.random.default_rng([seed, SPLITS.index(split), number]) for number in numbers]
    uniform = torch.from_numpy(np.stack([rng.random(SCENE_COLUMNS, np.float32) for rng in generators]))
    scenes = draw_scenes(uniform, sensor)
    exact_mm, hands = render_scene(scenes, torch.tensor(sensor.camera), sensor.size_px)
    joints = joints_xyz(scenes.hands).numpy().astype(np.float64)
    frames = []
    for k, rng in enumerate(generators):
        noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
        depth_mm = _measured(exact_mm[k], sensor, noise).numpy()
        frames.append(_rendered(depth_mm, hands[k].numpy(), exact_mm[k].numpy(), joints[k]))
    return frames


def _measured(exact_mm: torch.Tensor, sensor: Sensor, noise: torch.Generator) -> torch.Tensor:
    """Measure the part of a picture [height, width] that holds anything; the rest stays missing."""
    measured = torch.full_like(exact_mm, sensor.missing_mm)
    left, top, width, height = cv2.boundingRect((exact_mm < sensor.far_mm).numpy().view(np.uint8))
    if width:
        part = slice(top, top + height), slice(left, left + width)
        measured[part] = measure(exact_mm[part][None], sensor, sensor.camera.fx, noise)[0]
    return measured


def _rendered(depth_mm: np.ndarray, hand: np.ndarray, exact_mm: np.ndarray, joints: np.ndarray) -> Rendered:
    """Return the Rendered of a hand that the exact picture shows at `hand`; hidden, its centre is zeros."""
    v, u = np.nonzero(hand)
    center = np.zeros(3)
    if len(v):
        center = np.array([u.mean(), v.mean(), exact_mm[hand].mean(dtype=np.float64)])
    measured = hand & (np.abs(depth_mm - exact_mm) < 30)
    return Rendered(depth_mm, measured, joints, center, cv2.boundingRect(hand.view(np.uint8)))


def frame_path(layout: str, split: str, number: int) -> str:
    """Return where a frame (number from 0) lies in the data set's folder.

    ICVL: test frames go to both sequences in turn until the first is full. MSRA: test frames are subject 0's,
    training frames go to subjects 1..8 in turn, and of each to the gesture folders in turn.
    """
    if layout == "NYU":
        return f"{split}/depth_1_{number + 1:07d}.png"
    if layout == "HAND17":
        return f"{'training' if split == 'train' else 'frame'}/images/image_D{number + 1:08d}.png"
    if layout == "ICVL":
        if split == "train":
            return f"Training/Depth/201403121135/image_{number:04d}.png"
        first = ICVLDataset.first_sequence
        sequence, place = (1 + number % 2, number // 2) if number < 2 * first else (2, number - first)
        return f"Testing/Depth/test_seq_{sequence}/image_{place:04d}.png"
    subject, rest = (1 + number % 8, number // 8) if split == "train" else (0, number)
    gestures = MSRADataset.gestures
    gesture, place = gestures[rest % len(gestures)], rest // len(gestures)
    return f"P{subject}/{gesture}/{place:06d}_depth.bin"


def encode(layout: str, frame: Rendered) -> bytes:
    """Return a frame as the data set's files hold it."""
    if layout == "MSRA":
        return _msra_bytes(np.where(frame.hand, frame.depth_mm, 0).astype("<f4"))
    picture = np.rint(frame.depth_mm).astype("<u2")
    if layout == "NYU":  # depth = 256 * green + blue; OpenCV's order is blue, green, red
        low_high = picture.view(np.uint8).reshape(*picture.shape, 2)
        picture = cv2.merge([*cv2.split(low_high), np.zeros_like(low_high[..., 0])])
    return cv2.imencode(".png", picture, PNG_OPTIONS)[1].tobytes()


def _msra_bytes(depth_mm: np.ndarray) -> bytes:
    left, top, width, height = cv2.boundingRect((depth_mm != 0).view(np.uint8))
    right, bottom = left + max(width, 1), top + max(height, 1)  # at least a pixel
    header = np.array([*depth_mm.shape[::-1], left, top, right, bottom], "<i4")
    return header.tobytes() + depth_mm[top:bottom, left:right].tobytes()


def nyu_joints(joints: np.ndarray) -> np.ndarray:
    """Return NYU's 36 joints [N, 36, 3] of our 21 [N, 21, 3], fingers from the little one.

    A finger has its tip, end joint, a point of the middle bone, middle joint, a point of the first bone, and
    base; then come both sides of the wrist (ulnar, radial), the palm's middle, the points halfway between it
    and each of these, and the wrist.
    """
    slots = []
    for name in ("little", "ring", "middle", "index", "thumb"):
        base, middle, end, tip = (joints[:, j] for j in FINGERS[name])
        slots += [tip, end, (end + middle) / 2, middle, (middle + base) / 2, base]
    wrist = joints[:, 0]
    across = joints[:, FINGERS["index"][0]] - joints[:, FINGERS["little"][0]]
    across = 17 * across / np.linalg.norm(across, axis=1, keepdims=True)
    palm = (joints[:, FINGERS["middle"][0]] + joints[:, FINGERS["ring"][0]] + wrist) / 3
    ulnar, radial = wrist - across, wrist + across
    slots += [ulnar, radial, palm, (palm + ulnar) / 2, (palm + radial) / 2, wrist]
    return np.stack(slots, 1)


def icvl_joints(joints: np.ndarray) -> np.ndarray:
    """Return ICVL's joints [N, 16, 3] of our 21: the palm's middle, then, from the thumb, the bones' middles.

    So much the real labels' distances say (29 and 18 mm along an index finger whose bones measure 40, 22 and
    16).
    """
    palm = (joints[:, 0] + joints[:, FINGERS["middle"][0]]) / 2
    bones = [(joints[:, j] + joints[:, j + 1]) / 2 for chain in FINGERS.values() for j in chain[:3]]
    return np.stack([palm, *bones], 1)


def write_labels(
    layout: str, folder: Path, split: str, joints: np.ndarray, centers: np.ndarray, rects: list
) -> None:
    """Write the label, centre and list files of a split: joints [N, 21, 3] mm, centers [N, 3] uvd."""
    camera = SENSORS[layout].camera
    paths = [frame_path(layout, split, number) for number in range(len(joints))]
    if layout == "NYU":
        _write_mat(folder / split / "joint_data.mat", nyu_joints(joints), camera)
        (folder / f"nyu_center_{split}.txt").write_text(_text(centers))
    elif layout == "HAND17":
        _write_hand17(folder, split, paths, joints[:, HAND17_ORDER], rects)
        (folder / f"hands17_center_{split}.txt").write_text(_text(centers))
    elif layout == "ICVL":
        _write_icvl(folder, split, paths, xyz2uvd(icvl_joints(joints), camera), centers)
    else:
        _write_msra(folder, paths, joints[:, MSRA_ORDER] * (1, -1, -1))


def _text(frames: np.ndarray, names: list | None = None, number: str = " %.3f") -> str:
    """Return a line of numbers for each of [N, ...] frames, behind its name where there are names."""
    rows = np.reshape(frames, (len(frames), -1)).tolist()
    lines = ["".join(number % value for value in row) for row in rows]
    return "".join(f"{name}{line}\n".lstrip() for name, line in zip(names or repeat(""), lines))


def _write_mat(path: Path, joints: np.ndarray, camera: tuple) -> None:
    """Write joint_data.mat: all three cameras hold the first one's labels; in xyz, as in NYU's, y is up."""
    uvd = xyz2uvd(joints, camera)
    arrays = {"joint_uvd": np.stack([uvd] * 3), "joint_xyz": np.stack([joints * (1, -1, 1)] * 3)}
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, arrays)
    path.write_bytes(MAT_HEADER + buffer.getvalue()[len(MAT_HEADER) :])


def _write_hand17(folder: Path, split: str, paths: list, joints: np.ndarray, rects: list) -> None:
    names = [Path(path).name for path in paths]
    annotation = _text(joints, names, "\t%.4f")
    if split == "train":
        (folder / "training" / "Training_Annotation.txt").write_text(annotation)
        return
    (folder / "frame" / "test_annotation.txt").write_text(annotation)  # the official test has no labels
    (folder / "frame" / "BoundingBox.txt").write_text(_text(rects, names, "\t%d"))


def _write_icvl(folder: Path, split: str, paths: list, joints_uvd: np.ndarray, centers: np.ndarray) -> None:
    names = ["/".join(Path(path).parts[-2:]) for path in paths]
    if split == "train":
        (folder / "Training" / "labels.txt").write_text(_text(joints_uvd, names))
        (folder / "icvl_train_list.txt").write_text("\n".join(names))
        (folder / "icvl_center_train.txt").write_text(_text(centers))
        return
    places = np.array([int(Path(name).stem.removeprefix("image_")) for name in names])
    in_second = np.array([name.startswith("test_seq_2/") for name in names])
    for sequence, chosen in enumerate((~in_second, in_second), start=1):
        own = [name for name, is_own in zip(names, chosen) if is_own]
        (folder / "Testing" / f"test_seq_{sequence}.txt").write_text(_text(joints_uvd[chosen], own))
    # The second sequence's centres begin at a line of their own, however short the first one is.
    first = ICVLDataset.first_sequence
    rows = np.zeros((first + in_second.sum(), 3))
    rows[places + first * in_second] = centers
    (folder / "icvl_center_test.txt").write_text(_text(rows))


def _write_msra(folder: Path, paths: list, joints: np.ndarray) -> None:
    frames = {}
    for path, row in zip(paths, joints):
        frames.setdefault(Path(path).parent, []).append(row)
    for parent, rows in frames.items():
        (folder / parent / "joint.txt").write_text(f"{len(rows)}\n{_text(rows)}")


def write_chunk(
    layout: str, seed: int, folder: Path, sensor_name: str | None, split: str, numbers: range
) -> list[tuple]:
    """Render and write frames; return their (joints, centre, rect)."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    labels = []
    for number, frame in zip(numbers, render_frames(layout, seed, split, numbers, sensor_name)):
        path = folder / frame_path(layout, split, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(layout, frame))
        labels.append((frame.joints_xyz, frame.center_uvd, frame.rect))
    return labels


@contextmanager
def process_map(processes: int):
    """Yield a function like `map` that works in so many processes, or in this one for 1."""
    if processes == 1:
        yield map
        return
    # glibc would give the memory of every large tensor back to the system and fetch it again: a quarter of
    # the time.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 30))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 31))
    # Forking a process whose torch has started threads may hang: start fresh ones.
    with ProcessPoolExecutor(processes, get_context("spawn"), start_worker) as pool:
        try:
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)


def write_frames(
    layout: str, seed: int, counts: dict, folder: Path, processes: int, sensor_name: str | None = None
) -> None:
    """Render and write all frames and labels."""
    tasks = [
        (split, range(start, min(start + CHUNK, counts[split])))
        for split in SPLITS
        for start in range(0, counts[split], CHUNK)
    ]
    write, labels = partial(write_chunk, layout, seed, folder, sensor_name), {split: [] for split in SPLITS}
    with (
        tqdm(total=sum(counts.values()), desc=layout, unit="frame", mininterval=0.5) as bar,
        process_map(min(processes, len(tasks))) as mapped,
    ):
        for (split, _), part in zip(tasks, mapped(write, *zip(*tasks))):
            labels[split] += part
            bar.update(len(part))
    for split in SPLITS:
        joints, centers, rects = zip(*labels[split])
        write_labels(layout, folder, split, np.stack(joints), np.stack(centers), rects)


def write_dataset(
    layout: str, counts: dict, seed: int, out: Path, processes: int, sensor_name: str | None = None
) -> None:
    """Write a whole data set to `out`, which must not exist; measured as `sensor_of` says.

    It is written to `out`.partial and renamed when complete; on failure nothing stays. Raises UserError.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists: give --out the name of a new folder")
    unfinished = out.with_name(out.name + ".partial")
    try:
        unfinished.mkdir(parents=True)
        try:
            write_frames(layout, seed, counts, unfinished, processes, sensor_name)
            unfinished.rename(out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except FileExistsError:
        raise UserError(
            f"{unfinished} exists: another run writes it, or one was killed; then remove it"
        ) from None
    except BrokenProcessPool:
        raise UserError(f"cannot write {out}: a rendering process was killed (out of memory?)") from None
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
