"""The depth cameras of the data sets, and what they make of an exact scene: noise, shadows, lost edges."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from frames.cameras import PRESETS
from frames.transforms import Camera

NO_WALL_MM = 1e5  # deeper than anything
# Averaging (docs/experiments.md, "What a camera smooths"): what lies further before or behind is another
# surface; of the effect a frame gets this share at least.
JUMP_MM, LEAST_AVERAGED = 25.0, 0.4


class Sensor(NamedTuple):
    """A depth camera, where hands are held before it, and how it fails.

    Structured light measures in steps of disparity (`step_per_m2`, mm at 1 m; it and the noise grow with the
    square of the depth: Khoshelham & Elberink 2012, Sensors 12(2):1437-1454) and leaves shadows,
    `baseline_mm` times fx times the difference of 1/z wide. Time of flight leaves flying pixels instead.
    Matching a window of the pattern, or filtering, averages depth within a surface.
    """

    camera: Camera
    size_px: tuple  # width, height
    hand_mm: tuple  # nearest and farthest middle of a hand
    far_mm: float  # nothing is measured beyond
    unit_mm: float = 1.0  # of the stored numbers
    step_per_m2: float = 0.0
    noise_per_m2: float = 2.0  # standard deviation at 1 m
    window_px: int = 5  # odd width over which depth within a surface is averaged
    baseline_mm: float = 0.0
    edge_px: float = 0.8  # largest standard deviation of a silhouette's raggedness
    gap_px: int = 0  # how wide a surface is not measured beside a nearer one
    flying: float = 0.0  # share of edge pixels between the two surfaces
    bridged_mm: float = 0.0  # between surfaces so near behind each other all is measured
    steepest: float = 5.0  # tangent of the slope at which half the pixels are missing
    missing_mm: float = 0.0  # what stands where nothing was measured
    body: float = 0.0  # share of frames with a body behind
    wall: float = 0.0  # share of frames with a wall behind
    left: float = 0.0  # share of left hands


# NYU: Kinect 1; its frames say 2001 where nothing was measured. ICVL (its labels are those of left hands) and
# MSRA: time of flight (Intel Creative). HAND17 and SR305: Intel RealSense SR300, SR305, coded light.
QUALITIES = {
    "NYU": dict(
        hand_mm=(550, 950),
        far_mm=2000,
        step_per_m2=2.85,
        noise_per_m2=1.6,
        window_px=13,
        baseline_mm=75,
        edge_px=0.9,
        gap_px=1,
        bridged_mm=45,
        steepest=7,
        missing_mm=2001,
        body=0.8,
        wall=0.5,
    ),
    "ICVL": dict(
        hand_mm=(250, 440), far_mm=600, noise_per_m2=14, edge_px=0.5, flying=0.25, body=0.15, left=1.0
    ),
    "MSRA": dict(hand_mm=(260, 460), far_mm=600, noise_per_m2=14, edge_px=0.5, flying=0.25),
    "HAND17": dict(
        hand_mm=(330, 700),
        far_mm=1100,
        noise_per_m2=1.8,
        window_px=9,
        baseline_mm=26,
        gap_px=3,
        body=0.6,
        wall=0.2,
    ),
    "SR305": dict(
        hand_mm=(450, 650),
        far_mm=960,
        noise_per_m2=1.8,
        window_px=9,
        baseline_mm=26,
        gap_px=4,
        edge_px=0.9,
        body=0.9,
    ),
}
SENSORS = {
    name: Sensor(PRESETS[name].camera, PRESETS[name].size_px, unit_mm=PRESETS[name].unit_mm, **qualities)
    for name, qualities in QUALITIES.items()
}


def measure(depth_mm: Tensor, sensor: Sensor, fx_px: float, generator: torch.Generator) -> Tensor:
    """Return what a sensor measures of exact depth [B, H, W], mm; `sensor.missing_mm` where it fails.

    fx_px is the focal length of the picture given, which for crops differs from the sensor's own. What is
    lost is decided for cells of 2 x 2 px; for single pixels where fx_px is at most 3/4 of the sensor's.
    """
    depth_mm = depth_mm.clamp(max=NO_WALL_MM)
    cell = 2 if fx_px > 0.75 * sensor.camera.fx else 1
    cells_mm = -F.max_pool2d(-depth_mm, cell, ceil_mode=True)
    nearest_mm = _nearest(cells_mm, 1)
    uneven, bumps = (_smooth_noise(cells_mm, 2, generator) for _ in range(2))
    uneven += _smooth_noise(cells_mm, 16, generator)
    lost = _lost(cells_mm, nearest_mm, sensor, fx_px / cell, uneven)
    shift = torch.randn(2, *cells_mm.shape, device=depth_mm.device, generator=generator)
    # Edges of one frame are more ragged than those of another: by a fifth of edge_px to all of it.
    smooth = torch.rand(len(depth_mm), 1, 1, device=depth_mm.device, generator=generator)
    shift = (shift * (1 - 0.8 * smooth) * (sensor.edge_px * fx_px / sensor.camera.fx)).round().long()
    lost = lost | _look_aside(lost, (shift / cell).round().long())
    edge = (-_nearest(-cells_mm, 1) - nearest_mm > 12) & (nearest_mm < sensor.far_mm)
    averaged_mm = _averaged(depth_mm, round(sensor.window_px // 2 * fx_px / sensor.camera.fx))
    exact = (1 - LEAST_AVERAGED) * torch.rand(smooth.shape, device=depth_mm.device, generator=generator)
    depth_mm = torch.lerp(averaged_mm, depth_mm, exact)
    depth_mm = _ragged(depth_mm, edge, shift, sensor, generator)
    # Surfaces bump and ripple, more with depth.
    grain = _grain(depth_mm, generator) + _enlarged(1.5 * bumps, cell, depth_mm.shape)
    depth_mm = torch.addcmul(depth_mm, grain, depth_mm * depth_mm, value=1e-6 * sensor.noise_per_m2)
    return _store(depth_mm, _enlarged(lost, cell, depth_mm.shape), sensor)


def _averaged(depth_mm: Tensor, reach: int) -> Tensor:
    """Average depth [B, H, W] over what is up to `reach` px away, down the columns, then along the rows.

    Every other pixel counts, which halves the time; those JUMP_MM or more before or behind do not.
    """
    for axis in (1, 2):
        total, count = torch.zeros_like(depth_mm), torch.ones_like(depth_mm)
        for step in range(min(reach, depth_mm.shape[axis] - 1), 0, -2):
            size = depth_mm.shape[axis] - step
            rise = depth_mm.narrow(axis, step, size) - depth_mm.narrow(axis, 0, size)
            near = rise.abs() < JUMP_MM
            rise.mul_(near)
            total.narrow(axis, 0, size).add_(rise)
            total.narrow(axis, step, size).sub_(rise)
            count.narrow(axis, 0, size).add_(near)
            count.narrow(axis, step, size).add_(near)
        depth_mm = depth_mm + total / count
    return depth_mm


def _smooth_noise(like: Tensor, spacing: int, generator: torch.Generator) -> Tensor:
    """Draw normal noise [B, H, W] that is interpolated between points so many pixels apart."""
    batch, height, width = like.shape
    drawn = torch.randn(
        batch, 1, -(-height // spacing), -(-width // spacing), device=like.device, generator=generator
    )
    return F.interpolate(drawn, scale_factor=spacing, mode="bilinear")[:, 0, :height, :width]


@lru_cache
def _grain_bank(device: torch.device) -> Tensor:
    """Return the normal noise that all grain is cut from: drawn anew it takes 5% of the time."""
    return torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.35).to(device)


def _grain(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return normal noise [B, H, W] of standard deviation 0.35, a random stretch of the bank for each."""
    stretches = _grain_bank(like.device).unfold(0, like[0].numel(), 1)
    start = torch.randint(len(stretches), like.shape[:1], device=like.device, generator=generator)
    return stretches[start].view(like.shape)


def _enlarged(cells: Tensor, cell: int, shape: tuple) -> Tensor:
    """Repeat cells [B, h, w] to pixels [B, H, W]."""
    return cells.repeat_interleave(cell, 2).repeat_interleave(cell, 1)[:, : shape[1], : shape[2]]


def _lost(depth_mm: Tensor, nearest_mm: Tensor, sensor: Sensor, fx_px: float, uneven: Tensor) -> Tensor:
    """Return where [B, H, W] nothing is measured: far, steep, beside a nearer surface, in its shadow."""
    lost = depth_mm > sensor.far_mm * (1 - 0.05 * uneven.abs())
    climb = depth_mm - nearest_mm
    steep = (climb * fx_px > sensor.steepest * depth_mm * torch.exp2(uneven)) & (climb > sensor.bridged_mm)
    if not sensor.gap_px:
        return lost | (steep & (climb < 25))
    reach = max(1, round(sensor.gap_px * fx_px / sensor.camera.fx))
    lost = lost | steep | (_nearest(depth_mm, reach) < depth_mm - max(35, sensor.bridged_mm))
    return lost | _shadow(depth_mm, sensor.baseline_mm * fx_px, sensor.bridged_mm)


def _nearest(depth_mm: Tensor, reach: int) -> Tensor:
    """Return the least depth within `reach` pixels, as a square [B, H, W]."""
    for axis in (1, 2):
        done = 0
        while done < reach:  # windows grow from 2n + 1 to at most 6n + 3 pixels
            step = min(2 * done + 1, reach - done)
            size = depth_mm.shape[axis] - step
            low, high = depth_mm.narrow(axis, 0, size), depth_mm.narrow(axis, step, size)
            least = depth_mm.clone()
            torch.minimum(least.narrow(axis, 0, size), high, out=least.narrow(axis, 0, size))
            torch.minimum(least.narrow(axis, step, size), low, out=least.narrow(axis, step, size))
            depth_mm, done = least, done + step
    return depth_mm


def _shadow(depth_mm: Tensor, strength: float, bridged_mm: float) -> Tensor:
    """Return the pixels [B, H, W] that the projector, beside the camera, does not light.

    It stands left of the camera: a point's column in its picture is u + strength / z. Where a nearer surface
    further left reaches as far already, light does not.
    """
    columns = torch.arange(depth_mm.shape[2], device=depth_mm.device, dtype=depth_mm.dtype)
    reached = torch.cummax(columns + strength / depth_mm, 2).values
    return columns + strength / (depth_mm - bridged_mm) < reached - 1


def _look_aside(picture: Tensor, shift: Tensor) -> Tensor:
    """Let pixels of [B, H, W] take the value of a neighbour, shift [2, B, H, W] rows and columns away."""
    height, width = picture.shape[1:]
    rows = (torch.arange(height, device=shift.device)[:, None] + shift[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=shift.device) + shift[1]).clamp(0, width - 1)
    return picture.flatten(1).gather(1, (rows * width + columns).flatten(1)).reshape_as(picture)


def _ragged(
    depth_mm: Tensor, edge: Tensor, shift_px: Tensor, sensor: Sensor, generator: torch.Generator
) -> Tensor:
    """Move depth at cells on an edge by shift_px [2, B, h, w] px, and set some of it in between."""
    shape = depth_mm.shape
    height, width = shape[1:]
    cell = -(-height // edge.shape[1])
    frame, row, column = edge.nonzero(as_tuple=True)
    inner = torch.arange(cell * cell, device=depth_mm.device)
    v = (row[:, None] * cell + inner // cell).clamp(max=height - 1)  # (cells, cell * cell)
    u = (column[:, None] * cell + inner % cell).clamp(max=width - 1)
    from_v = (v + shift_px[0][edge][:, None]).clamp(0, height - 1)
    from_u = (u + shift_px[1][edge][:, None]).clamp(0, width - 1)
    start = frame[:, None] * (height * width)
    pixel = start + v * width + u
    own, other = depth_mm.take(pixel), depth_mm.take(start + from_v * width + from_u)
    if sensor.flying:
        draw = torch.rand(2, *pixel.shape, device=depth_mm.device, generator=generator)
        other = torch.where(draw[0] < sensor.flying, torch.lerp(own, other, draw[1]), other)
    moved = torch.where((other - own).abs() > 12, other, own)
    depth_mm = depth_mm.flatten()
    depth_mm[pixel] = moved
    return depth_mm.reshape(shape)


def _store(depth_mm: Tensor, lost: Tensor, sensor: Sensor) -> Tensor:
    """Round depth to steps of disparity and to the sensor's unit."""
    if sensor.step_per_m2:
        steps = 1e6 / sensor.step_per_m2  # over the depth: a whole number that grows with disparity
        depth_mm = steps / (steps / depth_mm).round()
    depth_mm = depth_mm.mul_(1 / sensor.unit_mm).round_().mul_(sensor.unit_mm)
    kept = (depth_mm <= sensor.far_mm) & ~lost
    return (depth_mm - sensor.missing_mm) * kept + sensor.missing_mm  # `torch.where` takes thrice as long
