"""The paper's comparison network, which regresses coordinates directly; for ablation tables alone."""

import math

import torch
from torch import nn

from model import Hourglass, StageOutput, at_least_float32, conv_norm_relu, initialise, stem, validate_sizes

# Of a checkpoint's weights, those whose number is three times the joints'.
COORDINATES_BIAS = "stages.0.dense.14.bias"


def dense_pixels(label_size):
    """Return how many pixels are left of the heatmaps' grid after three strides of 2."""
    return math.ceil(label_size / 8) ** 2


def label_size_of(weights, param):
    """Return the label size of a checkpoint's `param` where its dense layers have that size, else None."""
    inputs = param["features"] * dense_pixels(param["label_size"])
    return param["label_size"] if weights["stages.0.dense.10.weight"].shape[1] == inputs else None


class RegressionStage(nn.Module):
    """One stage of FullRegression: hourglass features, and coordinates read off them by dense layers."""

    def __init__(self, joints, inputs, *, label_size, features, level, norm_method):
        super().__init__()
        self.conv = nn.Conv2d(inputs, features, 1)
        self.hourglass = Hourglass(level, features, norm_method)
        layers = []
        for _ in range(3):
            layers += conv_norm_relu(features, features, 3, norm_method, stride=2)
        self.dense = nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Linear(features * dense_pixels(label_size), 1024),
            nn.ReLU(),
            nn.Linear(1024, 1024),
            nn.ReLU(),
            nn.Linear(1024, 3 * joints),
        )

    def forward(self, x):
        """Return (features [B, F, L, L], normalised uvd [B, J, 3])."""
        features = self.hourglass(self.conv(x))
        return features, at_least_float32(self.dense(features)).unflatten(-1, (-1, 3))


class FullRegression(nn.Module):
    """The paper's comparison: the same stem and hourglasses, but coordinates instead of maps.

    Takes and returns what PixelwiseRegression does, with maps that are zero; trains on coordinates alone
    (alpha 1). Raises ValueError for a size or norm that it cannot have.
    """

    def __init__(
        self, joints, stage=2, label_size=64, features=256, level=4, kernel_size=3, norm_method="batch"
    ):
        super().__init__()
        size = dict(label_size=label_size, features=features, level=level, norm_method=norm_method)
        self.joints, self.param = joints, dict(size, stage=stage, kernel_size=kernel_size)
        validate_sizes(joints, **self.param)
        if norm_method == "instance" and label_size <= 8:
            raise ValueError(f"label_size {label_size} leaves instance norm a single pixel: choose more")
        self.conv = stem(features, kernel_size, norm_method)
        self.stages = nn.ModuleList(
            RegressionStage(joints, features + 1 if s else features, **size) for s in range(stage)
        )
        initialise(self)

    def forward(self, img, label_img, mask):
        """Return the outputs of all stages."""
        x, outputs = self.conv(img), []
        for stage in self.stages:
            x, uvd = stage(x)
            empty = uvd.new_zeros(len(uvd), self.joints, *label_img.shape[-2:])
            outputs.append(StageOutput(empty, empty, uvd))
            x = torch.cat([x, label_img], dim=1)
        return outputs
