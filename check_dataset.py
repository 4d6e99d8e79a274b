"""Validate a data set and write its index files.

python check_dataset.py --dataset NYU
python check_dataset.py --dataset HAND17 --data_dir /data/HANDS17 --force
python check_dataset.py --dataset MSRA --cache
"""

import argparse
import sys
from pathlib import Path

from annotations import build_cache, build_index
from datasets import DATASETS
from utils import run


def main():
    """Parse the command line and build the index, and the crop cache where asked for."""
    parser = argparse.ArgumentParser(description="Validate a data set and write its index files.")
    parser.add_argument("--dataset", choices=DATASETS, default="NYU")
    parser.add_argument("--data_dir", type=Path, help="the data set's own folder (default: Data/<dataset>)")
    parser.add_argument("--force", action="store_true", help="build again what is in place")
    parser.add_argument(
        "--cache", action="store_true", help="also write the hands alone, which load many times faster"
    )
    args = parser.parse_args()
    root = args.data_dir or Path("Data", args.dataset)
    build_index(args.dataset, root, args.force)
    if args.cache:
        build_cache(args.dataset, root, args.force)


if __name__ == "__main__":
    sys.exit(run(main))
