"""Train the network that tells hands from what is no hand (handfinder.HandClassifier) on rendered frames.

    python -m tools.train_handfinder
    python -m tools.train_handfinder --init Model/handfinder.pt --frames 3000 --epochs 1 --seed 1

Model/handfinder.pt was made by eight runs: the first of these; on later rendered hands the second, twice;
then, each with --init Model/handfinder.pt, --frames 4000 --epochs 2 --seed 2, --frames 6000 --epochs 3 with
--seed 3 and 4, and on the hands of today --frames 8000 --epochs 6 with --seed 5 and 6. From --seed 4 on hands
were made larger or smaller (SIZE_FACTORS).

Frames of every sensor are rendered with an arm and mostly with a body, half of them with tables, bars, boxes
and specks; some are cut to a box around the hand, in some a body without a hand comes as near as hands do. Of
each the classifier learns places like those that it will have to score, and some around the hand.
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from engine.checkpoints import load_checkpoint, save_checkpoint
from frames.handfinder import (
    CROP_PX,
    REACH_MM,
    WEIGHTS,
    HandClassifier,
    candidates,
    coarse_picture,
    crops_around,
)
from frames.transforms import Camera, Frame, uvd2xyz
from rendering.anatomy import GESTURES
from rendering.hand import move_to
from rendering.layouts import process_map
from rendering.poses import Noise, draw_hands, gesture_angles, limits_rad
from rendering.scene import SCENE_COLUMNS, add_background, render_scene
from rendering.sensor import SENSORS, measure
from utils import HelpFormatter, UserError, run, usable_cores

PLACES, NEAR_PLACES = 12, 5  # of a frame: surfaces, and random places around the hand
HAND_MM, NO_HAND_MM = 60.0, 85.0  # a place nearer to the middle than this is a hand, one farther is not
OFFSET_MM = 150.0  # so far away the classifier has to say where the middle is
LEAST_SEEN = 0.35  # of a hand's surface, for a frame to be used
SAME_DEPTH_MM = 30.0
HANDLESS = 0.15  # share of frames without hand and arm, whose bodies come nearer by up to NEARER_MM
NEARER_MM = 450.0
CLOSED = ("fist", "fist, thumb on index", "A", "C", "E", "M", "N", "O", "T")
CLOSED_SHARE, CUT_OUT = 0.35, 0.2  # shares of frames
CUT_MM = (-5.0, 70.0)  # from the hand to where a frame is cut
SIZE_FACTORS = 0.9, 1.25  # of all depths: the same picture, of a larger hand (few rendered ones are broad)
BEHIND_CAMERA_MM, NOWHERE_MM = -1e4, 1e6
BATCH, TASK_FRAMES, RENDERED_AT_ONCE = 512, 200, 8


def render_frames(name, seed, count):
    """Yield (depth [H, W] mm, middle of the hand's surface uvd, Camera) as the sensor `name` sees hands.

    The middle is None in a share of frames, from which hand and arm are left out. Pictures of 640 x 480
    are rendered half as large. All are made larger or smaller (SIZE_FACTORS). Hands that can hardly be seen
    are left out.
    """
    sensor, generator, rng = SENSORS[name], torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    shrink = sensor.size_px[0] // 320
    camera = Camera(*(number / shrink for number in sensor.camera))
    size_px = tuple(size // shrink for size in sensor.size_px)
    for start in range(0, count, RENDERED_AT_ONCE):
        scenes = draw_finder_scenes(sensor, camera, size_px, generator, min(RENDERED_AT_ONCE, count - start))
        exact_mm, hands = render_scene(scenes, torch.tensor(camera), size_px)
        measured_mm = measure(exact_mm, sensor, camera.fx, generator)
        sizes = rng.uniform(*SIZE_FACTORS, (len(exact_mm), 1, 1)).astype(np.float32)
        for depth, exact, hand in zip(measured_mm.numpy() * sizes, exact_mm.numpy() * sizes, hands.numpy()):
            if rng.random() < 0.5:
                depth = add_clutter(depth, rng, camera)
            seen = np.abs(depth[hand] - exact[hand]) < SAME_DEPTH_MM
            if not hand.any():
                yield depth, None, camera
            elif seen.mean() > LEAST_SEEN:
                rows, columns = np.nonzero(hand)
                middle_uvd = np.array([columns.mean(), rows.mean(), exact[hand].mean()])
                if rng.random() < CUT_OUT:
                    margins_px = rng.uniform(*CUT_MM, 4) * camera.fx / middle_uvd[2]
                    depth = cut_out(depth, rows, columns, margins_px)
                yield depth, middle_uvd, camera


def draw_finder_scenes(sensor, camera, size_px, generator, count):
    """Draw scenes with hands anywhere in the picture, half of them seen from any side, or none."""
    uniform = torch.rand(count, SCENE_COLUMNS, generator=generator).clamp(1e-6, 1 - 1e-6)
    noise = Noise(uniform)
    hands = draw_hands(noise, sensor.left)
    rotation = torch.randn(count, 4, generator=generator)
    rotation = rotation / rotation.norm(dim=1, keepdim=True)
    from_anywhere = noise.uniform(1) < 0.5
    hands = hands._replace(rotation=torch.where(from_anywhere, rotation, hands.rotation))
    hands = close_some(hands, noise)
    near, far = sensor.hand_mm
    u, v, z = noise.uniform(3).unbind(1)
    z = near + (far - near) * z
    u, v = size_px[0] * (0.15 + 0.7 * u), size_px[1] * (0.15 + 0.7 * v)
    places = torch.stack([(u - camera.u0) * z / camera.fx, (v - camera.v0) * z / camera.fy, z], 1)
    scenes = add_background(move_to(hands, places), noise, sensor._replace(body=max(sensor.body, 0.7)))
    without = noise.uniform(1) < HANDLESS
    wrist_mm = torch.where(without, BEHIND_CAMERA_MM, scenes.hands.wrist_mm)
    nearer_mm = NEARER_MM * without * noise.uniform(1)
    for part, depths in zip(scenes.behind, ([2], [2, 6], [2, 5, 8])):  # of spheres, cones, triangles
        part[..., depths] -= nearer_mm[..., None]
    return scenes._replace(hands=scenes.hands._replace(wrist_mm=wrist_mm))


def close_some(hands, noise):
    """Return Hands of which a share make a gesture of CLOSED, more or less."""
    (low, high), table = limits_rad(hands.angles), gesture_angles(hands.angles)
    table = table[[list(GESTURES).index(name) for name in CLOSED]]
    closed = table[(len(table) * noise.uniform(1)[:, 0]).long()] + 0.08 * noise.normal(22)
    closed = torch.where(torch.arange(22) < 20, closed.clamp(low, high), hands.angles)  # not the wrist
    return hands._replace(angles=torch.where(noise.uniform(1) < CLOSED_SHARE, closed, hands.angles))


def cut_out(depth_mm, rows, columns, margins_px):
    """Return a frame [H, W] of which nothing is left but a box around pixels, larger by margins [4]."""
    left, top = (max(0, int(k.min() - margin)) for k, margin in zip((columns, rows), margins_px))
    right, bottom = (int(k.max() + margin) + 1 for k, margin in zip((columns, rows), margins_px[2:]))
    cut = np.zeros_like(depth_mm)
    cut[top:bottom, left:right] = depth_mm[top:bottom, left:right]
    return cut


def add_clutter(depth_mm, rng, camera):
    """Return a frame [H, W] with a table, bars, discs, boxes or specks in it, each in a share of frames."""
    height, width = depth_mm.shape
    depth_mm = np.where(depth_mm == 0, np.float32(np.inf), depth_mm)
    if rng.random() < 0.25:
        top, far_mm = rng.integers(height // 2, height), rng.uniform(500, 1100)
        near_mm = max(250, far_mm - rng.uniform(100, 500))
        table = np.linspace(far_mm, near_mm, height - top)[:, None]
        depth_mm[top:] = np.minimum(depth_mm[top:], table + rng.normal(0, 1.5, (height - top, width)))
    rows, columns = np.mgrid[:height, :width]
    for _ in range(rng.integers(4) * (rng.random() < 0.4)):
        distance_mm = rng.uniform(300, 1000)
        thing = draw_thing(rng, (height, width), camera.fx / distance_mm)
        slope = rng.normal(0, 0.6, 2)
        surface = distance_mm + slope[0] * (columns - width / 2) + slope[1] * (rows - height / 2)
        depth_mm[thing] = np.minimum(depth_mm, np.maximum(surface, 250))[thing]
    depth_mm[np.isinf(depth_mm)] = 0
    for _ in range(rng.integers(30) * (rng.random() < 0.3)):
        speck = rng.integers((0, 0), (width, height)).tolist()
        cv2.circle(depth_mm, speck, int(rng.integers(3)), rng.uniform(200, 900), -1)
    return depth_mm


def draw_thing(rng, shape, px_per_mm):
    """Return the mask [H, W] of a bar, an ellipse or a box somewhere in a picture."""
    mask, size = np.zeros(shape, np.uint8), shape[::-1]
    start, end = (rng.uniform((0, 0), size).astype(int).tolist() for _ in range(2))
    angle = float(rng.uniform(0, 180))
    kind = rng.integers(3)
    if kind == 0:
        cv2.line(mask, start, end, 1, max(1, int(rng.uniform(15, 90) * px_per_mm)))
    elif kind == 1:
        axes = (rng.uniform(20, 120, 2) * px_per_mm).astype(int).tolist()
        cv2.ellipse(mask, start, axes, angle, 0, 360, 1, -1)
    else:
        edges = (rng.uniform(30, 250, 2) * px_per_mm).tolist()
        cv2.fillPoly(mask, [cv2.boxPoints((start, edges, angle)).astype(int)], 1)
    return mask > 0


def collect(task):
    """Return the crops of a task's frames, int8 [N, 40, 40], and the way from each to the hand, [N, 3] mm."""
    name, seed, count = task
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    rng = np.random.default_rng(seed + 1)
    crops, ways_mm = [np.empty((0, CROP_PX, CROP_PX), np.int8)], [np.empty((0, 3), np.float32)]
    for depth_mm, middle_uvd, camera in render_frames(name, seed, count):
        picture, middle_xyz = coarse_picture(Frame(depth_mm), camera), np.full(3, NOWHERE_MM)
        places = rng.permutation(candidates(picture))[:PLACES]
        if middle_uvd is not None:
            middle_xyz = uvd2xyz(middle_uvd, camera)
            around = rng.normal(0, 1, (NEAR_PLACES, 3)) * rng.uniform(5, 60, (NEAR_PLACES, 1))
            places = np.concatenate([places, middle_xyz + around])
        crops.append(np.round(crops_around(picture, places) * 127).astype(np.int8))
        ways_mm.append((middle_xyz - places).astype(np.float32))
    return np.concatenate(crops), np.concatenate(ways_mm)


def collect_all(frames, seed):
    """Return what `collect` does of so many frames of every sensor, on all cores."""
    tasks = []
    for start in range(0, frames, TASK_FRAMES):
        for number, name in enumerate(SENSORS):
            task_seed = np.random.SeedSequence((seed, number, start)).generate_state(1)[0]
            tasks.append((name, int(task_seed), min(TASK_FRAMES, frames - start)))
    with process_map(usable_cores()) as mapped:
        parts = list(tqdm(mapped(collect, tasks), "render", len(tasks), unit="task"))
    return tuple(torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts))


def finder_loss(network, crops, ways_mm):
    """Return the loss of a batch, the share of right answers and the mean error of the middle, mm."""
    logits, offsets = network(crops)
    distance_mm = ways_mm.norm(dim=1)
    is_hand = (distance_mm < HAND_MM).float()
    clear = is_hand + (distance_mm > NO_HAND_MM).float()
    told_apart = F.binary_cross_entropy_with_logits(logits, is_hand, clear)
    near = (distance_mm < OFFSET_MM).float()
    apart = F.smooth_l1_loss(offsets, ways_mm / REACH_MM, reduction="none", beta=0.05).sum(1)
    right = ((logits > 0).float() == is_hand).float()
    error_mm = (REACH_MM * offsets - ways_mm).norm(dim=1)
    return (
        told_apart + 2 * (apart * near).sum() / near.sum().clamp(min=1),
        (right * clear).sum() / clear.sum(),
        (error_mm * is_hand).sum() / is_hand.sum().clamp(min=1),
    )


def augmented(crops, ways_mm):
    """Return a batch of int8 crops as the network takes them, with noise, holes and half of it mirrored."""
    crops, ways_mm = crops[:, None].float() / 127, ways_mm.clone()
    mirrored = torch.rand(len(crops)) < 0.5
    crops[mirrored] = crops[mirrored].flip(3)
    ways_mm[mirrored, 0] *= -1
    crops = (crops + 0.02 * torch.randn_like(crops)).clamp(-1, 1)
    crops[torch.rand_like(crops) < 0.01] = 1
    return crops, ways_mm


def fit(network, crops, ways_mm, epochs):
    """Train the network on all but the last twentieth, of which errors are printed."""
    kept = len(crops) * 19 // 20
    steps = kept // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
    for epoch in range(epochs):
        for chosen in tqdm(torch.randperm(kept)[: steps * BATCH].split(BATCH), "train", leave=False):
            loss, *_ = finder_loss(network, *augmented(crops[chosen], ways_mm[chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.inference_mode():
            loss, right, error_mm = finder_loss(network, crops[kept:, None].float() / 127, ways_mm[kept:])
        print(f"epoch {epoch + 1:>3}  val loss {loss:.4f}  right {right:.2%}  middle {error_mm:.1f} mm")


def main(argv=None):
    """Render, train and write as the command line says."""
    parser = argparse.ArgumentParser(
        description="Train the network that finds hands on rendered frames.", formatter_class=HelpFormatter
    )
    parser.add_argument("--frames", type=int, default=8000, help="of each sensor")
    parser.add_argument("--epochs", type=int, default=12, help="to train")
    parser.add_argument("--seed", type=int, default=0, help="of frames and weights")
    parser.add_argument("--init", type=Path, help="begin with this file's weights (default: new ones)")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="file to write")
    args = parser.parse_args(argv)
    if args.frames < 100 or args.epochs < 1:
        raise UserError("--frames must be 100 or more, --epochs 1 or more")
    torch.manual_seed(args.seed)
    network = HandClassifier().to(memory_format=torch.channels_last)
    if args.init:
        try:
            network.load_state_dict(load_checkpoint(args.init, ["state_dict"])["state_dict"])
        except RuntimeError as error:
            raise UserError(f"--init {args.init} holds another network's weights") from error
    fit(network, *collect_all(args.frames, args.seed), args.epochs)
    save_checkpoint(args.out, {"state_dict": network.state_dict(), "frames": args.frames, "seed": args.seed})
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    sys.exit(run(main))
