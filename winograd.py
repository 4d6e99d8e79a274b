"""3 x 3 convolutions with a quarter of the multiplications, for compiled inference on CPUs.

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


class WinogradConv(nn.Module):
    """What a 3 x 3 nn.Conv2d of stride 1 does, for pictures whose sides are multiples of 4.

    Meant to be compiled: without that, the transforms cost more than the products saved.
    """

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        transform = torch.tensor(KERNEL, dtype=torch.float64)
        kernels = torch.einsum("ia,ocab,jb->jico", transform, conv.weight.detach().double(), transform)
        self.register_buffer("kernels", kernels.flatten(0, 1).to(conv.weight))  # (36, inputs, outputs)

    def forward(self, x):
        """Return the convolution of [B, inputs, H, W], channels_last."""
        batch, channels, height, width = x.shape
        if height % STEP or width % STEP:
            return self.conv(x)
        rows, columns = height // STEP, width // STEP
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        x = _combine(INPUT, [x[:, k : k + height - 3 : STEP] for k in range(6)])
        x = _combine(INPUT, [x[:, :, :, k : k + width - 3 : STEP] for k in range(6)])
        x = torch.bmm(x.reshape(36, batch * rows * columns, channels), self.kernels)
        x = x.view(6, 6, batch, rows, columns, -1)
        x = _combine(OUTPUT, x.unbind(0))
        x = _combine(OUTPUT, x.unbind(1))  # (row in tile, column in tile, B, rows, columns, outputs)
        x = x.permute(2, 3, 0, 4, 1, 5).reshape(batch, height, width, -1) + self.conv.bias
        return x.permute(0, 3, 1, 2)


def _combine(matrix, parts):
    """Return the sums of parts that the rows of a matrix weigh, stacked."""
    return torch.stack([sum(weight * part for weight, part in zip(row, parts) if weight) for row in matrix])


def is_worth_it(module):
    """Return whether a module is a convolution that WinogradConv does faster."""
    return (
        isinstance(module, nn.Conv2d)
        and (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
        and min(module.in_channels, module.out_channels) >= LEAST_CHANNELS
    )
