"""Validate a data set and write its index files.

python check_dataset.py --dataset NYU
python check_dataset.py --dataset HAND17 --data_dir /data/HANDS17 --force
"""

import argparse
import sys
from pathlib import Path

from annotations import build_index
from datasets import DATASETS
from utils import run


def main():
    """Parse the command line and build the index."""
    parser = argparse.ArgumentParser(description="Validate a data set and write its index files.")
    parser.add_argument("--dataset", choices=DATASETS, default="NYU")
    parser.add_argument("--data_dir", type=Path, help="the data set's own folder (default: Data/<dataset>)")
    parser.add_argument("--force", action="store_true", help="build again what is in place")
    args = parser.parse_args()
    build_index(args.dataset, args.data_dir or Path("Data", args.dataset), args.force)


if __name__ == "__main__":
    sys.exit(run(main))
