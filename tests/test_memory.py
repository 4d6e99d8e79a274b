"""Memory stays flat over a long training and a long prediction.

Each is measured in a process of its own: `python tests/test_memory.py train|predict COUNT`.
"""

import json
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from training import RUN, TINY, repeat_lines

from datasets import DATASETS
from engine import loops as engine
from engine import testing
from engine.checkpoints import resolve_device
from engine.options import parse_train
from engine.training import train
from model import PixelwiseRegression

STEPS, PREDICTIONS = 2000, 10_000


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
    """Train one epoch, saving often; return the memory after a quarter, a half and all of it."""
    sizes, original = [], engine.train_step
    note = measured_at((0.25, 0.5, 1), steps, sizes)
    engine.train_step = lambda *arguments: (note(), original(*arguments))[1]
    train(parse_train("", [*TINY, "--batch_size", "2", "--epoch", "1", "--save_minutes", "0.05"]))
    return sizes


def predict_long(frames):
    """Predict; return the memory after a quarter, a half and all of it."""
    sizes, original = [], testing.to_device
    dataset = DATASETS["ICVL"](dataset="test", test_only=True, label_size=16, image_size=32)
    assert len(dataset) == frames
    note = measured_at((0.25, 0.5, 1), frames // 4, sizes)
    testing.to_device = lambda *arguments: (note(), original(*arguments))[1]
    network = PixelwiseRegression(dataset.joint_number, stage=1, label_size=16, features=32, level=0)
    _, refused = testing.predict(network, dataset, parse_train("", TINY), resolve_device("cpu"))
    assert not refused
    return sizes


def main():
    torch.set_num_threads(1)
    work, count = sys.argv[1:]
    print(json.dumps({"train": train_long, "predict": predict_long}[work](int(count))))


@pytest.mark.slow
@pytest.mark.parametrize(
    "work, index, count", [("train", "train.txt", STEPS), ("predict", "test.txt", PREDICTIONS)]
)
def test_memory_is_flat(work, index, count, fresh_indexed, capsys):
    root = fresh_indexed("ICVL")
    repeat_lines(root / index, count * (2 if work == "train" else 1))
    done = subprocess.run(
        [sys.executable, __file__, work, str(count)], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f" {work}: {[f'{size / 1e6:.1f} MB' for size in sizes]} ", end="")
    assert len(sizes) == 3 and abs(sizes[-1] / sizes[0] - 1) < 0.02
    assert work != "train" or Path("Model", f"{RUN}_final.pt").is_file()


if __name__ == "__main__":
    main()
