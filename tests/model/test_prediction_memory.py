"""Memory foretold: the rehearsal against passes that are made, a process against its prediction, and the budget."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support.forked import forked
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pairclf.config import Config, resolve
from pairclf.inputs.sequences import Item, LargestPass
from pairclf.model import prediction_memory
from pairclf.model.device_memory import memory_to_have, peak_memory
from pairclf.model.engine import build
from pairclf.model.prediction_memory import fitting_budget, footprint
from pairclf.model.scoring import ClassifierScorer

CPU = torch.device("cpu")
LARGEST = LargestPass(longest=300, tokens_per_batch=700, orders=2)

Configs = Callable[..., Config]


def rehearsed(scorer: ClassifierScorer, largest: LargestPass) -> float:
    items = prediction_memory._synthetic_items(scorer.layout, largest)
    return prediction_memory._count_pass(scorer, items, FakeTensorMode(allow_non_fake_inputs=True)).live


def made(scorer: ClassifierScorer, largest: LargestPass) -> float:
    return prediction_memory._count_pass(
        scorer, prediction_memory._synthetic_items(scorer.layout, largest), nullcontext()
    ).live


PLAIN, NF4_LORA = {"lora": None}, {"quantization": "nf4"}


@pytest.mark.parametrize(
    ("kind", "model", "layout"),
    [
        pytest.param("gemma2", PLAIN, "packed", id="gemma2-plain-packed"),
        pytest.param("gemma2", NF4_LORA, "shared", id="gemma2-nf4-shared"),
        pytest.param("llama", PLAIN, "shared", id="llama-plain-shared"),
        pytest.param("qwen3", NF4_LORA, "packed", id="qwen3-nf4-packed"),
    ],
)
def test_rehearsal_has_alive_what_a_pass_has(config_for: Configs, kind: str, layout: str, model: Any) -> None:
    scorer = ClassifierScorer(build(config_for(kind, model=model), CPU), layout)
    alive = made(scorer, LARGEST)
    assert rehearsed(scorer, LARGEST) == pytest.approx(alive, rel=0.01)
    assert alive > 700 * (128 + 64) * 4  # one MLP's activations, and its input
    assert rehearsed(scorer, LARGEST._replace(tokens_per_batch=1400)) > 1.5 * alive  # a wrong batch is told apart


def test_rehearsal_of_a_padded_pass_has_no_less_than_the_pass(config_for: Configs) -> None:
    """A pass over rows that happen to be of one length spares itself the mask."""
    scorer = ClassifierScorer(build(config_for("gemma2"), CPU), "padded")
    assert made(scorer, LARGEST) <= rehearsed(scorer, LARGEST) <= 1.5 * made(scorer, LARGEST)


def test_counter_forgets_what_is_freed() -> None:
    with prediction_memory._StorageCounter() as counter:
        for _ in range(3):
            kept = torch.ones(1000) + 1  # two at once, the first of which goes, as does the one of the round before
        view = kept[:10]
        del kept
        view.add_(1)
    assert counter.peak == 3 * 4000
    assert counter._now == 4000


def test_small_pass_is_computed_and_a_larger_one_rehearsed(
    config_for: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, passes = ClassifierScorer(build(config_for("llama"), CPU), "packed"), list[type]()
    count = prediction_memory._count_pass
    monkeypatch.setattr(
        prediction_memory,
        "_count_pass",
        lambda scorer, items, how: (passes.append(type(how)), count(scorer, items, how))[1],
    )
    computed = prediction_memory._tensors(scorer, LARGEST)
    monkeypatch.setattr(prediction_memory, "SMALL", 0)
    rehearsed = prediction_memory._tensors(scorer, LARGEST)
    assert passes == [nullcontext, FakeTensorMode]
    assert computed == pytest.approx(rehearsed, rel=0.01)


def test_rehearsal_extrapolates_operations_without_shapes(config_for: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_memory, "SMALL", 0)
    scorer = ClassifierScorer(build(config_for("llama", model={"quantization": "int8"}), CPU), "packed")
    largest = LargestPass(longest=640, tokens_per_batch=2048, orders=1)
    with pytest.raises(prediction_memory._NOT_REHEARSED):
        rehearsed(scorer, largest)
    assert prediction_memory._tensors(scorer, largest).live == pytest.approx(made(scorer, largest), rel=0.1)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_made_up_pass_computes_what_was_asked(layout: str) -> None:
    items = prediction_memory._synthetic_items(layout, LARGEST)
    assert max(len(item.ids) for item in items) == 300
    total, common = sum(len(item.ids) for item in items), int(300 / 8)
    assert total == {"padded": 600, "packed": 700, "shared": 700 + common}[layout]
    alone = prediction_memory._synthetic_items(layout, LargestPass(300, 100, 2))
    assert [len(item.ids) for item in alone][:2] == [300, 300]  # a row goes alone, in both orders


def test_counter_sees_parameters_of_other_classes_as_tensors() -> None:
    """torch 2.11, which Kaggle's image has, does not rehearse with bitsandbytes' own class of them."""

    class Packed(torch.nn.Parameter):
        pass

    class Below(TorchDispatchMode):
        seen: ClassVar[list[type]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.extend(type(one) for one in args if isinstance(one, torch.Tensor))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Below(), prediction_memory._StorageCounter():
        Packed(torch.zeros(2, 2)).view(4)
    assert set(Below.seen) == {torch.Tensor}


def test_footprint_leaves_the_model_as_it_was(config_for: Configs) -> None:
    classifier = build(config_for("gemma2"), CPU).train()
    scorer = ClassifierScorer(classifier, "shared")
    items = [Item(0, 0, np.arange(5, 50, dtype=np.int32))]
    before, _ = scorer(items)
    assert footprint(scorer, LARGEST).peak > 100e6
    assert classifier.training
    assert np.array_equal(scorer(items)[0], before)


def test_fitting_budget_is_halved_until_it_fits(config_for: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = ClassifierScorer(build(config_for("llama"), CPU), "packed")
    largest = LargestPass(longest=250, tokens_per_batch=2_000, orders=2)
    monkeypatch.setattr(prediction_memory, "peak_memory", lambda device: 0)  # of what ran before this test
    monkeypatch.setattr(prediction_memory, "memory_now", lambda device: 10**9)

    def budget_with(spare: float) -> int:
        monkeypatch.setattr(prediction_memory, "memory_to_have", lambda device, processes: 10**9 + int(spare))
        return fitting_budget(scorer, largest)

    needed = footprint(scorer, largest)
    needs = needed.live + needed.heap
    assert budget_with(needs) == 2_000
    assert budget_with(needs - 1) == 1_000
    assert budget_with(0) <= 500  # a row in both orders: no budget makes it smaller


@pytest.mark.parametrize(("processes", "expected"), [(1, 70), (2, 40)])
def test_processes_on_one_gpu_share_what_is_free(
    monkeypatch: pytest.MonkeyPatch, processes: int, expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10)
    assert memory_to_have(torch.device("cuda", 0), processes) == expected


def test_footprint_reads_as_a_sentence(config_for: Configs) -> None:
    said = str(
        prediction_memory.Footprint(
            before=1, held=600_000_000, live=500_000_000, heap=100_000_000, available=21 * 10**9
        )
    )
    assert said == "1.20 GB of 21.00 GB (held 0.60, a pass 0.50, heap 0.10)"


def _predict_and_score(folder: Path, layout: str, pipe: Connection) -> None:
    """In a process of its own: what it foretells, and what it took."""
    config = resolve({"model": {"base": str(folder), "quantization": "none", "lora": None}})
    scorer = ClassifierScorer(build(config, CPU).eval(), layout)
    random = np.random.default_rng(0)
    largest = LargestPass(longest=600, tokens_per_batch=6000, orders=1)
    found = footprint(scorer, largest)
    for longest in (600, 500, 300):
        ids = [random.integers(5, 300, longest).astype(np.int32) for _ in range(6000 // longest)]
        scorer([Item(row, 0, one) for row, one in enumerate(ids)])
    pipe.send((found.peak, peak_memory(CPU), found.held))


@pytest.mark.parametrize("kind", ["gemma2", pytest.param("llama", marks=pytest.mark.thorough)])
def test_footprint_foretells_the_peak_of_a_process(tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 2, "head_dim": 64, "vocab_size": 320}
    config = AutoConfig.for_model(kind, **sizes, num_attention_heads=4, num_key_value_heads=2)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    ours, theirs = multiprocessing.Pipe()
    process = forked(_predict_and_score, tmp_path, "packed", theirs, output=tmp_path / "output")
    theirs.close()
    foretold, taken, held = ours.recv()
    process.join()
    assert foretold == pytest.approx(taken, rel=0.1)
    assert foretold - held == pytest.approx(taken - held, rel=0.4)  # without what libraries take
