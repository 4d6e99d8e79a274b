"""Command lines and their YAML defaults."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPO

from engine.options import parse_test, parse_train
from utils import UserError, usable_cores

# Names, defaults and meanings that the published scripts had.
PUBLISHED_DEFAULTS = dict(
    suffix="default",
    dataset="NYU",
    seed=0,
    batch_size=32,
    label_size=64,
    kernel_size=7,
    sigmoid=1.5,
    norm_method="instance",
    heatmap_method="softmax",
    using_rotation=1,
    using_scale=1,
    using_shift=1,
    using_flip=0,
    gpu_id=0,
    epoch=50,
    num_workers=usable_cores(),
    stages=2,
    features=128,
    level=4,
    filter_size=3,
    opt="adam",
    lr=1e-3,
    beta1=0.9,
    beta2=0.999,
    weight_decay=0,
    mixed_precision=False,
    lambda_h=1,
    lambda_d=0.01,
    alpha=1,
    lr_decay=0.2,
    decay_epoch=15,
)


def train_options(text="", **more):
    return vars(parse_train("Train.", text.split(), **more))


def config(tmp_path, text):
    path = tmp_path / "options.yml"
    path.write_text(text)
    return f"--config {path}"


def test_published_options_keep_their_defaults():
    options = train_options()
    assert {name: options[name] for name in PUBLISHED_DEFAULTS} == PUBLISHED_DEFAULTS
    msra = train_options(subject=True)
    assert (msra["dataset"], msra["subject"]) == ("MSRA", 0)
    test = vars(parse_test("Test.", []))
    assert (test["seed"], test["process_mode"], test["suffix"]) == ("final", "uvd", "default")


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr("engine.options.usable_cores", lambda: 16)
    assert parse_train("", []).num_workers == 16
    assert [parse_train("", ["--num_workers", n]).num_workers for n in ("3", "64")] == [3, 16]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert parse_train("", []).num_workers == 4


def test_test_takes_the_architecture_from_the_checkpoint_alone():
    assert not {"features", "level", "stages", "label_size"} & set(vars(parse_test("Test.", [])))


@pytest.mark.parametrize("text, subject", [("--subject 8", 8), ("--subject all", "all")])
def test_msra_subjects(text, subject):
    assert train_options(text, subject=True)["subject"] == subject


@pytest.mark.parametrize(
    "text", ["--subject 9", "--subject -1", "--subject x", "--dataset NYU", "--norm_method group"]
)
def test_impossible_choice_ends_with_the_usage(text, capsys):
    with pytest.raises(SystemExit) as ending:
        train_options(text, subject=True)
    assert ending.value.code == 2 and "usage:" in capsys.readouterr().err


def test_help_names_the_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_train("Train.", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("data set (default: NYU)", "blur, px (default: 7)", "0 draws one (default: 0)"):
        assert words in text
    assert "default: None" not in text and "default: False" not in text


# YAML


def test_config_gives_defaults_that_the_command_line_overrides(tmp_path):
    given = config(tmp_path, "dataset: ICVL\nlr: 1e-2\nusing_flip: 1\nmixed_precision: true\nepoch: 3\n")
    options = train_options(f"{given} --epoch 7")
    assert (options["dataset"], options["lr"], options["using_flip"]) == ("ICVL", 0.01, 1)
    assert options["mixed_precision"] is True and options["epoch"] == 7
    assert options["batch_size"] == 32


def test_false_in_config_leaves_a_switch_off(tmp_path):
    assert train_options(config(tmp_path, "mixed_precision: false\n"))["mixed_precision"] is False


def test_empty_config_changes_nothing(tmp_path):
    given = config(tmp_path, "# nothing yet\n")
    assert {**train_options(given), "config": None} == train_options()


@pytest.mark.parametrize("key", ["lrate", "config", "help", "1", "subject"])
def test_unknown_key_is_refused_by_name(key, tmp_path):
    with pytest.raises(UserError, match=f"options.yml: no option is named .?{key}.?; there are .*lr"):
        train_options(config(tmp_path, f"{key}: 1\n"))


@pytest.mark.parametrize("text", ["- lr\n- epoch\n", "just words\n"])
def test_config_without_options_is_refused(text, tmp_path):
    with pytest.raises(UserError, match="expected `option: value` lines"):
        train_options(config(tmp_path, text))


@pytest.mark.parametrize("text", ["lr: [1\n", "\tlr: 1\n", "lr: 1: 2\n"])
def test_config_that_is_no_yaml_is_refused_in_one_line(text, tmp_path):
    with pytest.raises(UserError, match="cannot be read as YAML") as error:
        train_options(config(tmp_path, text))
    assert "\n" not in str(error.value)


def test_config_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "binary.yml").write_bytes(bytes(range(128, 256)))
    for path in (tmp_path / "absent.yml", tmp_path, tmp_path / "binary.yml"):
        with pytest.raises(UserError, match="cannot be read as YAML"):
            train_options(f"--config {path}")


def test_config_can_execute_nothing(tmp_path):
    with pytest.raises(UserError, match="cannot be read as YAML"):
        train_options(config(tmp_path, f"lr: !!python/object/apply:os.mkdir ['{tmp_path}/intruder']\n"))
    assert not (tmp_path / "intruder").exists()


def test_values_in_config_are_checked_as_on_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_options(config(tmp_path, "using_flip: 2\n"))
    assert "--using_flip" in capsys.readouterr().err
    with pytest.raises(UserError, match="--alpha must be between 0 and 1, not 3"):
        train_options(config(tmp_path, "alpha: 3\n"))


def test_test_reads_a_config_too(tmp_path):
    args = parse_test("Test.", config(tmp_path, "process_mode: bb\ndataset: HAND17\nseed: 4\n").split())
    assert (args.process_mode, args.dataset, args.seed) == ("bb", "HAND17", "4")


def test_written_options_read_back_alike(tmp_path):
    """The values of the options, as YAML keeps them, with paths as text."""
    options = train_options("--data_dir some/where --lr 0.00003 --alpha 0.5 --mixed_precision")
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in options.items() if k != "config"}
    again = train_options(config(tmp_path, yaml.safe_dump(plain)))
    assert {**again, "config": None} == options


# Ranges


@pytest.mark.parametrize(
    "text, message",
    [
        ("--batch_size 0", "--batch_size must be above 0, not 0"),
        ("--epoch 0", "--epoch must be above 0"),
        ("--lr -1", "--lr must be above 0"),
        ("--lr nan", "--lr must be above 0"),
        ("--sigmoid 0", "--sigmoid must be above 0"),
        ("--decay_epoch 0", "--decay_epoch must be above 0"),
        ("--stages 0", "--stages must be above 0"),
        ("--alpha 1.1", "--alpha must be between 0 and 1"),
        ("--holdout 1", "--holdout must be at least 0 and below 1"),
        ("--beta1 1", "--beta1 must be at least 0 and below 1"),
        ("--beta2 -0.1", "--beta2 must be at least 0 and below 1"),
        ("--weight_decay -1", "--weight_decay must be 0 or more"),
        ("--lambda_h nan", "--lambda_h must be 0 or more"),
        ("--lr_decay 0", "--lr_decay must be above 0"),
        ("--save_minutes -1", "--save_minutes must be 0 or more"),
        ("--max_bad_steps -1", "--max_bad_steps must be 0 or more"),
        ("--suffix a/b", "--suffix 'a/b' must be part of a file's name"),
        ("--seed -1", "--seed must be 0 to 4294967295"),
        ("--seed 5000000000", "--seed must be 0 to 4294967295"),
        ("--num_workers -1", "--num_workers must be 0 or more"),
        ("--kernel_size 6", "--kernel_size must be odd"),
        ("--kernel_size 9 --label_size 4", "--kernel_size must be odd and below twice --label_size"),
    ],
)
def test_value_out_of_range_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        train_options(text)


@pytest.mark.parametrize("text", ["--batch_size 0", "--num_workers -1", "--turns 0", "--turns 13"])
def test_test_checks_its_values_too(text):
    with pytest.raises(UserError, match="must be"):
        parse_test("Test.", text.split())


# What scripts set before torch is imported

# Imports scripts, each in a fork with its own variables, and prints what is set when torch is reached.
STOP_AT_TORCH = """import json, os, sys
import cv2
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
for script, variables in json.loads(sys.argv[1]):
    if os.fork() == 0:
        os.environ.update(variables)
        __import__(script)
        os._exit(1)
    assert os.wait()[1] == 0, script
"""


def test_threads_soon_sleep_unless_the_environment_says_otherwise():
    cases = {(name, ""): "1000" for name in "train train_msra test test_msra predict synthetic demo".split()}
    cases |= {("train", "GOMP_SPINCOUNT=7"): "7", ("train", "OMP_WAIT_POLICY=ACTIVE"): "None"}
    words = [(name, dict([own.split("=")] if own else [])) for name, own in cases]
    others = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    command = [sys.executable, "-c", STOP_AT_TORCH, json.dumps(words)]
    done = subprocess.run(command, cwd=REPO, env=others, capture_output=True, text=True)
    assert dict(zip(cases, done.stdout.split(), strict=True)) == cases, done.stderr
