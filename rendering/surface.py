"""Exact depth pictures of spheres, round cones and wedges in torch, of whole frames and of crops."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

TILE_PX = 8  # a primitive is met with the rays of the tiles of this size that its projection's box touches
PIECE = 2048  # so many tiles at a time stay in a processor's cache
NEAR_MM = 20.0  # nothing nearer than this is rendered


class Surface(NamedTuple):
    """What a batch of smooth bodies consists of, equally much for each; `build_surface` makes it."""

    spheres: Tensor  # [B, S, 4]: xyz, radius
    cones: Tensor  # [B, C, 8]: the two spheres whose hull a round cone is; without them it has no ends
    triangles: Tensor  # [B, T, 9]: xyz of three corners; NaN where there is none


def build_surface(spheres: Tensor, cones: tuple, wedges: tuple) -> Surface:
    """Hull spheres [B, S, 4] (xyz, radius): by twos (indices) to round cones, by threes to wedges."""
    edges = {tuple(sorted(pair)) for a, b, c in wedges for pair in ((a, b), (b, c), (a, c))}
    pairs = sorted(edges | {tuple(sorted(pair)) for pair in cones})
    first, second = torch.tensor(pairs, device=spheres.device).unbind(1)
    round_cones = torch.cat((spheres[:, first], spheres[:, second]), -1)
    used = spheres[:, sorted({end for pair in pairs for end in pair})]
    if not wedges:
        return Surface(used, round_cones, spheres.new_zeros(len(spheres), 0, 9))
    return Surface(used, round_cones, _facets(*(spheres[:, corner] for corner in zip(*wedges))))


def _facets(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return the two triangles [B, 2W, 9] that touch three spheres [B, W, 4] each, NaN where no plane does.

    The plane's unit normal n has n . (b - a) = r_a - r_b and n . (c - a) = r_a - r_c.
    """
    e, f = b[..., :3] - a[..., :3], c[..., :3] - a[..., :3]
    p, q = a[..., 3:] - b[..., 3:], a[..., 3:] - c[..., 3:]
    ee, ff, ef = (
        (s[..., :1] * t[..., :1] + s[..., 1:2] * t[..., 1:2] + s[..., 2:] * t[..., 2:])
        for s, t in ((e, e), (f, f), (e, f))
    )
    area = ee * ff - ef * ef
    along_e, along_f = (p * ff - q * ef) / area, (q * ee - p * ef) / area
    cross = torch.linalg.cross(e, f)
    lift = (1 - along_e * p - along_f * q).sqrt() * cross / area.sqrt()
    flat = along_e * e + along_f * f
    sides = [
        torch.cat([s[..., :3] + s[..., 3:] * (flat + sign * lift) for s in (a, b, c)], -1) for sign in (1, -1)
    ]
    return torch.cat(sides, 1)


def render_depth(surface: Surface, intrinsics: Tensor, size_px: tuple) -> Tensor:
    """Return the depth (z, mm) [B, height, width] of the nearest surface, inf where none is.

    intrinsics: fx, fy, u0, v0 as [4] or [B, 4]; size_px: (width, height). Primitives nearer than NEAR_MM are
    left out.
    """
    width, height = size_px
    picture = surface.spheres.new_full((len(surface.spheres) * height * width,), math.inf)
    pixels, depth_mm = render_pixels(surface, intrinsics, size_px)
    picture[pixels] = depth_mm
    return picture.reshape(-1, height, width)


def render_pixels(surface: Surface, intrinsics: Tensor, size_px: tuple) -> tuple[Tensor, Tensor]:
    """Return what `render_depth` does for the pixels near the surface alone: [N] indices and [N] depths.

    Indices are those of a flattened [B, height, width] picture, each at most once.
    """
    intrinsics = intrinsics.to(surface.spheres).expand(len(surface.spheres), 4)
    counts = [-(-size // TILE_PX) for size in size_px]
    corners = torch.nn.functional.pad(surface.triangles.unflatten(-1, (3, 3)), (0, 1))
    casts = []
    for shapes, points, depth_of in (
        (surface.spheres, surface.spheres[:, :, None], _sphere_depth),
        (surface.cones, surface.cones.unflatten(-1, (2, 4)), _cone_depth),
        (surface.triangles, corners, _triangle_depth),
    ):
        if shapes.shape[1]:
            shape, tile = _tiles_of(_discs(points, intrinsics).flatten(0, 1), counts)
            tile += shape // shapes.shape[1] * (counts[0] * counts[1])
            casts.append((depth_of, shapes.flatten(0, 1), shape, tile))
    tiles, places = torch.unique(torch.cat([tile for *_, tile in casts]), return_inverse=True)
    pixels, x, y, inside = _rays(tiles, counts, intrinsics, size_px)
    depth_mm = torch.full_like(x, math.inf)
    for (depth_of, shapes, shape, _), place in zip(casts, places.split([len(tile) for *_, tile in casts])):
        for some, where in zip(shape.split(PIECE), place.split(PIECE)):
            met_mm = depth_of(shapes[some], x[where], y[where])
            depth_mm.scatter_reduce_(0, where[:, None].expand_as(met_mm), met_mm, "amin")
    return pixels[inside], depth_mm[inside]


def _rays(tiles: Tensor, counts: list, intrinsics: Tensor, size_px: tuple) -> tuple[Tensor, ...]:
    """Return pixel indices, x and y of the rays (x, y, 1) [T, TILE_PX ** 2] of tiles [T], and which exist."""
    width, height = size_px
    frame, row, column = tiles // (counts[0] * counts[1]), tiles // counts[0] % counts[1], tiles % counts[0]
    pixel = torch.arange(TILE_PX**2, device=tiles.device)
    u = column[:, None] * TILE_PX + pixel % TILE_PX
    v = row[:, None] * TILE_PX + pixel // TILE_PX
    fx, fy, u0, v0 = intrinsics[frame, :, None].unbind(1)  # (T, 1) each
    inside = (u < width) & (v < height)
    return (frame[:, None] * height + v) * width + u, (u - u0) / fx, (v - v0) / fy, inside


def _discs(points: Tensor, intrinsics: Tensor) -> Tensor:
    """Return discs [B, P, N, 3] (u, v, radius; px) around projected spheres [B, P, N, 4], NaN if too near.

    A sphere's silhouette is an ellipse whose half axes a, b and half extents h, w keep a^2 + b^2 = h^2 + w^2;
    b is no less than the focal length times radius over depth.
    """
    across, z, r = points[..., :2], points[..., 2:3], points[..., 3:]
    z = torch.where(z - r > NEAR_MM, z, math.nan)
    fx_fy, centre = intrinsics[:, None, None, :2], intrinsics[:, None, None, 2:]
    middle = across * z / (z * z - r * r) * fx_fy + centre
    extent = r * (across * across + z * z - r * r).sqrt() / (z * z - r * r) * fx_fy
    short = fx_fy.amin(-1, keepdim=True) * r / z
    return torch.cat((middle, (extent[..., :1] ** 2 + extent[..., 1:] ** 2 - short**2).sqrt()), -1)


def _tiles_of(discs: Tensor, counts: list) -> tuple[Tensor, Tensor]:
    """List the (shape, tile) of all tiles that the hull of a shape's discs [S, N, 3] may touch."""
    limits = discs.new_tensor(counts)
    low, high = ((discs[..., :2] + side * discs[..., 2:]) / TILE_PX for side in (-1, 1))
    low, high = torch.nan_to_num(low.amin(1), nan=1e6), torch.nan_to_num(high.amax(1) + 1, nan=-1e6)
    left, top = torch.minimum(low.clamp(min=0).floor(), limits).long().unbind(-1)
    right, bottom = torch.minimum(high.clamp(min=0).floor(), limits).long().unbind(-1)
    width, count = (right - left).clamp(min=0), (right - left).clamp(min=0) * (bottom - top).clamp(min=0)
    shape = torch.repeat_interleave(count)
    offset = torch.arange(len(shape), device=shape.device) - (torch.cumsum(count, 0) - count)[shape]
    row, column = offset // width[shape] + top[shape], offset % width[shape] + left[shape]
    tile = torch.stack((column, row), -1) * TILE_PX + (TILE_PX - 1) / 2
    reach = discs[..., 2].amax(1)[shape] + TILE_PX * math.sqrt(0.5)
    corners = discs[shape, :, :2].unbind(1)
    kept = torch.ones_like(shape, dtype=torch.bool)
    side = 1.0
    if len(corners) == 3:
        side = torch.sign(_cross(corners[1] - corners[0], corners[2] - corners[0]))
    # Both ways along a cone's axis, around a triangle.
    for start, end in zip(corners, corners[1:] + corners[:1]):
        edge = end - start
        kept &= side * _cross(edge, tile - start) >= -reach * edge.square().sum(-1).sqrt()
    return shape[kept], (row * counts[0] + column)[kept]


def _cross(a: Tensor, b: Tensor) -> Tensor:
    """Return the cross products [N] of plane vectors [N, 2]."""
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def _sphere_depth(spheres: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return where the rays (x, y, 1) [N, M] enter spheres [N, 4], inf where they miss.

    Here as below rays start at the depth of the shape's first point instead of at the camera: so float32 is
    exact to micrometres.
    """
    cx, cy, cz, radius = spheres[..., None].unbind(1)
    px, py = x * cz - cx, y * cz - cy
    dd = x * x + y * y + 1
    pd = px * x + py * y
    inside = pd * pd - dd * (px * px + py * py - radius * radius)
    return _where_met(cz - (pd + inside.abs().sqrt()) / dd, inside)  # sqrt is slow on negatives


def _cone_depth(cones: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return where the rays (x, y, 1) [N, M] enter round cones [N, 8] between their end spheres, else inf.

    Closed form after I. Quilez, "Intersectors: rounded cone".
    """
    ax, ay, az, ra, bx, by, bz, rb = cones[..., None].unbind(1)
    ex, ey, ez, shrink = bx - ax, by - ay, bz - az, ra - rb
    axis = ex * ex + ey * ey + ez * ez
    slant = axis - shrink * shrink
    px, py = x * az - ax, y * az - ay  # the ray's start from the first end; its z is 0
    dd = x * x + y * y + 1
    ep, ed, pd, pp = ex * px + ey * py, ex * x + ey * y + ez, px * x + py * y, px * px + py * py
    k2 = slant * dd - ed * ed
    k1 = slant * pd - (ep - shrink * ra) * ed
    k0 = slant * pp - ep * (ep - 2 * shrink * ra) - axis * (ra * ra)
    inside = k1 * k1 - k0 * k2
    t = (-k1 - inside.abs().sqrt()) / k2
    along = ep - ra * shrink + t * ed
    return _where_met(az + t, torch.minimum(torch.minimum(along, slant - along), inside))


def _triangle_depth(triangles: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return where the rays (x, y, 1) [N, M] meet triangles [N, 9], inf where they miss (barycentric)."""
    a, b, c = triangles.unflatten(-1, (3, 3)).unbind(1)
    e, f = b - a, c - a
    normal, ca, ab = torch.linalg.cross(e, f), torch.linalg.cross(c, a), torch.linalg.cross(a, b)
    facing, p, q = (n[:, :1] * x + n[:, 1:2] * y + n[:, 2:] for n in (normal, ca, ab))
    p, q = p / facing, q / facing  # barycentric weights of the second and the third corner
    depth_mm = (a * normal).sum(1, keepdim=True) / facing
    return _where_met(depth_mm, torch.minimum(torch.minimum(p, q), 1 - p - q))


def _where_met(depth_mm: Tensor, margin: Tensor) -> Tensor:
    """Return depth_mm where margin is above 0, else inf; `torch.where` takes twice as long."""
    return torch.nan_to_num(depth_mm, nan=NEAR_MM).clamp_(min=NEAR_MM) / (margin > 0)
