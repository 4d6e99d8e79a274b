"""The loops: one training epoch, validation and prediction."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import distributed
from datasets import Sample
from inference import prepare
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


def train_step(network, optimizer, samples, args, frames=None):
    """Take one optimiser step; return [mean loss, 1 where the step was not applied else 0] on the device.

    A step whose loss or gradient is not finite, in any process, leaves weights and moments as they are.
    Where several processes share a step, `frames` is how many of its frames this one has, so that
    each frame counts alike.
    """
    statistics = running_statistics(network)
    before = [value.clone() for value in statistics]
    _, terms = forward_losses(network, samples, args)
    loss = sum(terms.values())
    if distributed.world_size() > 1 and frames is not None:
        mean_frames = distributed.reduce(torch.full_like(loss, frames)) / distributed.world_size()
        loss = loss * (frames / mean_frames)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    loss = loss.detach()
    norm = clip_grad_norm_(network.parameters(), float("inf"))  # clips nothing: it measures
    outcome = distributed.reduce(torch.stack([loss, (~torch.isfinite(norm + loss)).to(loss)]))
    bad = (outcome[1] > 0).float()
    # Fused optimisers skip the step on the device where this is 1, without the host having to look.
    optimizer.found_inf = bad
    optimizer.step()
    for value, old in zip(statistics, before):
        value.copy_(torch.where(bad > 0, old, value))
    return torch.stack([outcome[0] / distributed.world_size(), bad])


def running_statistics(network):
    """Return batch norm's running statistics, which a forward pass changes."""
    return [value for name, value in network.named_buffers() if "running_" in name or "tracked" in name]


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
    try:
        for samples, indices, refused in batches(loader, args, progress.step):
            note_refused(refused, args, progress)
            if samples is None and distributed.world_size() > 1:
                samples = empty_samples(dataset)
            if samples is not None:
                outcome = train_step(network, optimizer, to_device(samples, device), args, len(indices))
                waiting.append((outcome, indices))
            progress.step += 1
            bar.update()
            due = state.due(progress.step)
            if due or progress.step % REPORT_STEPS == 0:
                settle(waiting, progress, dataset, args.max_bad_steps)
                bar.set_postfix(loss=f"{progress.loss_sum / max(progress.good_steps, 1):.4f}")
            if due:
                state.save(progress)
    finally:
        settle(waiting, progress, dataset, args.max_bad_steps)
        bar.close()


def batches(loader, args, start=0):
    """Yield the batches from `start` on; with args.skip_bad a frame at which a worker dies is refused."""
    deadly = loader.dataset.deadly
    while True:
        loader.sampler.start = start
        try:
            for batch in batches_of(loader):
                start += 1
                yield batch
            return
        except WorkerDied as error:
            if not args.skip_bad or deadly.issuperset(error.indices):
                raise
            deadly.update(error.indices)


def empty_samples(dataset):
    """Return a batch of one empty frame, for a process that has no frame of a step that others take."""
    image, label = torch.zeros(1, 1, *[dataset.image_size] * 2), torch.zeros(1, 1, *[dataset.label_size] * 2)
    number, none = torch.zeros(1), torch.empty(0)
    uvd = torch.zeros(1, dataset.joint_number, 3)
    return Sample(image, label, label, number, number, torch.zeros(1, 3), uvd, none, none)


def settle(waiting, progress, dataset, max_bad_steps):
    """Move steps' outcomes, [(outcome on the device, frame indices)], into `progress`; report bad steps.

    Raises BadNumbers after more than `max_bad_steps` bad ones in a row.
    """
    if not waiting:
        return
    outcomes, frames = torch.stack([outcome for outcome, _ in waiting]).tolist(), [f for _, f in waiting]
    waiting.clear()
    for (loss, bad), indices in zip(outcomes, frames):
        if not bad:
            progress.loss_sum += loss
            progress.good_steps += 1
            progress.bad_in_a_row = 0
            continue
        progress.bad_steps += 1
        progress.bad_in_a_row += 1
        names = ", ".join(str(dataset.frame_path(index)) for index in indices)
        tqdm.write(f"warning: loss or gradient not finite, step not applied; its frames: {names or 'none'}")
        if progress.bad_in_a_row > max_bad_steps:
            raise BadNumbers(
                f"{progress.bad_in_a_row} steps in a row were not finite (--max_bad_steps {max_bad_steps}): "
                "lower --lr, or look at the frames named above"
            )


def note_refused(refused, args, progress):
    """Count refused frames and name the first few; raise the first FrameError unless args.skip_bad."""
    for error in refused:
        if not args.skip_bad:
            raise UserError(f"{error} (--skip_bad counts such frames and goes on)")
        progress.refused += 1
        if progress.refused <= 10:
            tqdm.write(f"warning: skipped {error}")


@torch.no_grad()
def validate(network, loader, device, args, progress, state):
    """Return the mean 3D joint error (mm) and mean loss over a split of which this process has a part.

    `state` is asked as in `train_one_epoch`; a run that goes on validates from the first batch.
    """
    network.eval()
    dataset, checked = loader.dataset.dataset, Progress()
    sums = torch.zeros(3, dtype=torch.float64)  # error mm, loss, frames
    bar = tqdm(
        batches(loader, args),
        desc="validate",
        total=-(-len(loader.sampler.indices) // loader.batch_size),
        unit="step",
        leave=False,
        disable=not distributed.is_main(),
    )
    for step, batch in enumerate(bar):
        if 0 < step <= loader.sampler.common_steps and state.due(step):
            state.save(progress)
        note_refused(batch.refused, args, checked)
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
    progress.refused += checked.refused
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
                uvd = forward(samples.img, samples.label_img, samples.mask).uvd.cpu()
                joints_uvd[batch.indices] = dataset.recover_uvd(uvd, batch.samples)
            bar.update(len(batch.indices) + len(batch.refused))
    return joints_uvd, refused
