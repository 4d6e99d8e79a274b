"""Camera geometry, hand crop and augmentation, against a literal transcription and by their properties."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frames.transforms import (
    Augmentation,
    Camera,
    Frame,
    Rect,
    augment_image,
    augment_joints,
    box_size_px,
    center_of_mass,
    crop_hand,
    cut_bounding_box,
    draw_augmentation,
    hand_part,
    joints_to_crop,
    recover_uvd,
    resize,
    uvd2xyz,
    window_around,
    xyz2uvd,
)

CAMERA = Camera(100.0, 110.0, 20.0, 15.0)
CUBE_MM = 150.0


def random_depth(seed, shape=(30, 40), low=300, high=900):
    """Return a uint16 picture [H, W] in mm, a third of it without measurement."""
    rng = np.random.default_rng(seed)
    return (rng.integers(low, high, shape) * (rng.random(shape) > 0.3)).astype(np.uint16)


def frozen(array):
    """Return an array that refuses to be written to."""
    array = np.array(array)
    array.flags.writeable = False
    return array


# Camera


def test_projection_by_hand():
    uvd = xyz2uvd(np.array([[10.0, -20.0, 500.0]]), CAMERA)
    np.testing.assert_allclose(uvd, [[10 * 100 / 500 + 20, -20 * 110 / 500 + 15, 500]])


@given(
    x=st.floats(-500, 500), y=st.floats(-500, 500), z=st.floats(100, 2000), frames=st.sampled_from([(), (2,)])
)
def test_back_projection_undoes_projection(x, y, z, frames):
    xyz = np.broadcast_to([x, y, z], (*frames, 3, 3))
    np.testing.assert_allclose(uvd2xyz(xyz2uvd(xyz, CAMERA), CAMERA), xyz, atol=1e-9)


def test_box_and_window_by_hand():
    assert box_size_px(400, 150, CAMERA) == 2 * (int(37.5 + 41.25) // 2) == 78
    assert window_around((20.5, 15.5, 400), 110, CAMERA) == (-7, -14, 48, 45)


def test_box_is_even_and_at_least_two_px():
    assert box_size_px(1e6, 150, CAMERA) == 2
    assert all(box_size_px(depth, 150, CAMERA) % 2 == 0 for depth in range(200, 900, 7))


@pytest.mark.parametrize("depth", [0, -3, np.nan, np.inf, 1e-3])
def test_impossible_centre_depth_is_refused(depth):
    with pytest.raises(ValueError, match="centre depth"):
        box_size_px(depth, 150, CAMERA)


def test_rectangles_intersect_to_nothing_where_they_do_not_meet():
    assert Rect(0, 0, 4, 4).intersect(Rect(2, 1, 9, 9)) == (2, 1, 4, 4)
    apart = Rect(0, 0, 4, 4).intersect(Rect(6, 7, 9, 9))
    assert apart.right - apart.left == 0 and apart.bottom - apart.top == 0


# Crop


def literal_crop(depth, center, cube, margin):
    """Transcribe window, depth cut and crop pixel by pixel; `margin` None is a frame without window."""
    cu, cv, cd = center
    height, width = depth.shape
    frame = depth.astype(float)
    if margin is not None:
        h_u, h_v = (cube - margin) / cd * CAMERA.fx, (cube - margin) / cd * CAMERA.fy
        for row in range(height):
            for column in range(width):
                inside = int(cu - h_u) <= column < int(cu + h_u) and int(cv - h_v) <= row < int(cv + h_v)
                if not inside or not cd - cube < frame[row, column] < cd + cube:
                    frame[row, column] = 0
    box = 2 * (max(int(cube / cd * CAMERA.fx + cube / cd * CAMERA.fy), 2) // 2)
    crop = np.zeros((box, box))
    for r in range(box):
        for c in range(box):
            row, column = int(cv) - box // 2 + r, int(cu) - box // 2 + c
            if 0 <= row < height and 0 <= column < width:
                value = frame[row, column]
                if value != 0 and cd - cube < value < cd + cube:
                    crop[r, c] = value - cd
    return crop


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    u=st.floats(-10, 50),
    v=st.floats(-10, 40),
    d=st.integers(300_000, 900_000).map(lambda um: um / 1000),  # centre files have three decimals
    margin=st.sampled_from([None, 40.0, 30.0]),
)
def test_crop_equals_the_literal_one(seed, u, v, d, margin):
    """Centres lie in the picture, at its border and beyond it."""
    depth = random_depth(seed)
    window = None if margin is None else window_around((u, v, d), CUBE_MM - margin, CAMERA)
    box_px = box_size_px(d, CUBE_MM, CAMERA)
    crop = crop_hand(Frame(depth), (int(u), int(v), d), box_px, CUBE_MM, window)
    assert crop.dtype == np.float32
    np.testing.assert_allclose(crop, literal_crop(depth, (u, v, d), CUBE_MM, margin), atol=1e-3)


def test_depth_range_excludes_its_ends_and_holes():
    depth = np.array([[350, 351, 499, 500, 649, 650, 0, 0]] * 8, np.uint16)
    crop = crop_hand(Frame(depth), (4, 4, 500.0), 8, 150)
    np.testing.assert_array_equal(crop[0], [0, -149, -1, 0, 149, 0, 0, 0])


def test_holes_are_no_hand_where_the_cube_reaches_behind_the_camera():
    depth = np.array([[0, 1, 101, 249, 250, 0, 0, 0]] * 8, np.uint16)
    crop = crop_hand(Frame(depth), (4, 4, 100.0), 8, 150)
    np.testing.assert_array_equal(crop[0], [0, -99, 1, 149, 0, 0, 0, 0])
    assert hand_part(Frame(depth), 100.0, 150).rect == (1, 0, 4, 8)


def test_part_of_a_picture_crops_like_the_whole():
    depth = random_depth(3)
    whole = np.zeros_like(depth)
    whole[5:20, 8:30] = depth[5:20, 8:30]
    part = Frame(depth[5:20, 8:30], left=8, top=5)
    np.testing.assert_array_equal(
        crop_hand(part, (18, 11, 600.0), 50, 150), crop_hand(Frame(whole), (18, 11, 600.0), 50, 150)
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    center=st.tuples(st.integers(-10, 50), st.integers(-10, 40), st.integers(200, 900)),
    shift=st.tuples(st.integers(-5, 5), st.integers(-5, 5)),
    windowed=st.booleans(),
)
def test_hand_part_crops_like_the_whole_frame_at_any_shift(seed, center, shift, windowed):
    frame, (u, v, d) = Frame(random_depth(seed)), center
    window = window_around(center, CUBE_MM - 40, CAMERA) if windowed else None
    part = hand_part(frame, d, CUBE_MM, window)
    shifted = (u + shift[0], v + shift[1], d)
    np.testing.assert_array_equal(
        crop_hand(part, shifted, 40, CUBE_MM, window), crop_hand(frame, shifted, 40, CUBE_MM, window)
    )


def test_joints_go_to_the_crop_and_back():
    rng = np.random.default_rng(0)
    uvd, center = rng.uniform((0, 0, 300), (40, 30, 500), (5, 3)), np.array([20, 15, 400.0])
    crop_uvd = joints_to_crop(uvd, center, box_px=78, image_size=128)
    np.testing.assert_allclose(crop_uvd[:, 0], (uvd[:, 0] - 20) * 127 / 77)
    np.testing.assert_allclose(crop_uvd[:, 2], uvd[:, 2] - 400)
    normalised = crop_uvd / (127, 127, CUBE_MM)
    np.testing.assert_allclose(recover_uvd(normalised, 78, CUBE_MM, center), uvd)


def test_recovery_of_a_batch_uses_each_frames_own_box_and_centre():
    uvd, boxes, cubes = np.full((2, 4, 3), 0.5), np.array([11, 21]), np.array([100.0, 125.0])
    centers = np.array([[1.0, 2, 300], [4, 5, 600]])
    found = recover_uvd(uvd, boxes, cubes, centers)
    np.testing.assert_allclose(found[0], [[6, 7, 350]] * 4)
    np.testing.assert_allclose(found[1], [[14, 15, 662.5]] * 4)


# Augmentation


def blob(size, u, v, depth=-40.0):
    """Return a crop [S, S] with a bright disc at (u, v) px from pixel (S // 2, S // 2)."""
    rows, columns = np.mgrid[:size, :size] - size // 2
    return np.where((columns - u) ** 2 + (rows - v) ** 2 < 16, np.float32(depth), np.float32(0))


@given(angle=st.floats(-30, 30), scale=st.floats(0.8, 1.2), flip=st.booleans())
@settings(max_examples=40, deadline=None)
def test_picture_and_joint_move_together(angle, scale, flip):
    augmentation = Augmentation(angle, scale, flip=flip)
    image = augment_image(blob(128, 22, -17), augmentation)
    ((u, v, d),) = augment_joints(np.array([[22.0, -17.0, -40.0]]), augmentation)
    rows, columns = np.nonzero(image)
    tolerance_px = 1.6 if flip else 0.6  # mirroring columns is about 63.5, the joint's u about 64
    assert abs(columns.mean() - 64 - u) < tolerance_px and abs(rows.mean() - 64 - v) < tolerance_px
    assert image.min() == pytest.approx(d, abs=1e-3) and d == pytest.approx(-40 * scale)


def test_joints_turn_as_the_specification_says():
    (found,) = augment_joints(np.array([[10.0, 0.0, 5.0]]), Augmentation(angle_deg=30, scale=1.2))
    np.testing.assert_allclose(found, (12 * np.cos(np.pi / 6), -12 * np.sin(np.pi / 6), 6))


def test_flip_comes_before_rotation():
    both = augment_joints(np.array([[10.0, 3.0, 5.0]]), Augmentation(angle_deg=20, flip=True))
    mirrored = augment_joints(np.array([[-10.0, 3.0, 5.0]]), Augmentation(angle_deg=20))
    np.testing.assert_allclose(both, mirrored)


def test_neutral_augmentation_changes_nothing():
    image, joints = blob(64, 5, 5), np.random.default_rng(0).normal(0, 10, (3, 3))
    np.testing.assert_array_equal(augment_image(image, Augmentation()), image)
    np.testing.assert_allclose(augment_joints(joints, Augmentation()), joints)


def draws(**switches):
    return [draw_augmentation(np.random.default_rng(seed), **switches) for seed in range(300)]


def test_draws_fill_their_ranges():
    drawn = draws(flip=True)
    for values, low, high in (
        ([d.angle_deg for d in drawn], -30, 30),
        ([d.scale for d in drawn], 0.8, 1.2),
        ([d.shift_px[0] for d in drawn], -5, 5),
        ([d.shift_px[1] for d in drawn], -5, 5),
    ):
        reach = high - low
        assert low <= min(values) < low + 0.05 * reach and high - 0.05 * reach < max(values) <= high
        assert abs(np.mean(values) - (low + high) / 2) < 0.1 * reach
    assert 100 < sum(d.flip for d in drawn) < 200
    assert len({d.shift_px[0] - d.shift_px[1] for d in drawn}) > 1


@pytest.mark.parametrize(
    "part, field", [("rotation", "angle_deg"), ("scale", "scale"), ("shift", "shift_px"), ("flip", "flip")]
)
def test_a_part_that_is_off_stays_neutral_and_leaves_the_others_alike(part, field):
    everything = draws(rotation=True, scale=True, shift=True, flip=True)
    without = draws(**{**dict.fromkeys(("rotation", "scale", "shift", "flip"), True), part: False})
    neutral = getattr(Augmentation(), field)
    assert all(getattr(d, field) == neutral for d in without)
    assert [d._replace(**{field: neutral}) for d in everything] == without


def test_defaults_are_rotation_scale_and_shift_without_flip():
    assert draws() == draws(rotation=True, scale=True, shift=True, flip=False)


# Centres


def test_center_of_mass_by_hand():
    depth = np.zeros((6, 8), np.uint16)
    depth[1, 2], depth[3, 6] = 400, 600
    np.testing.assert_allclose(center_of_mass(Frame(depth)), (4, 2, 500))
    np.testing.assert_allclose(center_of_mass(Frame(depth, left=10, top=20)), (14, 22, 500))
    with pytest.raises(ValueError, match="empty"):
        center_of_mass(Frame(np.zeros((6, 8), np.uint16)))


def test_bounding_box_drops_what_lies_far_behind_the_hand():
    depth = np.full((20, 20), 1500, np.uint16)
    depth[5:15, 5:15] = 500
    depth[5:15, 12:15] = 650  # 105 mm behind the second mean, 545 mm
    frame = cut_bounding_box(Frame(depth), (4.9, 4.2, 12.7, 12.7))
    assert (frame.left, frame.top, *frame.depth_mm.shape) == (4, 4, 12, 12)
    assert set(np.unique(frame.depth_mm)) == {0, 500}


def literal_bounding_box(depth, left, top, width, height):
    """Transcribe the two means and the cut pixel by pixel; return the whole picture, cut."""
    kept = np.zeros(depth.shape)
    for row in range(depth.shape[0]):
        for column in range(depth.shape[1]):
            if left <= column < left + width and top <= row < top + height:
                kept[row, column] = depth[row, column]
    mean = np.mean([value for value in kept.flat if value])
    second = np.mean([value for value in kept.flat if value and value <= mean + 100])
    return np.where(kept > second + 100, 0, kept)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), left=st.integers(-5, 30), top=st.integers(-5, 20))
def test_bounding_box_equals_the_literal_one(seed, left, top):
    depth = random_depth(seed)
    frame = cut_bounding_box(Frame(depth), (left + 0.9 * (left >= 0), top, 15.7, 12))
    whole = np.zeros(depth.shape)
    rect = frame.rect
    whole[rect.top : rect.bottom, rect.left : rect.right] = frame.depth_mm
    np.testing.assert_array_equal(whole, literal_bounding_box(depth, left, top, 15, 12))


def test_empty_bounding_box_is_refused():
    with pytest.raises(ValueError, match="bounding box holds no depth"):
        cut_bounding_box(Frame(random_depth(0)), (100, 100, 5, 5))


def test_nothing_writes_to_its_input():
    """Every array is read-only here, so that a write would raise."""
    depth, joints = frozen(random_depth(0, (240, 320))), frozen([[10.0, 20.0, 400.0]])
    frame, augmentation = Frame(depth), Augmentation(10, 1.1, (1, 2), True)
    crop = frozen(crop_hand(frame, frozen([160.0, 120.0, 500.0]), 80, 150, Rect(100, 100, 200, 200)))
    augment_image(frozen(resize(crop, 128)), augmentation)
    augment_joints(joints, augmentation)
    joints_to_crop(joints, frozen([1.0, 2.0, 3.0]), 80, 128)
    recover_uvd(joints, 80, 150, frozen([1.0, 2.0, 3.0]))
    uvd2xyz(xyz2uvd(joints, CAMERA), CAMERA)
    cut_bounding_box(frame, (100, 100, 50, 50))
    center_of_mass(frame)


# Beyond the published augmentation


def test_erasing_empties_its_rectangle_and_nothing_else():
    image = np.ones((32, 32), np.float32)
    erased = augment_image(image, Augmentation(erased=(0.25, 0.5, 0.125, 0.25)))
    assert not erased[16:24, 8:12].any() and erased.sum() == 32 * 32 - 8 * 4 and image.all()


def test_noise_has_its_size_its_seed_and_leaves_what_was_not_measured():
    image = np.zeros((64, 64), np.float32)
    image[:32] = 20
    noisy = augment_image(image, Augmentation(noise=(3.0, 7)))
    assert noisy.dtype == np.float32 and not noisy[32:].any()
    assert noisy[:32].mean() == pytest.approx(20, abs=0.3) and noisy[:32].std() == pytest.approx(3, abs=0.2)
    np.testing.assert_array_equal(noisy, augment_image(image, Augmentation(noise=(3.0, 7))))
    assert (noisy != augment_image(image, Augmentation(noise=(3.0, 8)))).any()


@pytest.mark.parametrize("augmentation", [Augmentation(erased=(0, 0, 1, 1)), Augmentation(noise=(9.0, 1))])
def test_erasing_and_noise_leave_labels_alone(augmentation):
    uvd = np.random.default_rng(0).normal(size=(21, 3))
    np.testing.assert_array_equal(augment_joints(uvd, augmentation), uvd)


def test_parts_beyond_the_published_ones_are_off_and_leave_their_draws_alone():
    plain = draw_augmentation(random.Random(1))
    assert plain.shift_mm == (0, 0, 0) and plain.erased is None and plain.noise == (0, 0)
    more = dict(rotation_deg=180, shift_mm=20, erasing=1, noise_mm=2)
    strong = [draw_augmentation(random.Random(seed), **more) for seed in range(300)]
    assert strong[1][1:4] == plain[1:4] and strong[1].angle_deg == pytest.approx(6 * plain.angle_deg)
    assert 170 < max(one.angle_deg for one in strong) <= 180
    shifts = np.array([one.shift_mm for one in strong])
    assert (np.abs(shifts).max(axis=0) > 19).all() and np.abs(shifts).max() <= 20
    left, top, width, height = np.array([one.erased for one in strong]).T
    assert min(left.min(), top.min()) >= 0 and max((left + width).max(), (top + height).max()) <= 1
    assert len({one.noise for one in strong}) == 300 and strong[0].noise[0] == 2
    some = [draw_augmentation(random.Random(seed), erasing=0.3).erased for seed in range(1000)]
    assert sum(erased is not None for erased in some) == pytest.approx(300, abs=60)
