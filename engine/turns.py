"""Averaging a network's coordinates over turned copies of each crop: more exact, and as much slower."""

import math

import torch
from torch.nn import functional as F

STEP_DEG = 30.0


def average_over_turns(forward, turns):
    """Return a function (img, label_img, mask) -> StageOutput whose uvd is a mean over `turns` crops.

    The crops are turned in the picture by 0, 30, -30, 60 .. degrees; the maps are those of the first.
    `forward` is what `engine.inference.prepare` returns; it runs once for each crop.
    """
    angles_deg = [STEP_DEG * ((k + 1) // 2) * (-1) ** (k + 1) for k in range(1, turns)]

    def averaged(img, label_img, mask):
        output = forward(img, label_img, mask)
        total = output.uvd
        for angle_deg in angles_deg:
            back = _rotation(angle_deg).to(img)
            turned = _turned(img, back)
            label = F.interpolate(turned, label_img.shape[-2:], mode="bilinear", align_corners=False)
            uvd = forward(turned, label, (label != 0).to(mask)).uvd
            total = total + torch.cat((uvd[..., :2] @ back.T, uvd[..., 2:]), -1)
        return output._replace(uvd=total / turns)

    return averaged if turns > 1 else forward


def _rotation(angle_deg):
    """Return the matrix [2, 2] that takes columns and rows of a turned crop back to the crop's own."""
    cos, sin = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    return torch.tensor([[cos, -sin], [sin, cos]])


def _turned(img, back):
    """Turn pictures [B, 1, S, S] about pixel (S // 2, S // 2), as `augment_image` does."""
    middle = img.new_full((2, 1), 1 / img.shape[-1])  # of that pixel, where a picture reaches from -1 to 1
    affine = torch.cat((back, middle - back @ middle), 1).expand(len(img), 2, 3)
    return F.grid_sample(img, F.affine_grid(affine, img.shape, align_corners=False), align_corners=False)
