"""Memory stays flat over a long training and a long prediction, each in a process of its own."""

import json
from pathlib import Path

import pytest
from processes import run_function
from training import RUN, TINY, repeat_lines

from datasets import DATASETS
from engine import loops as engine
from engine import testing
from engine.checkpoints import resolve_device
from engine.options import parse_test, parse_train
from engine.training import train
from model import PixelwiseRegression

STEPS, PREDICTIONS = 2000, 10_000
LARGEST_GROWTH = 0.02  # from a quarter on: a leak of some 5 kB a step, 1 kB a prediction


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measured_at(shares, total, sizes):
    """Return a function to call at each of `total` events; it notes the memory at the given shares."""
    marks, count = [round(share * total) for share in shares], 0

    def note(*_):
        nonlocal count
        count += 1
        if count in marks:
            sizes.append(resident_bytes())

    return note


def train_long(steps):
    """Train one epoch, saving often; print the memory after a quarter, a half and all of it."""
    sizes, original = [], engine.train_step
    note = measured_at((0.25, 0.5, 1), steps, sizes)
    engine.train_step = lambda *arguments: (note(), original(*arguments))[1]
    train(parse_train("", [*TINY, "--batch_size", "2", "--epoch", "1", "--save_minutes", "0.05"]))
    print(json.dumps(sizes))


def predict_long(frames):
    """Predict; print the memory after a quarter, a half and all of it."""
    sizes, original = [], testing.to_device
    dataset = DATASETS["ICVL"](dataset="test", test_only=True, label_size=16, image_size=32)
    assert len(dataset) == frames
    note = measured_at((0.25, 0.5, 1), frames // 4, sizes)
    testing.to_device = lambda *arguments: (note(), original(*arguments))[1]
    network = PixelwiseRegression(dataset.joint_number, stage=1, label_size=16, features=32, level=0)
    args = parse_test("", ["--num_workers", "0", "--batch_size", "4"])
    _, refused = testing.predict(network, dataset, args, resolve_device("cpu"))
    assert not refused
    print(json.dumps(sizes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "work, index, count", [(train_long, "train.txt", STEPS), (predict_long, "test.txt", PREDICTIONS)]
)
def test_memory_is_flat(work, index, count, fresh_indexed, workplace, capsys):
    root = fresh_indexed("ICVL")
    repeat_lines(root / index, count * (2 if work is train_long else 1))
    done = run_function(work, count, cwd=workplace)
    assert done.status == 0, done.err[-2000:]
    sizes = json.loads(done.out.splitlines()[-1])
    with capsys.disabled():
        print(f" {work.__name__}: {[f'{size / 1e6:.1f} MB' for size in sizes]} ", end="")
    assert len(sizes) == 3 and abs(sizes[-1] / sizes[0] - 1) < LARGEST_GROWTH
    assert work is predict_long or Path("Model", f"{RUN}_final.pt").is_file()
