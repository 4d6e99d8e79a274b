"""The pixel-wise regression network, its spatial form and decoder, and its losses.

Source: Zhang and Zhang, "Pixel-wise Regression: 3D Hand Pose Estimation via Spatial-form
Representation and Differentiable Decoder", arXiv 1905.02085.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# Keeps the two weighted means defined where a heatmap or a mask is empty.
EPSILON = 1e-14

# Smooth L1 is squared below this difference: 6 mm in the plane of a cube of 300 mm.
SMOOTH_BELOW = 0.02


class StageOutput(NamedTuple):
    """What one stage predicts: heatmaps and depthmaps [B, J, L, L], normalised uvd [B, J, 3]."""

    heatmaps: torch.Tensor
    depthmaps: torch.Tensor
    uvd: torch.Tensor


def _norm(method, features):
    return {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}[method](features, affine=True)


def conv_norm_relu(inputs, outputs, kernel_size, norm_method, stride=1):
    """Return the three layers as a list."""
    return [
        nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2),
        _norm(norm_method, outputs),
        nn.ReLU(),
    ]


class ResidualBlock(nn.Module):
    """Pre-activation bottleneck, [B, F, H, W] -> [B, F, H, W]."""

    def __init__(self, features, norm_method):
        super().__init__()
        half = features // 2
        self.conv = nn.Sequential(
            _norm(norm_method, features),
            nn.ReLU(),
            nn.Conv2d(features, half, 1),
            _norm(norm_method, half),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1),
            _norm(norm_method, half),
            nn.ReLU(),
            nn.Conv2d(half, features, 1),
        )

    def forward(self, x):
        """Return x plus its transformed copy."""
        return x + self.conv(x)


class Hourglass(nn.Module):
    """`level` + 1 nested hourglasses, [B, F, H, W] -> [B, F, H, W]."""

    def __init__(self, level, features, norm_method):
        super().__init__()
        self.input_conv = ResidualBlock(features, norm_method)
        self.inner = (
            Hourglass(level - 1, features, norm_method) if level > 0 else ResidualBlock(features, norm_method)
        )
        self.output_conv = ResidualBlock(features, norm_method)

    def forward(self, x):
        """Return the features joined with their half-resolution context."""
        x = self.input_conv(x)
        context = self.output_conv(self.inner(F.max_pool2d(x, 2)))
        return x + F.interpolate(context, scale_factor=2, mode="nearest")


class PlaneRegression(nn.Module):
    """Heatmaps and their soft-argmax: [B, F, L, L] -> [B, J, L, L], [B, J, 2]."""

    def __init__(self, joints, features, label_size, kernel_size, norm_method, heatmap_method):
        super().__init__()
        self.conv = _regression(joints, features, kernel_size, norm_method)
        self.heatmap_method = heatmap_method
        if heatmap_method == "softmax":
            self.w = nn.Parameter(torch.ones(joints, 1))
        grid = (torch.arange(label_size) - label_size // 2) / (label_size - 1)
        self.register_buffer(
            "filter", torch.stack([grid.expand(label_size, -1), grid[:, None].expand(-1, label_size)])
        )

    def forward(self, x):
        """Return heatmaps that sum to one, and their mean (column, row) in units of the crop."""
        logits = self.conv(x)
        with torch.autocast(logits.device.type, enabled=False):
            logits = at_least_float32(logits).flatten(2)  # (B, J, L*L)
            if self.heatmap_method == "softmax":
                flat = torch.softmax(logits * self.w, dim=-1)
            else:
                positive = F.relu(logits) + EPSILON
                flat = positive / positive.sum(-1, keepdim=True)
            uv = flat @ self.filter.flatten(1).T
        return flat.unflatten(-1, x.shape[-2:]), uv


class DepthRegression(nn.Module):
    """Depth maps and their heatmap- and mask-weighted mean: [B, F, L, L] -> [B, J, L, L], [B, J, 1]."""

    def __init__(self, joints, features, kernel_size, norm_method):
        super().__init__()
        self.conv = _regression(joints, features, kernel_size, norm_method)

    def forward(self, x, heatmaps, label_img, mask):
        """Return the per-pixel offsets from the surface to each joint, and the joints' depth."""
        depthmaps = self.conv(x)
        with torch.autocast(depthmaps.device.type, enabled=False):
            depthmaps = at_least_float32(depthmaps)
            weight = heatmaps * mask
            depth = (weight * (depthmaps + label_img) * mask).sum((-2, -1)) / (weight.sum((-2, -1)) + EPSILON)
        return depthmaps, depth.unsqueeze(-1)


def at_least_float32(x):
    """Widen half-precision activations: the decoder's sums run over thousands of tiny weights."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _regression(joints, features, kernel_size, norm_method):
    layers = [
        layer for _ in range(3) for layer in conv_norm_relu(features, features, kernel_size, norm_method)
    ]
    return nn.Sequential(*layers, nn.Conv2d(features, joints, kernel_size, padding=kernel_size // 2))


def stem(features, kernel_size, norm_method):
    """Return what leads from img [B, 1, 2L, 2L] to features [B, F, L, L]."""
    width, layers = 32, conv_norm_relu(1, 32, kernel_size, norm_method)
    while width < features:
        inputs, width = width, min(2 * width, features)
        layers += conv_norm_relu(inputs, width, kernel_size, norm_method)
    return nn.Sequential(*layers, *conv_norm_relu(width, width, kernel_size, norm_method, stride=2))


class PredictionStage(nn.Module):
    """One stage: hourglass features, heatmaps, depth maps, coordinates."""

    def __init__(
        self, joints, inputs, *, label_size, features, level, kernel_size, norm_method, heatmap_method
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, features, 1)
        self.hourglass = Hourglass(level, features, norm_method)
        self.plane_regression = PlaneRegression(
            joints, features, label_size, kernel_size, norm_method, heatmap_method
        )
        self.depth_regression = DepthRegression(joints, features, kernel_size, norm_method)

    def forward(self, x, label_img, mask):
        """Return the StageOutput for features [B, inputs, L, L]."""
        features = self.hourglass(self.conv(x))
        heatmaps, uv = self.plane_regression(features)
        depthmaps, d = self.depth_regression(features, heatmaps, label_img, mask)
        return StageOutput(heatmaps, depthmaps, torch.cat([uv, d], dim=-1))


class PixelwiseRegression(nn.Module):
    """The network of the paper: a stem and `stage` stacked prediction stages.

    Input: img [B, 1, 2L, 2L], label_img and mask [B, 1, L, L], depths over the cube, L = label_size.
    Output: a list with one StageOutput per stage; the last is the prediction.
    Raises ValueError for a size, norm or heatmap method that the network cannot have.
    """

    def __init__(
        self,
        joints,
        stage=2,
        label_size=64,
        features=256,
        level=4,
        kernel_size=3,
        norm_method="batch",
        heatmap_method="softmax",
    ):
        super().__init__()
        size = dict(label_size=label_size, features=features, level=level, kernel_size=kernel_size)
        size.update(norm_method=norm_method, heatmap_method=heatmap_method)
        self.joints, self.param = joints, dict(size, stage=stage)
        validate_sizes(joints, **self.param)
        self.conv = stem(features, kernel_size, norm_method)
        self.stages = nn.ModuleList(
            PredictionStage(joints, 2 * joints + 1 if s else features, **size) for s in range(stage)
        )
        initialise(self)

    def forward(self, img, label_img, mask):
        """Return the outputs of all stages."""
        x, outputs = self.conv(img), []
        for stage in self.stages:
            outputs.append(stage(x, label_img, mask))
            x = torch.cat([outputs[-1].heatmaps, outputs[-1].depthmaps, label_img], dim=1)
        return outputs


def initialise(network):
    """Draw the weights of all convolutions anew."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)


def validate_sizes(
    joints, *, stage, label_size, features, level, kernel_size, norm_method, heatmap_method="softmax"
):
    """Raise ValueError for a size, norm or heatmap method that no network here can have."""
    for name, value, least in (
        ("joints", joints, 1),
        ("stage", stage, 1),
        ("level", level, 0),
        ("features", features, 32),
        ("label_size", label_size, 2),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    if features % 2 or not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"features must be even and kernel_size odd, not {features!r} and {kernel_size!r}")
    if norm_method not in ("batch", "instance"):
        raise ValueError(f"norm_method must be batch or instance, not {norm_method!r}")
    if heatmap_method not in ("softmax", "sum"):
        raise ValueError(f"heatmap_method must be softmax or sum, not {heatmap_method!r}")
    smallest = 2 ** (level + 1)
    if label_size % smallest:
        raise ValueError(
            f"label_size {label_size} must be divisible by 2^(level+1) = {smallest} for level {level}"
        )
    if norm_method == "instance" and label_size == smallest:
        raise ValueError(
            f"label_size {label_size} leaves one pixel at the bottom of level {level}, which instance "
            f"norm cannot normalise: choose a smaller level or a label_size of at least {2 * smallest}"
        )


def grid_position(uv, label_size):
    """Return where normalised uv [..., 2] lies on the heatmap grid, in px from the first pixel."""
    return uv * (label_size - 1) + label_size // 2


def on_grid(uv, label_size):
    """Return whether each normalised uv [..., 2] has its four neighbours on the heatmap grid."""
    position = grid_position(uv, label_size)
    return ((position >= 0) & (position < label_size - 1)).all(-1)


@lru_cache
def _blur_matrix(label_size, kernel_size, sigma, device, dtype):
    """Return [L, L] whose column p is a unit impulse at p, blurred and mirrored at the borders.

    A Gaussian blur is separable, so rows and columns of a map can each be multiplied by this
    matrix; the border rule is OpenCV's default (reflection that does not repeat the edge).
    """
    offset = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
    kernel = torch.exp(-(offset**2) / (2 * sigma**2))
    impulses = F.pad(
        torch.eye(label_size, dtype=torch.float64)[:, None], (kernel_size // 2,) * 2, mode="reflect"
    )
    blurred = F.conv1d(impulses, (kernel / kernel.sum())[None, None])[:, 0]
    return blurred.T.to(device, dtype).contiguous()


def spatial_form(uvd, label_img, mask, kernel_size=7, sigma=1.5):
    """Return the target heatmaps and depthmaps [B, J, L, L] of normalised joints uvd [B, J, 3].

    `label_img` and `mask` are [B, 1, L, L]. A joint off the grid gets empty maps. Source: paper section 3.1.
    """
    label_size = label_img.shape[-1]
    position = grid_position(uvd[..., :2].double(), label_size)
    inside = on_grid(uvd[..., :2].double(), label_size)
    corner = position.floor().clamp(0, label_size - 2)
    fu, fv = (position - corner).unbind(-1)
    d = (torch.minimum(fu, fv) + (fu + fv - 1).clamp(min=0)) / 2
    weights = torch.stack([1 + d - fu - fv, fu - d, fv - d, d], -1).unflatten(
        -1, (2, 2)
    )  # (B, J, row, column)
    weights = weights * inside[..., None, None]

    blur = _blur_matrix(label_size, kernel_size, sigma, uvd.device, torch.float64)
    neighbours = corner.long()[..., None] + torch.arange(2, device=uvd.device)  # (B, J, uv, 2)
    columns, rows = blur.T[neighbours[..., 0, :]], blur.T[neighbours[..., 1, :]]  # (B, J, 2, L)
    heatmaps = rows.mT @ weights @ columns
    depthmaps = (uvd[..., 2, None, None] - label_img) * mask * (heatmaps > 0)
    return heatmaps.to(uvd.dtype), depthmaps


def losses(outputs, uvd, targets=None, *, alpha=1.0, lambda_h=1.0, lambda_d=0.01, coordinate_loss="squared"):
    """Return the weighted loss terms, summed over stages, as a dict of scalars; their sum is the loss.

    `uvd` is [B, J, 3] normalised; `targets` = (heatmaps, depthmaps) is needed when alpha < 1.
    alpha 1 is regression on coordinates alone, 0 detection on the maps alone (paper section 3.4).
    `coordinate_loss` is one of COORDINATE_LOSSES; the paper's is squared.
    """
    terms = {}
    if alpha > 0:
        distance = COORDINATE_LOSSES[coordinate_loss]
        terms["coordinate"] = alpha * sum(distance(o.uvd - uvd).sum(-1).mean() for o in outputs)
    if alpha < 1:
        heatmaps, depthmaps = targets
        terms["heatmap"] = (1 - alpha) * lambda_h * sum(_map_loss(o.heatmaps, heatmaps) for o in outputs)
        terms["depthmap"] = (1 - alpha) * lambda_d * sum(_map_loss(o.depthmaps, depthmaps) for o in outputs)
    return terms


def _smooth_l1(difference):
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none", beta=SMOOTH_BELOW)


# Of a difference in normalised units, elementwise.
COORDINATE_LOSSES = {"squared": torch.square, "l1": torch.abs, "smooth_l1": _smooth_l1}


def _map_loss(predicted, target):
    return (predicted - target).square().sum((-2, -1)).mean()
