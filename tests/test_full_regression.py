"""The paper's comparison network takes and gives what the pixel-wise one does."""

import pytest
import torch

from engine.full_regression import FullRegression


@pytest.mark.parametrize("norm_method", ["instance", "batch"])
def test_every_stage_gives_coordinates_and_empty_maps(norm_method):
    network = FullRegression(14, 2, label_size=16, features=32, level=1, norm_method=norm_method)
    outputs = network(torch.randn(2, 1, 32, 32), torch.randn(2, 1, 16, 16), torch.ones(2, 1, 16, 16))
    assert len(outputs) == 2
    for output in outputs:
        assert output.uvd.shape == (2, 14, 3) and output.heatmaps.shape == output.depthmaps.shape
        assert output.heatmaps.shape == (2, 14, 16, 16) and not output.heatmaps.any()


def test_the_head_is_the_papers_and_later_stages_see_features_and_surface():
    network = FullRegression(21, 2, label_size=64, features=48, level=4)
    dense = network.stages[0].dense
    convolutions = [layer for layer in dense if isinstance(layer, torch.nn.Conv2d)]
    assert [(conv.out_channels, conv.stride) for conv in convolutions] == [(48, (2, 2))] * 3
    linear = [layer for layer in dense if isinstance(layer, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [
        (48 * 8 * 8, 1024),
        (1024, 1024),
        (1024, 63),
    ]
    assert network.stages[1].conv.in_channels == 48 + 1


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="leaves one pixel"):
        FullRegression(14, label_size=8, features=32, level=0, norm_method="instance")
    with pytest.raises(ValueError, match="divisible"):
        FullRegression(14, label_size=20, features=32, level=4)
