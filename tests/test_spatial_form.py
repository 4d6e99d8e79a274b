"""The spatial form (target heatmaps and depth maps), against golden data and a literal transcription."""

import cv2
import numpy as np
import pytest
import torch
from conftest import expected
from hypothesis import given
from hypothesis import strategies as st

from model import on_grid, spatial_form

CUBE_MM = 150


def literal_heatmap(u_px, v_px, image_size, label_size, kernel_size, sigma):
    """Transcribe the heatmap's definition for one joint; u, v are px of the crop, from its centre."""
    p_u = u_px / (image_size - 1) * (label_size - 1) + label_size // 2
    p_v = v_px / (image_size - 1) * (label_size - 1) + label_size // 2
    i, j = int(np.floor(p_u)), int(np.floor(p_v))
    fu, fv = p_u - i, p_v - j
    d = (min(fu, fv) + max(fu + fv - 1, 0)) / 2
    spread = np.zeros((label_size, label_size))
    spread[j + 1, i + 1] = d
    spread[j, i + 1] = fu - d
    spread[j + 1, i] = fv - d
    spread[j, i] = 1 + d - fu - fv
    return cv2.GaussianBlur(spread, (kernel_size, kernel_size), sigma)


def literal_depthmap(heatmap, joint_mm, surface_mm, mask):
    """Transcribe the depth map's definition for one joint, pixel by pixel; result over the cube."""
    depthmap = np.zeros_like(surface_mm)
    for row in range(len(surface_mm)):
        for column in range(len(surface_mm)):
            if heatmap[row, column] > 0:
                depthmap[row, column] = (joint_mm - surface_mm[row, column]) * mask[row, column]
    return depthmap / CUBE_MM


def random_surface(seed, label_size):
    """Return (label image in mm, mask) [L, L] of a random surface with holes."""
    rng = np.random.default_rng(seed)
    surface_mm = rng.uniform(-CUBE_MM, CUBE_MM, (label_size, label_size))
    mask = (rng.random((label_size, label_size)) < 0.6).astype(float)
    return surface_mm * mask, mask


def on_uneven_grid(label_size, position_px):
    """Return the normalised coordinate of a position on the heatmap grid, in px from its first pixel."""
    return (position_px - label_size // 2) / (label_size - 1)


def uvd_tensor(u, v, d):
    return torch.tensor([[[u, v, d]]], dtype=torch.float64)


def blank(label_size):
    """Return an empty label image and a full mask [1, 1, L, L]."""
    return torch.zeros(1, 1, label_size, label_size), torch.ones(1, 1, label_size, label_size)


@pytest.mark.parametrize("label_size, kernel_size, sigma", [(64, 7, 1.5), (32, 5, 1.0)])
def test_heatmaps_anywhere_on_the_grid_equal_golden(label_size, kernel_size, sigma):
    key = f"{label_size}_{kernel_size}_{sigma}"
    points, heatmaps = expected("heatmaps")[f"points_{key}"], expected("heatmaps")[f"heatmaps_{key}"]
    uvd = np.concatenate([on_uneven_grid(label_size, points), np.zeros((len(points), 1))], axis=1)
    found, _ = spatial_form(torch.from_numpy(uvd)[None], *blank(label_size), kernel_size, sigma)
    np.testing.assert_allclose(found[0].numpy(), heatmaps, atol=1e-5, rtol=0)
    assert points.min() < 1 and points.max() > label_size - 2, "the golden points include the edges"


@given(
    seed=st.integers(0, 2**32),
    label_size=st.sampled_from([16, 32, 64]),
    blur=st.sampled_from([(7, 1.5), (5, 1.0), (3, 0.7), (1, 1.0)]),
    share_u=st.floats(0, 1, exclude_max=True),
    share_v=st.floats(0, 1, exclude_max=True),
    joint_mm=st.floats(-CUBE_MM, CUBE_MM),
)
def test_fast_form_equals_the_literal_one(seed, label_size, blur, share_u, share_v, joint_mm):
    """Joints lie anywhere from the first pixel to just before the last, edges included."""
    image_size = 2 * label_size
    u, v = (on_uneven_grid(label_size, share * (label_size - 1)) for share in (share_u, share_v))
    uvd = uvd_tensor(u, v, joint_mm / CUBE_MM)
    if not on_grid(uvd[..., :2], label_size):  # rounding moved it onto the last pixel
        return
    surface_mm, mask = random_surface(seed, label_size)
    heatmap = literal_heatmap(u * (image_size - 1), v * (image_size - 1), image_size, label_size, *blur)
    heatmaps, depthmaps = spatial_form(
        uvd, torch.from_numpy(surface_mm / CUBE_MM)[None, None], torch.from_numpy(mask)[None, None], *blur
    )
    np.testing.assert_allclose(heatmaps[0, 0].numpy(), heatmap, atol=1e-9)
    depthmap = literal_depthmap(heatmap, joint_mm, surface_mm, mask)
    clear = (heatmap > 1e-12) | (heatmap == 0) & (heatmaps[0, 0].numpy() == 0)
    np.testing.assert_allclose(depthmaps[0, 0].numpy()[clear], depthmap[clear], atol=1e-9)
    assert (clear | (heatmap < 1e-12)).all()


@pytest.mark.parametrize("corner", [(0, 0), (0, 30.5), (30.999, 0), (30.999, 30.999), (0.5, 30)])
def test_form_at_the_edges_equals_the_literal_one(corner):
    u, v = (on_uneven_grid(32, position) for position in corner)
    surface_mm, mask = random_surface(0, 32)
    heatmaps, depthmaps = spatial_form(
        uvd_tensor(u, v, 0.25),
        torch.from_numpy(surface_mm / CUBE_MM)[None, None],
        torch.from_numpy(mask)[None, None],
    )
    heatmap = literal_heatmap(u * 63, v * 63, 64, 32, 7, 1.5)
    np.testing.assert_allclose(heatmaps[0, 0].numpy(), heatmap, atol=1e-12)
    depthmap = literal_depthmap(heatmap, 0.25 * CUBE_MM, surface_mm, mask)
    np.testing.assert_allclose(depthmaps[0, 0].numpy(), depthmap, atol=1e-12)


def test_batches_and_joints_do_not_mix():
    rng = np.random.default_rng(1)
    uvd = torch.from_numpy(rng.uniform(-0.4, 0.4, (3, 5, 3)))
    surfaces = torch.from_numpy(rng.uniform(-1, 1, (3, 1, 32, 32)))
    mask = (surfaces > 0).double()
    heatmaps, depthmaps = spatial_form(uvd, surfaces, mask)
    assert heatmaps.shape == depthmaps.shape == (3, 5, 32, 32)
    for b in range(3):
        for j in range(5):
            alone = spatial_form(uvd[b : b + 1, j : j + 1], surfaces[b : b + 1], mask[b : b + 1])
            torch.testing.assert_close(heatmaps[b, j], alone[0][0, 0])
            torch.testing.assert_close(depthmaps[b, j], alone[1][0, 0])


@given(position=st.tuples(st.floats(4, 58.9), st.floats(4, 58.9)))
def test_heatmap_sums_to_one_away_from_the_edge(position):
    u, v = (on_uneven_grid(64, p) for p in position)
    heatmaps, _ = spatial_form(uvd_tensor(u, v, 0), *blank(64))
    assert heatmaps.sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("position", [(-0.01, 5), (5, -0.01), (31, 5), (5, 31), (-40, 5), (5, 1e6)])
def test_joint_off_the_grid_gets_empty_maps_and_never_wraps_round(position):
    u, v = (on_uneven_grid(32, p) for p in position)
    uvd = uvd_tensor(u, v, 0.1)
    assert not on_grid(uvd[..., :2], 32)
    heatmaps, depthmaps = spatial_form(uvd, *blank(32))
    assert not heatmaps.any() and not depthmaps.any()


def test_form_keeps_the_precision_it_is_given_and_its_inputs():
    uvd = torch.full((1, 2, 3), 0.123)
    surface, mask = torch.rand(1, 1, 32, 32), torch.ones(1, 1, 32, 32)
    before = uvd.clone(), surface.clone(), mask.clone()
    heatmaps, depthmaps = spatial_form(uvd, surface, mask)
    assert heatmaps.dtype == depthmaps.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(before, (uvd, surface, mask)))
