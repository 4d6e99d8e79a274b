"""Predict the test split of NYU, ICVL or HAND17, write the result file and print the errors.

python test.py --dataset NYU
python test.py --dataset HAND17 --process_mode bb
python test.py --dataset NYU --model Model/NYU_published.pt
"""

import sys

import utils  # first: torch reads the threads' settings when it is imported
from engine.options import parse_test
from engine.testing import test_and_evaluate


def main():
    """Test as the command line says."""
    return test_and_evaluate(parse_test("Predict the test split of NYU, ICVL or HAND17."))


if __name__ == "__main__":
    sys.exit(utils.run(main))
