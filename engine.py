"""Loading, training, prediction and testing loops."""

import time
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import yaml
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from tqdm import tqdm

from checkpoints import draw_seed, load_checkpoint, resolve_device, save_checkpoint, seed_everything
from datasets import DATASETS, MSRADataset, Sample, test_labels_uvd
from frames import FrameError
from metrics import PROTOCOLS, format_table, joint_errors_mm, summarise
from model import PixelwiseRegression, from_checkpoint, losses, spatial_form
from utils import UserError, append_json_line, atomic_path, draw_comparison, write_curves

# Reading the loss waits for the device, so the progress bar shows it once in so many steps.
REPORT_STEPS = 20


class Batch(NamedTuple):
    """Frames of one step: the collated samples (None when all were refused), their indices, the refusals."""

    samples: tuple | None
    indices: list
    refused: list


class Frames(Dataset):
    """A data set whose refused frames come back as FrameError values instead of ending the worker.

    A sample is (index, Sample or FrameError).
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, key):
        index = key[0] if isinstance(key, tuple) else key
        try:
            return index, self.dataset[key]
        except FrameError as error:
            return index, error


def collate(items):
    """Gather what `Frames` returns into a Batch."""
    good = [(index, sample) for index, sample in items if not isinstance(sample, FrameError)]
    refused = [(index, error) for index, error in items if isinstance(error, FrameError)]
    samples = default_collate([sample for _, sample in good]) if good else None
    return Batch(samples, [index for index, _ in good], refused)


class EpochSampler(Sampler):
    """The (index, augmentation seed) of every frame of an epoch, in an order that (seed, epoch) fix."""

    def __init__(self, indices, seed):
        self.indices, self.seed, self.epoch = indices, seed, 0

    def __len__(self):
        return len(self.indices)

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.indices)
        return iter(zip(order.tolist(), rng.integers(2**62, size=len(order)).tolist()))


def _start_worker(_):
    cv2.setNumThreads(0)


def make_loader(dataset, sampler, args, device, drop_last=False):
    """Return a DataLoader of Batches over what `sampler` yields."""
    workers = min(args.num_workers, len(sampler))
    return DataLoader(
        Frames(dataset),
        args.batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        drop_last=drop_last,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
    )


def to_device(samples, device):
    """Move a batch to the device without waiting for it; pictures in channels_last."""
    return type(samples)(
        *(
            field.to(device, non_blocking=True, memory_format=torch.channels_last)
            if field.ndim == 4
            else field.to(device, non_blocking=True)
            for field in samples
        )
    )


def open_splits(args):
    """Return (train set, its indices, validation set, its indices) as the options ask."""
    cls, options = (
        DATASETS[args.dataset],
        dict(
            path=args.data_dir,
            sigmoid=args.sigmoid,
            targets=False,
            kernel_size=args.kernel_size,
            label_size=args.label_size,
            image_size=2 * args.label_size,
        ),
    )
    if cls is MSRADataset:
        options["subject"] = args.subject
    using = {
        f"using_{part}": getattr(args, f"using_{part}") for part in ("rotation", "scale", "shift", "flip")
    }
    train = cls(dataset="train", **options, **using)
    if not args.holdout:
        val = cls(dataset="val", **options)
        return train, np.arange(len(train)), val, np.arange(len(val))
    kept = len(train) - round(args.holdout * len(train))
    if not 0 < kept < len(train):
        raise UserError(f"--holdout {args.holdout} leaves no frame on one side of {len(train)}")
    val = cls(dataset="train", **options, **dict.fromkeys(using, 0))
    return train, np.arange(kept), val, np.arange(kept, len(train))


def forward_losses(network, samples, args):
    """Run the network; return its outputs and the dict of loss terms, in float32 under autocast too."""
    with torch.autocast(samples.img.device.type, torch.bfloat16, enabled=args.mixed_precision):
        outputs = network(samples.img, samples.label_img, samples.mask)
    targets = None
    if args.alpha < 1:
        targets = spatial_form(samples.uvd, samples.label_img, samples.mask, args.kernel_size, args.sigmoid)
    return outputs, losses(outputs, samples.uvd, targets, args.alpha, args.lambda_h, args.lambda_d)


def train_one_epoch(network, loader, optimizer, device, args):
    """Take one optimiser step a batch; return the mean loss. Raises FrameError for a frame that cannot be used."""
    network.train()
    total = torch.zeros((), device=device)
    with tqdm(loader, desc=f"epoch {loader.sampler.epoch + 1}", unit="step", leave=False) as bar:
        for step, batch in enumerate(bar, start=1):
            if batch.refused:
                raise batch.refused[0][1]
            _, terms = forward_losses(network, to_device(batch.samples, device), args)
            loss = sum(terms.values())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
            if step % REPORT_STEPS == 0:
                bar.set_postfix(loss=f"{total.item() / step:.4f}")
    return total.item() / len(loader)


@torch.no_grad()
def validate(network, loader, device, args):
    """Return the mean 3D joint error (mm) and mean loss over a loader's frames."""
    network.eval()
    dataset, error_mm, loss_sum = loader.dataset.dataset, [], 0.0
    for batch in tqdm(loader, desc="validate", unit="step", leave=False):
        if batch.refused:
            raise batch.refused[0][1]
        outputs, terms = forward_losses(network, to_device(batch.samples, device), args)
        predicted, true = (
            dataset.uvd2xyz(dataset.recover_uvd(uvd.cpu().numpy(), batch.samples))
            for uvd in (outputs[-1].uvd, batch.samples.uvd)
        )
        error_mm.append(joint_errors_mm(predicted, true))
        loss_sum += sum(terms.values()).item() * len(batch.indices)
    error_mm = np.concatenate(error_mm)
    return float(error_mm.mean()), loss_sum / len(error_mm)


@torch.no_grad()
def picture_of(network, dataset, index, device, args):
    """Return an RGB picture of one frame: skeleton and heatmaps, true beside predicted."""
    network.eval()
    samples = to_device(Sample(*(field[None] for field in dataset.sample(index))), device)
    output = network(samples.img, samples.label_img, samples.mask)[-1]
    heatmaps, _ = spatial_form(samples.uvd, samples.label_img, samples.mask, args.kernel_size, args.sigmoid)
    true, predicted = (
        (uvd[0].float().cpu().numpy(), maps[0].float().cpu().numpy())
        for uvd, maps in ((samples.uvd, heatmaps), (output.uvd, output.heatmaps))
    )
    return draw_comparison(samples.img[0, 0].cpu().numpy(), true, predicted, dataset.config)


def run_name(args):
    """Return the name that a run's checkpoints, logs and results share."""
    fold = f"_subject{args.subject}" if args.dataset == "MSRA" else ""
    return f"{args.dataset}_{args.suffix}{fold}"


def build_network(args, joints):
    """Return the network that the options describe. Raises UserError for an impossible one."""
    try:
        return PixelwiseRegression(
            joints,
            stage=args.stages,
            label_size=args.label_size,
            features=args.features,
            level=args.level,
            kernel_size=args.filter_size,
            norm_method=args.norm_method,
            heatmap_method=args.heatmap_method,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def build_optimizer(args, parameters):
    """Return AdamW or SGD as the options ask."""
    if args.opt == "sgd":
        return torch.optim.SGD(parameters, args.lr, momentum=args.beta1, weight_decay=args.weight_decay)
    return torch.optim.AdamW(
        parameters, args.lr, betas=(args.beta1, args.beta2), weight_decay=args.weight_decay
    )


def train(args):
    """Train and validate as the options say; return (best epoch, its error mm, last error mm).

    Writes Model/<run>_<epoch>.pt, Model/<run>_final.pt (the best epoch), Model/<run>.yml and logs/<run>/.
    Raises UserError for what the user can mend.
    """
    # TensorBoard takes seconds to import, which no other script should pay.
    from torch.utils.tensorboard import SummaryWriter

    device = resolve_device(args.device, args.gpu_id)
    args.seed = args.seed or draw_seed()
    seed_everything(args.seed)
    train_set, train_indices, val_set, val_indices = open_splits(args)
    network = build_network(args, train_set.joint_number).to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(args, network.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.decay_epoch, args.lr_decay)
    if args.batch_size > len(train_indices):
        print(
            f"batch_size {args.batch_size} exceeds the {len(train_indices)} training frames: using them all at once"
        )
        args.batch_size = len(train_indices)
    train_loader = make_loader(
        train_set, EpochSampler(train_indices, args.seed), args, device, drop_last=True
    )
    val_loader = make_loader(val_set, val_indices.tolist(), args, device)

    run, logs = run_name(args), Path("logs", run_name(args))
    write_options(Path("Model", f"{run}.yml"), args)
    print(
        f"{run}: {len(train_indices)} training and {len(val_indices)} validation frames, seed {args.seed}, {device}"
    )
    (logs / "metrics.jsonl").unlink(missing_ok=True)
    records = []
    with SummaryWriter(logs) as board:
        for epoch in range(args.epoch):
            started = time.perf_counter()
            train_loader.sampler.epoch = epoch
            loss = train_one_epoch(network, train_loader, optimizer, device, args)
            val_mm, val_loss = validate(network, val_loader, device, args)
            record = {
                "epoch": epoch + 1,
                "loss": loss,
                "val_loss": val_loss,
                "val_mm": val_mm,
                "lr": scheduler.get_last_lr()[0],
                "seconds": round(time.perf_counter() - started, 2),
            }
            scheduler.step()
            save_epoch(run, network, args.seed, record)
            records.append(record)
            append_json_line(logs / "metrics.jsonl", record)
            for key in ("loss", "val_loss", "val_mm", "lr"):
                board.add_scalar(key, record[key], epoch + 1)
            board.add_image(
                "true and predicted",
                picture_of(network, val_set, val_indices[0], device, args),
                epoch + 1,
                dataformats="HWC",
            )
            print(f"epoch {epoch + 1:>3}  loss {loss:.4f}  val {val_mm:.2f} mm")
    write_curves(logs / "curves.png", records)
    return finish(run, records)


def write_options(path, args):
    """Write the options as resolved to YAML that --config reads."""
    skipped = ("config", "dataset") if args.dataset == "MSRA" else ("config",)
    options = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if key not in skipped
    }
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(options, sort_keys=False))


def checkpoint_path(run, which):
    """Return the file of a run's checkpoint: an epoch's number, or `final`."""
    return Path("Model", f"{run}_{which}.pt")


def save_epoch(run, network, seed, record):
    """Save one epoch's weights in the published form, with its record."""
    save_checkpoint(
        checkpoint_path(run, record["epoch"]),
        {"state_dict": network.state_dict(), "seed": seed, "model_param": network.param, "record": record},
    )


def finish(run, records):
    """Make the best epoch the final checkpoint; print best and last, and return (epoch, best mm, last mm)."""
    best, last = min(records, key=lambda record: record["val_mm"]), records[-1]
    save_checkpoint(checkpoint_path(run, "final"), load_checkpoint(checkpoint_path(run, best["epoch"])))
    print(
        f"best epoch {best['epoch']}: {best['val_mm']:.2f} mm, last epoch {last['epoch']}: {last['val_mm']:.2f} mm; "
        f"{checkpoint_path(run, 'final')} is the best"
    )
    return best["epoch"], best["val_mm"], last["val_mm"]


def load_network(path, joints):
    """Build the network a checkpoint describes. Raises UserError where it is damaged or has other joints."""
    checkpoint = load_checkpoint(path)
    try:
        network = from_checkpoint(checkpoint)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this network: {str(error).splitlines()[0]}") from error
    if network.joints != joints:
        raise UserError(f"{path} predicts {network.joints} joints, this data set has {joints}")
    return network


@torch.inference_mode()
def predict(network, dataset, args, device):
    """Return joints [N, J, 3] uvd (px, mm) of every frame of a data set, and the refused frames' errors.

    A refused frame's joints are zero, so that rows stay aligned with the data set.
    """
    network.eval()
    loader = make_loader(dataset, range(len(dataset)), args, device)
    joints_uvd, refused = np.zeros((len(dataset), dataset.joint_number, 3)), []
    with tqdm(total=len(dataset), desc=f"predict {dataset.name}", unit="frame", leave=False) as bar:
        for batch in loader:
            refused += [error for _, error in batch.refused]
            if batch.indices:
                samples = to_device(batch.samples, device)
                uvd = network(samples.img, samples.label_img, samples.mask)[-1].uvd
                joints_uvd[batch.indices] = dataset.recover_uvd(uvd.float().cpu().numpy(), batch.samples)
            bar.update(len(batch.indices) + len(batch.refused))
    return joints_uvd, refused


def result_lines(dataset, joints_uvd):
    """Return the lines of a result file: uvd, or HAND17's file name and xyz."""
    if dataset.name != "HAND17":
        return [
            " ".join(f"{n:.3f}" for n in frame) for frame in joints_uvd.reshape(len(joints_uvd), -1).tolist()
        ]
    joints_xyz = dataset.uvd2xyz(joints_uvd).reshape(len(joints_uvd), -1)
    return [
        "\t".join([f"frame\\images\\{dataset.frame_path(index).name}", *(f"{n:.3f}" for n in frame)])
        for index, frame in enumerate(joints_xyz.tolist())
    ]


def write_results(path, lines):
    """Write a result file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines))
    print(f"{path}: {len(lines)} frames")


def test(args):
    """Predict a test split and write Result/<run>.txt; print speed and, with labels, the evaluation table.

    Returns (result lines, predicted joints uvd). Raises UserError for what the user can mend.
    """
    device = resolve_device(args.device, args.gpu_id)
    cls = DATASETS[args.dataset]
    run = run_name(args)
    network = load_network(args.model or checkpoint_path(run, args.seed), cls.joint_number).to(device)
    label_size = network.param["label_size"]
    options = {"subject": args.subject} if cls is MSRADataset else {}
    dataset = cls(
        path=args.data_dir,
        dataset="test",
        test_only=True,
        process_mode=args.process_mode,
        label_size=label_size,
        image_size=2 * label_size,
        **options,
    )
    started = time.perf_counter()
    joints_uvd, refused = predict(network, dataset, args, device)
    print(f"{run}: {len(dataset) / (time.perf_counter() - started):.1f} frames a second on {device}")
    for error in refused[:10]:
        print(f"warning: {error}: its joints are written as zeros")
    if len(refused) > 10:
        print(f"warning: so are those of {len(refused) - 10} more frames")
    lines = result_lines(dataset, joints_uvd)
    write_results(Path("Result", f"{run}.txt"), lines)
    if args.dataset != "HAND17":
        labels = test_labels_uvd(args.dataset, args.data_dir, **options)
        print_evaluation(run, args.dataset, joints_uvd, labels)
    return lines, joints_uvd


def print_evaluation(title, name, joints_uvd, labels_uvd):
    """Print the community's evaluation table of predictions [N, J, 3] against labels."""
    protocol = PROTOCOLS[name]
    error_mm = joint_errors_mm(protocol.to_xyz(joints_uvd), protocol.to_xyz(labels_uvd))
    print(format_table({title: summarise(error_mm, protocol.split)}, protocol.joint_names))


def folds(args):
    """Return a copy of the options for each subject that --subject names."""
    subjects = range(MSRADataset.subjects) if args.subject == "all" else [args.subject]
    return [Namespace(**{**vars(args), "subject": subject}) for subject in subjects]


def test_folds(args):
    """Test the subjects that --subject names; with `all`, merge their results in the community's order."""
    results = [test(fold) for fold in folds(args)]
    if args.subject != "all":
        return
    title = f"MSRA_{args.suffix}"
    write_results(Path("Result", f"{title}.txt"), [line for lines, _ in results for line in lines])
    joints_uvd = np.concatenate([joints_uvd for _, joints_uvd in results])
    print_evaluation(title, "MSRA", joints_uvd, test_labels_uvd("MSRA", args.data_dir))
