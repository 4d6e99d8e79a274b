"""The faster convolution is the convolution."""

import pytest
import torch
from torch import nn

from engine.inference import replace
from engine.winograd import WinogradConv, as_winograd, is_worth_it


@pytest.mark.parametrize("size", [(8, 16), (10, 8)], ids=["whole tiles", "else"])
def test_it_gives_what_the_convolution_gives(size):
    torch.manual_seed(1)
    conv = nn.Conv2d(5, 7, 3, padding=1).double()
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    assert torch.allclose(as_winograd(conv)(x), conv(x), atol=1e-12)


def test_float32_rounds_off_little():
    torch.manual_seed(1)
    conv, x = nn.Conv2d(128, 128, 3, padding=1), torch.randn(1, 128, 16, 16)
    assert (as_winograd(conv)(x) - conv(x)).abs().max() < 1e-4


def test_wide_convolutions_of_stride_1_are_replaced():
    network = nn.Sequential(
        nn.Conv2d(128, 128, 3, padding=1),
        nn.Conv2d(128, 128, 3, 2, padding=1),
        nn.Sequential(nn.Conv2d(128, 128, 1), nn.Conv2d(128, 21, 3, padding=1)),
    )
    names = list(network.state_dict())
    assert replace(network, is_worth_it, as_winograd) == 1
    assert [type(module) for module in network[:2]] == [WinogradConv, nn.Conv2d]
    assert [type(module) for module in network[2]] == [nn.Conv2d, nn.Conv2d]
    assert list(network.state_dict()) == names
