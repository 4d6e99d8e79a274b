"""Train the network on NYU, ICVL or HAND17.

python train.py --dataset ICVL
python train.py --dataset NYU --suffix mixed --alpha 0.5 --mixed_precision
python train.py --config Model/NYU_mixed.yml
"""

import sys

import utils  # first: torch reads the threads' settings when it is imported
from engine.options import parse_train
from engine.training import train


def main():
    """Train as the command line says."""
    train(parse_train("Train on NYU, ICVL or HAND17."))


if __name__ == "__main__":
    sys.exit(utils.run(main))
