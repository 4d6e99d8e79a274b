"""The evaluation script: published numbers, the files people publish, and what it says about bad ones."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import GOLDEN, ON_CPU

import evaluate
from engine.metrics import PROTOCOLS, format_table, measure_errors, summarise
from frames.transforms import xyz2uvd
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT.parent / "shared" / "results"


def icvl_uvd(frames=3):
    """Return labels [frames, 16, 3] in uvd whose joints lie on the principal point, 241 mm and more away."""
    uvd = np.zeros((frames, 16, 3))
    uvd[...] = (160, 120, 241)
    uvd[..., 2] += np.arange(frames)[:, None]
    return uvd


def write_joints(path, joints):
    """Write [N, J, 3] as a text file, a frame a line; return its path."""
    np.savetxt(path, joints.reshape(len(joints), -1), fmt="%.3f")
    return path


def write_lines(path, *lines):
    """Write lines of text; return the file's path."""
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def labels_path(tmp_path):
    return write_joints(tmp_path / "labels.txt", icvl_uvd())


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published predictions are not here")
@pytest.mark.parametrize(
    ("dataset", "prediction", "expected"),
    [
        ("NYU", "TMM21_NYU_SRNet", "9.173 6.240 4.421 11.168 72.46 83.24 87.12 92.70 0.8248"),
        ("NYU", "CVPR18_NYU_HandPointNet", "10.540 7.594 5.544 12.638 59.34 78.41 85.97 89.36 0.7934"),
        ("ICVL", "TMM21_ICVL_SRNet", "6.152 5.130 6.927 5.544 85.34 94.86 97.68 98.21 0.8774"),
    ],
)
def test_published_predictions_give_the_published_numbers(dataset, prediction, expected):
    protocol = PROTOCOLS[dataset]
    source = PUBLISHED / f"{dataset.lower()}_test_groundtruth_label.txt"
    labels = evaluate.read_joints(source, len(protocol.joint_names))
    joints = evaluate.read_predictions(PUBLISHED / f"{prediction}.txt", protocol, labels, None, str(source))
    table = format_table({prediction: summarise(*measure_errors(protocol, joints, labels))})
    figures = [line.split()[-1] for line in table.splitlines() if " joint, mm" not in line]
    assert figures == [prediction, *expected.split()]


@pytest.mark.parametrize(
    "line",
    [
        "1 2.5 -3 400 5 6",
        "  1\t2.5  -3 \t400 5 6  \r",
        "1,2.5, -3,400,5,6",
        "1e0 2.5E+00 -3.0e0 4e2 5. 6",
        "frame\\images\\image_D00000001.png\t1\t2.5\t-3\t400\t5\t6",
        "\ufeff1 2.5 -3 400 5 6",
    ],
)
def test_numbers_are_read_however_they_are_spaced(tmp_path, line):
    path = tmp_path / "joints.txt"
    name = "b.png " if "png" in line else ""
    path.write_text(f"{line}\n{name}7 8 9 10 11 12\n\n  \n", encoding="utf-8")
    joints = evaluate.read_joints(path, joints=2)
    np.testing.assert_array_equal(joints, [[[1, 2.5, -3], [400, 5, 6]], [[7, 8, 9], [10, 11, 12]]])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 2 3 4 5", r"joints\.txt, line 2: expected 6 numbers .*, found 5$"),
        ("1 2 3 4 5 6 7", r"joints\.txt, line 2: expected 6 numbers .*, found 7$"),
        ("a.png 1 2 3 4 5", r"joints\.txt, line 2: expected 6 numbers .*, found 5 after 'a\.png'"),
        ("1 2 3 4 x5 6", r"joints\.txt, line 2: 'x5' is not a number"),
        ("a.png 1 2 3 4 b.png 6", r"joints\.txt, line 2: 'b\.png' is not a number"),
        ("1 2 3 NaN 5 6", r"joints\.txt, line 2: 'NaN' is not finite"),
        ("1 2 -inf 4 5 6", r"joints\.txt, line 2: '-inf' is not finite"),
        ("\0\1\2", r"joints\.txt, line 2: expected 6 numbers"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "joints.txt", "1 2 3 4 5 6", line)
    with pytest.raises(UserError, match=message):
        evaluate.read_joints(path, joints=2)


def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path):
    path = tmp_path / "joints.png"
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(UserError, match="line 1: expected 6 numbers"):
        evaluate.read_joints(path, joints=2)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, text):
    path = tmp_path / "joints.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=r"joints\.txt is empty"):
        evaluate.read_joints(path, joints=2)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.txt not found"):
        evaluate.read_joints(tmp_path / "nowhere.txt", joints=2)


def test_another_count_of_frames_names_both_counts(tmp_path, labels_path):
    path = write_joints(tmp_path / "pred.txt", icvl_uvd(frames=2))
    with pytest.raises(UserError, match=r"pred\.txt: expected 3 frames, as in .*labels\.txt, found 2"):
        evaluate.main(["--dataset", "ICVL", "--labels", str(labels_path), str(path)])


def test_errors_are_measured_after_back_projection(tmp_path, labels_path, capsys):
    # One column at depth z is z / fx mm: the frames are 241, 242 and 243 mm away and fx is 240.99.
    path = write_joints(tmp_path / "pred.txt", icvl_uvd() + (24.099, 0, 0))
    evaluate.main(["--dataset", "ICVL", "--labels", str(labels_path), str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ICVL, 3 test frames"
    assert lines[2].split() == ["mean,", "mm", "24.200"]
    assert lines[-1].split() == ["15", "little", "tip,", "mm", "24.200"]


def test_each_part_of_a_test_set_has_its_own_mean(tmp_path, labels_path, capsys, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "ICVL", PROTOCOLS["ICVL"]._replace(split=1))
    # Joints on the principal point, too deep by 1 mm in the first frame and by 3 and 5 mm in the others.
    path = write_joints(tmp_path / "pred.txt", icvl_uvd() + [[[0, 0, n]] for n in (1, 3, 5)])
    evaluate.main(["--dataset", "ICVL", "--labels", str(labels_path), str(path)])
    assert figures_of_parts(capsys.readouterr().out) == ["1.000", "4.000"]


def figures_of_parts(table):
    """Return the last column of the rows of the two test parts."""
    return [line.split()[-1] for line in table.splitlines() if "test part, mm" in line]


def test_testing_prints_both_parts_as_the_evaluation_does(fresh_indexed, script, monkeypatch):
    fresh_indexed("NYU")
    monkeypatch.setitem(PROTOCOLS, "NYU", PROTOCOLS["NYU"]._replace(split=1))
    checkpoint = GOLDEN / "expected" / "instance_softmax.pt"
    tested = script("test.py", "--dataset", "NYU", "--model", checkpoint, *ON_CPU)
    evaluated = script("evaluate.py", "--dataset", "NYU", "Result/NYU_default_instance_softmax.txt")
    parts = figures_of_parts(tested.out)
    assert parts == figures_of_parts(evaluated.out) and len(set(parts)) == 2 and "-" not in parts


def test_hand17_results_are_xyz_behind_a_name(tmp_path, capsys):
    xyz = np.full((2, 21, 3), (-100.0, 50.0, 400.0))
    labels = write_joints(tmp_path / "labels.txt", xyz)
    moved = "\t".join(f"{value:.3f}" for value in (xyz[0] + (3, 0, 4)).ravel())
    path = write_lines(tmp_path / "p.txt", *(f"frame\\images\\image_D{k:08d}.png\t{moved}" for k in (1, 2)))
    evaluate.main(["--dataset", "HAND17", "--labels", str(labels), str(path)])
    assert capsys.readouterr().out.splitlines()[2].split()[-1] == "5.000"


def nyu_labels(frames=4):
    """Return labels [frames, 14, 3] xyz of a hand about the middle of the picture."""
    rng = np.random.default_rng(1)
    return rng.normal(0, 50, (frames, 14, 3)) + rng.normal(0, 80, (frames, 1, 3)) + (0, 0, 800)


def nyu_uvd(xyz):
    return xyz2uvd(xyz, PROTOCOLS["NYU"].camera)


def nyu_palm(xyz):
    return xyz - xyz[:, 13:]


@pytest.mark.parametrize("labels_form, joints_form", [(a, b) for a in "urx" for b in "urx"])
def test_what_is_no_uvd_is_refused(labels_form, joints_form, tmp_path, capsys):
    """As xyz, or relative to the palm, both files would give a plausible and wrong mean."""
    forms = {"u": nyu_uvd, "r": nyu_palm, "x": lambda xyz: xyz}
    labels = write_joints(tmp_path / "labels.txt", forms[labels_form](nyu_labels()))
    joints = write_joints(tmp_path / "joints.txt", forms[joints_form](nyu_labels() + (0, 0, 5)))
    call = lambda: evaluate.main(["--dataset", "NYU", "--labels", str(labels), str(joints)])  # noqa: E731
    if (labels_form, joints_form) == ("u", "u"):
        call()
        assert capsys.readouterr().out.splitlines()[2].split()[-1] == "5.000"
        return
    name = "joints.txt" if labels_form == "u" else "labels.txt"
    with pytest.raises(
        UserError, match=rf"{name}: \d+% of its joints cannot be uvd .* 640 x 480 px .* mm away"
    ):
        call()


def test_hand17_joints_relative_to_the_palm_are_refused(tmp_path):
    xyz = np.random.default_rng(0).normal(0, 60, (3, 21, 3))
    labels = write_joints(tmp_path / "labels.txt", xyz + (0, 0, 500))
    joints = write_joints(tmp_path / "joints.txt", xyz)
    with pytest.raises(UserError, match="joints.txt: .* cannot be xyz"):
        evaluate.main(["--dataset", "HAND17", "--labels", str(labels), str(joints)])


def test_hand17_joints_in_uvd_are_refused(tmp_path):
    uvd = xyz2uvd(nyu_labels()[:, :1] + np.zeros((21, 3)), PROTOCOLS["HAND17"].camera)
    path = str(write_joints(tmp_path / "uvd.txt", uvd))
    with pytest.raises(UserError, match="uvd.txt: .* cannot be xyz"):
        evaluate.main(["--dataset", "HAND17", "--labels", path, path])


@pytest.mark.parametrize("outside", [(500, 120, 241), (160, -40, 241), (160, 120, 20), (160, 120, 4000)])
def test_one_joint_in_twenty_may_be_predicted_where_none_can_be(outside, tmp_path):
    joints = icvl_uvd(25)  # 400 joints
    for count in (20, 21):
        joints.reshape(-1, 3)[:count] = outside
        if count == 21:
            with pytest.raises(UserError, match="joints.txt: 5% of its joints cannot be uvd"):
                PROTOCOLS["ICVL"].require_form(joints, "joints.txt")
        else:
            PROTOCOLS["ICVL"].require_form(joints, "joints.txt")


def test_frames_of_zeros_are_left_out_and_counted(tmp_path, labels_path, capsys, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "ICVL", PROTOCOLS["ICVL"]._replace(split=2))
    joints = icvl_uvd() + [[[0, 0, n]] for n in (1, 3, 5)]
    joints[0] = 0
    command = ["--dataset", "ICVL", "--labels", str(labels_path)]
    evaluate.main([*command, str(write_joints(tmp_path / "some.txt", joints))])
    printed = capsys.readouterr().out
    assert figures_of_parts(printed) == ["3.000", "5.000"]
    assert printed.endswith("some: 1 frames have no joints (zeros) and are left out\n")
    with pytest.raises(UserError, match="none.txt: no frame of it has joints"):
        evaluate.main([*command, str(write_joints(tmp_path / "none.txt", 0 * joints))])


NAMES = ["test_seq_1/image_0000.png", "test_seq_1/image_0001.png", "test_seq_2/image_0000.png"]


def write_named(path, names, joints):
    """Write joints [N, J, 3] behind frame names, the lines backwards; return the path as text."""
    lines = [" ".join([name, *map(str, frame.ravel())]) for name, frame in zip(names, joints, strict=True)]
    return str(write_lines(path, *reversed(lines)))


@pytest.mark.parametrize("prefix", ["", "Testing\\Depth\\", "\ufeff/data/ICVL/Testing/Depth/"])
def test_named_frames_are_matched_by_name(prefix, tmp_path, capsys):
    labels = write_lines(
        tmp_path / "labels.txt", *(f"{n} {' '.join(map(str, f.ravel()))}" for n, f in zip(NAMES, icvl_uvd()))
    )
    joints = write_named(tmp_path / "joints.txt", [prefix + name for name in NAMES], icvl_uvd() + (0, 0, 2))
    evaluate.main(["--dataset", "ICVL", "--labels", str(labels), joints])
    assert capsys.readouterr().out.splitlines()[2].split()[-1] == "2.000"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([NAMES[0], NAMES[1], NAMES[0]], "frame test_seq_1/image_0000.png stands in two lines"),
        (
            [NAMES[0], NAMES[1], "test_seq_3/image_0000.png"],
            "frame test_seq_3/image_0000.png is not in .*labels",
        ),
        ([NAMES[0], NAMES[1], "image_0000.png"], "frame image_0000.png is not in"),
        (NAMES[:2], "frame test_seq_2/image_0000.png of .*labels.txt is missing"),
    ],
)
def test_unknown_double_and_missing_names_are_refused(names, message, tmp_path):
    labels = write_named(tmp_path / "labels.txt", NAMES, icvl_uvd())
    joints = write_named(tmp_path / "joints.txt", names, icvl_uvd(len(names)))
    with pytest.raises(UserError, match=f"joints.txt: {message}"):
        evaluate.main(["--dataset", "ICVL", "--labels", labels, joints])


def test_labels_that_name_a_frame_twice_are_refused(tmp_path):
    labels = write_named(tmp_path / "labels.txt", [NAMES[0], *NAMES[:2]], icvl_uvd())
    joints = write_named(tmp_path / "joints.txt", NAMES, icvl_uvd())
    with pytest.raises(UserError, match="labels.txt: two lines are of one frame"):
        evaluate.main(["--dataset", "ICVL", "--labels", labels, joints])


def test_a_line_without_a_name_among_named_ones_is_refused(tmp_path):
    path = write_lines(tmp_path / "joints.txt", "a.png 1 2 3", "4 5 6")
    with pytest.raises(UserError, match="line 2: give a frame's name in every line, or in none"):
        evaluate.read_frames(path, joints=1)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_are_no_part_of_a_number(encoding, tmp_path):
    path = tmp_path / "joints.txt"
    path.write_text("1 2 3\n4 5 6\n", encoding=encoding)
    np.testing.assert_array_equal(evaluate.read_joints(path, joints=1).ravel(), [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize(("options", "subject"), [([], None), (["--subject", "3"], 3)])
def test_without_a_file_labels_come_from_the_test_index(tmp_path, monkeypatch, capsys, options, subject):
    labels = np.full((2, 21, 3), 200.0)
    calls = []

    def test_labels_uvd(*where):
        calls.append(where)
        return labels

    monkeypatch.setattr("engine.testing.test_labels_uvd", test_labels_uvd)
    monkeypatch.setattr("engine.testing.test_parts", lambda *_: [])
    path = write_joints(tmp_path / "pred.txt", labels)
    evaluate.main(["--dataset", "MSRA", "--data_dir", str(tmp_path), str(path), *options])
    assert calls == [("MSRA", tmp_path, subject)]
    assert capsys.readouterr().out.splitlines()[2].split()[-1] == "0.000"


def test_named_frames_are_matched_with_the_test_index_too(indexed, tmp_path, capsys):
    lines = (indexed("NYU") / "test.txt").read_text().splitlines()
    path = write_lines(tmp_path / "joints.txt", *reversed(lines))
    evaluate.main(["--dataset", "NYU", "--data_dir", str(indexed("NYU")), str(path)])
    assert len(lines) > 1 and capsys.readouterr().out.splitlines()[2].split()[-1] == "0.000"


@pytest.mark.parametrize(
    "options",
    [
        ["--dataset", "NYU", "--subject", "1"],
        ["--dataset", "MSRA", "--subject", "1", "--labels", "labels.txt"],
        ["--dataset", "NYU", "--plot", "errors.docx"],
        ["--dataset", "OTHER"],
    ],
)
def test_options_that_make_no_sense_are_refused(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([*options, "pred.txt"])
    assert "error:" in capsys.readouterr().err


def test_files_of_one_name_are_told_apart_by_their_folders():
    assert evaluate.name_files([Path("a/x.txt"), Path("b/y.txt")]) == ["x", "y"]
    paths = [Path("a/x.txt"), Path("b/x.txt")]
    assert evaluate.name_files(paths) == [str(path) for path in paths]


def test_the_script_writes_table_figure_and_json(tmp_path, labels_path):
    near = write_joints(tmp_path / "near.txt", icvl_uvd() + (0, 0, 1))
    far = write_joints(tmp_path / "_far.txt", icvl_uvd() + (0, 0, 100))
    command = [sys.executable, ROOT / "evaluate.py", "--dataset", "ICVL", "--labels", labels_path, near, far]
    outputs = ["--plot", tmp_path / "out" / "errors.png", "--json", tmp_path / "out" / "errors.json"]
    done = subprocess.run([*command, *outputs], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines()[1].split() == ["near", "_far"]

    report = json.loads((tmp_path / "out" / "errors.json").read_text())
    assert (report["dataset"], report["frames"]) == ("ICVL", 3)
    assert report["joint_names"] == list(PROTOCOLS["ICVL"].joint_names)
    assert list(report["predictions"]) == ["near", "_far"]
    assert report["predictions"]["near"]["mean"] == pytest.approx(1)
    assert report["predictions"]["_far"]["per_joint"] == pytest.approx([100] * 16)
    image = cv2.imread(str(tmp_path / "out" / "errors.png"))
    assert image is not None
    assert image.std() > 0


def test_the_script_ends_with_one_line_after_an_error(tmp_path, labels_path, script):
    done = script("evaluate.py", "--dataset", "ICVL", "--labels", labels_path, tmp_path / "none.txt")
    assert done.status == 1
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert "none.txt" in done.err
