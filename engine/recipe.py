"""What a recipe may add to the published one: schedules, averaged weights, another network's weights."""

import math
from argparse import Namespace

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from engine.checkpoints import read_network
from utils import UserError


def epoch_options(args, epoch):
    """Return the options as they are in `epoch` (from 1): --coordinates_from turns alpha to 1."""
    turned = args.coordinates_from and epoch >= args.coordinates_from
    return Namespace(**{**vars(args), "alpha": 1.0 if turned else args.alpha})


def learning_rate(args, epochs_done):
    """Return the rate of --lr_schedule cosine after `epochs_done` epochs, a fraction among them.

    It climbs from 0 for --warmup_epochs, then falls along half a cosine to 0 at the end (Loshchilov and
    Hutter, "SGDR", 2017).
    """
    warmup = min(args.warmup_epochs, args.epoch)
    if epochs_done < warmup:
        return args.lr * epochs_done / warmup
    share = (epochs_done - warmup) / max(args.epoch - warmup, 1e-9)
    return args.lr * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def set_learning_rate(optimizer, args, epochs_done):
    """Set the rate of the next step; with --lr_schedule step the scheduler does so between epochs."""
    if args.lr_schedule == "cosine":
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, epochs_done)


def averaged(network, decay):
    """Return the exponential moving average of a network's weights, a network of its own; None for decay 0.

    Statistics of batch norm are the network's latest (Polyak and Juditsky 1992).
    """
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None


def load_weights(network, path):
    """Give a network the weights of a checkpoint file; return the names of what stays as it is.

    That is weights of layers whose size is the number of joints, or of a FullRegression's maps, where that
    differs, and stages that a file of one stage has not: the first reads other inputs than they. Where the
    file has more, those that it has not begin as copies of its last. Convolutions do not depend on
    label_size: a network learns fast on coarse maps and in one stage, and goes on from there on finer ones
    and in more.
    Raises UserError where the file is no checkpoint, or another network's.
    """
    (other, _), own = read_network(path), network.state_dict()
    for name in {**network.param, **other.param}:
        there, here = other.param.get(name), network.param.get(name)
        grows = name == "stage" and there < here
        if there != here and name != "label_size" and not grows:
            raise UserError(f"--init {path} is of another network: its {name} is {there}, here {here}")
    weights = other.state_dict()
    anew = [f"stages.{number}" for number in range(other.param["stage"], network.param["stage"])]
    if other.param["stage"] > 1:
        last = f"stages.{other.param['stage'] - 1}."
        copied = {name.removeprefix(last): weights[name] for name in weights if name.startswith(last)}
        weights |= {f"{stage}.{name}": copied[name] for stage in anew for name in copied}
        anew = []
    kept = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    network.load_state_dict({name: own[name] if name in kept else weights[name] for name in own})
    names = (name for name, _ in network.named_parameters() if name in kept)
    return anew + [name for name in names if ".".join(name.split(".")[:2]) not in anew]
