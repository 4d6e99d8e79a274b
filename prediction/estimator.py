"""The joints of the hand in depth frames of any camera: find it, cut it out, predict, cut again, predict."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets import DATASETS
from engine.batches import to_device
from engine.checkpoints import load_network, resolve_device
from engine.turns import SHIPPED_TURNS, prepare_turned
from frames.cameras import (
    FARTHEST_MM,
    NEAREST_MM,
    DepthCamera,
    OutOfReachError,
    check_depth,
    doubts_about,
    parse_camera,
)
from frames.handfinder import find_center
from frames.samples import UnlabelledSample, prepare_crop
from frames.transforms import Camera, Frame, recover_uvd, uvd2xyz, window_around
from model import grid_position
from utils import UserError

# The model that comes with this code: Model/README.md says how it was trained and how good it is.
SHIPPED_MODEL = Path(__file__).parents[1] / "Model" / "HAND17_synthetic_final.pt"

# A joint's confidence is the share of its heatmap within this distance of it.
SURE_WITHIN_MM = 15.0

# Where the first prediction shows the hand's middle farther off the crop's, a second crop is cut. What lies
# nearer is its noise: a second crop for every frame makes joints worse, not better.
SECOND_PASS_MM = 25.0

# The surface taken for the hand then: what lies so near to a joint.
HAND_AROUND_JOINTS_MM = 25.0
LEAST_SHARE = 0.3


class HandPose(NamedTuple):
    """The joints of one frame, in the order of the model's data set, or why there are none.

    joints_xyz [J, 3] mm (camera frame: x right, y down, z forward); joints_uvd [J, 3] (column px, row
    px, depth mm); confidence [J], 0 to 1: the share of the joint's heatmap within 15 mm of it;
    center_uvd [3]: the centre of the crop that was used. `reason` is None where there are joints;
    where there is no hand it says so and the others are None.
    """

    joints_xyz: np.ndarray | None
    joints_uvd: np.ndarray | None
    confidence: np.ndarray | None
    center_uvd: np.ndarray | None
    reason: str | None = None


class Place(NamedTuple):
    """Where a hand is in a frame (`center_uvd` [3]: column px, row px, depth mm), and its crop there.

    `seen_uvd`, `frame`, `camera` and `crop` are as the network sees them: a left hand's are mirrored.
    `guessed`: neither centre nor box was given; a second crop may be cut around the first prediction.
    """

    center_uvd: np.ndarray
    seen_uvd: np.ndarray
    frame: Frame
    camera: Camera
    crop: UnlabelledSample
    guessed: bool


def no_hand(reason):
    """Return the HandPose of a frame without a hand."""
    return HandPose(None, None, None, None, str(reason))


class HandPoseEstimator:
    """The joints of the hand in depth frames of one camera.

        estimator = HandPoseEstimator(camera="SR305")
        pose = estimator(depth_mm)                  # depth_mm: [H, W], uint16 or float, 0: not measured
        pose.joints_xyz                             # [21, 3] mm
        poses = estimator.batch([depth_mm, other_mm])
        pose = estimator(next_mm, near_uvd=pose.center_uvd)    # a sequence: where the hand was last

    `model` is a checkpoint's path, without one the model that comes with this code; `camera` a Camera or what
    --camera takes (a stored unit other than mm is not applied: give mm). `joints` names the data set
    whose joints the model predicts and `cube_mm` half the edge of the cube around the hand; both
    default to what the checkpoint was trained on. `hand` is right, or left: then frames are mirrored
    for the network and joints mirrored back; a right hand in a mirrored picture is a left one.
    Coordinates are means over `turns` crops (1 to 12, see `engine.turns.average_over_turns`), by default 2
    with the model that comes with this code, else 1 as in test.py; confidences are of the first crop.
    `frames` is how many are to come, if that is known: the network is compiled for long work.

    Raises UserError where the model or camera is of no use, or one of these out of its range.
    """

    def __init__(
        self,
        model=None,
        camera="HAND17",
        *,
        joints=None,
        cube_mm=None,
        hand="right",
        turns=None,
        device="auto",
        frames=0,
    ):
        if hand not in ("right", "left"):
            raise UserError(f"hand must be right or left, not {hand!r}")
        depth_camera = DepthCamera(camera) if isinstance(camera, Camera) else parse_camera(camera)
        self.camera, self.size_px = depth_camera.camera, depth_camera.size_px
        self.device, self.model = resolve_device(device), Path(model or SHIPPED_MODEL)
        self.network = load_network(self.model, joints)
        self.dataset = DATASETS[self.network.dataset]
        self.cube_mm, self.hand = float(self.dataset.cube_mm if cube_mm is None else cube_mm), hand
        if not 0 < self.cube_mm < FARTHEST_MM:
            raise UserError(f"the hand's cube must be above 0 and below {FARTHEST_MM:g} mm, not {cube_mm}")
        usual = SHIPPED_TURNS if self.model.samefile(SHIPPED_MODEL) else 1
        self.turns = usual if turns is None else turns
        self._forward = prepare_turned(self.network, self.device, frames, self.turns)

    def __call__(self, depth_mm, center_uvd=None, bbox=None, near_uvd=None):
        """Return the HandPose of one frame, depth [H, W] in mm.

        With `center_uvd` (column px, row px, depth mm) the hand is taken to be there, with `bbox` (left, top,
        width, height; px) in that box; else it is found, preferably near `near_uvd`, and where the first
        prediction shows it far from there, cut out anew. Raises ValueError where the frame is no depth
        picture or not of the camera's size.
        """
        return self.batch([depth_mm], [center_uvd], [bbox], [near_uvd])[0]

    def batch(self, frames, centers_uvd=None, bboxes=None, near_uvd=None):
        """Return a list of HandPose, one for each frame [H, W] in mm; sizes may differ.

        The lists beside `frames` hold what `__call__` takes, None where it is not known.
        Raises ValueError where a frame is no depth picture.
        """
        hints = ([None] * len(frames) if hint is None else hint for hint in (centers_uvd, bboxes, near_uvd))
        return self.predict([self.locate(*hint) for hint in zip(frames, *hints, strict=True)])

    def predict(self, located):
        """Return a list of HandPose for a list of what `locate` returned: Place, or HandPose, which stays."""
        poses = list(located)
        hands = [index for index, place in enumerate(poses) if isinstance(place, Place)]
        if not hands:
            return poses
        places = [poses[index] for index in hands]
        uvd, confidence = self._run_network([place.crop for place in places])
        better = [self._improved(*found) for found in zip(places, uvd)]
        again = [k for k, place in enumerate(better) if place is not places[k]]
        if again:
            uvd[again], confidence[again] = self._run_network([better[k].crop for k in again])
        for index, *output in zip(hands, better, uvd, confidence):
            poses[index] = self._pose(*output)
        return poses

    def locate(self, depth_mm, center_uvd=None, bbox=None, near_uvd=None):
        """Return the Place of the hand in a frame, or the HandPose that says that there is none.

        The first half of `__call__`, with the same arguments: it finds the hand and cuts it out. A thread can
        do this for a sequence's next frame (near_uvd: the last Place's center_uvd) while `predict` runs the
        network. Raises ValueError as `__call__`.
        """
        try:
            depth_mm, camera = check_depth(depth_mm, size_px=self.size_px), self.camera
        except OutOfReachError as error:
            return no_hand(error)
        height, width = depth_mm.shape
        doubts_about(DepthCamera(camera), (width, height))
        if not depth_mm.any():
            return no_hand("the frame is empty: no pixel has a depth")
        try:
            if bbox is not None:
                require_box(bbox, width, height)
            for name, hint in (("centre", center_uvd), ("place before", near_uvd)):
                if hint is not None and not (np.shape(hint) == (3,) and np.isfinite(hint).all()):
                    raise ValueError(f"the {name} {tuple(hint)} must be column px, row px and depth mm")
            if self.hand == "left":
                depth_mm = np.ascontiguousarray(depth_mm[:, ::-1])
                camera = camera._replace(u0=width - 1 - camera.u0)
                center_uvd, near_uvd = mirrored(center_uvd, width), mirrored(near_uvd, width)
                bbox = None if bbox is None else (width - bbox[0] - bbox[2], *bbox[1:])
            frame = Frame(depth_mm)
            guessed = center_uvd is None and bbox is None
            if center_uvd is None:
                center_uvd = find_center(frame, camera, near_uvd, bbox)
            return self._around(frame, camera, np.asarray(center_uvd, np.float64), guessed)
        except ValueError as error:
            return no_hand(error)

    def _improved(self, place, uvd):
        """Return the Place around the hand that a first prediction shows, which may be the same."""
        if place.guessed:
            middle_uvd = middle_of_hand(place.crop, uvd)
            moved_mm = np.linalg.norm(np.subtract(*uvd2xyz([middle_uvd, place.seen_uvd], place.camera)))
            if moved_mm > SECOND_PASS_MM:
                with suppress(ValueError):  # no hand can be there
                    return self._around(place.frame, place.camera, middle_uvd)
        return place

    def _around(self, frame, camera, center_uvd, guessed=True):
        """Return the Place of a hand at a centre, cut out as the model's data set cuts its hands.

        Raises ValueError where no hand can be there or nothing was measured around it.
        """
        if not NEAREST_MM <= center_uvd[2] <= FARTHEST_MM:
            what = "too near" if center_uvd[2] < NEAREST_MM else "too far"
            expected = f"a hand is {NEAREST_MM:g} to {FARTHEST_MM:g} mm away"
            raise ValueError(f"centre depth {center_uvd[2]:g} mm is {what}: {expected}")
        window, margin_mm = None, self.dataset.margin_mm
        if margin_mm is not None:
            window = window_around(center_uvd, self.cube_mm - margin_mm, camera)
        label_size = self.network.param["label_size"]
        sizes = {"image_size": 2 * label_size, "label_size": label_size}
        crop = prepare_crop(frame, center_uvd, self.cube_mm, camera, window=window, **sizes)
        given_uvd = mirrored(center_uvd, frame.rect.right) if self.hand == "left" else center_uvd
        return Place(given_uvd, center_uvd, frame, camera, crop, guessed)

    @torch.inference_mode()
    def _run_network(self, crops):
        """Return normalised joints [B, J, 3] and confidences [B, J] of a list of crops."""
        samples = to_device(UnlabelledSample(*map(torch.stack, zip(*crops))), self.device)
        output = self._forward(samples.img, samples.label_img, samples.mask)
        uvd, heatmaps = output.uvd.float(), output.heatmaps.float()
        size = heatmaps.shape[-1]
        pixel = torch.arange(size, device=uvd.device)
        column, row = grid_position(uvd[..., :2], size)[..., None].unbind(-2)
        off_px = torch.hypot((row - pixel)[..., :, None], (column - pixel)[..., None, :])  # (B, J, L, L)
        near = off_px < SURE_WITHIN_MM * (size - 1) / (2 * self.cube_mm)
        return uvd.cpu().numpy(), (heatmaps * near).sum((-2, -1)).cpu().numpy()

    def _pose(self, place, uvd, confidence):
        """Return the HandPose of a crop's normalised joints; a left hand is mirrored back."""
        crop = place.crop
        joints_uvd = recover_uvd(uvd, float(crop.box_size), float(crop.cube_size), crop.com.numpy())
        joints_xyz = uvd2xyz(joints_uvd, place.camera)
        if not np.isfinite(joints_xyz).all():
            return no_hand("the model's answer is not finite")
        if self.hand == "left":
            width = place.frame.rect.right
            joints_xyz, joints_uvd = joints_xyz * (-1, 1, 1), mirrored(joints_uvd, width)
        return HandPose(joints_xyz, joints_uvd, confidence, place.center_uvd)


def mirrored(uvd, width):
    """Return points [..., 3] (column, row, depth) of a picture mirrored left to right; None stays None."""
    return None if uvd is None else np.asarray(uvd) * (-1, 1, 1) + (width - 1, 0, 0)


def require_box(bbox, width, height):
    """Raise ValueError where a box (left, top, width, height; px) is none, or can only be two corners."""
    if not (np.shape(bbox) == (4,) and np.isfinite(bbox).all() and bbox[2] > 0 and bbox[3] > 0):
        raise ValueError(f"the box {tuple(bbox)} must be left, top, width, height, the last two above 0")
    left, top, wide, high = bbox
    beyond = left + wide > width * 1.1 or top + high > height * 1.1
    if beyond and left < wide <= width and top < high <= height and min(left, top) >= 0:
        box = f"{left:g},{top:g},{wide - left:g},{high - top:g}"
        raise ValueError(f"the box reaches beyond {width}x{height} px: for two corners give {box}")


def middle_of_hand(crop, uvd):
    """Return the middle (uvd) of the surface that lies around the joints predicted in a crop.

    Without the arm, that is. Where they lie beside what was measured, the crop's own centre is kept.
    """
    cube_mm, size = float(crop.cube_size), crop.mask.shape[-1]
    rows, columns = np.nonzero(crop.mask[0].numpy())
    relative_d = crop.label_img[0].numpy()[rows, columns]
    columns, rows = ((index - size // 2) / (size - 1) for index in (columns, rows))
    surface = np.stack([columns, rows, relative_d], axis=-1)
    millimetres = np.array([2 * cube_mm, 2 * cube_mm, cube_mm])
    apart_mm = np.linalg.norm((surface[:, None] - uvd) * millimetres, axis=-1).min(1)
    hand = apart_mm < HAND_AROUND_JOINTS_MM
    if hand.sum() < LEAST_SHARE * len(surface) or not hand.any():
        return crop.com.numpy().astype(np.float64)
    middle = surface[hand].mean(0, keepdims=True)
    return recover_uvd(middle, float(crop.box_size), cube_mm, crop.com.numpy())[0]
