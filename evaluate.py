"""Evaluate files of predicted hand joints as the community does: one table, one figure, one JSON file.

python evaluate.py --dataset NYU Result/NYU_default.txt
python evaluate.py --dataset NYU --labels labels.txt A.txt B.txt --plot errors.png --json errors.json
python evaluate.py --dataset MSRA --subject 3 Result/MSRA_default_subject3.txt
"""

import argparse
import json
import re
import sys
from array import array
from pathlib import Path

import numpy as np

from engine.metrics import PROTOCOLS, format_table, has_joints, measure_errors, success_curve, summarise
from utils import UserError, atomic_path, require_file, run

PLOT_SUFFIXES = (".png", ".pdf", ".svg")
PLOT_THRESHOLDS_MM = np.arange(81)


def read_joints(path, joints):
    """Return the joints [N, joints, 3], float64, of a text file as `read_frames` reads it."""
    return read_frames(path, joints)[0]


def read_frames(path, joints):
    """Read a text file of joints, a frame a line: [N, joints, 3] in its own units, and the frames' names.

    Numbers are separated by blanks, tabs or commas and may follow a file name; blank lines are skipped. The
    names are None where no line has one. Raises UserError when the file is missing or empty and, with the
    line's number, when a line has another count of numbers, holds something that is not a finite number, or
    has a name where others have none.
    """
    require_file(path, "give a text file with a frame a line")
    values, names = array("d"), []  # HAND17 has 18 million numbers: no Python object may stay for each
    try:
        with path.open("rb") as file:
            encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
        # Bytes that are no text are replaced, so that they are reported as tokens that are no numbers.
        with path.open(encoding=encoding, errors="replace") as file:
            for number, line in enumerate(file, start=1):
                tokens = line.replace(",", " ").replace("\ufeff", " ").split()  # the byte order mark
                if tokens:
                    where = f"{path}, line {number}"
                    name, numbers = _parse_frame(tokens, 3 * joints, where)
                    values.extend(numbers)
                    names.append(name)
                    if (name is None) != (names[0] is None):
                        raise UserError(f"{where}: give a frame's name in every line, or in none")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not values:
        raise UserError(f"{path} is empty: give a text file with a frame a line")
    return np.array(values).reshape(-1, joints, 3), None if names[0] is None else names


def _parse_frame(tokens, count, where):
    """Return the name (or None) and the `count` numbers of a line; `where` opens a UserError's message."""
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
    return name, values


def _is_number(token):
    """Tell whether a token reads as a float."""
    try:
        float(token)
    except ValueError:
        return False
    return True


def read_labels(args):
    """Return the labels [N, J, 3] that `args` ask for (uvd; HAND17 xyz), their frames' names, their source.

    The names are None where they have none. Raises UserError when the label file cannot be read or is in
    another form, or the data set has no test index or no test labels.
    """
    protocol = PROTOCOLS[args.dataset]
    if args.labels is not None:
        labels, names = read_frames(args.labels, len(protocol.joint_names))
        protocol.require_form(labels, args.labels)
        return labels, names, str(args.labels)
    from engine import testing  # pulls in torch, which files of labels do without

    where = args.dataset, args.data_dir, args.subject
    parts = testing.test_parts(*where)
    names = [str(part.frame_path(index)) for part in parts for index in range(len(part))]
    return testing.test_labels_uvd(*where), names, f"the test index of {args.dataset}"


def read_predictions(path, protocol, labels, names, source):
    """Return the joints [N, J, 3] of one prediction file in the order of the labels that `source` names.

    Lines are matched by frame names where both files have them. Raises UserError when the file cannot be
    read, is in another form, or has other frames than the labels.
    """
    joints, own_names = read_frames(path, len(protocol.joint_names))
    if own_names is not None and names is not None:
        joints = joints[match_names(own_names, names, path, source)]
    if len(joints) != len(labels):
        raise UserError(f"{path}: expected {len(labels)} frames, as in {source}, found {len(joints)}")
    if not (has_joints(joints) & has_joints(labels)).any():
        raise UserError(f"{path}: no frame of it has joints: all numbers are 0")
    protocol.require_form(joints, path)
    return joints


def match_names(names, wanted, path, source):
    """Return, for each frame name `wanted` by `source`, which of the `names` in the lines of `path` it is.

    A frame is known by the end of its path, as much of it as tells the wanted ones apart. Raises UserError
    at a name that stands twice, is unknown, or is missing.
    """
    ends = [tuple(re.split(r"[\\/]", name)) for name in wanted]
    parts = 1
    while len({end[-parts:] for end in ends}) < len(ends) and parts < max(map(len, ends)):
        parts += 1
    wanted = {end[-parts:]: None for end in ends}
    if len(wanted) < len(ends):
        raise UserError(f"{source}: two lines are of one frame")
    lines = {}
    for line, name in enumerate(names):
        end = tuple(re.split(r"[\\/]", name))[-parts:]
        if end not in wanted or end in lines:
            problem = f"is not in {source}" if end not in wanted else "stands in two lines"
            raise UserError(f"{path}: frame {name} {problem}")
        lines[end] = line
    missing = next((end for end in wanted if end not in lines), None)
    if missing:
        raise UserError(f"{path}: frame {'/'.join(missing)} of {source} is missing")
    return [lines[end] for end in wanted]


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
    parser = argparse.ArgumentParser(description="Evaluate predicted hand joints against labels.")
    add = parser.add_argument
    add("predictions", nargs="+", type=Path, metavar="PRED", help="file of results")
    add("--dataset", required=True, choices=PROTOCOLS, help="data set that was predicted")
    default = "the data set's test index"
    add("--labels", type=Path, help=f"labels in the layout of the results (default: {default})")
    add("--data_dir", type=Path, help="folder of the data set (default: Data/<dataset>)")
    add("--subject", type=int, choices=range(9), help="MSRA's test subject (default: all)")
    add("--plot", type=Path, help="figure to write, .png, .pdf or .svg")
    add("--json", type=Path, help="JSON file to write, errors in mm")
    args = parser.parse_args(argv)
    if args.subject is not None and (args.dataset != "MSRA" or args.labels is not None):
        parser.error("--subject goes with --dataset MSRA and without --labels: it chooses MSRA's own labels")
    if args.plot is not None and args.plot.suffix.lower() not in PLOT_SUFFIXES:
        parser.error(f"--plot {args.plot}: give a name that ends in {', '.join(PLOT_SUFFIXES)}")
    protocol, summaries, errors_mm = PROTOCOLS[args.dataset], {}, {}
    labels, frame_names, source = read_labels(args)
    for name, path in zip(name_files(args.predictions), args.predictions, strict=True):
        joints = read_predictions(path, protocol, labels, frame_names, source)
        errors_mm[name], split = measure_errors(protocol, joints, labels)
        summaries[name] = summarise(errors_mm[name], split)
    title = f"{args.dataset}, {len(labels)} test frames"
    print(title)
    print(format_table(summaries, protocol.joint_names))
    for name, error_mm in errors_mm.items():
        if len(error_mm) < len(labels):
            print(f"{name}: {len(labels) - len(error_mm)} frames have no joints (zeros) and are left out")
    if args.plot is not None:
        plot_errors(args.plot, errors_mm, protocol.joint_names, title)
    if args.json is not None:
        report = {"dataset": args.dataset, "frames": len(labels), "joint_names": protocol.joint_names}
        with atomic_path(args.json) as temporary:
            temporary.write_text(json.dumps({**report, "predictions": summaries}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
