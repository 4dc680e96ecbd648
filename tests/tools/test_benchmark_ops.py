"""Ours beside the peers: what is compared, how it is timed, what is printed."""
import json
import math
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import visionkit.ops
from visionkit.engine import op_benchmark, op_cases
from visionkit.engine.op_benchmark import Call, difference, in_turns, measure, peak_bytes
from visionkit.engine.op_cases import CASES, Case, peers

ROOT = Path(__file__).parents[2]
BARS = {                                                     # what the ops owe: times faster, forward and forward + backward
    "v1, 2x64x56x56, 3x3": (6, 14), "v1, 2x256x28x28, 3x3": (3.8, 9.5), "v1, 1x512x25x38, 3x3": (2.4, 5.8),
    "v2, 2x256x28x28, 3x3": (3.2, 9),
    "256 channels of 50x76, 512 RoIs, 7x7, 2x2 samples": (12, 20), "81*49 channels of 38x50, 300 RoIs, 2x2 samples": (9, 7),
    "81*49 channels of 38x50, 300 RoIs": (4, 3.5), "21*49 channels of 38x50, 300 RoIs": (2, 1.3),
    "2,000 boxes around 100 objects, IoU 0.7": (1,), "20,000 boxes around 500 objects, IoU 0.7": (3,),
    "20,000 boxes spread over the image, IoU 0.5": (3,), "encoder: 17,821 queries, 4 levels, 4 points, 8 heads x 32": (6, 2.4),
}


def tiny_roi_align():
    return torch.randn(1, 3, 8, 8).requires_grad_(), torch.tensor([[0.0, 4, 4, 50, 40], [0, 10, 0, 30, 60]]), 2, 1 / 8, 2, True


def tiny_nms():
    return torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3], [5, 5, 6, 6]]), torch.tensor([0.2, 0.9, 0.5]), 0.5


TINY = (Case("roi_align", "tiny", tiny_roi_align, bars=(1e-9, 1e9)), Case("nms", "tiny", tiny_nms))


@pytest.fixture
def tiny(monkeypatch):
    """The tool measures two small cases, against a peer that is ours again."""
    monkeypatch.setattr(op_cases, "CASES", TINY)
    functions = {"roi_align": visionkit.ops.roi_align, "nms": visionkit.ops.nms}
    for module in (op_cases, op_benchmark):
        monkeypatch.setattr(module, "peers", lambda op: {"torchvision": functions[op]})


def test_help_is_answered_before_anything_heavy_is_imported():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-X", "importtime", ROOT / "tools" / "benchmark_ops.py", "--help"], capture_output=True,
                              text=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1
    assert "--repeats" in done.stdout
    assert " torch" not in done.stderr


def test_the_table_tells_times_bars_and_differences(tiny, tool, capsys, tmp_path, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert tool("benchmark_ops", "--repeats", 3, "--no-memory", "--json", tmp_path / "out.json", "--threads", 7) == 0
    assert threads == [7]
    facts, _, header, *lines, _, summary = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in facts
    assert facts.endswith(f"{torch.get_num_threads()} threads; cpu, float32, median of 3")
    assert summary == "1 of 2 bars met"
    assert " ".join(header.split()) == "op case passes ms peer peer ms times faster bar difference"        # nothing of memory
    words = [" ".join(line.split()) for line in lines]
    assert words[0].startswith("roi_align tiny forward ")
    assert words[0].endswith(" 1e-09, met 0")
    assert words[1].startswith("roi_align tiny forward + backward ")
    assert words[1].endswith(" 1e+09, MISSED 0")
    assert words[2].startswith("nms tiny forward ")          # no gradient, so no second row
    assert len(words) == 3
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["environment"]["torch"] == torch.__version__
    first = written["rows"][0]
    assert len(first["ratios"]) == 3
    assert first["times_faster"] == sorted(first["ratios"])[1]
    assert first["peer_seconds"] > 0 < first["ours_seconds"]


def test_a_result_that_differs_from_the_peers_is_reported(tiny, tool, capsys, monkeypatch):
    monkeypatch.setattr(visionkit.ops, "roi_align", lambda *arguments: peers_roi_align(*arguments) * 1.5)
    peers_roi_align = op_benchmark.peers("roi_align")["torchvision"]
    assert tool("benchmark_ops", "--ops", "roi_align", "--repeats", 1, "--no-memory", "--no-backward") == 1
    assert "DISAGREES" in capsys.readouterr().out


@pytest.mark.parametrize("interrupt", [
    lambda: signal.default_int_handler(signal.SIGINT, None), lambda: signal.raise_signal(signal.SIGTERM)], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_leaves_the_rows_so_far(tiny, tool, capsys, monkeypatch, interrupt):
    def interrupted(case, **settings):
        yield next(measure(case, **settings))
        interrupt()
    monkeypatch.setattr(op_benchmark, "measure", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    assert tool("benchmark_ops", "--repeats", 1, "--no-memory") == 130
    shown = capsys.readouterr()
    assert "roi_align" in shown.out
    assert "nms" not in shown.out
    assert "stopped" in shown.err
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("arguments, message", [
    (["--ops", "roi_alig"], "nothing is measured of 'roi_alig'. Did you mean 'roi_align'? Ops: roi_align, nms"),
    (["--repeats", "0"], "--repeats must be positive, got 0"),
    (["--device", "cuda"], "PyTorch sees no GPU here"),
], ids=["an op that is not there", "no repeats", "no GPU"])
def test_wrong_arguments_are_one_line_and_status_2(tiny, tool, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tool("benchmark_ops", *arguments) == 2
    assert message in capsys.readouterr().err


def test_without_torchvision_it_says_what_to_install(tiny, tool, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(op_benchmark, "peers", lambda op: {})
    assert tool("benchmark_ops", "--ops", "nms", "--repeats", 1, "--no-memory") == 0
    shown = capsys.readouterr()
    assert "pip install -e '.[bench]'" in shown.err
    assert "nms  tiny  forward" in shown.out
    assert "none" in shown.out


def test_the_list_and_the_table_can_be_markdown(tiny, tool, capsys):
    assert tool("benchmark_ops", "--list", "--markdown") == 0
    assert capsys.readouterr().out.splitlines() == [
        "| op | case | peers |", "| --- | --- | --- |", "| roi_align | tiny | torchvision |", "| nms | tiny | torchvision |"]


def test_every_case_names_an_op_and_no_bar_is_missing():
    assert len({(case.op, case.shape) for case in CASES}) == len(CASES)
    assert {case.shape: case.bars for case in CASES if case.bars} == BARS
    assert [case.megabytes for case in CASES if case.megabytes] == [(120, 220)]
    assert all(hasattr(visionkit.ops, case.op) for case in CASES)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only goes on when a run says how long it takes."""
    now = [0.0]
    monkeypatch.setattr(op_benchmark.time, "perf_counter", lambda: now[0])

    def take(seconds):
        now[0] += seconds
    return take


def test_implementations_take_turns(clock):
    order = []
    seconds = in_turns([lambda: order.append("ours") or clock(0.01), lambda: order.append("peer") or clock(0.03)], repeats=3)
    assert order == ["ours", "peer"] * 4                     # the first of each tells how often to call
    assert seconds == [pytest.approx([0.01, 0.03])] * 3


def test_what_takes_a_moment_is_called_many_times_a_timing(clock):
    calls = []
    (seconds,), = in_turns([lambda: calls.append(1) or clock(0.002)], repeats=1)
    assert len(calls) == 1 + 5
    assert seconds == pytest.approx(0.002)


def test_the_ratio_says_how_many_times_faster_ours_is_and_its_bar_is_about_one_peer(clock, monkeypatch):
    monkeypatch.setattr(visionkit.ops, "wait", lambda x: clock(0.02) or x, raising=False)
    monkeypatch.setattr(op_benchmark, "peers", lambda op: {name: lambda x, s=seconds: clock(s) or x
                                                           for name, seconds in {"mmcv": 0.01, "torchvision": 0.06}.items()})
    slower, faster = measure(Case("wait", "", lambda: (torch.ones(1),), bars=(2,)), repeats=1, memory=False)
    assert [slower.peer, slower.times_faster, slower.bar] == ["mmcv", pytest.approx(0.5), None]
    assert [faster.peer, faster.times_faster, faster.bar] == ["torchvision", pytest.approx(3), 2]
    assert [faster.ours_seconds, faster.peer_seconds] == pytest.approx([0.02, 0.06])


def test_a_case_has_the_same_values_each_time_in_the_type_asked_for():
    first, again = (TINY[0].arguments("cpu", torch.float64) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert [first[0].dtype, first[0].requires_grad, first[1].requires_grad, first[2]] == [torch.float64, True, False, 2]
    assert TINY[1].arguments("cpu", torch.bfloat16)[1].dtype == torch.bfloat16


def test_a_difference_counts_by_the_size_of_the_values():
    ones, large = torch.ones(3), torch.tensor([1000.0, 0, 0])
    assert difference([ones, None], [ones, ones], 1e-4) == (0.0, True)
    assert difference([ones, large], [ones, large + 0.05], 1e-4) == (pytest.approx(0.05, rel=1e-2), True)
    assert difference([ones + 0.05, large], [ones, large], 1e-4)[1] is False
    assert difference([ones[:2]], [ones], 1e-4) == (None, False)
    assert difference([ones[:0]], [ones[:0]], 1e-4) == (0.0, True)
    assert difference([ones], [torch.full((3,), math.nan)], 1e-4)[1] is False


def test_a_call_gives_results_or_gradients():
    x, y = torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor([5.0, 7.0])
    results = Call(lambda x, y: x * y, (x, y), "forward")()
    assert results[0].tolist() == [10, 21]
    assert not results[0].requires_grad
    call = Call(lambda x, y: (x * y, torch.arange(2)), (x, y), "forward + backward")
    gradient, = call()
    noise = call.incoming
    assert torch.equal(gradient, y * noise[0])
    assert torch.equal(call()[0], gradient)
    assert call.incoming is noise                            # made once, before anything is timed
    assert x.grad is None


def test_a_peer_without_the_dtype_takes_float32(monkeypatch):
    def float32_only(input, *rest):
        if input.dtype != torch.float32:
            raise RuntimeError("not implemented for 'BFloat16'\nand more")
        return visionkit.ops.roi_align(input, *rest)
    monkeypatch.setattr(op_benchmark, "peers", lambda op: {"torchvision": float32_only})
    row = next(measure(TINY[0], repeats=1, dtype=torch.bfloat16, memory=False))
    assert row.problem == "torchvision takes float32 instead: not implemented for 'BFloat16'"
    assert row.agrees
    assert row.difference > 0
    assert row.bar is None                                   # asked for in float32


def test_a_peer_that_fails_leaves_ours_alone(monkeypatch):
    def broken(*arguments):
        raise NotImplementedError("no kernel for cpu")
    monkeypatch.setattr(op_benchmark, "peers", lambda op: {"torchvision": broken})
    row = next(measure(TINY[0], repeats=1, memory=False))
    assert row.problem == "torchvision fails: no kernel for cpu"
    assert row.ours_seconds > 0
    assert row.times_faster is None


def test_ours_may_get_another_layout_and_is_compared_in_the_peers(monkeypatch):
    monkeypatch.setattr(visionkit.ops, "scaled", lambda maps, factor, flipped=False: maps * factor.flip(0) if flipped else maps * factor,
                        raising=False)
    monkeypatch.setattr(op_benchmark, "peers", lambda op: {"torchvision": lambda maps, factor: (maps * factor).flip(0)})
    case = Case("scaled", "flipped", lambda: (torch.randn(3).requires_grad_(), torch.arange(3.0)), layout=lambda maps: maps.flip(0),
                options={"flipped": True})
    rows = list(measure(case, repeats=1, memory=False))
    assert [row.agrees for row in rows] == [True, True]


def test_bin_major_puts_the_class_last():
    maps = torch.arange(2 * 49 * 4.0).view(1, 98, 2, 2)      # channel = class * 49 + bin
    moved = op_cases._bin_major(maps)
    assert torch.equal(moved[0, 10 * 2 + 1], maps[0, 49 + 10])
    assert moved.is_contiguous(memory_format=torch.channels_last)


def test_of_a_large_case_only_the_memory_is_measured(tool, capsys, monkeypatch):
    large = Case("nms", "large", lambda: pytest.fail("it is not run here"), megabytes=(100, 200))
    monkeypatch.setattr(op_cases, "CASES", (large,))
    monkeypatch.setattr(Case, "arguments", lambda *_: (torch.ones(1, requires_grad=True),))
    monkeypatch.setattr(op_benchmark, "peers", lambda op: {"torchvision": None})
    monkeypatch.setattr(op_benchmark, "peak_bytes", lambda case, peer, *_: dict.fromkeys(op_benchmark.PASSES, 300e6 if peer else 150e6))
    assert list(measure(large, memory=False)) == []
    assert tool("benchmark_ops") == 0
    words = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[3:-2]]
    assert words == ["nms large forward torchvision 150 300 100, MISSED", "nms large forward + backward torchvision 150 300 200, met"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_memory_holds_the_result():
    case = next(case for case in CASES if case.op == "box_iou")
    peak = peak_bytes(case, None, "cpu", torch.float32)
    assert set(peak) == set(op_benchmark.PASSES)
    assert 4e6 < peak["forward"] < 60e6                      # the result is 1,000 x 1,000 x 4 bytes


def attention_by_hand(value, spatial_shapes, level_start_index, locations, weights):
    """Deformable-DETR, eq. 3: pixel centres at half-integers, zeros outside."""
    batch, _, heads, depth = value.shape
    output = torch.zeros(batch, locations.shape[1], heads, depth, dtype=value.dtype)
    for n, q, m, level, point in torch.cartesian_prod(*map(torch.arange, locations.shape[:5])).tolist():
        height, width = spatial_shapes[level].tolist()
        x, y = (locations[n, q, m, level, point] * torch.tensor([width, height]) - 0.5).tolist()
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < height and 0 <= column < width:
                    share = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[n, q, m, level, point]
                    output[n, q, m] += share * value[n, level_start_index[level] + row * width + column, m]
    return output.flatten(2)


def test_the_peer_of_multi_scale_deformable_attention_keeps_the_definition():
    torch.manual_seed(0)
    arguments = [value.double() if value.is_floating_point() else value
                 for value in op_cases._attention(5, ((3, 4), (2, 2)), heads=2, points=2, depth=3)]
    torch.testing.assert_close(peers("ms_deform_attn")["plain PyTorch"](*arguments), attention_by_hand(*arguments), rtol=0, atol=1e-12)


def test_no_sample_lies_where_the_gradient_jumps():
    positions = op_cases._between_centers(torch.tensor([-1.0, -0.25, 0.0, 0.5, 1.999]))
    torch.testing.assert_close(positions, torch.tensor([-0.99, -0.25, 0.01, 0.5, 1.99]))


def test_the_peer_of_soft_nms_keeps_the_definition():
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1], [5, 5, 6, 6], [0, 0, 2, 2]])
    scores = torch.tensor([0.9, 0.8, 0.5, 0.002])
    indices, rescored = peers("soft_nms")["plain PyTorch"](boxes, scores, 0.5, 0.001)
    assert indices.tolist() == [0, 2, 1]                     # the last falls to 0.002 * exp(-2), below the threshold
    torch.testing.assert_close(rescored, torch.tensor([0.9, 0.5, 0.8 * math.exp(-0.5)]))


def test_the_encoder_asks_about_each_pixel():
    _, shapes, starts, locations, weights = op_cases._attention(None, ((2, 3), (1, 1)), points=1)
    assert starts.tolist() == [0, 6]
    assert locations.shape == (1, 7, 8, 2, 1, 2)
    torch.testing.assert_close(weights.sum((3, 4)), torch.ones(1, 7, 8))


def test_bins_moved_by_an_eighth_lie_where_roi_align_samples():
    pytest.importorskip("torchvision", reason="the peer", exc_type=ImportError)
    for op, channels in (("deform_roi_pool", 3), ("deform_ps_roi_pool", 3 * 49)):
        arguments = (torch.randn(1, channels, 8, 8), *op_cases._moved_bins(4, 128, 128, classes=3 if "ps" in op else 1), 7, 1 / 16, 4)
        torch.testing.assert_close(peers(op)["torchvision (plain)"](*arguments), getattr(visionkit.ops, op)(*arguments), rtol=0, atol=1e-5)


def test_mmcvs_functions_get_their_arguments_in_their_order(monkeypatch):
    calls = {}

    def record(name, result=None):
        return lambda *arguments: calls.update({name: arguments}) or result
    stub = types.ModuleType("mmcv.ops")
    for name in ("deform_conv2d", "modulated_deform_conv2d", "roi_align"):
        setattr(stub, name, record(name))
    stub.nms, stub.batched_nms = record("nms", ("boxes", "kept")), record("batched_nms", ("boxes", "kept"))
    stub.soft_nms = lambda *arguments, **named: calls.update(soft_nms=named) or (torch.arange(10.0).view(2, 5), "kept")
    attention = types.ModuleType("mmcv.ops.multi_scale_deform_attn")
    attention.MultiScaleDeformableAttnFunction = types.SimpleNamespace(apply=record("attention"))
    monkeypatch.setitem(sys.modules, "mmcv.ops", stub)
    monkeypatch.setitem(sys.modules, "mmcv.ops.multi_scale_deform_attn", attention)
    monkeypatch.setattr("mmcv.ops", stub, raising=False)

    input, offset, weight, mask = torch.zeros(1, 4, 5, 5), torch.zeros(1, 36, 5, 5), torch.zeros(6, 2, 3, 3), torch.zeros(1, 18, 5, 5)
    deform_conv2d = peers("deform_conv2d")["mmcv"]
    deform_conv2d(input, offset, weight, None, 1, 2, 3, None)
    assert calls["deform_conv2d"][3:] == (1, 2, 3, 2, 2)     # stride, padding, dilation, groups, offset groups
    deform_conv2d(input, offset, weight, None, 1, 2, 3, mask)
    assert calls["modulated_deform_conv2d"][2] is mask
    assert calls["modulated_deform_conv2d"][4:] == (None, 1, 2, 3, 2, 2)
    peers("roi_align")["mmcv"](input, None, 7, 0.5, -1, True)
    assert calls["roi_align"][2:] == (7, 0.5, 0, "avg", True)
    assert peers("nms")["mmcv"]("boxes", "scores", 0.5) == "kept"
    assert peers("batched_nms")["mmcv"]("boxes", "scores", "idxs", 0.5) == "kept"
    assert calls["batched_nms"][3] == {"type": "nms", "iou_threshold": 0.5}
    indices, scores = peers("soft_nms")["mmcv"]("boxes", "scores", 0.4, 0.1)
    assert [indices, scores.tolist()] == ["kept", [4, 9]]
    assert calls["soft_nms"] == {"sigma": 0.4, "min_score": 0.1, "method": "gaussian"}
    peers("ms_deform_attn")["mmcv"](1, 2, 3, 4, 5)
    assert calls["attention"] == (1, 2, 3, 4, 5, 64)
