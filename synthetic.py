"""Render a synthetic hand data set in the official on-disk layout of NYU, ICVL, MSRA or HAND17.

    python synthetic.py --layout NYU --train 2000 --test 200 --seed 1 --out Data/NYU
    python check_dataset.py --dataset NYU

The same seed gives the same bytes, on any number of processes.
"""

import argparse
import sys
from pathlib import Path

import utils  # first: torch reads the threads' settings when it is imported
from rendering.layouts import EVERY_SENSOR, FEWEST, SPLITS, write_dataset
from rendering.sensor import SENSORS
from utils import HelpFormatter, UserError, usable_cores


def main() -> None:
    """Write the data set that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--layout", choices=[*FEWEST], required=True, help="whose on-disk layout and camera")
    parser.add_argument(
        "--sensor",
        choices=[*SENSORS, EVERY_SENSOR],
        help=f"whose noise, shadows and distances (default: the layout's own); {EVERY_SENSOR}: all in turn",
    )
    parser.add_argument("--train", type=int, default=2000, help="training frames")
    parser.add_argument("--test", type=int, default=200, help="test frames")
    parser.add_argument("--seed", type=int, default=1, help="0 or more; the same seed gives the same bytes")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--num_workers", type=int, default=usable_cores(), help="processes")
    args = parser.parse_args()
    for split, fewest in zip(SPLITS, FEWEST[args.layout]):
        if getattr(args, split) < fewest:
            raise UserError(f"--{split} {getattr(args, split)}: {args.layout} needs at least {fewest}")
    if args.seed < 0 or args.num_workers < 1:
        raise UserError("--seed must be 0 or more, --num_workers 1 or more")
    counts = {"train": args.train, "test": args.test}
    write_dataset(args.layout, counts, args.seed, args.out, args.num_workers, args.sensor)
    print(f"{args.out}: {args.train} training and {args.test} test frames")


if __name__ == "__main__":
    sys.exit(utils.run(main))
