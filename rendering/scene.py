"""Scenes around rendered hands: body, clutter and wall, in torch."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rendering.hand import Hands, elbow_xyz, hand_and_arm, joints_xyz, middle_xyz, move_to
from rendering.poses import NOISE_COLUMNS, Noise, draw_hands
from rendering.sensor import NO_WALL_MM, Sensor
from rendering.surface import Surface, build_surface, render_depth, render_pixels

RELIEF = (6, 8)  # points of the folds in what is behind the hand
SCENE_COLUMNS = NOISE_COLUMNS + 130  # uniform numbers of a scene
COARSE = 4  # how much smaller what is behind the arm is rendered
CLUTTER = 4  # objects behind the hand, drawn as cones

# Spheres of a body: elbow, near and far shoulder, two hips, neck, chin, crown, then two for each piece of
# clutter.
BODY_RADII_MM = (36.0, 55.0, 55.0, 95.0, 95.0, 48.0, 62.0, 78.0)
BODY_CONES = ((0, 1), (5, 6), (6, 7), *((8 + 2 * k, 9 + 2 * k) for k in range(CLUTTER)))
BODY_WEDGES = ((1, 2, 3), (2, 3, 4), (1, 2, 5))


class Scene(NamedTuple):
    """A batch of hands and what is behind them."""

    hands: Hands
    behind: Surface  # bodies and clutter
    wall: Tensor  # [B, 3]: inverse depth of the wall is wall . (x / z, y / z, 1)
    relief_mm: Tensor  # [B, *RELIEF]: folds, spread over the picture


def draw_scenes(uniform: Tensor, sensor: Sensor) -> Scene:
    """Draw scenes from uniform numbers [B, SCENE_COLUMNS]; a scene depends on nothing but its own row."""
    noise = Noise(uniform)
    hands = draw_hands(noise, sensor.left)
    near, far = sensor.hand_mm
    z = near + (far - near) * noise.uniform(1)[:, 0]
    across = []
    for focal, middle, size, share in zip(
        sensor.camera[:2], sensor.camera[2:], sensor.size_px, noise.uniform(2, -1, 1).unbind(1)
    ):
        room_px = (size / 2 - 105 * focal / z).clamp(min=0)  # keeps the hand inside the picture where it fits
        across.append((size / 2 + room_px * share - middle) * z / focal)
    return add_background(move_to(hands, torch.stack((*across, z), -1)), noise, sensor)


def add_background(hands: Hands, noise: Noise, sensor: Sensor) -> Scene:
    """Put a body at the end of the arm, clutter and a wall behind hands, each in its share of frames."""
    has_body = noise.uniform(1) < sensor.body
    hands = hands._replace(
        forearm_mm=torch.where(has_body[:, 0], hands.forearm_mm.clamp(min=215), hands.forearm_mm)
    )
    hands = move_to(hands, middle_xyz(hands))
    body = _body_spheres(hands, noise)
    present = torch.cat(
        (has_body.expand(-1, 8), noise.uniform(CLUTTER).repeat_interleave(2, 1) < sensor.wall), 1
    )
    spheres = torch.where(present[..., None], torch.cat((body, _clutter_spheres(body, noise)), 1), -1.0)
    tilt = noise.uniform(2, -0.5, 0.5)
    distance = torch.where(
        noise.uniform(1) < sensor.wall, body[:, 1:2, 2] + 150 + 900 * noise.uniform(1), NO_WALL_MM
    )
    wall = torch.cat((tilt, torch.ones_like(distance)), 1) / distance
    relief_mm = noise.uniform(RELIEF[0] * RELIEF[1], -14, 14).reshape(-1, *RELIEF)
    return Scene(hands, build_surface(spheres, BODY_CONES, BODY_WEDGES), wall, relief_mm)


def _body_spheres(hands: Hands, noise: Noise) -> Tensor:
    """Return the 8 spheres [B, 8, 4] of a person who faces the camera, in the order of BODY_RADII_MM."""
    u = noise.uniform(6)
    elbow = elbow_xyz(hands)
    x, y, z = elbow.unbind(1)
    inward = torch.where(hands.left, -1.0, 1.0)  # a right shoulder is on the left of the picture
    back = torch.maximum(z + 40 + 150 * u[:, 0], joints_xyz(hands)[..., 2].amax(1) + 110 + 120 * u[:, 1])
    shoulder_x, shoulder_y = x + inward * (40 + 140 * u[:, 2]), y - 120 - 160 * u[:, 3]
    centre_x, lean = shoulder_x + inward * 150, 60 * (u[:, 4] - 0.5)
    turned = 120 * (u[:, 5] - 0.5)
    rows = [
        (x, y, z),
        (shoulder_x, shoulder_y, back + 20),
        (shoulder_x + inward * 300, shoulder_y, back + 20 + turned),
        (centre_x - 75, shoulder_y + 800, back + 30 - lean),
        (centre_x + 75, shoulder_y + 800, back + 30 - lean),
        (centre_x, shoulder_y - 70, back + 50),
        (centre_x, shoulder_y - 165, back + 10 + lean),
        (centre_x, shoulder_y - 235, back + 25 + lean),
    ]
    centres = torch.stack([torch.stack(row, -1) for row in rows], 1)
    return torch.cat((centres, centres.new_tensor(BODY_RADII_MM).expand(len(u), 8)[..., None]), -1)


def _clutter_spheres(body: Tensor, noise: Noise) -> Tensor:
    """Return the end spheres [B, 2 * CLUTTER, 4] of bars behind the shoulder's depth."""
    u = noise.uniform(6 * CLUTTER).reshape(-1, CLUTTER, 6)
    z = body[:, 1:2, 2] + 100 + 700 * u[..., 0]
    start = torch.stack(((u[..., 1] - 0.5) * z, (u[..., 2] - 0.5) * 0.8 * z, z), -1)
    reach = torch.stack((u[..., 3] - 0.5, u[..., 4] - 0.5, 0.3 * u[..., 1]), -1) * 900
    radius = (20 + 60 * u[..., 5, None]).expand(-1, -1, 1)
    ends = torch.stack((torch.cat((start, radius), -1), torch.cat((start + reach, radius), -1)), 2)
    return ends.flatten(1, 2)


def render_scene(scene: Scene, intrinsics: Tensor, size_px: tuple) -> tuple[Tensor, Tensor]:
    """Return depth [B, height, width] in mm, exact for hand and arm, and a mask of the hand to the wrist.

    intrinsics: fx, fy, u0, v0 as [4]; size_px: (width, height).
    """
    depth_mm = _behind(scene, intrinsics.to(scene.wall), size_px).flatten()
    is_hand = torch.zeros_like(depth_mm, dtype=torch.bool)
    for surface, is_it in zip(hand_and_arm(scene.hands), (True, False)):
        pixels, near_mm = render_pixels(surface, intrinsics, size_px)
        far_mm = depth_mm[pixels]
        depth_mm[pixels] = torch.minimum(near_mm, far_mm)
        is_hand[pixels] = torch.where(near_mm < far_mm, is_it, is_hand[pixels])
    return depth_mm.reshape(-1, *size_px[::-1]), is_hand.reshape(-1, *size_px[::-1])


def _behind(scene: Scene, intrinsics: Tensor, size_px: tuple) -> Tensor:
    """Return the depth [B, H, W] of bodies, clutter and wall, rendered COARSE times smaller and interpolated.

    `measure` takes its ramps at edges for grazing angles.
    """
    small = [-(-size // COARSE) for size in size_px]
    half = intrinsics.new_tensor((0.0, 0.0, 0.5, 0.5))  # a pixel's middle is at a whole number
    intrinsics = (intrinsics + half) / COARSE - half
    fx, fy, u0, v0 = intrinsics
    x = (torch.arange(small[0], device=fx.device) - u0) / fx
    y = (torch.arange(small[1], device=fx.device)[:, None] - v0) / fy
    a, b, c = scene.wall[..., None, None].unbind(1)
    wall_mm = 1 / (a * x + b * y + c).clamp(min=1 / NO_WALL_MM)
    depth_mm = torch.minimum(render_depth(scene.behind, intrinsics, small), wall_mm)
    depth_mm = depth_mm + F.interpolate(scene.relief_mm[:, None], size=small[::-1], mode="bicubic")[:, 0]
    full = F.interpolate(depth_mm[:, None], scale_factor=COARSE, mode="bilinear", align_corners=False)[:, 0]
    return full[:, : size_px[1], : size_px[0]]
