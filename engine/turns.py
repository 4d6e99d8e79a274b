"""Averaging a network's coordinates over turned copies of each crop, for as many times the work."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch.nn import functional as F

from engine.inference import forwards_at_once, prepare
from frames.transforms import Augmentation, augment_joints
from utils import UserError

STEP_DEG = 30
MOST_TURNS = 360 // STEP_DEG

# Of predict.py and HandPoseEstimator, with the model that ships, which was trained on all turns.
SHIPPED_TURNS = 2


def prepare_turned(network, device, frames=0, turns=1):
    """Return what `engine.inference.prepare` returns, its coordinates averaged over `turns` crops.

    Raises UserError where `turns` is not 1 to MOST_TURNS.
    """
    if turns not in range(1, MOST_TURNS + 1):
        raise UserError(f"turns must be 1 to {MOST_TURNS}, not {turns!r}")
    return average_over_turns(prepare(network, device, frames * turns), int(turns))


def average_over_turns(forward, turns):
    """Return a function of img [B, 1, S, S], label_img and mask [B, 1, S / 2, S / 2] -> StageOutput.

    Its uvd is the mean of what `forward`, such a function, says of `turns` crops: turned in the picture by 0,
    30, -30, 60 .. degrees; its maps are those of the first. What a turn moves out of the picture is lost to
    that crop. On a CPU as many crops are predicted at once as there are cores for PyTorch's threads.
    """
    angles_deg = [sign * step for step in range(STEP_DEG, 360, STEP_DEG) for sign in (1, -1)][: turns - 1]
    rotations = [torch.from_numpy(augment_joints(np.eye(3), Augmentation(angle))) for angle in angles_deg]
    # Made for the first frame: predict.py limits PyTorch's threads once the network is known.
    pool = cache(lambda: ThreadPoolExecutor(forwards_at_once("cpu")))

    @torch.inference_mode()
    def predicted(rotation, img, label_img, mask):
        if rotation is None:
            return forward(img, label_img, mask)
        rotation = rotation.to(img)
        turned = _turned(img, rotation[:2, :2])
        # As `prepare_crop` resizes: to half the size, the mean of 2 x 2 px.
        label = F.interpolate(turned, label_img.shape[-2:], mode="bilinear", align_corners=False)
        output = forward(turned, label, (label != 0).to(mask))
        return output._replace(uvd=output.uvd @ rotation.T)

    def averaged(img, label_img, mask):
        at_once = pool().map if rotations and img.device.type == "cpu" else map
        outputs = list(at_once(lambda each: predicted(each, img, label_img, mask), [None, *rotations]))
        return outputs[0]._replace(uvd=sum(output.uvd for output in outputs) / turns)

    return averaged


def _turned(img, rotation):
    """Turn pictures [B, 1, S, S], S even, about pixel (S / 2, S / 2), as `augment_image` does.

    `rotation` [2, 2] is that of `augment_joints`: columns and rows @ rotation.
    """
    middle = img.new_full((2, 1), 1 / img.shape[-1])  # of that pixel; the picture reaches from -1 to 1
    affine = torch.cat((rotation, middle - rotation @ middle), 1).expand(len(img), 2, 3)
    return F.grid_sample(img, F.affine_grid(affine, img.shape, align_corners=False), align_corners=False)
