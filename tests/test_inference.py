"""The fast forward pass gives the network's own answer."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from engine import inference
from engine.inference import limit_threads, moved_mm, prepare
from model import PixelwiseRegression, StageOutput


def random_network(seed=3, **size):
    """Return a network in float64, for random weights amplify rounding."""
    torch.manual_seed(seed)
    # Two stages, so that one taken for the other shows.
    size = {"stage": 2, "features": 32, "level": 0, "norm_method": "instance"} | size
    return PixelwiseRegression(5, label_size=16, **size).double().eval()


@pytest.fixture(params=["instance", "batch"])
def network(request):
    return random_network(level=2, norm_method=request.param)


def inputs(batch, dtype=torch.float64):
    generator = torch.Generator().manual_seed(batch)
    img, label_img = (
        torch.rand(batch, 1, size, size, generator=generator, dtype=dtype) - 0.5 for size in (32, 16)
    )
    return img, label_img, (label_img > 0).to(dtype)


@torch.no_grad()
def assert_same(network, forward, batch, rounding=1):
    batch = inputs(batch, next(network.parameters()).dtype)
    expected = StageOutput(*(field.float() for field in network(*batch)[-1]))
    answer = forward(*batch)
    assert moved_mm(answer.uvd, expected.uvd) < 0.01 * rounding
    assert torch.allclose(answer.heatmaps, expected.heatmaps, atol=1e-5 * rounding)
    assert torch.allclose(answer.depthmaps, expected.depthmaps, atol=1e-3 * rounding)


def test_fast_path_gives_the_networks_answer_and_leaves_it_alone(network):
    before = [type(module) for module in network.modules()]
    forward = prepare(network, torch.device("cpu"))
    for batch in (1, 3):
        assert_same(network, forward, batch)
    assert [type(module) for module in network.modules()] == before


@pytest.mark.parametrize(
    "frames, batches, runs_of_graph",
    [(0, [1, 1, 3], [1, 1, 3]), (9, [1, 1], [1, 1]), (1, [1], []), (0, [3, 3, 1], [])],
)
def test_a_graph_is_recorded_where_frames_come_one_by_one(
    frames, batches, runs_of_graph, monkeypatch, capsys
):
    recorded, runs = inference.recorded, []

    def noted(*arguments):
        graph = recorded(*arguments)
        return lambda *batch: (runs.append(len(batch[0])), graph(*batch))[1]

    monkeypatch.setattr(inference, "recorded", noted)
    network = random_network()
    forward = prepare(network, torch.device("cpu"), frames)
    for batch in batches:
        assert_same(network, forward, batch)
    assert runs == runs_of_graph and "passed over" not in capsys.readouterr().err


def test_threads_that_begin_together_use_one_graph(monkeypatch):
    recorded, graphs, network = inference.recorded, [], random_network()

    def slowly(*arguments):
        graphs.append(arguments)
        time.sleep(0.2)  # time for the other threads to come in between
        return recorded(*arguments)

    monkeypatch.setattr(inference, "recorded", slowly)
    forward = prepare(network, torch.device("cpu"))
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(assert_same, network, forward, 1) for _ in range(4)]:
            done.result()
    assert len(graphs) == 1


def test_a_pytorch_that_records_no_graph_runs_the_network_as_it_is(monkeypatch, capsys):
    monkeypatch.delattr(torch.jit, "trace")
    network = random_network()
    assert_same(network, prepare(network, torch.device("cpu")), 1)
    assert "passed over: AttributeError" in "".join(capsys.readouterr())


def test_answers_are_told_apart_in_mm():
    uvd = torch.zeros(1, 2, 3)
    assert moved_mm(uvd, uvd + torch.tensor([0.001, 0, 0])) == pytest.approx(0.3)
    assert moved_mm(uvd, uvd + torch.tensor([0, 0, 0.001])) == pytest.approx(0.15)


@torch.no_grad()
def test_a_faster_way_that_moves_the_answer_is_not_taken(network, monkeypatch):
    calls = []

    def another(*inputs):
        calls.append(inputs)
        return [stage._replace(uvd=stage.uvd + 0.001) for stage in network(*inputs)]

    monkeypatch.setattr(inference, "faster_forwards", lambda *_: [lambda: another])
    forward = prepare(network, torch.device("cpu"))
    for batch in (2, 2):
        assert_same(network, forward, batch)
    assert len(calls) == 1
    loose = prepare(network, torch.device("cpu"), tolerance_mm=1)
    assert_same(network, loose, 2)
    assert moved_mm(loose(*inputs(2)).uvd, network(*inputs(2))[-1].uvd) == pytest.approx(0.3, abs=0.01)


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")


@pytest.fixture
def compiled_calls(monkeypatch):
    """Let few frames repay compiling; return a list of the batches that compiled code gets."""
    compile_frozen, shapes = inference.compile_frozen, []

    def noted(network, inputs):
        compiled = compile_frozen(network, inputs)
        return lambda *x: (shapes.append(len(x[0])), compiled(*x))[1]

    monkeypatch.setitem(inference.COMPILE_FRAMES, "cpu", 4)
    monkeypatch.setattr(inference, "compile_frozen", noted)
    return shapes


@pytest.mark.parametrize(
    ("features", "batch", "frames", "compiles"),
    [
        (64, 1, 14999, False),
        (64, 1, 15000, True),
        (64, 2, 2999, False),
        (64, 2, 3000, True),
        (96, 1, 3000, True),
    ],
)
def test_compiling_pays_later_where_a_graph_is_nearly_as_fast(features, batch, frames, compiles, monkeypatch):
    compiled = []
    monkeypatch.setattr(inference, "compile_for", lambda *_: compiled.append(1))
    monkeypatch.setattr(inference, "recorded", lambda *_: None)
    network = random_network(stage=1, features=features)
    for make in inference.faster_forwards(network, inputs(batch), frames):
        make()
    assert bool(compiled) == compiles


@pytest.mark.slow
@needs_compiler
def test_long_work_is_compiled_and_a_last_short_batch_is_not(compiled_calls):
    network = random_network().float()  # torch freezes no float64
    forward = prepare(network, torch.device("cpu"), frames=5, tolerance_mm=1)
    for batch in (2, 2, 1):
        assert_same(network, forward, batch, rounding=100)
    assert compiled_calls == [2, 2], "once to see that it gives the same"


@pytest.mark.slow
def test_without_a_working_compiler_the_network_runs_as_it_is(compiled_calls, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    network = random_network(stage=1)
    with torch._inductor.config.patch({"cpp.cxx": ("false",)}):
        assert_same(network, prepare(network, torch.device("cpu"), frames=5), 2)
    assert "warning: a faster way was passed over" in capsys.readouterr().out and not compiled_calls


class Wide(nn.Module):
    """The least that has a wide convolution and gives a stage's output."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 128, 1), nn.Conv2d(128, 5, 1)
        self.wide = nn.Conv2d(128, 128, 3, padding=1)

    def forward(self, img, label_img, mask):
        maps = self.last(self.wide(self.first(label_img)))
        return [StageOutput(maps, maps * mask, maps.mean((2, 3))[..., None].repeat(1, 1, 3))]


@pytest.mark.slow
@needs_compiler
def test_wide_networks_take_frames_one_by_one_and_are_not_mixed_up(compiled_calls):
    for seed in (3, 4):
        torch.manual_seed(seed)
        network = Wide().eval()
        forward = prepare(network, torch.device("cpu"), frames=5)
        for batch in (2, 1, 2):
            assert_same(network, forward, batch)
        assert compiled_calls == [1] * (2 + 2 + 1)
        compiled_calls.clear()


def test_a_narrow_network_gets_one_thread_unless_the_environment_says_how_many(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    narrow, wide = (PixelwiseRegression(1, 1, 16, features, 0) for features in (64, 96))
    limit_threads(narrow)
    monkeypatch.delenv("OMP_NUM_THREADS")
    limit_threads(wide)
    assert asked == []
    limit_threads(narrow)
    assert asked == [1]
