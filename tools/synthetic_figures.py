"""Draw the pictures of docs/synthetic: real beside rendered frames, the gestures, the drawn angles and bones.

python -m tools.synthetic_figures --real ../shared/real

The worst frames there (worst.png) are drawn by tools.show, as docs/experiments.md says.
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from frames.cameras import PRESETS, read_depth
from frames.drawing import write_picture
from frames.transforms import Camera, xyz2uvd
from rendering import anatomy, hand
from rendering.poses import NOISE_COLUMNS, Noise, draw_hands, gesture_angles
from rendering.scene import SCENE_COLUMNS, draw_scenes, render_scene
from rendering.sensor import SENSORS, measure
from rendering.surface import render_depth
from tools.show import contact_sheet
from utils import HelpFormatter, UserError, atomic_path, run

# Frames whose views look like the real ones beside them.
RENDERED = [("NYU", 7), ("SR305", 50), ("SR305", 34), ("SR305", 51), ("SR305", 24)]
GESTURES_A_ROW = 15
SMALLEST = cv2.IMWRITE_PNG_COMPRESSION, 9
REAL_SR305 = ("230536_110", "230536_70", "231615_100", "231615_220")


def rendered_frame(name, seed):
    """Return one measured frame [H, W] in mm of a sensor, and its hand's median depth."""
    sensor, generator = SENSORS[name], torch.Generator().manual_seed(seed)
    scene = draw_scenes(torch.rand(1, SCENE_COLUMNS, generator=generator), sensor)
    exact_mm, mask = render_scene(scene, torch.tensor(sensor.camera), sensor.size_px)
    depth_mm = measure(exact_mm, sensor, sensor.camera.fx, generator)
    return depth_mm[0].numpy(), float(exact_mm[mask].median())


def real_frames(folder):
    """Return [(depth in mm [H, W], depth of the hand)] of the NYU frame and of REAL_SR305."""
    frames = [(read_depth(folder / "nyu/test/depth_1_0000001.png", PRESETS["NYU"]), 765.0)]
    for name in REAL_SR305:
        depth_mm = read_depth(folder / f"sr305/{name}.png", PRESETS["SR305"])
        frames.append((depth_mm, float(np.percentile(depth_mm[depth_mm > 0], 15))))
    return frames


def colored(depth_mm, hand_mm):
    """Return an RGB picture [H, W, 3] of depth from 60 mm before a hand to 300 mm behind; white: nothing."""
    shade = np.clip((depth_mm - hand_mm + 60) / 360, 0, 1)
    picture = (colormaps["turbo"](shade)[..., :3] * 255).astype(np.uint8)
    picture[(depth_mm <= 0) | (depth_mm > 2000)] = 255
    return picture


def draw_real_and_rendered(real, out):
    """Write a row of real frames above a row of rendered ones."""
    tiles = []
    for depth_mm, hand_mm in [*real_frames(real), *(rendered_frame(*key) for key in RENDERED)]:
        small = cv2.resize(colored(depth_mm, hand_mm), (320, 240), interpolation=cv2.INTER_AREA)
        tiles.append(cv2.copyMakeBorder(small, 2, 2, 2, 2, cv2.BORDER_CONSTANT))
    write_picture(out / "real_and_rendered.png", contact_sheet(tiles, len(RENDERED)), SMALLEST)


def draw_gestures(out):
    """Write a sheet of all gestures, seen from the palm and from the thumb's side, with joints."""
    angles = gesture_angles(torch.zeros(1))
    count, camera = len(angles), Camera(480.0, 480.0, 80.0, 100.0)
    rows = []
    for turn in (0.35, 1.3):
        hands = hand.Hands(
            torch.tensor(anatomy.BONES_MM).expand(count, 5, 4),
            girth=torch.ones(count),
            angles=angles,
            rotation=torch.tensor([np.cos(turn / 2), 0, np.sin(turn / 2), 0]).float().expand(count, 4),
            wrist_mm=torch.tensor([0.0, 90, 600]).expand(count, 3),
            left=torch.zeros(count).bool(),
            forearm_mm=torch.full((count,), 100.0),
            arm_girth=torch.ones(count),
            hollow=torch.full((count,), 0.5),
            flesh=torch.ones(count, 2),
            sleeve_mm=torch.full((count,), torch.inf),
        )
        surfaces = hand.hand_and_arm(hands)
        depth_mm = torch.minimum(*(render_depth(one, torch.tensor(camera), (160, 200)) for one in surfaces))
        joints_uvd = xyz2uvd(hand.joints_xyz(hands).numpy(), camera)
        rows.append([_sketch(*pair) for pair in zip(depth_mm.numpy(), joints_uvd)])
    cells = [np.vstack(pair) for pair in zip(*rows)]
    for cell, name in zip(cells, anatomy.GESTURES):
        cv2.putText(cell, name, (4, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % GESTURES_A_ROW)
    write_picture(out / "gestures.png", contact_sheet(cells, GESTURES_A_ROW), SMALLEST)


def _sketch(depth_mm, joints_uvd):
    picture = colored(np.where(np.isfinite(depth_mm), depth_mm, 0), 560)
    for u, v in joints_uvd[:, :2].round().astype(int).tolist():
        cv2.circle(picture, (u, v), 2, (0, 0, 0), -1, cv2.LINE_AA)
    return picture


def draw_angles(out):
    """Write histograms of the angles and bone lengths of 10,000 drawn hands with their limits."""
    uniform = torch.rand(10000, NOISE_COLUMNS, generator=torch.Generator().manual_seed(0))
    hands = draw_hands(Noise(uniform))
    panels = {}
    for name, limits in anatomy.LIMITS_DEG.items():
        columns = [k for k, other in enumerate(anatomy.ANGLES) if other == name]
        panels[f"{name}, deg"] = hands.angles[:, columns].rad2deg(), limits
    for name, finger, bone in (("middle metacarpal", 2, 0), ("index proximal phalanx", 1, 1)):
        mean_mm = anatomy.BONES_MM[finger][bone]
        most_mm = anatomy.BONE_LIMIT_SD * anatomy.BONES_SD_MM[finger][bone]
        panels[f"{name}, mm"] = hands.bones_mm[:, finger, bone], (mean_mm - most_mm, mean_mm + most_mm)
    figure = Figure(figsize=(12, 7), layout="tight")
    for axis, (title, (values, limits)) in zip(figure.subplots(3, 4).flat, panels.items()):
        axis.hist(values.flatten().numpy(), bins=60)
        axis.set_title(title, fontsize=9)
        for limit in limits:
            axis.axvline(limit, color="k", lw=1, ls="--")
    with atomic_path(out / "angles.png") as temporary:
        figure.savefig(temporary, dpi=70)


def main():
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(
        description="Draw the pictures of docs/synthetic but worst.png.", formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--real", type=Path, help="folder with nyu/ and sr305/; without it no real_and_rendered.png"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/synthetic"), help="folder to write to")
    args = parser.parse_args()
    if args.real and not (args.real / "sr305").is_dir():
        raise UserError(f"{args.real}/sr305 not found: --real is the folder of the real frames")
    if args.real:
        draw_real_and_rendered(args.real, args.out)
    draw_gestures(args.out)
    draw_angles(args.out)


if __name__ == "__main__":
    sys.exit(run(main))
