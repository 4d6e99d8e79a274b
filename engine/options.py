"""Command-line options of training, testing (with defaults from YAML) and prediction."""

import argparse
import os
import sys
from math import inf
from pathlib import Path

import yaml

from datasets import DATASETS, MSRADataset
from engine.checkpoints import DEVICES
from engine.turns import MOST_TURNS, SHIPPED_TURNS, STEP_DEG
from frames.cameras import PRESETS, parse_camera, split_numbers
from model import COORDINATE_LOSSES
from utils import HelpFormatter, UserError, one_line, usable_cores

USAGE = "%(prog)s [options], which --help lists"
TURNS = {
    "type": int,
    "default": 1,
    "help": f"average the coordinates over so many crops, turned by 0, {STEP_DEG}, -{STEP_DEG} .. degrees",
}
TURNS_OF_MODEL = TURNS | {
    "default": None,
    "help": f"{TURNS['help']} (default: {SHIPPED_TURNS} with the model that ships, else 1)",
}
SWITCH = {"action": argparse.BooleanOptionalAction, "default": False}

# In words, as a test, and of which options; the network itself looks at its sizes.
RANGES = (
    (
        "above 0",
        lambda x: 0 < x < inf,
        "batch_size kernel_size sigmoid epoch lr lr_decay decay_epoch stages depth_unit cube",
    ),
    (
        "0 or more",
        lambda x: 0 <= x < inf,
        "num_workers weight_decay lambda_h lambda_d save_minutes max_bad_steps "
        "rotation_deg shift_mm depth_noise coordinates_from warmup_epochs",
    ),
    (f"0 to {2**32 - 1}", lambda x: 0 <= x < 2**32, "seed"),
    ("between 0 and 1", lambda x: 0 <= x <= 1, "alpha erasing"),
    (f"1 to {MOST_TURNS}", lambda x: 1 <= x <= MOST_TURNS, "turns"),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, "holdout beta1 beta2 ema"),
)


def parse_train(description, argv=None, subject=False):
    """Parse the options of train.py, or with `subject` of train_msra.py.

    Defaults may come from `--config FILE.yml`; the command line wins over them.
    Raises UserError for an unreadable configuration or a value out of range.
    """
    parser = argparse.ArgumentParser(usage=USAGE, description=description, formatter_class=HelpFormatter)
    _add_data(parser, subject)
    _add_samples(parser)
    _add_network(parser)
    _add_training(parser)
    _add_stopping(parser)
    args = _parse(parser, argv)
    if args.network == "full" and args.alpha < 1:
        raise UserError("--network full has no maps: leave --alpha at 1")
    if args.kernel_size % 2 == 0 or args.kernel_size // 2 >= args.label_size:
        raise UserError(f"--kernel_size must be odd and below twice --label_size, not {args.kernel_size}")
    return args


def parse_test(description, argv=None, subject=False):
    """Parse the options of test.py, or with `subject` of test_msra.py."""
    parser = argparse.ArgumentParser(
        usage=USAGE,
        description=description,
        formatter_class=HelpFormatter,
        epilog="Exit status: 0 every frame has joints, 3 some were refused (zeros in the result file,\n"
        "left out of the errors), 1 all were, or something else is wrong.",
    )
    _add_data(parser, subject)
    add = parser.add_argument
    add("--seed", default="final", help="which checkpoint: final, or an epoch's number")
    add("--model", type=Path, help="a checkpoint file, instead of Model/<dataset>_<suffix>_<seed>.pt")
    add("--turns", **TURNS)
    add("--process_mode", choices=("uvd", "bb"), default="uvd", help="centre file, or bounding box (HAND17)")
    return _parse(parser, argv)


def parse_predict(argv=None):
    """Parse the options of predict.py; camera, centre and box are numbers then."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s INPUT [INPUT ...] --camera CAMERA [options]",
        description="Find the hand in depth frames and predict its joints.",
        formatter_class=HelpFormatter,
        epilog="Exit status: 0 every frame has joints, 3 some have none (predictions.jsonl says why),\n"
        "1 none has, or the model or a folder cannot be used, 2 wrong options.",
    )
    _add_frames(parser)
    _add_model(parser)
    _add_hand(parser)
    _add_output(parser)
    args = parser.parse_args(argv)
    try:
        _check_ranges(args)
        args.camera = parse_camera(args.camera)
        args.center = args.center and split_numbers(args.center, 3, "--center")
        args.bbox = args.bbox and split_numbers(args.bbox, 4, "--bbox")
    except UserError as error:
        parser.error(str(error))
    if args.bbox and min(args.bbox[2:]) <= 0:
        parser.error(f"--bbox {args.bbox}: width and height must be above 0")
    if args.depth_unit:
        args.camera = args.camera._replace(unit_mm=args.depth_unit)
    return args


def _add_data(parser, subject):
    add = parser.add_argument_group("run").add_argument
    add("--config", type=Path, help="YAML file with defaults for these options")
    add("--suffix", default="default", help="name of the run")
    if subject:
        subjects = (*range(MSRADataset.subjects), "all")
        add("--subject", type=_number_or_text, choices=subjects, default=0, help="held-out subject, or all")
        parser.set_defaults(dataset="MSRA")
    else:
        names = [name for name in DATASETS if name != "MSRA"]
        add("--dataset", choices=names, default="NYU", help="data set")
    add("--data_dir", type=Path, help="the data set's own folder (default: Data/<dataset>)")
    add("--batch_size", type=int, default=32, help="frames a step, of all processes together")
    cores = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    add("--num_workers", type=int, default=cores, help="loading processes, at most one a core (the default)")
    add("--device", choices=DEVICES, default="auto", help="auto: a GPU where there is one")
    add("--gpu_id", type=int, default=0, help="which GPU")


def _add_samples(parser):
    add = parser.add_argument_group("data").add_argument
    add("--kernel_size", type=int, default=7, help="width of the heatmaps' blur, px")
    add("--sigmoid", type=float, default=1.5, help="sigma of the heatmaps' blur, px")
    add("--using_rotation", type=int, choices=(0, 1), default=1, help="augment by rotation")
    add("--using_scale", type=int, choices=(0, 1), default=1, help="augment by scale")
    add("--using_shift", type=int, choices=(0, 1), default=1, help="augment by shift")
    add("--using_flip", type=int, choices=(0, 1), default=0, help="augment by flip")
    add("--rotation_deg", type=float, default=30.0, help="largest angle to turn by, degrees")
    add("--shift_mm", type=float, default=0.0, help="also shift the centre by up to this along x, y, z, mm")
    add("--erasing", type=float, default=0.0, help="share of crops that lose a rectangle, 0 to 1")
    add("--depth_noise", type=float, default=0.0, help="standard deviation of added noise, mm")
    instead = "validate on this last share of train instead of val (which is test data in NYU, ICVL, MSRA)"
    add("--holdout", type=float, default=0.0, help=instead)


def _add_network(parser):
    add = parser.add_argument_group("network").add_argument
    full = "full: the paper's comparison, which regresses coordinates directly"
    add("--network", choices=("pixelwise", "full"), default="pixelwise", help=full)
    add("--label_size", type=int, default=64, help="edge of the heatmaps, px; the crop is twice that")
    add("--stages", type=int, default=2, help="stacked prediction stages")
    add("--features", type=int, default=128, help="width of the features")
    add("--level", type=int, default=4, help="depth of the hourglass")
    add("--filter_size", type=int, default=3, help="kernel of stem and regressions, px")
    add("--norm_method", choices=("instance", "batch"), default="instance", help="kind of norm")
    add("--heatmap_method", choices=("softmax", "sum"), default="softmax", help="logits to heatmap")


def _add_training(parser):
    add = parser.add_argument_group("training").add_argument
    add("--seed", type=int, default=0, help="of weights, order and augmentation; 0 draws one")
    add("--epoch", type=int, default=50, help="epochs to train")
    add("--opt", choices=("adam", "sgd"), default="adam", help="AdamW or SGD")
    add("--lr", type=float, default=1e-3, help="learning rate")
    add("--lr_decay", type=float, default=0.2, help="factor on lr every --decay_epoch epochs")
    add("--decay_epoch", type=int, default=15, help="epochs between two decays")
    cosine = "cosine: down to 0 along half a cosine, instead of --lr_decay"
    add("--lr_schedule", choices=("step", "cosine"), default="step", help=cosine)
    add("--warmup_epochs", type=float, default=0.0, help="with cosine: epochs in which lr climbs from 0")
    add("--beta1", type=float, default=0.9, help="AdamW's beta 1, SGD's momentum")
    add("--beta2", type=float, default=0.999, help="AdamW's beta 2")
    add("--weight_decay", type=float, default=0.0, help="on all weights")
    add("--alpha", type=float, default=1.0, help="1 regression, 0 detection, between mixed")
    add("--coordinates_from", type=int, default=0, help="alpha is 1 from this epoch on (0: never)")
    add("--coordinate_loss", choices=COORDINATE_LOSSES, default="squared", help="of uvd, at alpha above 0")
    add("--lambda_h", type=float, default=1.0, help="weight of the heatmaps' loss")
    add("--lambda_d", type=float, default=0.01, help="weight of the depth maps' loss")
    average = "validate and save a moving average of the weights: its decay a step, such as 0.999 (0: none)"
    add("--ema", type=float, default=0.0, help=average)
    begin = "begin with this checkpoint's weights; it may have fewer stages and another label_size"
    add("--init", type=Path, help=begin)
    add("--mixed_precision", **SWITCH, help="bfloat16 autocast; the decoder stays float32")
    add("--compile", **SWITCH, help="compile the network (minutes once, then faster)")


def _add_stopping(parser):
    add = parser.add_argument_group("stopping and going on").add_argument
    from_state = "go on from Model/<run>_last.pt; auto: where it exists"
    add("--resume", nargs="?", const="always", choices=("always", "auto"), help=from_state)
    add("--save_minutes", type=float, default=10.0, help="save the state that often, minutes")
    add("--skip_bad", **SWITCH, help="count frames that cannot be read and go on")
    add("--max_bad_steps", type=int, default=10, help="end after more non-finite steps in a row")


def _add_frames(parser):
    kinds = "16-bit PNG, TIFF, .npy, MSRA .bin, with --camera NYU its colour PNG, or a folder of them: a "
    order = "sequence in the order of the numbers in their names"
    parser.add_argument("input", nargs="+", type=Path, help=kinds + order)
    add = parser.add_argument_group("camera").add_argument
    camera = (
        "px; or a camera file (YAML or JSON, also of RealSense, Open3D, ROS; docs/camera.md); or one of "
        f"{', '.join(PRESETS)}, which hold for the depth stream itself, not for depth aligned to colour"
    )
    add("--camera", required=True, metavar="FX,FY,U0,V0", help=camera)
    unit = "mm that a stored 1 means (default: the camera file's, 0.125 for SR300 and SR305, else 1)"
    add("--depth_unit", type=float, help=unit)


def _add_model(parser):
    add = parser.add_argument_group("model").add_argument
    add("--model", type=Path, help="checkpoint (default: the one that comes with this code)")
    add("--joints", choices=DATASETS, help="data set whose joints it predicts (default: the checkpoint's)")
    add("--cube", type=float, help="half the edge of the hand's cube, mm (default: --joints')")
    add("--turns", **TURNS_OF_MODEL)
    add("--device", choices=DEVICES, default="auto", help="auto: a GPU where there is one")


def _add_hand(parser):
    group = parser.add_argument_group("hand")
    where = group.add_mutually_exclusive_group()
    center = "its middle: column px, row px, depth mm; where U is negative --center=U,V,D"
    where.add_argument("--center", metavar="U,V,D", help=center)
    box = "the box that holds it: left, top, width, height, px; where L is negative --bbox=L,T,W,H"
    where.add_argument("--bbox", metavar="L,T,W,H", help=box)
    hand = "which hand it is; a right hand in a mirrored picture is a left one"
    group.add_argument("--hand", choices=("right", "left"), default="right", help=hand)


def _add_output(parser):
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default=Path("Result/predict"), help="folder")
    pictures = "overlays and film; without, a sequence goes faster"
    add("--pictures", action=argparse.BooleanOptionalAction, default=True, help=pictures)
    add("--plot3d", action="store_true", help="also picture the points from two sides")
    add("--video", choices=("mp4", "gif", "none"), default="mp4", help="film of a sequence (gif: 100 frames)")


def _number_or_text(text):
    return int(text) if text.isdecimal() else text


def _parse(parser, argv):
    argv = sys.argv[1:] if argv is None else list(argv)
    path = parser.parse_args(argv).config
    args = parser.parse_args(_config_arguments(parser, path) + argv if path else argv)
    _check_ranges(args)
    args.num_workers = min(args.num_workers, parser.get_default("num_workers"))
    if Path(args.suffix).name != args.suffix:
        raise UserError(f"--suffix {args.suffix!r} must be part of a file's name")
    return args


def _config_arguments(parser, path):
    """Return a YAML file's options as command-line words, so that both are checked alike."""
    try:
        options = yaml.safe_load(path.read_bytes()) or {}
    except (OSError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {one_line(error)}") from error
    if not isinstance(options, dict):
        raise UserError(f"{path}: expected `option: value` lines")
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    words = []
    for key, value in options.items():
        if key not in known:
            raise UserError(f"{path}: no option is named {key!r}; there are {', '.join(known)}")
        if known[key].nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"{path}: {key} must be true or false, not {value!r}")
            words.append(f"--{'' if value else 'no-'}{key}")
        elif value is not None:
            words.append(f"--{key}={value}")
    return words


def _check_ranges(args):
    """Raise UserError for the first number among the options that is out of range."""
    for words, fits, names in RANGES:
        for name in names.split():
            value = getattr(args, name, None)
            if isinstance(value, (int, float)) and not fits(value):
                raise UserError(f"--{name} must be {words}, not {value}")
