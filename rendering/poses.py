"""Random hands: people, poses within the limits, views and arms.

Every random choice enters as a row of uniform numbers (see `Noise`), so that a hand depends on nothing but
its own row: the same bytes on any number of cores and in any batch, and one `torch.rand` draws a batch on a
GPU. Angles are radians, frames those of `rendering/hand.py`.
"""

import math

import torch
from torch import Tensor

from rendering import anatomy
from rendering.hand import Hands, elbow_xyz, overlap_mm

# Mean and standard deviation of the wrist's flexion (negative: bent back) and deviation.
WRIST_DEG, WRIST_SD_DEG = (-15.0, -8.0), (26.0, 13.0)
TOGETHER = 0.6  # correlation of one finger's change with what is common to all
GRIP_TRIES = 8  # poses drawn for a hand; the first whose fingers do not intersect deeply is taken
OVERLAP_MM = 5.0  # flesh may be pressed this deep
# So often a view is drawn anew while the forearm comes towards the camera by more than a share of its length.
VIEW_TRIES, TOWARDS = 3, -0.5
SLEEVES_MM = (20.0, 420.0)  # of many arms no sleeve is seen
NOISE_COLUMNS = 300  # uniform numbers that `draw_hands` uses up for a hand, rounded up


class Noise:
    """Hand out the columns of uniform numbers [B, N] in (0, 1) one after another."""

    def __init__(self, uniform: Tensor):
        self.values, self.used = uniform, 0

    def uniform(self, count: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return the next `count` columns [B, count], uniform between low and high."""
        if self.used + count > self.values.shape[1]:
            raise ValueError(
                f"more than {self.values.shape[1]} random numbers are needed: "
                "raise NOISE_COLUMNS or SCENE_COLUMNS"
            )
        self.used += count
        return low + (high - low) * self.values[:, self.used - count : self.used]

    def normal(self, count: int) -> Tensor:
        """Return the next `count` columns [B, count], standard normal."""
        return torch.special.ndtri(self.uniform(count, 1e-6, 1 - 1e-6))


def _draw_people(noise: Noise, like: Tensor) -> tuple[Tensor, Tensor]:
    """Draw bone lengths [B, 5, 4] in mm and girths [B]."""
    mean, deviation = like.new_tensor(anatomy.BONES_MM), like.new_tensor(anatomy.BONES_SD_MM)
    size = noise.normal(1)[:, :, None]
    own = noise.normal(20).reshape(-1, 5, 4)
    score = anatomy.SIZE_SHARE * size + math.sqrt(1 - anatomy.SIZE_SHARE**2) * own
    bones_mm = mean + deviation * score.clamp(-anatomy.BONE_LIMIT_SD, anatomy.BONE_LIMIT_SD)
    girth = 1 + 0.055 * size[:, 0, 0] + 0.045 * noise.normal(1)[:, 0]
    return bones_mm, girth.clamp(*anatomy.GIRTH_LIMITS)


def limits_rad(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower and the upper limits [22] of the angles, radians, in the order of anatomy.ANGLES."""
    low, high = zip(*(anatomy.LIMITS_DEG[name] for name in anatomy.ANGLES))
    return like.new_tensor(low).deg2rad(), like.new_tensor(high).deg2rad()


def gesture_angles(like: Tensor) -> Tensor:
    """Return the angles [G, 22] of anatomy.GESTURES in radians, wrist straight."""
    rows = []
    for thumb, fingers, spread in anatomy.GESTURES.values():
        row = list(anatomy.THUMB[thumb])
        abductions = (
            spread if isinstance(spread, tuple) else [spread * degrees for degrees in anatomy.SPREAD_DEG]
        )
        for state, abduction in zip(fingers, abductions):
            mcp, pip = anatomy.FINGER[state]
            row += [mcp, abduction, pip, anatomy.DIP_OVER_PIP * pip]
        rows.append(row + [0, 0])
    angles = like.new_tensor(rows).deg2rad()
    return _coupled(angles, torch.zeros_like(angles[:, :4]))


def _draw_angles(noise: Noise, like: Tensor) -> Tensor:
    """Draw GRIP_TRIES poses [B, tries, 22] within the limits: gestures, and mixtures of two finger by finger.

    From try to try they come nearer to a gesture as it stands in the table; the last ones are opened a bit.
    """
    times = [anatomy.OFTEN.get(name, 1) for name in anatomy.GESTURES]
    table = gesture_angles(like).repeat_interleave(torch.tensor(times, device=like.device), 0)
    first, second = (table[(noise.uniform(1)[:, 0] * len(table)).long()] for _ in range(2))
    kind = noise.uniform(1)
    # One weight a finger; 0 for a plain gesture, the same for all fingers half-way between two.
    share = torch.where(kind < 0.4, 0 * kind, torch.where(kind < 0.7, noise.uniform(1), noise.uniform(5)))
    share = torch.cat((share.repeat_interleave(4, 1), torch.zeros_like(kind).expand(-1, 2)), 1)
    scale = torch.deg2rad(noise.uniform(1, 1, 9))
    dip = torch.deg2rad(anatomy.DIP_SPREAD_DEG * noise.uniform(4, -1, 1))
    wrist = torch.deg2rad(share.new_tensor(WRIST_DEG) + noise.normal(2) * share.new_tensor(WRIST_SD_DEG))
    slack = noise.uniform(1, -1, 1).clamp(min=0) * share.new_tensor(anatomy.SLACK)
    tries = []
    for left in torch.linspace(1, -0.9, GRIP_TRIES).tolist():
        change = noise.normal(22)
        for joint, common in zip((4, 6), noise.normal(2).split(1, 1)):
            change[:, joint:20:4] = TOGETHER * common + math.sqrt(1 - TOGETHER**2) * change[:, joint:20:4]
        angles = first + max(left, 0) * share * (second - first) + max(left, 0.1) * scale * change
        angles = angles * (1 + 0.25 * min(left, 0))
        angles[:, 4:20:4] *= 1 - max(left, 0.1) * slack
        tries.append(_coupled(torch.cat((angles[:, :20], wrist), 1), max(left, 0) * dip))
    return torch.stack(tries, 1)


def _coupled(angles: Tensor, dip_offset: Tensor) -> Tensor:
    """Bend end joints with the middle ones, close the spread of bent fingers, keep all within limits."""
    low, high = limits_rad(angles)
    angles = angles.clamp(low, high)
    mcp, pip = angles[:, 4:20:4], angles[:, 6:20:4]
    spreadable = (1 - mcp.clamp(min=0) / (math.pi / 2)).clamp(min=0.15)
    angles[:, 5:20:4] *= spreadable
    angles[:, 7:20:4] = anatomy.DIP_OVER_PIP * pip + dip_offset
    return angles.clamp(low, high)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply quaternions [B, 4]: turn by b, then by a."""
    (aw, ax, ay, az), (bw, bx, by, bz) = a.unbind(-1), b.unbind(-1)
    return torch.stack(
        (
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ),
        -1,
    )


def _about(axis: tuple, angle: Tensor) -> Tensor:
    """Return the quaternions [B, 4] of turns by angle [B] about the unit axis (x, y, z; numbers or [B])."""
    sine = torch.sin(angle / 2)
    return torch.stack((torch.cos(angle / 2), *(sine * part for part in axis)), -1)


def _draw_rotations(noise: Noise) -> Tensor:
    """Draw rotations [B, 4]: fingers up, the palm or less often the back to the camera.

    One hand in six shows it any side of the forearm, one in eight is turned anyhow.
    """
    uniform = noise.uniform(3)
    a, b, c = uniform[:, 0], 2 * math.pi * uniform[:, 1], 2 * math.pi * uniform[:, 2]
    free = torch.stack(
        ((1 - a).sqrt() * b.sin(), (1 - a).sqrt() * b.cos(), a.sqrt() * c.sin(), a.sqrt() * c.cos()), -1
    )
    choice = noise.uniform(3)
    side = 2 * math.pi * noise.uniform(1)[:, 0]
    back = math.pi * (choice[:, 0] < 0.45).to(a.dtype)
    facing = _about((0, 1, 0), torch.where(choice[:, 0] < 1 / 6, side, back))
    direction = 2 * math.pi * noise.uniform(1)[:, 0]
    tilt = _about(
        (direction.cos(), direction.sin(), 0 * direction), torch.deg2rad(38 * noise.normal(1)[:, 0])
    )
    roll = torch.where(
        choice[:, 1] < 0.75, torch.deg2rad(35 * noise.normal(1)[:, 0]), math.pi * noise.uniform(1, -1)[:, 0]
    )
    frontal = _product(_about((0, 0, 1), roll), _product(tilt, facing))
    return torch.where(choice[:, 2:] < 0.125, free, frontal)


def draw_hands(noise: Noise, left_share: float = 0.0) -> Hands:
    """Draw hands from uniform numbers: people, poses, views and forearms, with the wrist at the origin.

    Of GRIP_TRIES poses the first is taken that overlaps by OVERLAP_MM or less, else the least
    overlapping.
    """
    like = noise.values
    bones_mm, girth = _draw_people(noise, like)
    tries = _draw_angles(noise, like)
    flat = tries.flatten(0, 1)
    overlap = overlap_mm(bones_mm.repeat_interleave(GRIP_TRIES, 0), girth.repeat_interleave(GRIP_TRIES), flat)
    best = overlap.reshape(-1, GRIP_TRIES).clamp(min=OVERLAP_MM).argmin(1)
    angles = tries[torch.arange(len(best), device=best.device), best]
    forearm = 70 + 190 * noise.uniform(1)[:, 0]
    left = noise.uniform(1)[:, 0] < left_share
    wrist_mm = torch.zeros_like(bones_mm[:, 0, :3])
    arm_girth = girth * noise.uniform(1, 0.85, 1.2)[:, 0]
    sleeve_mm = noise.uniform(1, *SLEEVES_MM)[:, 0]
    hollow = noise.uniform(1)[:, 0]
    flesh = torch.cat([noise.uniform(1, *limits) for limits in (anatomy.FINGER_GIRTH, anatomy.PALM_GIRTH)], 1)
    rotation, arm = _draw_rotations(noise), (forearm, arm_girth, sleeve_mm)
    hands = Hands(bones_mm, girth, angles, rotation, wrist_mm, left, *arm, hollow, flesh)
    for _ in range(VIEW_TRIES):
        rotation = _draw_rotations(noise)
        towards = elbow_xyz(hands)[:, 2] < TOWARDS * forearm
        hands = hands._replace(rotation=torch.where(towards[:, None], rotation, hands.rotation))
    return hands
