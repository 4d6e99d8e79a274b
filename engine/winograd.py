"""3 x 3 convolutions with a quarter of the multiplications, for compiled networks on CPUs.

Source: F(4 x 4, 3 x 3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
arXiv 1509.09308.
"""

import torch
import torch.nn.functional as F
from torch import nn

# A tile of 6 x 6 inputs gives 4 x 4 outputs: OUTPUT @ (INPUT @ tile @ INPUT.T * KERNEL @ kernel @ KERNEL.T)
# @ OUTPUT.T, where * multiplies number by number.
INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
STEP = 4  # between tiles
LEAST_CHANNELS = 128  # from so many on it is the faster way


@torch.library.custom_op("pixelwise::written", mutates_args=())
def written(x: torch.Tensor) -> torch.Tensor:
    """Return a copy of x that is opaque to the compiler, which would else compute x again for every tile."""
    return x.clone()


@written.register_fake
def _(x):
    return torch.empty_like(x)


class WinogradConv(nn.Conv2d):
    """A 3 x 3 nn.Conv2d of stride 1 and padding 1, for pictures whose sides are multiples of 4.

    Meant to be compiled: without that, the transforms cost more than the products saved.
    """

    def forward(self, x):
        """Return the convolution of [B, inputs, H, W], channels_last."""
        batch, channels, height, width = x.shape
        if height % STEP or width % STEP:
            return super().forward(x)
        x = F.pad(written(x).permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        x = _combine(INPUT, [x[:, k : k + height - 3 : STEP] for k in range(6)], 3)
        x = _combine(INPUT, [x[:, :, k : k + width - 3 : STEP] for k in range(6)], 4)
        # (B, rows, columns, 6, 6, inputs) as 36 pictures of `inputs` channels each: their products with the
        # kernels are a grouped 1 x 1 convolution.
        x = F.conv2d(x.flatten(3).permute(0, 3, 1, 2), self._kernels(), groups=36)
        x = x.permute(0, 2, 3, 1).unflatten(3, (6, 6, -1))  # (B, rows, columns, 6, 6, outputs)
        x = _combine(OUTPUT, x.unbind(3), 2)
        x = _combine(OUTPUT, x.unbind(4), 4)  # (B, rows, row in tile, columns, column in tile, outputs)
        x = x.reshape(batch, height, width, -1) + self.bias
        return x.permute(0, 3, 1, 2)

    def _kernels(self):
        """Return the transformed kernels as those of 36 groups, [36 * outputs, inputs, 1, 1]."""
        transform = self.weight.new_tensor(KERNEL)
        kernels = torch.einsum("ia,ocab,jb->ijoc", transform, self.weight, transform)
        return kernels.flatten(0, 2)[:, :, None, None]


def _combine(matrix, parts, place):
    """Return the sums of parts that the rows of a matrix weigh, stacked at dimension `place`."""
    sums = [sum(weight * part for weight, part in zip(row, parts) if weight) for row in matrix]
    return torch.stack(sums, place)


def is_worth_it(module):
    """Return whether a module is a convolution that WinogradConv does faster."""
    return (
        isinstance(module, nn.Conv2d)
        and (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
        and min(module.in_channels, module.out_channels) >= LEAST_CHANNELS
    )


def as_winograd(conv):
    """Return a WinogradConv with the weights (not a copy) of a convolution that is worth it."""
    other = WinogradConv(conv.in_channels, conv.out_channels, 3, padding=1)
    other.weight, other.bias = conv.weight, conv.bias
    return other
