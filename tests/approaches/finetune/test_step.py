"""A step that fails: out of memory, a loss that is not finite; and the parts of its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from support.training import log_lines
from tests_support import make_rows

from pairclf.approaches.finetune.distributed import make_accelerator
from pairclf.approaches.finetune.losses import cross_entropy, disagreement, distillation
from pairclf.approaches.finetune.step import (
    TrainState,
    accumulate,
    accumulate_with_oom_retry,
    batch_loss,
    make_examples,
)
from pairclf.approaches.finetune.train import construct, train
from pairclf.config import Config
from pairclf.errors import DataError, ModelError
from pairclf.inputs.sequences import Item
from pairclf.model.backbone import checkpoint_gradients
from pairclf.model.engine import Classifier, build
from pairclf.model.inputs import open_inputs
from pairclf.model.layouts import packed
from pairclf.model.trim import last_layer

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("without_forecast")
ROWS = make_rows(8)
MEMBERS = np.arange(8)


def learner_of(config: Config) -> TrainState:
    """Of `ROWS`, with adapters that have an effect: LoRA's B starts at zero, and A then has no gradient."""
    classifier = build(config, CPU)
    for name, one in classifier.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one, std=0.05)
    examples = make_examples(ROWS, open_inputs(config).builder.encode(ROWS), config)
    return construct(config, examples, classifier, make_accelerator(config))


def gradients(learner: TrainState) -> dict[str, torch.Tensor]:
    return {name: one.grad.clone() for name, one in learner.weights.items() if one.grad is not None}


def small_memory(classifier: Classifier, monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """Let passes over more tokens than that run out of memory half-way; returns the sizes of those that were tried."""
    tried: list[int] = []
    forward = classifier.backbone.forward

    def limited(*arguments: Any, **named: Any) -> Any:
        tried.append(named["input_ids"].numel())
        if tried[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory (a test's)")
        return forward(*arguments, **named)

    monkeypatch.setattr(classifier.backbone, "forward", limited)
    return tried


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_within_memory_halves_the_budget_and_keeps_the_gradients(
    config_for: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    config = config_for("llama", train={"layout": layout})
    learner = learner_of(config)
    outcome, budget = accumulate_with_oom_retry(learner, MEMBERS, 1, None)
    whole = gradients(learner)
    assert budget is None
    limit = int(outcome.computed) // 3
    learner = learner_of(config)
    tried = small_memory(learner.classifier, monkeypatch, limit)
    again, budget = accumulate_with_oom_retry(learner, MEMBERS, 1, None)
    assert budget is not None
    assert budget <= max(tried) // 2
    assert max(tried) > limit
    assert again.loss == pytest.approx(outcome.loss, abs=1e-6)
    assert again.tokens == outcome.tokens
    assert max(float((one - whole[name]).abs().max()) for name, one in gradients(learner).items()) <= 1e-5


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_last_layer_is_computed_at_the_read_tokens_unless_it_is_recomputed(
    config_for: Callable[..., Config], kind: str
) -> None:
    every = []
    for recompute in (False, True):
        learner = learner_of(config_for(kind, train={"gradient_checkpointing": recompute}))
        if recompute:
            checkpoint_gradients(learner.classifier.backbone)
        seen: list[int] = []
        last_layer(learner.classifier.backbone).register_forward_hook(
            lambda layer, states, out, seen=seen: seen.append((out if torch.is_tensor(out) else out[0]).shape[1])
        )
        outcome = accumulate(learner, MEMBERS, 1)
        assert outcome is not None
        read = len(ROWS) * learner.config.train.orders
        assert seen[0] == (outcome.tokens if recompute else read)
        every.append(gradients(learner))
    trimmed, whole = every
    assert max(float((one - whole[name]).abs().max()) for name, one in trimmed.items()) <= 1e-5


def test_accumulate_adds_to_gradients_that_are_left(
    config_for: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrong variant: to do the step again on top of what the failed attempt left."""
    config = config_for("llama", train={"per_device_train_batch_size": 2})
    learner = learner_of(config)
    accumulate(learner, MEMBERS, 1)
    whole = gradients(learner)
    accumulate(learner, MEMBERS, 1)
    assert max(float((one - whole[name]).abs().max()) for name, one in gradients(learner).items()) > 1e-3


def test_within_memory_does_again_what_a_failed_pass_had_done(
    config_for: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate clears no gradient while it thinks that more is to come."""
    config = config_for("llama", train={"per_device_train_batch_size": 3})
    learner = learner_of(config)
    accumulate(learner, MEMBERS, 1)
    whole = gradients(learner)
    learner = learner_of(config)
    forward, passes = learner.classifier.backbone.forward, [0]

    def failing(*arguments: Any, **named: Any) -> Any:
        passes[0] += 1
        if passes[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory (a test's)")
        return forward(*arguments, **named)

    monkeypatch.setattr(learner.classifier.backbone, "forward", failing)
    accumulate_with_oom_retry(learner, MEMBERS, 1, None)
    assert max(float((one - whole[name]).abs().max()) for name, one in gradients(learner).items()) <= 1e-5


def test_within_memory_names_a_row_that_does_not_fit(
    config_for: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for("llama")
    learner = learner_of(config)
    lengths = learner.examples.lengths
    tried = small_memory(learner.classifier, monkeypatch, 2 * max(lengths) - 1)
    with pytest.raises(ModelError, match="out of memory for a single row") as caught:
        accumulate_with_oom_retry(learner, MEMBERS, 1, None)
    longest = max(range(8), key=lengths.__getitem__)
    assert caught.value.rows == (ROWS[longest].id,)
    assert tried[-1] == 2 * max(lengths)


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], what: str) -> None:
    """Let the loss, or only its gradient, be infinite at these steps."""
    from pairclf.approaches.finetune import step as module

    original, number = accumulate, [0]

    def spoiled(learner: TrainState, *arguments: Any, **named: Any) -> Any:
        number[0] += 1
        outcome = original(learner, *arguments, **named)
        if number[0] in steps:
            next(iter(learner.weights.values())).grad.fill_(float("inf"))  # type: ignore[union-attr]
            if what == "loss":
                return replace(outcome, loss=float("nan"))
        return outcome

    monkeypatch.setattr(module, "accumulate", spoiled)


def run(config: Config, folder: Path) -> Classifier:
    rows = make_rows(24)
    examples = make_examples(rows, open_inputs(config).builder.encode(rows), config)
    return train(config, examples, folder, make_accelerator(config)).classifier


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_train_skips_and_counts_steps_that_are_not_finite(
    config_for: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    config = config_for("llama", train={"num_train_epochs": 2, "logging_steps": 1, "max_skipped_steps": 3})
    spoil(monkeypatch, {2, 3}, what)
    trained = run(config, tmp_path)
    assert all(one.isfinite().all() for one in trained.parameters())
    lines = log_lines(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 1, 2, 2, 2, 2]
    assert [line["loss"] is None for line in lines] == [step in (1, 2) and what == "loss" for step in range(6)]
    assert [line["gradient_norm"] is None for line in lines] == [False, True, True, False, False, False]


def test_train_stops_after_too_many_skipped_steps_and_names_the_rows(
    config_for: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for("llama", train={"num_train_epochs": 4, "max_skipped_steps": 3})
    spoil(monkeypatch, {1, 2, 4, 5, 6}, "loss")
    with pytest.raises(ModelError, match=r"step 6 .* diverged") as caught:
        run(config, tmp_path)
    assert len(caught.value.rows) == 8
    assert set(caught.value.rows) <= {row.id for row in make_rows(24)}


def test_train_stops_at_a_rate_far_too_high(config_for: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="diverged"):
        run(config_for("llama", train={"learning_rate": 1e30, "num_train_epochs": 4, "max_skipped_steps": 3}), tmp_path)


def test_batch_loss_is_the_sum_of_its_parts(config_for: Callable[..., Config]) -> None:
    settings = {"consistency_weight": 0.7, "label_smoothing_factor": 0.1}
    settings |= {
        "distill": {
            "scores": ["x.parquet"],
            "ce_weight": 0.5,
            "kl_weight": 2.0,
            "temperature": 3.0,
            "cosine_weight": 0.2,
        }
    }  # type: ignore[dict-item]
    config = config_for("llama", train=settings)
    rows = [replace(row, weight=1.0 + number) for number, row in enumerate(ROWS)]
    teachers = np.random.default_rng(0).dirichlet(np.ones(3), size=8)
    teachers[3] = np.nan
    encoded = open_inputs(config).builder.encode(rows)
    examples = make_examples(rows, encoded, config, teachers)
    batch = packed([Item(row, order, encoded[row][order].ids) for row in (5, 3) for order in (0, 1)])
    logits = torch.randn(4, 3)
    expected = torch.zeros(())
    for row, (ab, ba) in zip((5, 3), (logits[:2], logits[2:]), strict=True):
        target = 0.9 * torch.tensor(rows[row].target) + 0.1 / 3
        taught = torch.from_numpy(teachers[row]).float()
        apart = disagreement(ab[None], ba[None], config.task)[0]
        for one, columns in ((ab, [0, 1, 2]), (ba, [1, 0, 2])):
            loss = 0.5 * cross_entropy(one[None], target[None, columns], config.task)[0]
            loss = loss + distillation(one[None], taught[None, columns], config.train.distill)[0] + 0.7 * apart
            expected = expected + rows[row].weight * loss
    assert torch.allclose(batch_loss(logits, batch, examples, config), expected, rtol=1e-5)


def test_train_in_float16_lowers_its_scale_where_a_gradient_overflows(
    config_for: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for("llama", model={"dtype": "float16"}, train={"logging_steps": 1, "max_grad_norm": None})
    spoil(monkeypatch, {2}, "gradient")
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # a process has one precision, but for tests
    rows, accelerator = make_rows(24), make_accelerator(config)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # Accelerate makes one on GPUs alone
    accelerator.native_amp = True
    examples = make_examples(rows, open_inputs(config).builder.encode(rows), config)
    trained = train(config, examples, tmp_path, accelerator).classifier
    assert accelerator.scaler.get_scale() == 512.0
    assert all(one.isfinite().all() for one in trained.parameters())
    lines = log_lines(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 1, 1]


def test_prepare_counts_the_rows_that_are_cut(config_for: Callable[..., Config]) -> None:
    rows = make_rows(24)
    uncut = open_inputs(config_for("llama", inputs={"max_length": 1000})).builder.encode(rows)
    lengths = sorted(len(orders[0].ids) for orders in uncut)
    config = config_for("llama", inputs={"max_length": lengths[12]})
    examples = make_examples(rows, open_inputs(config).builder.encode(rows), config)
    assert examples.cut == sum(length > lengths[12] for length in lengths) > 0


@pytest.mark.parametrize("weight", [1e300, 1e-300])
def test_prepare_refuses_row_weights_beyond_float32(config_for: Callable[..., Config], weight: float) -> None:
    config = config_for("llama")
    rows = [*ROWS[:2], replace(ROWS[2], weight=weight)]
    with pytest.raises(DataError, match="float32") as caught:
        make_examples(rows, open_inputs(config).builder.encode(rows), config)
    assert caught.value.rows == (ROWS[2].id,)
