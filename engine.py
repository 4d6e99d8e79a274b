"""The loops: one training epoch, validation and prediction."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import distributed
from datasets import Sample
from loading import WorkerDied, batches_of, make_loader, to_device
from metrics import joint_errors_mm
from model import losses, spatial_form
from utils import UserError, draw_comparison

# Reading a loss waits for the device, so it is done once in so many steps.
REPORT_STEPS = 20


class BadNumbers(UserError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


@dataclass
class Progress:
    """How far an epoch is: steps taken, the sum of the good ones' losses, and what went wrong."""

    step: int = 0
    good_steps: int = 0
    loss_sum: float = 0.0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    refused: int = 0


def forward_losses(network, samples, args):
    """Run the network; return its outputs and the dict of loss terms, in float32 under autocast too."""
    with torch.autocast(samples.img.device.type, torch.bfloat16, enabled=args.mixed_precision):
        outputs = network(samples.img, samples.label_img, samples.mask)
    targets = None
    if args.alpha < 1:
        targets = spatial_form(samples.uvd, samples.label_img, samples.mask, args.kernel_size, args.sigmoid)
    return outputs, losses(outputs, samples.uvd, targets, args.alpha, args.lambda_h, args.lambda_d)


def train_step(network, optimizer, samples, args):
    """Take one optimiser step; return (loss, 1 where the step was not applied else 0), on the device.

    A step whose loss or gradient is not finite, in any process, leaves weights and moments as they are.
    """
    _, terms = forward_losses(network, samples, args)
    loss = sum(terms.values())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    loss = loss.detach()
    norm = clip_grad_norm_(network.parameters(), float("inf"))  # clips nothing: it measures
    bad = distributed.reduce((~torch.isfinite(norm + loss)).float(), "max")
    # Fused optimisers skip the step on the device where this is 1, without the host having to look.
    optimizer.found_inf = bad
    optimizer.step()
    return loss, bad


def train_one_epoch(network, loader, optimizer, device, args, progress, state):
    """Train from batch `progress.step` to the end of the epoch.

    `state.due(step)` is asked after each step whether to call `state.save(progress)`.
    Raises FrameError for a frame that cannot be used (unless args.skip_bad), BadNumbers, and
    whatever state.save raises to end the run.
    """
    network.train()
    sampler, dataset, waiting = loader.sampler, loader.dataset.dataset, []
    bar = tqdm(
        total=sampler.steps,
        initial=progress.step,
        desc=f"epoch {sampler.epoch + 1}",
        unit="step",
        leave=False,
        disable=not distributed.is_main(),
    )
    with bar:
        for batch in batches(loader, args, progress):
            if batch.refused:
                settle(waiting, progress, dataset, args.max_bad_steps)
                note_refused(batch.refused, args, progress)
            if batch.samples is not None:
                waiting.append(
                    (*train_step(network, optimizer, to_device(batch.samples, device), args), batch.indices)
                )
            progress.step += 1
            bar.update()
            due = state.due(progress.step)
            if due or progress.step % REPORT_STEPS == 0:
                settle(waiting, progress, dataset, args.max_bad_steps)
                bar.set_postfix(loss=f"{progress.loss_sum / max(progress.good_steps, 1):.4f}")
            if due:
                state.save(progress)
        settle(waiting, progress, dataset, args.max_bad_steps)


def batches(loader, args, progress):
    """Yield the batches from `progress.step` on; with args.skip_bad pass over one where a worker died."""
    while True:
        loader.sampler.start = progress.step
        try:
            yield from batches_of(loader)
            return
        except WorkerDied as error:
            if not args.skip_bad or distributed.world_size() > 1:
                raise
            tqdm.write(f"warning: {error}; skipped a batch")
            progress.refused += loader.batch_size
            progress.step += 1


def settle(waiting, progress, dataset, max_bad_steps):
    """Read what steps left on the device, [(loss, bad, frame indices)], into `progress`; report bad steps.

    Raises BadNumbers after more than `max_bad_steps` bad ones in a row.
    """
    if not waiting:
        return
    read = torch.stack([torch.stack((loss, bad)) for loss, bad, _ in waiting])
    read[:, 0] = distributed.reduce(read[:, 0].clone()) / distributed.world_size()
    for (loss, bad), (_, _, indices) in zip(read.tolist(), waiting):
        if not bad:
            progress.loss_sum += loss
            progress.good_steps += 1
            progress.bad_in_a_row = 0
            continue
        progress.bad_steps += 1
        progress.bad_in_a_row += 1
        names = ", ".join(str(dataset.frame_path(index)) for index in indices)
        tqdm.write(f"warning: loss or gradient not finite, step not applied; its frames: {names}")
        if progress.bad_in_a_row > max_bad_steps:
            raise BadNumbers(
                f"{progress.bad_in_a_row} steps in a row were not finite (--max_bad_steps "
                f"{max_bad_steps}): lower --lr, or look at the frames named above"
            )
    waiting.clear()


def note_refused(refused, args, progress):
    """Count refused frames and name the first few; raise the first FrameError unless args.skip_bad."""
    for error in refused:
        if not args.skip_bad:
            raise UserError(f"{error} (--skip_bad counts such frames and goes on)")
        progress.refused += 1
        if progress.refused <= 10:
            tqdm.write(f"warning: skipped {error}")


@torch.no_grad()
def validate(network, loader, device, args, progress):
    """Return the mean 3D joint error (mm) and mean loss over a split of which this process has a part."""
    network.eval()
    dataset = loader.dataset.dataset
    sums = torch.zeros(3, dtype=torch.float64)  # error mm, loss, frames
    bar = tqdm(
        batches_of(loader),
        desc="validate",
        total=len(loader),
        unit="step",
        leave=False,
        disable=not distributed.is_main(),
    )
    for batch in bar:
        note_refused(batch.refused, args, progress)
        if batch.samples is None:
            continue
        outputs, terms = forward_losses(network, to_device(batch.samples, device), args)
        predicted, true = (
            dataset.uvd2xyz(dataset.recover_uvd(uvd.double().cpu(), batch.samples))
            for uvd in (outputs[-1].uvd, batch.samples.uvd)
        )
        frames, loss = len(batch.indices), sum(terms.values()).item()
        sums += torch.tensor([joint_errors_mm(predicted, true).mean(axis=1).sum(), loss * frames, frames])
    error_mm, loss, frames = distributed.reduce(sums.to(device)).tolist()
    if not frames:
        raise UserError("no validation frame could be used")
    return error_mm / frames, loss / frames


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


def prepare(network, device, frames=None):
    """Return a function (img, label_img, mask) -> last StageOutput, the fastest exact one on the device.

    `frames` is how many frames are to come, where that is known.
    """
    network = network.to(device, memory_format=torch.channels_last).eval()
    return lambda img, label_img, mask: network(img, label_img, mask)[-1]


@torch.inference_mode()
def predict(network, dataset, args, device):
    """Return joints [N, J, 3] uvd (px, mm) of every frame of a data set, and the refused frames' errors.

    A refused frame's joints are zero, so that rows stay aligned with the data set.
    """
    forward = prepare(network, device, len(dataset))
    loader = make_loader(dataset, range(len(dataset)), args, device, args.batch_size)
    joints_uvd, refused = np.zeros((len(dataset), dataset.joint_number, 3)), []
    with tqdm(total=len(dataset), desc=f"predict {dataset.name}", unit="frame", leave=False) as bar:
        for batch in batches_of(loader):
            refused += batch.refused
            if batch.samples is not None:
                samples = to_device(batch.samples, device)
                uvd = forward(samples.img, samples.label_img, samples.mask).uvd.float().cpu()
                joints_uvd[batch.indices] = dataset.recover_uvd(uvd, batch.samples)
            bar.update(len(batch.indices) + len(batch.refused))
    return joints_uvd, refused
