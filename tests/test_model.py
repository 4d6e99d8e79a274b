"""The network, its decoder, its losses and its checkpoints."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN, expected
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from engine.checkpoints import load_checkpoint, load_network, save_checkpoint
from model import (
    DepthRegression,
    PixelwiseRegression,
    PlaneRegression,
    StageOutput,
    losses,
    spatial_form,
)
from utils import UserError


def small_network(joints=3, **options):
    """Return a network that runs in milliseconds, on 16 x 16 heatmaps."""
    torch.manual_seed(0)
    return PixelwiseRegression(
        joints, **{**dict(stage=2, label_size=16, features=32, level=1, norm_method="instance"), **options}
    )


def inputs(batch=2, label_size=16, seed=0):
    """Return random (img, label_img, mask) in [-1, 1] with holes."""
    generator = torch.Generator().manual_seed(seed)
    img = torch.rand(batch, 1, 2 * label_size, 2 * label_size, generator=generator) * 2 - 1
    label_img = torch.rand(batch, 1, label_size, label_size, generator=generator) * 2 - 1
    mask = (torch.rand(batch, 1, label_size, label_size, generator=generator) < 0.7).float()
    return img, label_img * mask, mask


def relative_error(found, wanted):
    return np.abs(found.numpy() - wanted).max() / np.abs(wanted).max()


# Published checkpoints


@pytest.mark.parametrize("name, dataset", [("instance_softmax", "NYU"), ("batch_sum", "MSRA")])
def test_published_checkpoint_gives_its_golden_outputs(name, dataset):
    wanted = expected(f"{name}_io")
    network = load_network(GOLDEN / "expected" / f"{name}.pt", dataset).double()
    assert network.joints == wanted["joints"]
    with torch.no_grad():
        outputs = network(*(torch.from_numpy(wanted[k]).double() for k in ("img", "label_img", "mask")))
    checked = 0
    for stage, output in enumerate(outputs):
        for field in output._fields:
            assert relative_error(getattr(output, field), wanted[f"stage{stage}_{field}"]) < 1e-5
            checked += 1
    assert checked == sum(key.startswith("stage") for key in wanted)


@pytest.mark.parametrize("name", ["instance_softmax", "batch_sum"])
def test_own_weights_have_exactly_the_published_names_and_shapes(name):
    published = load_checkpoint(GOLDEN / "expected" / f"{name}.pt")
    joints = int(expected(f"{name}_io")["joints"])
    own = PixelwiseRegression(joints, **published["model_param"]).state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in published["state_dict"].items()}


def test_checkpoint_round_trip_restores_network_and_outputs(tmp_path):
    network = small_network(joints=16, heatmap_method="sum").eval()
    path = tmp_path / "network.pt"
    save_checkpoint(path, {"state_dict": network.state_dict(), "seed": 5, "model_param": network.param})
    again = load_network(path)
    assert load_checkpoint(path)["seed"] == 5
    assert (again.joints, again.dataset, again.param) == (16, "ICVL", network.param)
    with torch.no_grad():
        for before, after in zip(network(*inputs()), again(*inputs())):
            assert all(torch.equal(a, b) for a, b in zip(before, after))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_wrappers_put_before_weights_are_taken_off(prefix, tmp_path):
    network, path = small_network(joints=14), tmp_path / "best.pt"
    weights = {prefix + name: value for name, value in network.state_dict().items()}
    save_checkpoint(path, {"state_dict": weights, "model_param": network.param})
    again = load_network(path)
    assert again.dataset == "NYU"
    assert all(torch.equal(again.state_dict()[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    network, path = small_network(joints=14), tmp_path / "NYU_nan.pt"
    with torch.no_grad():
        network.stages[1].conv.bias[3] = value
    save_checkpoint(path, {"state_dict": network.state_dict(), "model_param": network.param})
    with pytest.raises(UserError, match=r"not finite \(stages.1.conv.bias\): take an earlier epoch"):
        load_network(path)


def test_a_data_sets_name_that_is_no_text_is_damage(tmp_path):
    network = small_network(joints=21)
    content = {"state_dict": network.state_dict(), "model_param": network.param, "dataset": ["NYU"]}
    save_checkpoint(tmp_path / "forged.pt", content)
    with pytest.raises(UserError, match="forged.pt is damaged"):
        load_network(tmp_path / "forged.pt")


def test_a_checkpoint_of_21_joints_does_not_say_whose_they_are(tmp_path):
    network = small_network(joints=21)
    for name in ("best.pt", "MSRA_default_final.pt"):
        save_checkpoint(tmp_path / name, {"state_dict": network.state_dict(), "model_param": network.param})
    with pytest.raises(UserError, match="predicts 21 joints: say with --joints"):
        load_network(tmp_path / "best.pt")
    assert load_network(tmp_path / "MSRA_default_final.pt").dataset == "MSRA"


# Architecture


@pytest.mark.parametrize("norm_method", ["instance", "batch"])
@pytest.mark.parametrize("heatmap_method", ["softmax", "sum"])
@pytest.mark.parametrize("stage", [1, 3])
def test_every_stage_returns_maps_and_coordinates(stage, norm_method, heatmap_method):
    network = small_network(5, stage=stage, norm_method=norm_method, heatmap_method=heatmap_method)
    outputs = network(*inputs(batch=2))
    assert len(outputs) == stage
    for heatmaps, depthmaps, uvd in outputs:
        assert heatmaps.shape == depthmaps.shape == (2, 5, 16, 16) and uvd.shape == (2, 5, 3)
        torch.testing.assert_close(heatmaps.sum((-2, -1)), torch.ones(2, 5))
        assert (heatmaps >= 0).all()


def test_later_stages_see_the_maps_of_the_one_before_and_the_surface():
    network = small_network(joints=5, stage=2)
    assert network.stages[0].conv.in_channels == 32
    assert network.stages[1].conv.in_channels == 2 * 5 + 1


@pytest.mark.parametrize("features, widths", [(32, [32]), (48, [32, 48]), (128, [32, 64, 128])])
def test_stem_doubles_its_width_up_to_features_then_halves_the_size(features, widths):
    stem = [layer for layer in small_network(features=features, stage=1).conv if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in stem] == [*widths, features]
    assert [layer.stride for layer in stem] == [(1, 1)] * len(widths) + [(2, 2)]


@pytest.mark.parametrize("kernel_size", [1, 5])
def test_wider_filters_keep_the_sizes(kernel_size):
    assert small_network(kernel_size=kernel_size)(*inputs())[-1].heatmaps.shape == (2, 3, 16, 16)


def test_instance_norm_keeps_no_running_statistics_and_batch_norm_does():
    assert not any("running" in name for name in small_network(norm_method="instance").state_dict())
    assert any("running_mean" in name for name in small_network(norm_method="batch").state_dict())


def test_instance_norm_frames_do_not_see_each_other():
    network = small_network(norm_method="instance").train()
    img, label_img, mask = inputs(batch=2)
    together = network(img, label_img, mask)[-1].uvd[:1]
    alone = network(img[:1], label_img[:1], mask[:1])[-1].uvd
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_every_norm_is_affine_and_every_convolution_has_a_bias():
    for module in small_network().modules():
        if isinstance(module, nn.InstanceNorm2d):
            assert module.weight is not None and module.bias is not None
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None


def test_joint_weights_start_at_one_and_the_sum_method_has_none():
    assert torch.equal(small_network().stages[0].plane_regression.w, torch.ones(3, 1))
    assert not any(name.endswith(".w") for name in small_network(heatmap_method="sum").state_dict())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(label_size=48, level=4), "label_size 48 must be divisible by 2.* = 32"),
        (dict(label_size=16, level=3), "one pixel at the bottom of level 3"),
        (dict(label_size=0), "label_size must be a whole number"),
        (dict(level=-1), "level must be a whole number"),
        (dict(stage=0), "stage must be"),
        (dict(joints=0), "joints must be"),
        (dict(features=33), "features must be even"),
        (dict(kernel_size=4), "kernel_size odd"),
        (dict(norm_method="group"), "norm_method must be batch or instance, not 'group'"),
        (dict(heatmap_method="max"), "heatmap_method must be softmax or sum, not 'max'"),
    ],
)
def test_impossible_network_is_refused_when_built(options, message):
    with pytest.raises(ValueError, match=message):
        small_network(**options)


def test_batch_norm_may_shrink_to_one_pixel():
    assert len(small_network(label_size=16, level=3, norm_method="batch")(*inputs())) == 2


def test_weights_of_convolutions_start_xavier_normal():
    """Of a uniform draw with the same deviation none would lie beyond 1.73 of it."""
    layers = [module for module in small_network().modules() if isinstance(module, nn.Conv2d)]
    for weight in (layer.weight for layer in layers if layer.weight.numel() > 4000):
        fans = (weight.shape[0] + weight.shape[1]) * weight[0, 0].numel()
        deviations = weight / (2 / fans) ** 0.5
        assert abs(deviations.std() - 1) < 0.05 and deviations.abs().max() > 3


# Decoder, against a literal transcription of its definition


def literal_decoder(logits, w, depthmap, label_img, mask, heatmap_method):
    """Return (heatmap [L, L], u, v, d) of one joint, pixel by pixel, from logits [L, L]."""
    size = len(logits)
    pixels = [(row, column) for row in range(size) for column in range(size)]
    if heatmap_method == "softmax":
        largest = max(w * logits[p] for p in pixels)
        raw = {p: np.exp(w * logits[p] - largest) for p in pixels}
    else:
        raw = {p: max(logits[p], 0) + 1e-14 for p in pixels}
    total = sum(raw.values())
    heatmap = {p: raw[p] / total for p in pixels}
    u = sum(heatmap[row, column] * (column - size // 2) / (size - 1) for row, column in pixels)
    v = sum(heatmap[row, column] * (row - size // 2) / (size - 1) for row, column in pixels)
    above = sum(heatmap[p] * mask[p] * (depthmap[p] + label_img[p]) * mask[p] for p in pixels)
    below = sum(heatmap[p] * mask[p] for p in pixels) + 1e-14
    return (
        np.array([[heatmap[row, column] for column in range(size)] for row in range(size)]),
        u,
        v,
        above / below,
    )


def decode(logits, w, depthmaps, label_img, mask, heatmap_method):
    """Run the network's decoder alone on arrays [J, L, L] (label_img, mask [L, L])."""
    joints, size, _ = logits.shape
    plane = PlaneRegression(joints, 32, size, 3, "batch", heatmap_method).double()
    depth = DepthRegression(joints, 32, 3, "batch").double()
    plane.conv = depth.conv = nn.Identity()
    if heatmap_method == "softmax":
        plane.w.data = torch.from_numpy(w)[:, None]
    heatmaps, uv = plane(torch.from_numpy(logits)[None])
    label_img, mask = (torch.from_numpy(a)[None, None] for a in (label_img, mask))
    _, d = depth(torch.from_numpy(depthmaps)[None], heatmaps, label_img, mask)
    return heatmaps[0].detach().numpy(), torch.cat([uv, d], -1)[0].detach().numpy()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([4, 7, 10]),
    spread=st.sampled_from([0.1, 1, 20]),
    masked=st.sampled_from([0.0, 0.3, 1.0]),
    heatmap_method=st.sampled_from(["softmax", "sum"]),
)
def test_decoder_equals_the_literal_one(seed, size, spread, masked, heatmap_method):
    rng = np.random.default_rng(seed)
    logits, depthmaps = rng.normal(0, spread, (2, size, size)), rng.normal(0, 1, (2, size, size))
    mask = (rng.random((size, size)) >= masked).astype(float)
    label_img, w = rng.uniform(-1, 1, (size, size)) * mask, rng.uniform(0.5, 2, 2)
    heatmaps, uvd = decode(logits, w, depthmaps, label_img, mask, heatmap_method)
    for j in range(2):
        heatmap, u, v, d = literal_decoder(logits[j], w[j], depthmaps[j], label_img, mask, heatmap_method)
        np.testing.assert_allclose(heatmaps[j], heatmap, rtol=1e-9, atol=1e-12)
        # The published grid is float32.
        np.testing.assert_allclose(uvd[j], (u, v, d), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("heatmap_method, height", [("softmax", 200.0), ("sum", 1.0)])
@pytest.mark.parametrize("row, column", [(0, 0), (0, 7), (7, 0), (7, 7), (4, 4), (2, 5)])
def test_one_hot_pixel_decodes_to_its_place_and_depth(heatmap_method, height, row, column):
    """Edges included; the grid's centre, pixel L // 2, is 0."""
    logits, surface = np.full((1, 8, 8), -height), np.full((8, 8), 0.3)
    logits[0, row, column] = height
    _, (uvd,) = decode(logits, np.ones(1), np.full((1, 8, 8), 0.2), surface, np.ones((8, 8)), heatmap_method)
    np.testing.assert_allclose(uvd, ((column - 4) / 7, (row - 4) / 7, 0.5), atol=1e-7)


def test_empty_mask_and_silent_logits_stay_finite():
    network = small_network(heatmap_method="sum")
    img, label_img, mask = inputs()
    output = network(img, label_img * 0, mask * 0)[-1]
    assert torch.isfinite(output.uvd).all() and not output.uvd[..., 2].any()
    nothing = np.zeros((8, 8))
    heatmaps, uvd = decode(np.full((1, 8, 8), -1.0), np.ones(1), nothing[None], nothing, nothing, "sum")
    np.testing.assert_allclose(heatmaps, 1 / 64)
    assert np.isfinite(uvd).all()


# Losses


def one_stage(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return StageOutput(
        torch.rand(2, 3, 8, 8, generator=generator),
        torch.rand(2, 3, 8, 8, generator=generator),
        torch.rand(2, 3, 3, generator=generator),
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_loss_is_the_weighted_sum_over_stages(alpha):
    outputs, target = [one_stage(1), one_stage(2)], one_stage(3)
    wanted = 0.0
    for output in outputs:
        for b in range(2):
            for j in range(3):
                c, h, d = (
                    float(((getattr(output, f)[b, j] - getattr(target, f)[b, j]) ** 2).sum())
                    for f in ("uvd", "heatmaps", "depthmaps")
                )
                wanted += (alpha * c + (1 - alpha) * (2.0 * h + 0.05 * d)) / 6
    terms = losses(outputs, target.uvd, target[:2], alpha=alpha, lambda_h=2.0, lambda_d=0.05)
    assert float(sum(terms.values())) == pytest.approx(wanted, rel=1e-5)


def test_regression_needs_no_maps_and_detection_no_coordinates():
    output, target = one_stage(1), one_stage(2)
    assert list(losses([output], target.uvd)) == ["coordinate"]
    assert list(losses([output], target.uvd, target[:2], alpha=0)) == ["heatmap", "depthmap"]


@pytest.mark.parametrize(
    ("kind", "of_one"),
    [
        ("squared", lambda x: x**2),
        ("l1", abs),
        ("smooth_l1", lambda x: x**2 / 0.04 if abs(x) < 0.02 else abs(x) - 0.01),
    ],
)
def test_coordinate_losses_are_their_formulas(kind, of_one):
    torch.manual_seed(0)
    uvd, predicted = torch.randn(2, 3, 3) / 20, torch.randn(2, 3, 3) / 20
    terms = losses([StageOutput(None, None, predicted)], uvd, coordinate_loss=kind)
    expected = sum(of_one(x) for x in (predicted - uvd).flatten().tolist()) / 6
    assert terms["coordinate"].item() == pytest.approx(expected, rel=1e-5)


def test_default_weights_are_those_of_the_paper():
    output, target = one_stage(1), one_stage(2)
    explicit = losses([output], target.uvd, target[:2], alpha=0.5, lambda_h=1.0, lambda_d=0.01)
    assert losses([output], target.uvd, target[:2], alpha=0.5) == explicit


# Precision


@pytest.mark.parametrize("heatmap_method", ["softmax", "sum"])
def test_bfloat16_autocast_gives_a_finite_loss_close_to_float32(heatmap_method):
    network = small_network(heatmap_method=heatmap_method)
    img, label_img, mask = inputs()
    uvd = torch.rand(2, 3, 3) * 0.4 - 0.2
    targets = spatial_form(uvd, label_img, mask)

    def loss(enabled):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = network(img, label_img, mask)
        assert outputs[-1].heatmaps.dtype == outputs[-1].uvd.dtype == torch.float32
        total = sum(losses(outputs, uvd, targets, alpha=0.5).values())
        total.backward()
        assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
        return total.item()

    full, half = loss(False), loss(True)
    assert np.isfinite(half) and half != full
    assert half == pytest.approx(full, rel=0.05)


@pytest.mark.parametrize("heatmap_method", ["softmax", "sum"])
def test_decoder_leaves_autocast(heatmap_method):
    """What it makes of half-precision maps equals what it makes of the same maps in float32."""
    plane = PlaneRegression(3, 32, 16, 3, "batch", heatmap_method)
    depth = DepthRegression(3, 32, 3, "batch")
    plane.conv = depth.conv = nn.Identity()
    maps = torch.randn(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, label_img, mask = inputs()

    def decoded(logits, depthmaps, enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            heatmaps, uv = plane(logits)
            return heatmaps, uv, *depth(depthmaps, heatmaps, label_img, mask)

    half, full = decoded(*maps, enabled=True), decoded(*maps.float(), enabled=False)
    for one, other in zip(half, full, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
