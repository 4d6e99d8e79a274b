"""Evaluate files of predicted hand joints as the community does: one table, one figure, one JSON file.

python evaluate.py --dataset NYU Result/NYU_default.txt
python evaluate.py --dataset NYU --labels labels.txt A.txt B.txt --plot errors.png --json errors.json
python evaluate.py --dataset MSRA --subject 3 Result/MSRA_default_subject3.txt
"""

import argparse
import json
import sys
from array import array
from pathlib import Path

import numpy as np

from engine.metrics import PROTOCOLS, format_table, joint_errors_mm, success_curve, summarise
from utils import UserError, atomic_path, require_file, run

PLOT_SUFFIXES = (".png", ".pdf", ".svg")
PLOT_THRESHOLDS_MM = np.arange(81)


def get_parser():
    """Return the parser of this script's options."""
    parser = argparse.ArgumentParser(description="Evaluate predicted hand joints against labels.")
    parser.add_argument("predictions", nargs="+", type=Path, metavar="PRED", help="file of results")
    parser.add_argument("--dataset", required=True, choices=PROTOCOLS, help="data set that was predicted")
    parser.add_argument(
        "--labels", type=Path, help="labels in the layout of the results (default: the data set's test index)"
    )
    parser.add_argument("--data_dir", type=Path, help="folder of the data set (default: Data/<dataset>)")
    parser.add_argument("--subject", type=int, choices=range(9), help="MSRA's test subject (default: all)")
    parser.add_argument("--plot", type=Path, help="figure to write, .png, .pdf or .svg")
    parser.add_argument("--json", type=Path, help="JSON file to write, errors in mm")
    return parser


def read_joints(path, joints):
    """Read a text file of joints, a frame a line, as [N, joints, 3] float64 in the file's own units.

    Numbers are separated by blanks, tabs or commas and may follow a file name; blank lines are skipped.
    Raises UserError when the file is missing or empty and, with the line's number, when a line has another
    count of numbers or holds something that is not a finite number.
    """
    require_file(path, "give a text file with a frame a line")
    values = array("d")  # HAND17 has 18 million numbers: no Python object may stay for each
    # Bytes that are no text are replaced, so that they are reported as tokens that are no numbers.
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                tokens = line.replace(",", " ").split()
                if tokens:
                    values.extend(_parse_frame(tokens, 3 * joints, f"{path}, line {number}"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not values:
        raise UserError(f"{path} is empty: give a text file with a frame a line")
    return np.array(values).reshape(-1, joints, 3)


def _parse_frame(tokens, count, where):
    """Return the `count` numbers of one line's tokens; `where` opens the message of a UserError."""
    name = None if _is_number(tokens[0]) else tokens[0]
    numbers = tokens if name is None else tokens[1:]
    if len(numbers) != count:
        after_name = "" if name is None else f" after {name[:40]!a}, which is not a number"
        expected = f"expected {count} numbers ({count // 3} joints)"
        raise UserError(f"{where}: {expected}, found {len(numbers)}{after_name}")
    try:
        values = [float(token) for token in numbers]
    except ValueError as error:
        token = next(token for token in numbers if not _is_number(token))
        raise UserError(f"{where}: {token!r} is not a number") from error
    if not np.isfinite(values).all():
        token = next(token for token in numbers if not np.isfinite(float(token)))
        raise UserError(f"{where}: {token!r} is not finite: give every joint of every frame a place")
    return values


def _is_number(token):
    """Tell whether a token reads as a float."""
    try:
        float(token)
    except ValueError:
        return False
    return True


def read_labels(args):
    """Return the labels [N, J, 3] that `args` ask for (uvd; HAND17 xyz) and the words that name their source.

    Raises UserError when the label file cannot be read, or the data set has no test index or no test labels.
    """
    if args.labels is not None:
        return read_joints(args.labels, len(PROTOCOLS[args.dataset].joint_names)), str(args.labels)
    import datasets  # pulls in torch, which files of labels do without

    options = {} if args.subject is None else {"subject": args.subject}
    labels = datasets.test_labels_uvd(args.dataset, args.data_dir, **options)
    return labels, f"the test index of {args.dataset}"


def measure_errors_mm(path, protocol, labels, source):
    """Return the joint errors [N, J], mm, of one prediction file against `labels` [N, J, 3].

    Raises UserError when the file cannot be read or has another count of frames than the labels, which
    `source` names.
    """
    joints = read_joints(path, len(protocol.joint_names))
    if len(joints) != len(labels):
        raise UserError(f"{path}: expected {len(labels)} frames, as in {source}, found {len(joints)}")
    return joint_errors_mm(protocol.to_xyz(joints), protocol.to_xyz(labels))


def name_files(paths):
    """Name files by their stems or, where stems are not unique, by the paths as given."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def plot_errors(path, errors_mm, joint_names, title):
    """Draw the error of each joint and the success curve of {name: error_mm [N, J]} into the file `path`."""
    # Slow to import and not needed for the table; without pyplot no window can open.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6), layout="constrained")
    figure.suptitle(title)
    joint_axes, curve_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    labels = [*joint_names, "mean"]
    positions = np.arange(len(labels))
    width = 0.8 / len(errors_mm)
    for row, (name, error_mm) in enumerate(errors_mm.items()):
        heights_mm = [*error_mm.mean(axis=0), error_mm.mean()]
        # The figure leads, because matplotlib leaves a label that begins with "_" out of the legend.
        legend = f"{error_mm.mean():.2f} mm: {name}"
        joint_axes.bar(positions + (row + 0.5) * width - 0.4, heights_mm, width, label=legend)
        curve_axes.plot(PLOT_THRESHOLDS_MM, 100 * success_curve(error_mm, PLOT_THRESHOLDS_MM))
    joint_axes.set_xticks(positions, labels, rotation=45, ha="right", rotation_mode="anchor")
    joint_axes.set(ylabel="mean 3D error, mm", title="Error per joint")
    joint_axes.grid(axis="y", alpha=0.4)
    joint_axes.set_axisbelow(True)
    curve_axes.set(xlim=(0, PLOT_THRESHOLDS_MM[-1]), ylim=(0, 100), title="Success curve")
    curve_axes.set(xlabel="threshold, mm", ylabel="frames whose worst joint is under the threshold, %")
    curve_axes.grid(alpha=0.4)
    figure.legend(loc="outside lower center", ncols=2)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=120)


def main(argv=None):
    """Read the options, print the table, and write the files that were asked for."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.subject is not None and (args.dataset != "MSRA" or args.labels is not None):
        parser.error("--subject goes with --dataset MSRA and without --labels: it chooses MSRA's own labels")
    if args.plot is not None and args.plot.suffix.lower() not in PLOT_SUFFIXES:
        parser.error(f"--plot {args.plot}: give a name that ends in {', '.join(PLOT_SUFFIXES)}")
    protocol = PROTOCOLS[args.dataset]
    labels, source = read_labels(args)
    errors_mm = {
        name: measure_errors_mm(path, protocol, labels, source)
        for name, path in zip(name_files(args.predictions), args.predictions, strict=True)
    }
    summaries = {name: summarise(error_mm, protocol.split) for name, error_mm in errors_mm.items()}
    title = f"{args.dataset}, {len(labels)} test frames"
    print(title)
    print(format_table(summaries, protocol.joint_names))
    if args.plot is not None:
        plot_errors(args.plot, errors_mm, protocol.joint_names, title)
    if args.json is not None:
        report = {"dataset": args.dataset, "frames": len(labels), "joint_names": protocol.joint_names}
        with atomic_path(args.json) as temporary:
            temporary.write_text(json.dumps({**report, "predictions": summaries}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
