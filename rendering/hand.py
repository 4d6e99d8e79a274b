"""Parametric human hand in torch: joints, flesh and surface of people in their poses.

Hand frame, right hand: origin at the wrist, x radial (to the thumb), y proximal (to the forearm), z dorsal.
With no rotation it is the camera frame: palm to the camera, fingers up, thumb on the picture's right. Left
hands are mirrored in x. Unless said otherwise lengths are mm, angles radians, points are in the camera frame
(x right, y down, z away).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rendering import anatomy
from rendering.surface import Surface, build_surface


class Hands(NamedTuple):
    """A batch of hands: people, their poses and where they are."""

    bones_mm: Tensor  # [B, 5, 4], see anatomy.BONES_MM
    girth: Tensor  # [B] thickness over the mean hand's
    angles: Tensor  # [B, 22] in the order of anatomy.ANGLES
    rotation: Tensor  # [B, 4] unit quaternion (w, x, y, z), hand frame to camera frame
    wrist_mm: Tensor  # [B, 3] camera frame
    left: Tensor  # [B] bool
    forearm_mm: Tensor  # [B]
    arm_girth: Tensor  # [B] thickness of the forearm over the mean one's
    sleeve_mm: Tensor  # [B] from the wrist to where a sleeve begins; beyond the forearm there is none
    hollow: Tensor  # [B] of the stretched palm, 0 (flat) to 1; such a palm rises less in a fist
    flesh: Tensor  # [B, 2] thickness of fingers and palm over what girth makes of them


def _turn(rotation: Tensor, vectors: Tensor) -> Tensor:
    """Rotate vectors [B, N, 3] by unit quaternions [B, 4] (a matrix product would round by batch)."""
    w, q = rotation[:, None, :1], rotation[:, None, 1:].expand_as(vectors)
    twice = 2 * torch.linalg.cross(q, vectors)
    return vectors + w * twice + torch.linalg.cross(q, twice)


def _local_joints(bones_mm: Tensor, angles: Tensor) -> Tensor:
    """Return the joints [B, 21, 3] in the hand frame of a right hand."""
    base = _carpus(bones_mm)
    chains = [_thumb(base[:, 0], bones_mm[:, 0, 1:], angles[:, :4])]
    zero = torch.zeros_like(angles[:, 0])
    for k in range(1, 5):
        mcp, abduction, pip, dip = angles[:, 4 * k : 4 * k + 4].unbind(1)
        ray = math.radians(anatomy.METACARPAL_DEG[k - 1])
        along = base.new_tensor((math.sin(ray), -math.cos(ray), 0.0))
        splay = 0.5 * ray + abduction
        forward = torch.stack((splay.sin(), -splay.cos(), zero), -1)
        across = torch.stack((splay.cos(), splay.sin(), zero), -1)
        towards = math.radians(anatomy.CONVERGENCE_DEG[k - 1])
        palmar = math.sin(towards) * across - math.cos(towards) * base.new_tensor((0.0, 0.0, 1.0))
        knuckle = base[:, k] + along * bones_mm[:, k, :1]
        chains.append(_bend(knuckle, forward, palmar, bones_mm[:, k, 1:], (mcp, mcp + pip, mcp + pip + dip)))
    return torch.cat((torch.zeros_like(base[:, :1]), *chains), 1)


def _carpus(bones_mm: Tensor) -> Tensor:
    """Return where thumb and metacarpals begin [B, 5, 3], further from the wrist in longer hands."""
    thumb, hand = (bones_mm[:, k, 0] / anatomy.BONES_MM[k][0] for k in (0, 2))
    size = torch.stack((thumb, hand, hand, hand, hand), 1)
    return bones_mm.new_tensor(anatomy.CARPAL_MM) * size[..., None]


def _thumb(base: Tensor, lengths_mm: Tensor, angles: Tensor) -> Tensor:
    """Return the thumb's CMC, MCP, IP and tip [B, 4, 3]; leaving the palm's plane it turns to the fingers."""
    radial, palmar, mcp, ip = angles.unbind(1)
    along = torch.stack((radial.sin() * palmar.cos(), -radial.cos() * palmar.cos(), -palmar.sin()), -1)
    turn = math.radians(35) - 1.1 * palmar
    pad = torch.stack((-turn.cos(), 0 * turn, -turn.sin()), -1)
    pad = pad - (pad[:, :1] * along[:, :1] + pad[:, 1:2] * along[:, 1:2] + pad[:, 2:] * along[:, 2:]) * along
    pad = pad / _length(pad)
    return _bend(base, along, pad, lengths_mm, (0 * mcp, mcp, mcp + ip))


def _bend(start: Tensor, forward: Tensor, palmar: Tensor, lengths_mm: Tensor, flexions: tuple) -> Tensor:
    """Return a chain [B, 4, 3] from start whose bones are flexed by so much from forward to palmar."""
    points = [start]
    for j, flexion in enumerate(flexions):
        direction = forward * flexion.cos()[:, None] + palmar * flexion.sin()[:, None]
        points.append(points[-1] + direction * lengths_mm[:, j : j + 1])
    return torch.stack(points, 1)


def _length(vectors: Tensor) -> Tensor:
    """Return the lengths [..., 1] of vectors [..., 3]."""
    x, y, z = vectors.unbind(-1)
    return (x * x + y * y + z * z).sqrt().unsqueeze(-1)


def _local_spheres(hands: Hands, joints: Tensor) -> tuple[Tensor, Tensor]:
    """Return centres [B, 45, 3] in the hand frame and radii [B, 45] of the surface's spheres."""
    girth = hands.girth[:, None]
    radii = joints.new_tensor(anatomy.RADII_MM) * hands.flesh[:, :1, None]
    radii[:, 0, 0] = _between(anatomy.THUMB_BASE_MM, hands.hollow)
    chains = joints[:, 1:].reshape(-1, 5, 4, 3)
    # The last sphere ends where the flesh does, beyond the bone; the tip joint lies inside it.
    reach = chains[:, :, 3] - chains[:, :, 2]
    inset = (radii[..., 3] * girth - anatomy.SOFT_TIP_MM)[..., None] / _length(reach)
    ends = chains[:, :, 3] - inset * reach
    fingers = torch.cat((chains[:, :, :3], ends[:, :, None]), 2)
    palm, palm_radii = _palm_spheres(hands, chains)
    arm, arm_radii = _forearm_spheres(hands)
    # Flesh between bent bones goes to the sides.
    pressed = hands.angles[:, 2:20:4].clamp(min=0)[..., None] * radii.new_tensor(anatomy.BULGE)
    radii = radii * (1 + pressed) * girth[..., None]
    grooves, groove_radii = _groove_spheres(fingers, radii)
    centres = torch.cat((fingers.flatten(1, 2), palm, arm, grooves), 1)
    return centres, torch.cat((radii.flatten(1), palm_radii, arm_radii, groove_radii), 1)


def _groove_spheres(chains: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    """Return spheres 36..44 [B, 9, 3] and radii [B, 9]: flesh in the grooves between fingers that touch.

    chains [B, 5, 4, 3], radii [B, 5, 4]: the fingers' own. As fingers part these spheres shrink and withdraw
    into the one nearer to the thumb; along it the web of skin at their roots tapers off.
    """
    one, other = chains[:, 1:4, 1:], chains[:, 2:, 1:]
    size, other_size = radii[:, 1:4, 1:], radii[:, 2:, 1:]
    gap_mm = _length(one - other)[..., 0] - size - other_size
    closed = (1 - gap_mm / anatomy.PARTED_MM).clamp(0, 1)
    middle = one + 0.5 * closed[..., None] * (other - one)
    filled = closed * ((size + other_size) / 2 - anatomy.GROOVE_MM)
    return middle.flatten(1, 2), filled.flatten(1)


def _palm_spheres(hands: Hands, chains: Tensor) -> tuple[Tensor, Tensor]:
    """Return spheres 20..29 [B, 10, 3] and radii [B, 10]: the palm and the webs at its fingers.

    The index finger's carpus, the heel, the thumb's ball, its web, the little finger's ball; the cushion and
    what is between the balls, which rise in a fist; three webs.
    """
    carpal = _carpus(hands.bones_mm)
    girth = hands.girth[:, None]
    palmar = chains.new_tensor((0.0, 0.0, -1.0))
    closed = (hands.angles[:, 4:20:4].mean(1) / math.radians(85)).clamp(0, 1)  # 1 for a fist
    hollow = torch.maximum(hands.hollow, closed)
    rise, size = (
        [(_between(ends, hollow) + ends[2] * closed)[:, None] for ends in pairs]
        for pairs in (anatomy.BALLS_MM, anatomy.BALL_RADII_MM)
    )
    shift = (anatomy.BALLS_FORWARD * closed)[:, None]
    thenar = torch.lerp(chains[:, 0, 0], chains[:, 0, 1], 0.45 + shift) + palmar * rise[0] * girth
    web_thumb = 0.42 * carpal[:, 1] + 0.58 * chains[:, 1, 0] + palmar * 1.5 * girth
    heel = carpal[:, 4] + carpal.new_tensor(anatomy.HEEL_MM) * closed[:, None] * girth
    hypothenar = torch.lerp(heel, chains[:, 4, 0], 0.4 + shift) + palmar * rise[1] * girth
    # In a fist the palm rises, below the fingertips and between the balls.
    middle = (thenar + hypothenar) / 2
    cushion = torch.lerp(middle, chains[:, 1:4, 0].mean(1), anatomy.CUSHION_FORWARD)
    rising = torch.stack((cushion, middle), 1)
    rising[..., 2] *= closed[:, None] * (1 - hands.hollow[:, None] * closed.new_tensor(anatomy.RISING_LESS))
    # A thumb under the fingers pushes the palm up to them.
    tucked = closed * _tucked(hands.angles[:, :4])
    lift = tucked[:, None, None] * palmar * closed.new_tensor(anatomy.TUCKED_MM)[:, None]
    thenar, rising = thenar + lift[:, 0], rising + lift[:, 1:]
    proximal = 0.6 * chains[:, 1:, 0] + 0.4 * chains[:, 1:, 1]
    webs = 0.5 * (proximal[:, :-1] + proximal[:, 1:])
    singles = torch.stack((carpal[:, 1], heel, thenar, web_thumb, hypothenar), 1)
    palm = hands.flesh[:, 1:]
    swollen, heel_radius = (
        palm * _between(ends, closed)[:, None] for ends in (anatomy.CUSHION_MM, anatomy.HEEL_RADIUS_MM)
    )
    web_radii = palm * palm.new_tensor((5.5, 5.5, 5.0))
    radii = (14 * palm, heel_radius, size[0], 9 * palm, size[1], swollen, swollen, web_radii)
    return torch.cat((singles, rising, webs), 1), torch.cat(radii, 1) * girth


def _tucked(thumb: Tensor) -> Tensor:
    """Return 1 for thumbs [B, 4] that are bent flat across the palm, 0 for those beside or before it."""
    radial, palmar, mcp, ip = torch.rad2deg(thumb).unbind(1)
    across, flat, bent = (
        ((angle - free) / (under - free)).clamp(0, 1)
        for angle, (free, under) in zip((radial, palmar, mcp + ip), anatomy.TUCKED_DEG)
    )
    return across * flat * bent


def _between(ends: tuple, share: Tensor) -> Tensor:
    """Return what lies at a share [B] (0..1) of the way from the first to the second of two numbers."""
    return ends[0] + (ends[1] - ends[0]) * share


def _forearm_spheres(hands: Hands) -> tuple[Tensor, Tensor]:
    """Return spheres 30..35 and their radii: both sides of the wrist, the elbow and the sleeve's end."""
    flexion, deviation = hands.angles[:, 20], hands.angles[:, 21]
    along = torch.stack(
        (deviation.sin() * flexion.cos(), deviation.cos() * flexion.cos(), -flexion.sin()), -1
    )
    across = torch.stack((deviation.cos(), -deviation.sin(), torch.zeros_like(flexion)), -1)
    sleeve_mm = torch.minimum(hands.sleeve_mm, hands.forearm_mm)
    away_mm = torch.stack((torch.zeros_like(sleeve_mm), hands.forearm_mm, sleeve_mm), 1)  # (B, 3)
    size = torch.stack((hands.girth, hands.arm_girth, hands.arm_girth), 1)
    side, radius = (size * (start + growth * away_mm / 250) for start, growth in anatomy.ARM_MM)
    cloth = size.new_tensor((0.0, anatomy.SLEEVE_MM[1], anatomy.SLEEVE_MM[0]))
    radius = radius + cloth * (hands.sleeve_mm < hands.forearm_mm)[:, None]
    middle, side = away_mm[..., None] * along[:, None], side[..., None] * across[:, None]
    spheres = torch.stack((middle + side, middle - side), 2).flatten(1, 2)
    return spheres, radius.repeat_interleave(2, 1)


def _to_camera(hands: Hands, points: Tensor) -> Tensor:
    """Take points [B, N, 3] from the hand frame to the camera frame; left hands are mirrored first."""
    mirrored = torch.where(hands.left[:, None, None], points * points.new_tensor((-1.0, 1.0, 1.0)), points)
    return _turn(hands.rotation, mirrored) + hands.wrist_mm[:, None]


def joints_xyz(hands: Hands) -> Tensor:
    """Return joints [B, 21, 3] in mm, camera frame: wrist, then base to tip of thumb, index .. little."""
    return _to_camera(hands, _local_joints(hands.bones_mm, hands.angles))


def middle_xyz(hands: Hands) -> Tensor:
    """Return the middle of the joints' bounding box [B, 3] in mm, camera frame."""
    joints = joints_xyz(hands)
    return (joints.amin(1) + joints.amax(1)) / 2


def elbow_xyz(hands: Hands) -> Tensor:
    """Return the middle of the forearm's far end [B, 3] in mm, camera frame."""
    return _to_camera(hands, _forearm_spheres(hands)[0][:, 2:4]).mean(1)


def hand_and_arm(hands: Hands) -> tuple[Surface, Surface]:
    """Return the surfaces of the hand (to the wrist joint) and of the forearm."""
    centres, radii = _local_spheres(hands, _local_joints(hands.bones_mm, hands.angles))
    spheres = torch.cat((_to_camera(hands, centres), radii[..., None]), -1)
    hand = build_surface(spheres, anatomy.HAND_CONES, anatomy.HAND_WEDGES)
    return hand, build_surface(spheres, (), anatomy.ARM_WEDGES)


def overlap_mm(bones_mm: Tensor, girth: Tensor, angles: Tensor) -> Tensor:
    """Return how deeply [B], in mm, the flesh of two fingers, or of finger and palm, intersects at worst.

    It is judged on flesh of mean thickness (`Hands.flesh` 1) that does not bulge, on a thumb that is pressed
    flat, and on a palm that does not rise to the fingertips.
    """
    chains = _local_joints(bones_mm, angles)[:, 1:].reshape(-1, 5, 4, 3)
    radii = chains.new_tensor(anatomy.RADII_MM)
    radii[0, 2:] *= anatomy.THUMB_FLAT
    steps = chains.new_tensor((1 / 3, 2 / 3, 1.0))[:, None]
    points = chains[:, :, :3, None] + steps * (chains[:, :, 1:, None] - chains[:, :, :3, None])
    points = points.reshape(len(angles), 45, 3)  # (B, finger x bone x step, 3)
    sizes = (radii[:, :3, None] + steps[:, 0] * (radii[:, 1:, None] - radii[:, :3, None])).reshape(-1)
    carpal = _carpus(bones_mm)[:, 1:]
    palm = torch.cat([carpal + share * (chains[:, 1:, 0] - carpal) for share in (0.45, 0.8)], 1)  # (B, 8, 3)
    points = torch.cat((points, palm), 1)
    sizes = torch.cat((sizes, sizes.new_full(palm.shape[1:2], anatomy.PALM_MM)))
    # Bones beside each other at their roots touch without harm; the palm (finger 5) meets the others alone.
    finger, bone = torch.arange(len(sizes)) // 9, torch.arange(len(sizes)) // 3 % 3
    bone[45:] = 0
    near_palm = (bone == 0) | ((finger == 0) & (bone == 1))
    judged = (finger[:, None] < finger.clamp(max=5)) & ~((bone[:, None] == 0) & (bone == 0))
    judged[:, 45:] = ((finger < 5) & ~near_palm)[:, None]
    one, other = judged.nonzero().to(angles.device).unbind(1)
    gap_mm = _length(points[:, one] - points[:, other])[..., 0] - girth[:, None] * (sizes[one] + sizes[other])
    return -gap_mm.amin(1)


def move_to(hands: Hands, centre_xyz: Tensor) -> Hands:
    """Put the middle of the joints' bounding box at [B, 3] in mm.

    Forearms that would come nearer to the camera than 250 mm are shortened, to 40 mm at the least.
    """
    hands = hands._replace(wrist_mm=torch.zeros_like(hands.wrist_mm))
    hands = hands._replace(wrist_mm=centre_xyz - middle_xyz(hands))
    slope = -(elbow_xyz(hands) - hands.wrist_mm)[:, 2] / hands.forearm_mm
    longest = torch.where(slope > 0, (hands.wrist_mm[:, 2] - 250) / slope, math.inf)
    return hands._replace(forearm_mm=torch.minimum(hands.forearm_mm, longest.clamp(min=40)))
