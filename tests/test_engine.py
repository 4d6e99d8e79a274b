"""Splits, network, optimiser and loops do what the options say."""

import numpy as np
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory
from training import TINY, repeat_lines

from datasets import DATASETS
from engine.batches import EpochSampler, Frames, collate, make_loader
from engine.loops import Progress, forward_losses, running_statistics, train_one_epoch, validate
from engine.options import parse_train
from engine.state import build_optimizer
from engine.training import build_network, open_splits, usable_batch_size
from frames.samples import Sample
from model import PixelwiseRegression, StageOutput, losses, spatial_form
from utils import UserError

CPU = torch.device("cpu")


def options(text=""):
    return parse_train("", [*TINY, *text.split()])


# Splits


def test_held_out_frames_are_the_last_and_not_trained_on(fresh_indexed):
    repeat_lines(fresh_indexed("ICVL") / "train.txt", 10)
    train, train_indices, val, val_indices = open_splits(options("--holdout 0.4"))
    assert train_indices.tolist() == [0, 1, 2, 3, 4, 5] and val_indices.tolist() == [6, 7, 8, 9]
    assert train.lines[6] == val.lines[6]


def test_batch_norm_of_one_pixel_of_one_frame_is_refused():
    words = "--norm_method batch --label_size 16 --level 3 --batch_size"
    assert usable_batch_size(options(f"{words} 2"), 10) == 2
    with pytest.raises(UserError, match="more than one frame"):
        usable_batch_size(options(f"{words} 1"), 10)


def test_held_out_frames_are_not_augmented(fresh_indexed):
    repeat_lines(fresh_indexed("ICVL") / "train.txt", 10)
    train, _, val, _ = open_splits(options("--holdout 0.4"))
    for seed in range(5):
        plain, held_out, trained_on = val.sample(6), val[6, seed], train[6, seed]
        assert all(torch.equal(a, b) for a, b in zip(plain, held_out))
        assert not torch.equal(plain.img, trained_on.img)


def test_augmentation_is_switched_part_by_part(fresh_indexed):
    fresh_indexed("ICVL")
    parts = dict(rotation=True, scale=True, shift=True, flip=False)
    for part, default in parts.items():
        train = open_splits(options(f"--using_{part} {int(not default)}"))[0]
        assert {name: train.drawn[name] for name in parts} == {**parts, part: not default}


# Batches


def test_what_is_handed_to_a_gpu_lies_in_pinned_memory(fresh_indexed, monkeypatch):
    """Pinning itself needs a GPU: here a field that would be pinned is counted."""
    fresh_indexed("ICVL")
    pinned, gpu = [], torch.device("cuda")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self) or self)
    dataset = open_splits(options())[2]
    batch = collate([Frames(dataset)[0], Frames(dataset)[1]])
    moved = pin_memory(batch)
    assert [field.shape for field in pinned] == [field.shape for field in moved.samples]
    assert all(map(np.array_equal, moved.samples, batch.samples))
    assert moved.indices == [0, 1] and pin_memory(collate([(0, None, [])])).samples is None
    assert make_loader(dataset, [0], options(), gpu, 1).pin_memory


# Network and optimiser


def test_network_is_the_one_that_the_options_describe():
    args = options(
        "--stages 3 --label_size 32 --features 48 --level 2 --filter_size 5 --norm_method batch "
        "--heatmap_method sum"
    )
    network = build_network(args, 7, CPU)
    assert network.joints == 7 and network.param == dict(
        stage=3,
        label_size=32,
        features=48,
        level=2,
        kernel_size=5,
        norm_method="batch",
        heatmap_method="sum",
    )


@pytest.mark.parametrize(
    "name, kind, own",
    [("adam", torch.optim.AdamW, {"betas": (0.7, 0.8)}), ("sgd", torch.optim.SGD, {"momentum": 0.7})],
)
def test_optimiser_has_the_rates_of_the_options(name, kind, own):
    args = options(f"--opt {name} --lr 0.02 --weight_decay 0.03 --beta1 0.7 --beta2 0.8")
    optimizer = build_optimizer(args, [torch.nn.Parameter(torch.ones(3))])
    (group,) = optimizer.param_groups
    assert type(optimizer) is kind
    assert {"lr": 0.02, "weight_decay": 0.03, "fused": True, **own}.items() <= group.items()


# Losses


def random_samples(frames=2, joints=3, label_size=16):
    """Return a batch of samples whose joints lie on the grid."""
    generator = torch.Generator().manual_seed(0)
    label_img = torch.rand(frames, 1, label_size, label_size, generator=generator) - 0.5
    img = torch.rand(frames, 1, 2 * label_size, 2 * label_size, generator=generator) - 0.5
    uvd = 0.6 * torch.rand(frames, joints, 3, generator=generator) - 0.3
    number, none = torch.zeros(frames), torch.empty(0)
    return Sample(
        img, label_img, torch.ones_like(label_img), number, number, torch.zeros(frames, 3), uvd, none, none
    )


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_loss_is_weighted_as_the_options_say(alpha):
    args = options(f"--alpha {alpha} --lambda_h 2 --lambda_d 0.3 --kernel_size 5 --sigmoid 0.8")
    samples = random_samples()
    maps = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    outputs = [StageOutput(maps, 1 - maps, maps[..., 0, :3])]
    targets = spatial_form(samples.uvd, samples.label_img, samples.mask, 5, 0.8)
    found, terms = forward_losses(lambda *_: outputs, samples, args)
    assert found is outputs and terms == losses(
        outputs, samples.uvd, targets, alpha=alpha, lambda_h=2, lambda_d=0.3
    )


@pytest.mark.parametrize(
    "switch, dtype", [("--mixed_precision", torch.bfloat16), ("--no-mixed_precision", torch.float32)]
)
def test_mixed_precision_is_inside_the_network_and_not_in_its_losses(switch, dtype):
    network, seen = tiny_network("instance"), []
    network.conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    args = options(f"--alpha 0.5 {switch}")
    _, terms = forward_losses(network, random_samples(), args, args.mixed_precision)
    assert seen == [dtype] and {term.dtype for term in terms.values()} == {torch.float32}


# Training and validation


def tiny_network(norm_method, joints=3):
    torch.manual_seed(0)
    return PixelwiseRegression(joints, stage=1, label_size=16, features=32, level=0, norm_method=norm_method)


def test_batch_norm_learns_its_statistics_in_training_alone(indexed):
    frames = DATASETS["ICVL"](path=indexed("ICVL"), label_size=16, image_size=32, targets=False)
    args, network = options(), tiny_network("batch", frames.joint_number).eval()
    optimizer = build_optimizer(args, network.parameters())
    indices = np.arange(len(frames))
    sampler = EpochSampler(indices, 3, seed=1)
    loader = make_loader(frames, sampler, args, CPU, 3)
    initial = [value.clone() for value in running_statistics(network)]
    list(train_one_epoch(network, loader, optimizer, CPU, args, Progress()))
    trained = [value.clone() for value in running_statistics(network)]
    assert trained and not any(torch.equal(a, b) for a, b in zip(initial, trained))
    network.train()
    list(validate(network, make_loader(frames, range(3), args, CPU, 3), CPU, args, torch.zeros(4)))
    assert all(torch.equal(a, b) for a, b in zip(trained, running_statistics(network)))


class Distances:
    """Frames of one joint each, so many mm from the camera in a world without perspective."""

    distances_mm = (1.0, 1.0, 4.0)

    def __getitem__(self, index):
        nothing, uvd = torch.empty(0), torch.tensor([[0.0, 0.0, self.distances_mm[index]]])
        return Sample(*[nothing] * 6, uvd, nothing, nothing)

    def recover_uvd(self, uvd, samples):
        return uvd.numpy()

    def uvd2xyz(self, uvd):
        return uvd


class TwoStages(torch.nn.Module):
    """Sees every joint 5 mm from the camera at first, and in it at last."""

    def forward(self, img, label_img, mask):
        return [
            StageOutput(None, None, torch.tensor([0.0, 0.0, depth]).expand(len(img), 1, 3))
            for depth in (5, 0)
        ]


def test_validation_is_the_mean_over_frames_of_the_last_stages_error():
    """Though the last batch is smaller; the loss is that of all stages."""
    args = options("--batch_size 2")
    loader, sums = make_loader(Distances(), range(3), args, CPU, 2), torch.zeros(4)
    assert len(list(validate(TwoStages(), loader, CPU, args, sums))) == 2
    assert sums.tolist() == pytest.approx([1 + 1 + 4, 16 + 16 + 1 + 1 + 1 + 16, 3, 0])


@pytest.mark.parametrize("training, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_mixed_precision_is_for_training_alone(training, dtype, indexed):
    frames = DATASETS["ICVL"](path=indexed("ICVL"), label_size=16, image_size=32, targets=False)
    args, network, seen = options("--mixed_precision"), tiny_network("instance", frames.joint_number), []
    network.conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loader = make_loader(
        frames, EpochSampler(np.arange(3), 3, seed=1) if training else range(3), args, CPU, 3
    )
    if training:
        optimizer = build_optimizer(args, network.parameters())
        list(train_one_epoch(network, loader, optimizer, CPU, args, Progress()))
    else:
        list(validate(network, loader, CPU, args, torch.zeros(4)))
    assert seen == [dtype]
