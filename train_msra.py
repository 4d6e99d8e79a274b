"""Train the network on MSRA, leaving one subject out or all nine in turn.

python train_msra.py --subject 3
python train_msra.py --subject all
"""

import sys

import utils  # first: torch reads the threads' settings when it is imported
from engine import distributed
from engine.options import parse_train
from engine.training import folds, train


def main():
    """Train each fold that the command line names; print the mean of several."""
    args = parse_train("Train on MSRA, leaving one subject out.", subject=True)
    best_mm = [train(fold)[1] for fold in folds(args)]
    if len(best_mm) > 1 and distributed.is_main():
        print(f"mean of {len(best_mm)} folds: {sum(best_mm) / len(best_mm):.2f} mm")


if __name__ == "__main__":
    sys.exit(utils.run(main))
