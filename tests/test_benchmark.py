"""The benchmark: it runs, and its table and JSON say the same."""

import json

import pytest

from annotations import build_cache
from tools import benchmark
from tools.benchmark import Timing, format_rows, timed


def test_it_measures_a_data_set_and_the_network(fresh_indexed, tmp_path, capsys, monkeypatch):
    roots = {name: fresh_indexed(name) for name in benchmark.DATASETS}
    build_cache("NYU", roots["NYU"])
    monkeypatch.setattr(benchmark, "limit_flops", lambda *_: (1e12, 0.0))
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
    assert {"targets, batch 32", "training bfloat16 eager, batch 1", "inference, best batch"} <= set(rows)
    assert all(row["value"] > 0 and row["part"] in table for row in rows.values())


def test_a_rate_and_a_time_keep_their_relative_spread():
    timing = Timing(median=0.5, spread=0.05)
    assert timing.row("part", "samples/s", 8)[:4] == ("part", 16.0, "samples/s", pytest.approx(1.6))
    assert timing.row("part", "ms")[:4] == ("part", 500.0, "ms", pytest.approx(50.0))
    assert "part" in format_rows([timing.row("part", "ms")])


def test_functions_take_turns():
    calls = []
    timed([lambda: calls.append("a"), lambda: calls.append("b")], benchmark.torch.device("cpu"), 3)
    assert "".join(calls) == "ab" * 5
