"""The script for a GPU in miniature: every part runs on a CPU, finds what is planted, and is resumed by part."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.scripts import benchmark_script
from torch import Tensor
from torch.nn import functional

from pairclf.model.attention import KERNELS, ScoreOptions
from pairclf.model.batch import Segment, Topology, end_to_end

gpu, steps = benchmark_script("gpu"), benchmark_script("steps")
Figures = dict[str, Any]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return gpu.Bench(tmp_path_factory.mktemp("bases"), miniature=True)


def test_every_part_runs_in_miniature(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def pytest_run(command: list[str], **_: object) -> SimpleNamespace:
        asked.extend(command)
        return SimpleNamespace(returncode=0, stdout="= 5 passed, 2 skipped, 70 deselected in 9.1s =")

    monkeypatch.setattr(subprocess, "run", pytest_run)
    given = ["--miniature", "--out", str(tmp_path), "--bases", str(tiny.bases)]
    assert gpu.main(given, run=lambda step, *_: gpu.run_part(step.name, tiny)) == 0
    found = steps.read_results(tmp_path / "results.jsonl")
    assert list(found) == list(gpu.PARTS)
    assert all(line["device"] for line in found.values())

    assert {"passed": 5, "skipped": 2}.items() <= found["tests"].items()
    assert {Path(part).name for part in asked} >= {"test_attention.py", "test_worker.py", "test_devices.py"}
    for shape in ("smollm2-135m", "gemma-2-9b-4-layers"):
        differences = found["layouts"][f"{shape}, float32"]
        wrong = differences.pop("wrong")
        assert differences.keys() == {"padded", "packed, loop", "shared, loop"}
        assert max(differences.values()) < 1e-5 < 0.1 < wrong
        assert f"{shape}, float16" in found["layouts"]
    assert found["forward"]["bfloat16"]["tokens_per_second"] > 0
    assert found["forward"]["nf4"]["foretold_over_taken"] > 0
    assert found["training"]["first_losses_apart"] <= 5e-3
    assert found["training"]["pairclf_over_trainer"] > 0
    assert found["float16"]["plain"]["rescued"] == 0
    assert found["float16"]["overflowing"]["rescued"] == 16
    assert len([name for name in found["memory"] if name.startswith("prediction, ")]) == 3
    assert found["memory"]["nf4 lora, packed, checkpointing"]["foretold_gb"] > 0
    assert found["out_of_memory"]["budget_after"] == 96
    assert len(found["replicas"]["one"]["workers"]) == 1
    assert len(found["replicas"]["two"]["workers"]) == 2


def test_parts_fit_into_eight_minutes() -> None:
    assert sum(part.seconds for part in gpu.PARTS.values()) <= 8 * 60


def test_a_part_that_fails_is_one_line_and_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls, broken = list[str](), {"forward"}

    def run(step: Any, seconds: float, _: Path) -> Figures:
        calls.append(step.name)
        assert step.command[2:4] == ["--here", step.name]
        assert step.command[4:] == ["--miniature", "--out", str(tmp_path), "--bases", str(tmp_path / "bases")]
        if step.name in broken:
            raise steps.StepError("out of memory")
        return {"tokens_per_second": 1}

    given = ["--miniature", "--out", str(tmp_path), "--parts", "layouts", "forward", "training"]
    assert gpu.main(given, run=run) == 1
    assert calls == ["layouts", "forward", "training"]
    printed = capsys.readouterr().out.splitlines()
    assert "forward        goal: 23,000 tokens a second in bfloat16: out of memory" in printed
    assert json.loads(printed[-1])["forward"]["error"] == "out of memory"
    broken.clear()
    assert gpu.main(given, run=run) == 0
    assert calls[3:] == ["forward"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_asks_for_the_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    assert "give --miniature" in capsys.readouterr().err


def test_a_layout_that_mixes_rows_fails(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out = gpu.packed
    monkeypatch.setattr(gpu, "DTYPES", [torch.float32])
    monkeypatch.setattr(gpu, "packed", lambda items: gpu.one_topology(lay_out(items)))
    with pytest.raises(gpu.PartError, match="packed, loop is off by"):
        gpu.compare_layouts(tiny)


def test_arms_that_do_not_train_the_same_fail(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "take_head", lambda *_: None)
    with pytest.raises(gpu.PartError, match="the arms do not compute the same"):
        gpu.measure_training(tiny)


def test_memory_that_does_not_run_out_fails(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "scarce_memory", lambda *_: gpu.nullcontext())
    with pytest.raises(gpu.PartError, match="did not run out of memory"):
        gpu.check_out_of_memory(tiny)


def test_tests_that_fail_or_are_all_skipped_fail(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = iter([(1, "1 failed, 4 passed"), (0, "5 skipped")])

    def pytest_run(*_: object, **__: object) -> SimpleNamespace:
        code, text = next(outcomes)
        return SimpleNamespace(returncode=code, stdout=text)

    monkeypatch.setattr(subprocess, "run", pytest_run)
    for message in ("exit code 1: {'failed': 1, 'passed': 4}", "none passed: {'skipped': 5}"):
        with pytest.raises(gpu.PartError, match=message):
            gpu.run_tests(gpu.Bench(tiny.bases, miniature=False))


def varlen_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, *longest: int, **given: Any
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` as its page has it: the ends of queries and keys are aligned."""
    assert given.keys() == {"scale", "window_size", "enable_gqa"}
    left, right = given["window_size"]
    outputs, found = [], [0, 0]
    for place in range(len(queries) - 1):
        asking, asked = slice(*queries[place : place + 2].tolist()), slice(*keys[place : place + 2].tolist())
        sizes = [asking.stop - asking.start, asked.stop - asked.start]
        found = [max(pair) for pair in zip(found, sizes, strict=True)]
        apart = torch.arange(sizes[1])[None] - (torch.arange(sizes[0])[:, None] + sizes[1] - sizes[0])
        seen = (apart <= right if right >= 0 else apart == apart) & (apart >= -left if left >= 0 else apart == apart)
        parts = (query[asking], key[asked], value[asked])
        q, k, v = (states.transpose(0, 1)[None] for states in parts)
        out = functional.scaled_dot_product_attention(
            q, k, v, seen, scale=given["scale"], enable_gqa=given["enable_gqa"]
        )
        outputs.append(out[0].transpose(0, 1))
    assert found == [*longest]
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("shared", [False, True])
def test_torchs_varlen_kernel_is_asked_for_what_the_loop_computes(
    monkeypatch: pytest.MonkeyPatch, window: int | None, *, shared: bool
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_on_cpu)
    torch.manual_seed(0)
    states = [torch.randn(1, heads, 30, 16) for heads in (4, 2, 2)]
    tree = Topology((Segment(0, 18, ((0, 18),)), Segment(18, 30, ((0, 9), (18, 30)))), (((0, 18),), ((0, 9), (18, 30))))
    topology, scores = tree if shared else end_to_end([18, 12]), ScoreOptions(0.25, None, window, 0.0)
    wanted = KERNELS["loop"](*states, scores, topology)
    assert (gpu.torch_varlen(*states, scores, topology) - wanted).abs().max() <= 1e-6
    other = end_to_end([12, 18])
    assert (gpu.torch_varlen(*states, scores, other) - wanted).abs().max() > 1e-2
