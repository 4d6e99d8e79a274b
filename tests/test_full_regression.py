"""The paper's comparison network takes and gives what the pixel-wise one does."""

import pytest
import torch

from engine.checkpoints import load_network, save_checkpoint
from engine.full_regression import FullRegression
from utils import UserError


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
    with pytest.raises(ValueError, match="a single pixel"):
        FullRegression(14, label_size=8, features=32, level=0, norm_method="instance")
    with pytest.raises(ValueError, match="divisible"):
        FullRegression(14, label_size=20, features=32, level=4)


def test_a_checkpoint_says_that_it_is_this_network(tmp_path):
    network = FullRegression(16, 1, label_size=16, features=32, level=0, norm_method="instance").eval()
    content = {"state_dict": network.state_dict(), "seed": 0, "model_param": network.param}
    save_checkpoint(tmp_path / "full.pt", content)
    loaded = load_network(tmp_path / "full.pt")
    assert isinstance(loaded, FullRegression) and loaded.dataset == "ICVL"
    for name, value in network.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    save_checkpoint(tmp_path / "wrong.pt", {**content, "model_param": {**network.param, "label_size": 4096}})
    with pytest.raises(UserError, match="not those of label_size 4096"):
        load_network(tmp_path / "wrong.pt")
