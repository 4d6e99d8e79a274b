"""What the tests of training share: a tiny run, in this process or in one that can be killed."""

import json
import socket
import traceback
from pathlib import Path

import torch
from processes import end_together, start

import utils
from engine.checkpoints import load_checkpoint
from engine.options import parse_train
from engine.training import train

RUN = "ICVL_default"
TINY = (
    "--dataset ICVL --label_size 16 --features 32 --level 0 --stages 1 --device cpu --num_workers 0 "
    "--batch_size 4 --epoch 2 --seed 5"
).split()


def repeat_lines(path, count):
    """Make `count` lines of an index file's few."""
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{lines[i % len(lines)]}\n" for i in range(count)))


def global_batches(sampler):
    """Return the frames of each batch of an EpochSampler of one process."""
    indices = [index for index, _ in sampler]
    return [indices[k : k + sampler.batch_size] for k in range(0, len(indices), sampler.batch_size)]


def train_tiny(*arguments):
    """Train in this process, in the current folder; `arguments` win over TINY."""
    try:
        return train(parse_train("", [*TINY, *map(str, arguments)]))
    except BaseException as error:
        # Else its frames keep the loading processes, whose end the garbage collection waits for in vain.
        traceback.clear_frames(error.__traceback__)
        raise


def tiny_process(folder, *arguments, limit_bytes=None):
    """Return a forked process that trains in `folder`, its output in folder/output.txt (see `start`)."""
    how = dict(cwd=folder, output=["output.txt"] * 2, limit_bytes=limit_bytes)
    return start(train_as_a_script_does, *arguments, **how)


def train_in_two(folder, *arguments):
    """Train in two processes as torchrun does, but quicker; return their exit statuses."""
    return end_together(start_two(train_as_a_script_does, *arguments, cwd=folder), 120)


def start_two(function, *arguments, cwd):
    """Start two forked processes that work together, their output in cwd/output.txt; return them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    how = dict(cwd=cwd, output=["output.txt"] * 2)
    return [
        start(function, *arguments, **how, environment={**shared, "RANK": str(n), "LOCAL_RANK": str(n)})
        for n in range(2)
    ]


def train_as_a_script_does(*arguments):
    """Train; return the exit status."""
    return utils.run(lambda: train_each(*arguments))


def train_each(*arguments):
    """Train for each of several suffixes `--suffix a,b`, one after the other in the same process."""
    suffixes = ["default"]
    if "--suffix" in arguments:
        suffixes = arguments[arguments.index("--suffix") + 1].split(",")
    for suffix in suffixes:
        train_tiny(*arguments, "--suffix", suffix)


def records(folder=".", run=RUN):
    """Return the epochs of a run's metrics.jsonl without how long they took."""
    lines = Path(folder, "logs", run, "metrics.jsonl").read_text().splitlines()[1:]
    return [{**json.loads(line), "seconds": None} for line in lines]


def assert_same_values(value, other):
    """Compare nested values bit for bit."""
    assert type(value) is type(other)
    if isinstance(value, torch.Tensor):
        assert torch.equal(value, other)
    elif isinstance(value, dict):
        assert value.keys() == other.keys()
        for key in value:
            assert_same_values(value[key], other[key])
    elif isinstance(value, list):
        assert len(value) == len(other)
        for one, another in zip(value, other):
            assert_same_values(one, another)
    else:
        assert value == other


def assert_same_run(folder, other):
    """Check that two runs ended alike: weights of every epoch, optimiser and schedule, losses and errors."""
    assert_same_values(records(folder), records(other))
    for epoch in [record["epoch"] for record in records(other)] + ["final"]:
        paths = [Path(where, "Model", f"{RUN}_{epoch}.pt") for where in (folder, other)]
        assert_same_values(*(load_checkpoint(path)["state_dict"] for path in paths))
    states = [load_checkpoint(Path(where, "Model", f"{RUN}_last.pt")) for where in (folder, other)]
    for key in ("state_dict", "optimizer", "scheduler", "epoch", "progress"):
        assert_same_values(*(state[key] for state in states))
