"""The benchmark: it runs, and its table and JSON say the same."""

import json
import time
from unittest.mock import Mock

import pytest

from check_dataset import build_cache
from tools import benchmark
from tools.benchmark import timed, to_row


@pytest.mark.slow
def test_it_measures_a_data_set_and_the_network(fresh_indexed, tmp_path, capsys, monkeypatch):
    roots = {name: fresh_indexed(name) for name in benchmark.DATASETS}
    build_cache("NYU", roots["NYU"])
    monkeypatch.setattr(
        benchmark, "limit_row", lambda *_: benchmark.Row("matrix product", 1e3, "GFLOP/s", 0.0)
    )
    monkeypatch.setattr(benchmark, "loader_rows", lambda *_: [])
    small = "--features 32 --stages 1 --level 2".split()
    parse_train = benchmark.parse_train
    monkeypatch.setattr(benchmark, "parse_train", lambda title, words: parse_train(title, [*small, *words]))
    words = [f"--data={name}={root}" for name, root in roots.items()]
    words += ["--device", "cpu", "--repeats", "2", "--modes", "eager", "--batch_sizes", "1"]
    benchmark.main([*words, "--json", str(tmp_path / "rows.json")])
    table = capsys.readouterr().out
    rows = {row["part"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert "NYU training samples, cache" in rows and "HAND17 training samples, cache" not in rows
    assert {"targets, batch 32", "training bfloat16 eager, batch 1", "inference eager, batch 1"} <= set(rows)
    assert all(row["value"] > 0 and row["part"] in table for row in rows.values())


@pytest.mark.parametrize("words", ["--repeats 0", "--frames 0", "--batch_sizes 8 0"])
def test_nothing_to_measure_is_a_wrong_option(words, capsys):
    with pytest.raises(SystemExit) as ending:
        benchmark.parse(words.split())
    assert ending.value.code == 2 and "must be 1 or more" in capsys.readouterr().err


def test_a_rate_keeps_its_relative_spread():
    timing = Mock(median=0.5, iqr=0.1)
    row = to_row(timing, "part", "samples/s", 8)
    assert row[:4] == ("part", 16.0, "samples/s", pytest.approx(1.6)) and str(row).startswith("part ")


def test_functions_take_turns_and_a_slow_one_is_measured_as_such():
    calls = []
    slow, fast = timed([lambda: calls.append("a") or time.sleep(0.02), lambda: calls.append("b")], 3)
    assert "".join(calls) == "aabb" * 3
    assert 0.02 <= slow.median < 0.2 and fast.median < 0.01 and slow.iqr < 0.1
