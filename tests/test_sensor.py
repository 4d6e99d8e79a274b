"""Sensors and scenes: noise, units, steps, what is lost and what is averaged; bodies, walls and hands."""

import pytest
import torch

from rendering.hand import joints_xyz
from rendering.scene import SCENE_COLUMNS, draw_scenes, render_scene
from rendering.sensor import SENSORS, measure


def measured_by(sensor, exact, fx_px=None):
    return measure(exact, sensor, fx_px or sensor.camera.fx, torch.Generator().manual_seed(0))


def flat_wall(sensor, depth_mm):
    return measured_by(sensor, torch.full((1, 120, 160), float(depth_mm)))


@pytest.mark.parametrize("name", SENSORS)
def test_noise_grows_with_the_square_of_depth(name):
    fine = SENSORS[name]._replace(step_per_m2=0.0, unit_mm=1e-3)  # so that nothing but noise is seen
    near, far = flat_wall(fine, 200), flat_wall(fine, 400)
    assert near.std() > 50 * fine.unit_mm
    assert 3.8 < far.std() / near.std() < 4.2


@pytest.mark.parametrize("name", SENSORS)
def test_numbers_are_of_the_sensor_s_unit(name):
    sensor = SENSORS[name]._replace(step_per_m2=0.0)
    far = flat_wall(sensor, 500)
    assert torch.equal((far / sensor.unit_mm).round(), far / sensor.unit_mm)
    assert abs(float(far.mean()) - 500) < 1
    assert (flat_wall(sensor, 5000) == sensor.missing_mm).all()


def test_disparity_steps_are_coarser_far_away():
    steps = [flat_wall(SENSORS["NYU"], depth).unique().diff().float().median() for depth in (750, 1500)]
    assert 1 <= steps[0] <= 2 and 5 <= steps[1] <= 8  # real NYU frames: 1.6 mm at 755 mm


def test_far_surfaces_are_lost_beside_near_ones_and_where_they_are_steep():
    exact = torch.full((1, 120, 160), 750.0)
    exact[:, 30:90, 60:100] = 500.0
    sensor = SENSORS["SR305"]
    measured = measured_by(sensor, exact)
    missing = measured == 0
    assert missing[0, 45:75, 102:105].float().mean() > 0.9  # beside the edge, on the far side
    assert missing[0, 35:85, 66:94].float().mean() < 0.01  # the near surface stays
    assert missing[0, 5:20].float().mean() < 0.05
    grazing = exact.clone()
    grazing[:] = 500 + 14 * torch.arange(160)
    assert (measured_by(sensor, grazing) == 0).float().mean() > 0.5


def test_a_kinect_measures_across_small_jumps_and_nothing_beside_large_ones():
    sensor = SENSORS["NYU"]
    for jump_mm, some_missing in ((30, False), (200, True)):
        exact = torch.full((1, 120, 160), 750.0)
        exact[:, 30:90, 60:100] -= jump_mm
        missing = measured_by(sensor, exact) == 2001
        assert missing.any() == some_missing


def quiet(name):
    """Return a sensor that measures every pixel, and but for averaging without an error."""
    return SENSORS[name]._replace(noise_per_m2=0.0, step_per_m2=0.0, unit_mm=1e-3, edge_px=0.0)


def waves(axis):
    """Return exact depth [160, 160] with waves along an axis, 8 px long, before one edge and behind it."""
    along = torch.arange(160.0)
    surface = 500 + 2 * torch.cos(along * torch.pi / 4) + 40 * (along >= 80)
    return surface.expand(160, 160) if axis == 1 else surface[:, None].expand(160, 160)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", SENSORS)
def test_depth_is_averaged_within_a_surface_but_not_across_two(name, axis):
    sensor, exact = quiet(name), waves(axis)[None]
    measured = measured_by(sensor, exact)
    kept = measured[measured != sensor.missing_mm]
    assert len(kept) > 0.9 * measured.numel()
    assert not ((kept > 503) & (kept < 537)).any()
    for middle_mm in (500, 540):
        seen = kept[(kept - middle_mm).abs() < 5]
        assert abs(seen.mean() - middle_mm) < 0.1
        assert seen.std() < 0.8 * 2**0.5
    alone = sensor._replace(window_px=1)
    measured = measured_by(alone, exact)
    kept = measured != sensor.missing_mm
    assert torch.allclose(measured[kept], exact[kept], atol=1e-2)


def test_some_frames_are_averaged_more_than_others_and_smaller_pictures_over_fewer_pixels():
    sensor = quiet("NYU")
    exact = waves(1).expand(8, 160, 160)[:, :, :80].contiguous()
    full, small = (
        measured_by(sensor, exact, fx_px).std((1, 2)) for fx_px in (sensor.camera.fx, sensor.camera.fx / 5)
    )
    assert full.max() > 1.3 * full.min()
    assert (small > full).all()


def test_a_scene_does_not_depend_on_its_batch_and_shows_the_hand_in_front():
    sensor = SENSORS["SR305"]
    uniform = torch.rand(5, SCENE_COLUMNS, generator=torch.Generator().manual_seed(2))
    depth_mm, mask = render_scene(draw_scenes(uniform, sensor), torch.tensor(sensor.camera), sensor.size_px)
    alone, alone_mask = render_scene(
        draw_scenes(uniform[3:4], sensor), torch.tensor(sensor.camera), sensor.size_px
    )
    assert torch.equal(depth_mm[3:4], alone) and torch.equal(mask[3:4], alone_mask)
    joints = joints_xyz(draw_scenes(uniform, sensor).hands)
    near, far = sensor.hand_mm
    middle = (joints[..., 2].amin(1) + joints[..., 2].amax(1)) / 2
    assert (middle >= near - 0.1).all() and (middle <= far + 0.1).all()
    assert mask.flatten(1).sum(1).min() > 1000


@pytest.mark.parametrize("name", SENSORS)
def test_time_of_flight_alone_measures_between_two_surfaces(name):
    exact = torch.full((1, 120, 160), 500.0)
    exact[:, 30:90, 60:100] = 300.0
    measured = measured_by(SENSORS[name], exact)
    flying = (measured > 320) & (measured < 480)
    assert flying.any() == (name in ("ICVL", "MSRA"))


def background_share(sensor):
    """Return how much [400] of what is no hand or arm shows something behind them, in small pictures."""
    uniform = torch.rand(400, SCENE_COLUMNS, generator=torch.Generator().manual_seed(2))
    scenes, empty = (draw_scenes(uniform, s) for s in (sensor, sensor._replace(body=0.0, wall=0.0)))
    camera, size_px = torch.tensor(sensor.camera) / 8, [size // 8 for size in sensor.size_px]
    exact_mm, _ = render_scene(scenes, camera, size_px)
    arm_mm, _ = render_scene(scenes._replace(behind=empty.behind, wall=empty.wall), camera, size_px)
    free = arm_mm > 10_000
    return (free & (exact_mm < 10_000)).sum((1, 2)) / free.sum((1, 2))


@pytest.mark.parametrize("name, body, wall", [("NYU", 0.8, 0.5), ("HAND17", 0.6, 0.2)])
def test_bodies_and_walls_are_behind_hands_in_their_share_of_frames(name, body, wall):
    sensor = SENSORS[name]
    assert abs((background_share(sensor) > 0.99).float().mean() - wall) < 0.08
    bodies = background_share(sensor._replace(wall=0.0))
    assert bodies.max() < 0.7
    assert abs((bodies > 0.02).float().mean() - body) < 0.08


@pytest.mark.parametrize("name", SENSORS)
def test_hands_of_icvl_are_left_and_all_others_right(name):
    uniform = torch.rand(20, SCENE_COLUMNS, generator=torch.Generator().manual_seed(2))
    left = draw_scenes(uniform, SENSORS[name]).hands.left
    assert left.all() if name == "ICVL" else not left.any()
