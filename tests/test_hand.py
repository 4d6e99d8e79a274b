"""The parametric hand and its renderer: anatomical limits, reproducibility, exact depth."""

import numpy as np
import pytest
import torch

from rendering import anatomy, hand, poses
from rendering.hand import hand_and_arm, joints_xyz, move_to
from rendering.poses import Noise, draw_hands
from rendering.surface import build_surface, render_depth

CAMERA = torch.tensor([400.0, 410.0, 63.5, 47.0])
SIZE_PX = (128, 96)


def hands_of(count, seed=0, **options):
    uniform = torch.rand(count, poses.NOISE_COLUMNS, generator=torch.Generator().manual_seed(seed))
    return move_to(draw_hands(Noise(uniform), **options), torch.tensor([0.0, 0.0, 600.0]).expand(count, 3))


def rays():
    fx, fy, u0, v0 = CAMERA.double().numpy()
    v, u = np.mgrid[: SIZE_PX[1], : SIZE_PX[0]]
    return np.stack([(u - u0) / fx, (v - v0) / fy, np.ones(u.shape)], -1)


def brute_force_depth(spheres):
    """Return the depth of the hull of two spheres [2, 4] as that of 1501 spheres between them, in float64."""
    spheres = np.asarray(spheres, np.float64)
    weights = np.linspace(0, 1, 1501)[:, None]
    chain = np.concatenate([1 - weights, weights], 1) @ spheres
    direction = rays().reshape(-1, 3)
    unit = direction / np.linalg.norm(direction, axis=1, keepdims=True)
    pd = unit @ chain[:, :3].T
    inside = pd**2 - (chain[:, :3] ** 2).sum(1) + chain[:, 3] ** 2
    distance = np.where(inside >= 0, pd - np.sqrt(np.abs(inside)), np.inf).min(1)
    return (distance * unit[:, 2]).reshape(SIZE_PX[1], SIZE_PX[0])


def rendered(spheres, cones=(), wedges=()):
    surface = build_surface(torch.tensor(spheres, dtype=torch.float32)[None], cones, wedges)
    return render_depth(surface, CAMERA, SIZE_PX)[0].double().numpy()


def test_a_sphere_has_its_closed_form_depth():
    center, radius = np.array([12.0, -9.0, 500.0]), 31.0
    direction = rays()
    a, b, c = (direction**2).sum(-1), direction @ center, center @ center - radius**2
    exact = np.where(b**2 >= a * c, (b - np.sqrt(np.abs(b**2 - a * c))) / a, np.inf)
    depth = rendered([[*center, radius], [*center, radius]], cones=((0, 1),))
    assert (np.isfinite(depth) == np.isfinite(exact)).mean() > 0.9999
    both = np.isfinite(depth) & np.isfinite(exact)
    assert both.sum() > 1500
    assert np.abs(depth[both] - exact[both]).max() < 0.1


@pytest.mark.parametrize(
    "spheres",
    [
        [[-30, -20, 480, 14], [35, 10, 530, 14]],  # capsule
        [[-30, 25, 520, 20], [30, -20, 470, 7]],  # round cone
        [[0, 0, 600, 12], [6, 4, 480, 16]],  # towards the camera
        [[0, 5, 500, 30], [5, 0, 495, 12]],  # one end swallows the other
        [[300, 200, 500, 20], [-10, 5, 520, 9]],  # leaves the picture
    ],
)
def test_capsules_and_round_cones_match_brute_force(spheres):
    depth, exact = rendered(spheres, cones=((0, 1),)), brute_force_depth(spheres)
    both = np.isfinite(depth) & np.isfinite(exact)
    assert both.sum() > 300
    assert (
        np.isfinite(depth) != np.isfinite(exact)
    ).sum() <= 12  # the brute force is bumpy at the silhouette
    assert np.quantile(np.abs(depth[both] - exact[both]), 0.98) < 0.1
    assert (exact[both] - depth[both]).min() > -0.1  # the chain of spheres lies inside the hull


def test_a_wedge_is_the_hull_of_its_spheres():
    spheres = np.array([[-25, -20, 500, 12], [28, -8, 520, 9], [2, 24, 485, 6]], np.float64)
    depth = rendered(spheres.tolist(), wedges=((0, 1, 2),))
    grid = [(a, b, 150 - a - b) for a in range(151) for b in range(151 - a)]
    chain = np.array(grid) / 150 @ spheres
    direction = rays()[::4, ::4].reshape(-1, 3)
    dd, pd = (direction**2).sum(1)[:, None], direction @ chain[:, :3].T
    inside = pd**2 - dd * ((chain[:, :3] ** 2).sum(1) - chain[:, 3] ** 2)
    exact = np.where(inside >= 0, (pd - np.sqrt(np.abs(inside))) / dd, np.inf).min(1)
    depth = depth[::4, ::4].ravel()
    both = np.isfinite(depth) & np.isfinite(exact)
    assert both.sum() > 80
    assert np.quantile(np.abs(depth[both] - exact[both]), 0.97) < 0.1
    assert (exact[both] - depth[both]).min() > -0.1


def test_joints_lie_inside_the_flesh_where_the_finger_is():
    hands = hands_of(200)
    camera = torch.tensor([400.0, 410.0, 150, 150])
    depth = render_depth(hand_and_arm(hands)[0], camera, (300, 300)).numpy()
    joints = joints_xyz(hands).numpy()
    u = np.rint(joints[..., 0] / joints[..., 2] * 400 + 150).astype(int)
    v = np.rint(joints[..., 1] / joints[..., 2] * 410 + 150).astype(int)
    surface = depth[np.arange(200)[:, None], v, u]
    assert np.isfinite(surface).all()  # a joint's pixel shows the hand
    covered_mm = joints[..., 2] - surface
    assert covered_mm.min() > 1.5  # under the skin
    visible = covered_mm < 40  # else another finger is before it
    assert visible.mean() > 0.8
    assert np.median(covered_mm[visible]) < 15


@pytest.mark.slow
def test_10000_hands_keep_bones_and_angles_within_their_limits():
    parts = [
        hands_of(500, seed, left_share=0.5) for seed in range(20)
    ]  # 10,000 at once would not fit the caches
    hands = hand.Hands(*(torch.cat(fields) for fields in zip(*parts)))
    assert abs(hands.left.float().mean() - 0.5) < 0.02
    low, high = poses.limits_rad(torch.zeros(1))
    assert (hands.angles >= low - 1e-6).all() and (hands.angles <= high + 1e-6).all()
    width = (hands.angles.amax(0) - hands.angles.amin(0)) / (high - low)
    assert width.min() > 0.8  # ... and use them
    dip, pip = hands.angles[:, 7:20:4].rad2deg(), hands.angles[:, 6:20:4].rad2deg()
    free = dip < anatomy.LIMITS_DEG["dip"][1] - 0.01
    assert (dip - anatomy.DIP_OVER_PIP * pip)[free].abs().max() <= anatomy.DIP_SPREAD_DEG + 0.01
    mean, deviation = torch.tensor(anatomy.BONES_MM), torch.tensor(anatomy.BONES_SD_MM)
    score = (hands.bones_mm - mean) / deviation
    assert score.abs().max() <= anatomy.BONE_LIMIT_SD + 1e-4
    assert score.mean().abs() < 0.03 and abs(score.std() - 1) < 0.05
    assert hands.girth.min() >= anatomy.GIRTH_LIMITS[0] and hands.girth.max() <= anatomy.GIRTH_LIMITS[1]
    joints = joints_xyz(hands)
    chains = joints[:, 1:].reshape(-1, 5, 4, 3)
    lengths = (chains[:, :, 1:] - chains[:, :, :-1]).norm(dim=-1)
    assert torch.allclose(lengths, hands.bones_mm[:, :, 1:], atol=1e-2)
    length_mm = (joints[:, 12] - joints[:, 0]).norm(dim=-1).amax()
    assert length_mm < 230
    assert (
        hand.overlap_mm(hands.bones_mm, hands.girth, hands.angles) <= poses.OVERLAP_MM
    ).float().mean() > 0.97


def test_an_open_right_hand_shows_its_thumb_on_the_right_and_a_left_one_on_the_left():
    hands = hands_of(1)
    opened = poses.gesture_angles(torch.zeros(1))[:1]
    upright = torch.tensor([[1.0, 0, 0, 0]])
    for left, side in ((False, 1), (True, -1)):
        joints = joints_xyz(hands._replace(angles=opened, rotation=upright, left=torch.tensor([left])))[0]
        assert side * (joints[4, 0] - joints[20, 0]) > 80  # thumb's and little finger's tips
        assert (joints[12, 1] < joints[0, 1] - 120).all()  # fingers up
        bent = hands._replace(angles=poses.gesture_angles(torch.zeros(1))[3:4], rotation=upright)
        assert joints_xyz(bent)[0, 12, 2] < joints_xyz(bent)[0, 9, 2]  # a fist closes towards the palm's side


def mean_hands(count):
    return torch.tensor(anatomy.BONES_MM).expand(count, 5, 4), torch.ones(count)


def test_fingers_of_no_gesture_cut_through_each_other_or_the_palm():
    angles = poses.gesture_angles(torch.zeros(1))
    overlap_mm = hand.overlap_mm(*mean_hands(len(angles)), angles)
    deepest = {name: float(mm) for name, mm in zip(anatomy.GESTURES, overlap_mm) if mm > poses.OVERLAP_MM}
    assert not deepest
    through_the_palm = angles[list(anatomy.GESTURES).index("fist")].repeat(2, 1)
    through_the_palm[1, 4:20:4] += 0.5
    assert hand.overlap_mm(*mean_hands(2), through_the_palm)[1] > 2 * poses.OVERLAP_MM


def test_a_fist_is_closed_and_crossed_fingers_cross():
    names, bones_mm = list(anatomy.GESTURES), mean_hands(1)[0]
    angles = poses.gesture_angles(torch.zeros(1))
    fist, crossed = (hand._local_joints(bones_mm, angles[[names.index(name)]])[0] for name in ("fist", "R"))
    knuckles, tips = fist[5::4], fist[8::4]
    halfway = (hand._carpus(bones_mm)[0, 1:] + 2 * knuckles) / 3
    assert (tips - halfway).norm(dim=1).max() < 25  # flesh on flesh
    assert (tips[:-1] - tips[1:]).norm(dim=1).max() < 21  # side by side
    index, middle = crossed[8], crossed[12]
    assert index[0] < middle[0] and index[2] < middle[2]  # the index crosses before the middle finger


def test_a_sleeve_makes_the_arm_thicker_from_where_it_begins():
    hands = hands_of(1)._replace(arm_girth=torch.ones(1), forearm_mm=torch.tensor([200.0]))
    radii = [
        hand._forearm_spheres(hands._replace(sleeve_mm=torch.tensor([mm])))[1][0] for mm in (60.0, 999.0)
    ]
    assert (radii[0] - radii[1])[2:4].tolist() == pytest.approx([anatomy.SLEEVE_MM[1]] * 2)
    places = hand._forearm_spheres(hands._replace(sleeve_mm=torch.tensor([60.0])))[0][0, 4:]
    assert float(places.mean(0).norm()) == pytest.approx(60, abs=0.1)


def test_palms_are_flat_or_hollow_and_fingers_and_palms_of_their_own_thickness():
    angles = poses.gesture_angles(torch.zeros(1))[[list(anatomy.GESTURES).index("open")]].expand(2, 22)
    hands = hands_of(1)
    hands = type(hands)(*(field.expand(2, *field.shape[1:]) for field in hands))
    hands = hands._replace(angles=angles, hollow=torch.tensor([0.0, 1.0]), flesh=torch.ones(2, 2))

    def front(hands, sphere):
        centres, radii = hand._local_spheres(hands, hand._local_joints(hands.bones_mm, hands.angles))
        return centres[:, sphere, 2] - radii[:, sphere]

    palm = front(hands, anatomy.CARPUS_INDEX)
    for ball in (anatomy.THENAR, anatomy.HYPOTHENAR):
        flat, hollow = (palm - front(hands, ball)).tolist()
        assert hollow - flat > 5 and flat < 10
    for which, sphere in enumerate((8, anatomy.HEEL)):
        thicker = hands._replace(flesh=torch.ones(2, 2).index_fill(1, torch.tensor(which), 1.1))
        assert (front(hands, sphere) - front(thicker, sphere) > 0.5).all()
        other = (anatomy.HEEL, 8)[which]
        assert torch.equal(front(hands, other), front(thicker, other))
    drawn = hands_of(1000)
    assert drawn.hollow.min() < 0.05 and drawn.hollow.max() > 0.95
    for limits, thickness in zip((anatomy.FINGER_GIRTH, anatomy.PALM_GIRTH), drawn.flesh.unbind(1)):
        assert limits[0] <= thickness.min() < thickness.max() <= limits[1]


def frontal_depth(gesture):
    """Return joints_uvd [21, 3] and the exact depth [300, 300] of a mean hand, its palm to the camera."""
    bones_mm, girth = mean_hands(1)
    angles = poses.gesture_angles(torch.zeros(1))[[list(anatomy.GESTURES).index(gesture)]]
    upright, wrist_mm = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[0.0, 80, 600]])
    hands = hands_of(1)._replace(bones_mm=bones_mm, girth=girth, angles=angles, rotation=upright)
    hands = hands._replace(wrist_mm=wrist_mm, hollow=torch.zeros(1), flesh=torch.ones(1, 2))
    depth = render_depth(hand_and_arm(hands)[0], torch.tensor([1000.0, 1000, 150, 150]), (300, 300))[0]
    joints = joints_xyz(hands)[0]
    return torch.cat((joints[:, :2] / joints[:, 2:] * 1000 + 150, joints[:, 2:]), 1), depth


def test_fingers_that_touch_leave_shallow_grooves():
    joints_uvd, depth = frontal_depth("thumb up")
    ends = joints_uvd[7:20:4, :2]
    between = (ends[:-1] + ends[1:]) / 2
    on_mm, between_mm = (depth[tuple(pixels.flip(1).round().long().T)] for pixels in (ends, between))
    groove_mm = between_mm - (on_mm[:-1] + on_mm[1:]) / 2
    assert (groove_mm[:2] > 1).all() and (groove_mm < 2.5).all()


def test_flesh_between_fingers_that_part_goes_into_one_of_them():
    hands = hands_of(500)
    centres, radii = hand._local_spheres(hands, hand._local_joints(hands.bones_mm, hands.angles))
    fingers, sizes = (part[:, :20].unflatten(1, (5, 4))[:, 1:, 1:] for part in (centres, radii))
    gap_mm = (fingers[:, :-1] - fingers[:, 1:]).norm(dim=-1) - sizes[:, :-1] - sizes[:, 1:]
    between, between_radii = centres[:, anatomy.GROOVES], radii[:, anatomy.GROOVES]
    apart = gap_mm.flatten(1) > anatomy.PARTED_MM + 0.01
    assert 0.1 < apart.float().mean() < 0.9
    assert (between_radii[apart] == 0).all() and (between_radii[~apart] > 0).float().mean() > 0.99
    assert torch.equal(between[apart], fingers[:, :-1].flatten(1, 2)[apart])
    joints_uvd, depth = frontal_depth("two")
    u, v = ((joints_uvd[7] + joints_uvd[11]) / 2)[:2].round().long().tolist()  # of two stretched fingers
    assert not depth[v, u].isfinite()


def test_in_a_fist_the_palm_rises_up_to_the_fingertips():
    joints_uvd, depth = frontal_depth("fist")
    u, v = joints_uvd[11, :2].round().long().tolist()  # the middle finger's end joint, where it is folded
    below = depth[v : v + 60, u]
    assert below.isfinite().all() and below.max() - below.min() < 25
    joints_uvd, depth = frontal_depth("open")
    u, v = ((joints_uvd[0] + joints_uvd[9]) / 2)[:2].round().long().tolist()
    assert joints_uvd[9, 2] - depth[v, u] < 15  # a flat palm stays flat


def test_fingers_over_the_thumb_lie_near_the_palm():
    names, bones_mm = list(anatomy.GESTURES), mean_hands(3)[0]
    angles = poses.gesture_angles(torch.zeros(1))[[names.index(name) for name in "MNT"]]
    joints = hand._local_joints(bones_mm, angles)
    assert (joints[:, 8, 2] > -40).all()  # the index finger's tip, before the wrist
    assert (joints[:, 4, 2] > joints[:, 7, 2] + 5).all()  # the thumb's tip behind its end joint


def test_a_thumb_under_the_fingers_leaves_no_step_from_them_to_the_palm():
    for gesture in "MN":
        joints_uvd, depth = frontal_depth(gesture)
        for tip in (8, 12):  # of the index and of the middle finger
            u, v = joints_uvd[tip, :2].round().long().tolist()
            below = depth[v - 5 : v + 60, u]
            assert (below[6:] - below[:-6]).max() < 15  # 21 and 22 mm over a palm that does not rise
    thumbs = torch.tensor(list(anatomy.THUMB.values())).deg2rad()
    tucked = dict(zip(anatomy.THUMB, hand._tucked(thumbs).tolist()))
    assert tucked["between 3 and 4"] > 0.7 and tucked["across"] == tucked["out"] == 0  # before and beside


def test_some_gestures_are_drawn_more_often(monkeypatch):
    def fists():
        return (hands_of(500).angles[:, 4:20:4].rad2deg() > 45).all(1).float().mean()

    as_it_is = fists()
    monkeypatch.setattr(anatomy, "OFTEN", {})
    assert fists() < as_it_is
    monkeypatch.setattr(anatomy, "OFTEN", {"fist": 10_000})
    assert fists() > 0.8


def test_in_some_fists_ring_and_little_finger_close_less_firmly():
    index, middle, ring, little = hands_of(3000).angles[:, 4:20:4].rad2deg().T
    fists = (index > 75) & (middle > 75) & (ring > 55) & (little > 35)
    assert fists.sum() > 100
    slack = (index - little)[fists]
    assert 0.1 < (slack > 20).float().mean() < 0.3 and (slack < 5).float().mean() > 0.4


def test_a_fist_has_a_heel_that_is_as_wide_as_the_knuckles():
    joints_uvd, depth = frontal_depth("fist")
    (u, v), knuckle = joints_uvd[0, :2].round().long().tolist(), joints_uvd[17, 0]
    heel = depth[v - 25, :u].isfinite().sum()  # 15 mm from the wrist, on the little finger's side
    assert heel > 1.04 * (u - knuckle)


def test_wrists_are_bent_back_and_to_the_little_finger_more_often():
    flexion, deviation = hands_of(1000).angles[:, 20:].rad2deg().T
    assert -19 < flexion.mean() < -11 and (flexion < 0).float().mean() > 0.65
    assert -12 < deviation.mean() < -4


def test_most_hands_face_the_camera_with_the_palm_or_less_often_the_back():
    _, x, y, _ = hands_of(5000).rotation.unbind(1)
    facing = 1 - 2 * (x * x + y * y)  # cosine between the way the hand's back looks and the camera's view
    assert (facing.abs() > 0.5).float().mean() > 0.8  # within 60 degrees; half of all rotations are
    assert 0.55 < (facing > 0).float().mean() < 0.75


def test_a_hand_does_not_depend_on_its_batch():
    uniform = torch.rand(13, poses.NOISE_COLUMNS, generator=torch.Generator().manual_seed(5))
    where = torch.tensor([10.0, -20.0, 480.0])

    def pictures(rows):
        hands = move_to(draw_hands(Noise(rows), 0.5), where.expand(len(rows), 3))
        return [
            torch.cat([render_depth(surface, CAMERA, SIZE_PX) for surface in hand_and_arm(hands)], 1),
            *hands,
        ]

    together = pictures(uniform)
    for part in (slice(0, 1), slice(5, 8), slice(12, 13)):
        for whole, alone in zip(together, pictures(uniform[part])):
            assert torch.equal(whole[part], alone)


def test_a_crop_shows_what_the_whole_picture_shows():
    hands = hands_of(2)
    surface = hand_and_arm(hands)[0]
    camera = torch.tensor([400.0, 410.0, 150, 150])
    whole = render_depth(surface, camera, (300, 300))
    boxes = torch.tensor([[90.0, 80.0, 128.0, 128.0], [60.0, 100.0, 128.0, 128.0]])
    cropped = torch.cat((camera[:2].expand(2, 2), camera[2:] - boxes[:, :2]), 1)
    crops = render_depth(surface, cropped, (128, 128))
    for crop, picture, (left, top) in zip(crops, whole, boxes[:, :2].int().tolist()):
        part = picture[top : top + 128, left : left + 128]
        same = torch.isfinite(crop) == torch.isfinite(part)
        both = torch.isfinite(crop) & torch.isfinite(part)
        assert same.float().mean() > 0.999
        assert ((crop - part).abs()[both] < 0.05).float().mean() > 0.999


def test_too_little_noise_is_refused():
    with pytest.raises(ValueError, match="NOISE_COLUMNS"):
        draw_hands(Noise(torch.rand(1, 20)))
