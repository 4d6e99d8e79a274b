"""Predict MSRA's held-out subjects, write the result files and print the errors.

python test_msra.py --subject 3
python test_msra.py --subject all
"""

import sys

import utils  # first: torch reads the threads' settings when it is imported
from engine.options import parse_test
from engine.testing import test_and_evaluate


def main():
    """Test each fold that the command line names; merge the results of all nine."""
    return test_and_evaluate(parse_test("Predict MSRA's held-out subjects.", subject=True))


if __name__ == "__main__":
    sys.exit(utils.run(main))
