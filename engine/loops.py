"""The loops: a training step, an epoch of them, and validation."""

import math
from dataclasses import dataclass

import torch
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from engine import distributed
from engine.batches import batches_of, to_device
from engine.metrics import joint_errors_mm
from engine.recipe import set_learning_rate
from frames.drawing import draw_comparison
from frames.samples import Sample
from model import losses, spatial_form
from utils import UserError

# So many bad frames of an epoch are named.
NAMED_FRAMES = 10


@dataclass
class Progress:
    """How far an epoch is, over all processes: steps, sum of the applied ones' losses, what went wrong."""

    step: int = 0
    good_steps: int = 0
    loss_sum: float = 0.0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    refused: int = 0

    def count(self, loss, applied, refused):
        """Add a step: its mean loss, whether it was applied, and how many frames were refused."""
        self.step += 1
        self.refused += refused
        if applied:
            self.good_steps += 1
            self.loss_sum += loss
            self.bad_in_a_row = 0
        else:
            self.bad_steps += 1
            self.bad_in_a_row += 1


def forward_losses(network, samples, args, mixed_precision=False):
    """Run the network; return its outputs and the dict of loss terms, in float32 under autocast too."""
    with torch.autocast(samples.img.device.type, torch.bfloat16, enabled=mixed_precision):
        outputs = network(samples.img, samples.label_img, samples.mask)
    targets = None
    if args.alpha < 1:
        targets = spatial_form(samples.uvd, samples.label_img, samples.mask, args.kernel_size, args.sigmoid)
    terms = losses(
        outputs,
        samples.uvd,
        targets,
        alpha=args.alpha,
        lambda_h=args.lambda_h,
        lambda_d=args.lambda_d,
        coordinate_loss=args.coordinate_loss,
    )
    return outputs, terms


def train_step(network, optimizer, samples, args):
    """Take one optimiser step; return (mean loss over all processes, whether the step was applied).

    A step whose loss or gradient is not finite leaves weights, moments and batch norm's statistics as
    they are, in all processes alike.
    """
    statistics = running_statistics(network)
    before = [value.clone() for value in statistics]
    _, terms = forward_losses(network, samples, args, args.mixed_precision)
    loss = sum(terms.values())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # with several processes, to the mean of their gradients
    norm = get_total_norm([weight.grad for weight in network.parameters() if weight.grad is not None])
    mean_loss = distributed.total(loss.item()) / distributed.world_size()
    applied = math.isfinite(mean_loss) and math.isfinite(norm)
    if applied:
        optimizer.step()
    else:
        for value, old in zip(statistics, before):
            value.copy_(old)
    return mean_loss, applied


def running_statistics(network):
    """Return batch norm's running statistics, which a forward pass changes."""
    return [value for name, value in network.named_buffers() if "running_" in name or "tracked" in name]


def train_one_epoch(network, loader, optimizer, device, args, progress):
    """Train on the loader's batches; count each step in `progress`, and yield it.

    Raises UserError for a frame that cannot be used (unless args.skip_bad), and after too many steps in a row
    whose loss or gradient is not finite.
    """
    network.train()
    for batch in batches_of(loader):
        report_refused(batch.refused, args, progress.refused)
        samples = to_device(batch.samples, device)
        set_learning_rate(optimizer, args, loader.sampler.epoch + progress.step / loader.sampler.steps)
        loss, applied = train_step(network, optimizer, samples, args)
        progress.count(loss, applied, int(distributed.total(len(batch.refused))))
        if not applied:
            dataset = loader.dataset.dataset
            names = ", ".join(str(dataset.frame_path(index)) for index in batch.indices)
            tqdm.write(f"warning: loss or gradient not finite, step not applied; its frames: {names}")
        if progress.bad_in_a_row > args.max_bad_steps:
            raise UserError(
                f"{progress.bad_in_a_row} steps in a row were not finite (--max_bad_steps "
                f"{args.max_bad_steps}): look at the frames named above, or start anew with a lower --lr"
            )
        yield progress


def report_refused(errors, args, before):
    """Name refused frames, ten an epoch, of which `before` came before; raise the first unless --skip_bad."""
    for error in errors[: max(NAMED_FRAMES - before, 0) if args.skip_bad else 1]:
        if not args.skip_bad:
            raise UserError(f"{error} (--skip_bad counts such frames and goes on)")
        tqdm.write(f"warning: skipped {error}")


@torch.no_grad()
def validate(network, loader, device, args, sums):
    """Go through the loader's batches, which are this process's part; yield after each.

    Adds to `sums`, float64 [4]: each frame's mean 3D joint error (mm), its loss, the number of frames,
    and of refused frames. The network runs in float32, whatever training uses.
    """
    network.eval()
    dataset = loader.dataset.dataset
    for batch in batches_of(loader):
        report_refused(batch.refused, args, int(sums[3]))
        sums[3] += len(batch.refused)
        if batch.indices:
            outputs, terms = forward_losses(network, to_device(batch.samples, device), args)
            predicted, true = (
                dataset.uvd2xyz(dataset.recover_uvd(uvd.double().cpu(), batch.samples))
                for uvd in (outputs[-1].uvd, batch.samples.uvd)
            )
            frames, loss = len(batch.indices), sum(terms.values()).item()
            error_mm = joint_errors_mm(predicted, true).mean(axis=1).sum()
            sums[:3] += torch.tensor([error_mm, loss * frames, frames])
        yield


@torch.no_grad()
def picture_of(network, dataset, index, device, args):
    """Return an RGB picture of one frame: skeleton and heatmaps, true beside predicted."""
    network.eval()
    samples = to_device(Sample(*(part[None] for part in dataset.sample(index))), device)
    output = network(samples.img, samples.label_img, samples.mask)[-1]
    heatmaps, _ = spatial_form(samples.uvd, samples.label_img, samples.mask, args.kernel_size, args.sigmoid)
    true, predicted = (
        (uvd[0].float().cpu().numpy(), maps[0].float().cpu().numpy())
        for uvd, maps in ((samples.uvd, heatmaps), (output.uvd, output.heatmaps))
    )
    return draw_comparison(samples.img[0, 0].cpu().numpy(), true, predicted, dataset.config)
