"""The loops: one training epoch and validation."""

from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from engine import distributed
from engine.batches import Batch, WorkerDied, batches_of, to_device
from engine.metrics import joint_errors_mm
from frames.drawing import draw_comparison
from frames.samples import Sample
from model import losses, spatial_form
from utils import UserError

# Reading a loss waits for the device, so it is done once in so many steps.
REPORT_STEPS = 20


class BadNumbers(UserError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class OtherFailed(UserError):
    """Another process of this run could not go on."""

    def __init__(self):
        super().__init__("another process could not go on: its own error says why")


@dataclass
class Progress:
    """How far an epoch is, in all processes: steps, the sum of the good ones' losses, what went wrong."""

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


def train_step(network, optimizer, samples, args, *, frames=1, refused=0, failed=False):
    """Take one optimiser step; return its outcome on the device.

    The outcome is [mean loss, in how many processes it or its gradient is not finite, frames, refused frames,
    failures] over all processes. `frames` is how many of the step's frames this process has: each frame
    counts alike. A step that is not finite, has no frame, or in which a process `failed`, leaves
    weights and moments as they are in all processes.
    """
    statistics = running_statistics(network)
    before = [value.clone() for value in statistics]
    _, terms = forward_losses(network, samples, args)
    loss = sum(terms.values())
    # Filled on the device: a copy from the host would wait for it.
    counts = [torch.full_like(loss, count) for count in (frames, refused, failed)]
    counts = distributed.reduce(torch.stack(counts))
    mean_frames = counts[0].clamp(min=1) / distributed.world_size()
    loss = loss * (frames / mean_frames)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    loss = loss.detach()
    norm = clip_grad_norm_(network.parameters(), float("inf"))  # clips nothing: it measures
    total, bad = distributed.reduce(torch.stack([loss, (~torch.isfinite(norm + loss)).to(loss)]))
    skipped = (bad > 0) | (counts[0] == 0) | (counts[2] > 0)
    # Fused optimisers skip the step on the device where this is 1, without the host having to look.
    optimizer.found_inf = skipped.float()
    optimizer.step()
    for value, old in zip(statistics, before):
        value.copy_(torch.where(skipped, old, value))
    return torch.stack([total / distributed.world_size(), bad, *counts])


def running_statistics(network):
    """Return batch norm's running statistics, which a forward pass changes."""
    return [value for name, value in network.named_buffers() if "running_" in name or "tracked" in name]


def train_one_epoch(network, loader, optimizer, device, args, *, progress, state):
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
    error = None
    try:
        for batch, error in common_batches(loader, args, progress.step):
            samples = to_device(batch.samples or empty_samples(dataset), device)
            counts = dict(frames=len(batch.indices), refused=len(batch.refused), failed=error is not None)
            waiting.append((train_step(network, optimizer, samples, args, **counts), batch.indices))
            progress.step += 1
            bar.update()
            due = state.due(progress.step)
            if due or progress.step % REPORT_STEPS == 0:
                settle(waiting, progress, dataset, args.max_bad_steps, error)
                bar.set_postfix(loss=f"{progress.loss_sum / max(progress.good_steps, 1):.4f}")
            if due:
                state.save(progress)
    finally:
        settle(waiting, progress, dataset, args.max_bad_steps, error)
        bar.close()


def common_batches(loader, args, start=0):
    """Yield (Batch, this process's UserError or None) for every step from `start` on.

    A process alone raises its UserError. Several go on with empty batches after it, for the others wait
    for each in every step, until they look at what failed.
    """
    step, told = start, 0
    try:
        for batch in batches(loader, args, start):
            told = note_refused(batch.refused, args, told)
            step += 1
            yield batch, None
    except UserError as error:
        if distributed.world_size() == 1:
            raise
        for _ in range(step, loader.sampler.start + len(loader)):
            yield Batch(None, [], []), error


def batches(loader, args, start):
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
    """Return a batch of one empty frame, for a process that has no frame of a step."""
    image, label = torch.zeros(1, 1, *[dataset.image_size] * 2), torch.zeros(1, 1, *[dataset.label_size] * 2)
    number, none = torch.zeros(1), torch.empty(0)
    uvd = torch.zeros(1, dataset.joint_number, 3)
    return Sample(image, label, label, number, number, torch.zeros(1, 3), uvd, none, none)


def settle(waiting, progress, dataset, max_bad_steps, error):
    """Move steps' outcomes, [(outcome on the device, frame indices)], into `progress`; report bad steps.

    Raises BadNumbers after more than `max_bad_steps` bad ones in a row. Where a process failed, whose
    steps from then on do not count, raises this one's `error` or OtherFailed.
    """
    if not waiting:
        return
    outcomes, frames = torch.stack([outcome for outcome, _ in waiting]).tolist(), [f for _, f in waiting]
    waiting.clear()
    worst = 0
    for number, ((loss, bad, count, refused, failures), indices) in enumerate(zip(outcomes, frames)):
        if failures:
            progress.step -= len(outcomes) - number
            raise error or OtherFailed
        progress.refused += int(refused)
        if not bad and count:
            progress.loss_sum += loss
            progress.good_steps += 1
            progress.bad_in_a_row = 0
        if not bad:
            continue
        progress.bad_steps += 1
        progress.bad_in_a_row += 1
        worst = max(worst, progress.bad_in_a_row)
        names = ", ".join(str(dataset.frame_path(index)) for index in indices)
        tqdm.write(f"warning: loss or gradient not finite, step not applied; its frames: {names or 'none'}")
    if worst > max_bad_steps:
        raise BadNumbers(
            f"{worst} steps in a row were not finite (--max_bad_steps {max_bad_steps}): "
            "look at the frames named above, or start anew with a lower --lr"
        )


def note_refused(refused, args, told):
    """Name refused frames unless ten were `told`; return how many were. Raise the first without skip_bad."""
    for error in refused:
        if not args.skip_bad:
            raise UserError(f"{error} (--skip_bad counts such frames and goes on)")
        told += 1
        if told <= 10:
            tqdm.write(f"warning: skipped {error}")
    return told


@torch.no_grad()
def validate(network, loader, device, args, progress, state):
    """Return the mean 3D joint error (mm) and mean loss over a split of which this process has a part.

    `state` is asked as in `train_one_epoch`; a run that goes on validates from the first batch.
    """
    network.eval()
    dataset, error = loader.dataset.dataset, None
    sums = torch.zeros(5, dtype=torch.float64)  # error mm, loss, frames, refused frames, failures
    bar = tqdm(
        common_batches(loader, args),
        desc="validate",
        total=-(-len(loader.sampler.indices) // loader.batch_size),
        unit="step",
        leave=False,
        disable=not distributed.is_main(),
    )
    for step, (batch, error) in enumerate(bar):
        if 0 < step <= loader.sampler.common_steps and state.due(step):
            state.save(progress)
        sums[3] += len(batch.refused)
        sums[4] = error is not None
        if batch.samples is None:
            continue
        outputs, terms = forward_losses(network, to_device(batch.samples, device), args)
        predicted, true = (
            dataset.uvd2xyz(dataset.recover_uvd(uvd.double().cpu(), batch.samples))
            for uvd in (outputs[-1].uvd, batch.samples.uvd)
        )
        frames, loss = len(batch.indices), sum(terms.values()).item()
        sums[:3] += torch.tensor([joint_errors_mm(predicted, true).mean(axis=1).sum(), loss * frames, frames])
    error_mm, loss, frames, refused, failures = distributed.reduce(sums.to(device)).tolist()
    if failures:
        raise error or OtherFailed
    if not frames:
        raise UserError("no validation frame could be used")
    progress.refused += int(refused)
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
