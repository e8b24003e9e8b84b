"""The loop: the loss is that of the whole step however it is cut up, dials move what they say, and it learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tests_support import make_rows

from pairclf.config import Config, resolve
from pairclf.errors import DataError, ModelError
from pairclf.inputs.render import Encoded
from pairclf.jobs.inputs import open_inputs
from pairclf.jobs.launch import make_accelerator
from pairclf.jobs.train import (
    Examples,
    accumulate,
    orders_shown,
    parameter_groups,
    prepare,
    rate_factor,
    row_losses,
    total_steps,
    train,
)
from pairclf.model.engine import Classifier, build
from pairclf.task import AB, BA, LMSYS, Row, Task

CPU = torch.device("cpu")


def encode(config: Config, rows: list[Row]) -> list[tuple[Encoded, ...]]:
    return open_inputs(config).builder.encode(rows)


def examples_of(config: Config, rows: list[Row]) -> Examples:
    return prepare(rows, encode(config, rows), config.task)


def with_working_adapters(config: Config) -> Classifier:
    """LoRA's B starts at zero, and A then has no gradient: fill it."""
    classifier = build(config, CPU)
    for name, one in classifier.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one, std=0.05)
    return classifier


def gradients(config: Config, rows: list[Row]) -> tuple[float, dict[str, torch.Tensor]]:
    accelerator = make_accelerator(config)
    classifier = with_working_adapters(config)
    members = np.arange(len(rows))
    loss, _ = accumulate(accelerator, classifier, config, examples_of(config, rows), members, step=1)
    return loss, {name: one.grad.clone() for name, one in classifier.named_parameters() if one.grad is not None}


def farthest(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("swap", ["none", "both", "random"])
@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_eight_rows_at_once_are_two_fours_and_eight_ones(
    config_for: Callable[..., Config], kind: str, swap: str
) -> None:
    """FACTS: transformers' own loss is four times as large under 2 x 4."""
    rows = make_rows(7)  # an uneven last batch
    made = {
        size: gradients(config_for(kind, train={"rows_per_batch": size, "swap": swap}), rows) for size in (8, 4, 2, 1)
    }
    loss, whole = made[8]
    assert len(whole) > 2
    for size in (4, 2, 1):
        assert made[size][0] == pytest.approx(loss, abs=1e-6)
        assert farthest(made[size][1], whole) <= 1e-5


def test_a_loss_averaged_over_micro_batches_would_show(config_for: Callable[..., Config]) -> None:
    """The wrong variant: the mean of the batches' means, which uneven batches weigh wrongly."""
    rows = make_rows(7)
    _, whole = gradients(config_for("llama"), rows)
    config = config_for("llama")
    classifier, examples = with_working_adapters(config), examples_of(config, rows)
    for part in (np.arange(4), np.arange(4, 7)):
        accumulate(make_accelerator(config), classifier, config, examples, part, step=1)
    wrong = {name: one.grad / 2 for name, one in classifier.named_parameters() if one.grad is not None}
    assert farthest(wrong, whole) > 1e-3


def test_row_weights_count_as_repeated_rows(config_for: Callable[..., Config]) -> None:
    rows = make_rows(3)
    repeated = gradients(config_for("llama"), [rows[0], rows[0], rows[1], rows[2]])
    heavy = Row(rows[0].id, rows[0].fields, rows[0].target, weight=2.0)
    weighted = gradients(config_for("llama"), [heavy, rows[1], rows[2]])
    assert weighted[0] == pytest.approx(repeated[0], abs=1e-6)
    assert farthest(weighted[1], repeated[1]) <= 1e-5


def test_the_loss_is_that_of_torch_for_hard_soft_and_several_labels() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    hard = torch.nn.functional.one_hot(labels, 3).float()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(row_losses(logits, hard, LMSYS), expected)
    soft = torch.softmax(torch.randn(6, 3), dim=-1)
    assert torch.allclose(
        row_losses(logits, soft, LMSYS), torch.nn.functional.cross_entropy(logits, soft, reduction="none")
    )
    several = Task(name="t", fields=("text",), classes=("x", "y", "z"), multi_label=True)
    by_hand = -(hard * logits.sigmoid().log() + (1 - hard) * (-logits).sigmoid().log()).sum(dim=1)
    assert torch.allclose(row_losses(logits, hard, several), by_hand, atol=1e-6)


def test_targets_are_swapped_with_the_texts(config_for: Callable[..., Config]) -> None:
    examples = examples_of(config_for("llama"), make_rows(3))
    assert examples.targets[:, AB].argmax(dim=1).tolist() == [0, 1, 2]
    assert examples.targets[:, BA].argmax(dim=1).tolist() == [1, 0, 2]


def test_orders_shown() -> None:
    members = np.array([4, 9, 2, 7, 1, 3])
    assert set(orders_shown(resolve({"train": {"swap": "none"}}), members, 1).values()) == {(AB,)}
    assert set(orders_shown(resolve({"train": {"swap": "both"}}), members, 1).values()) == {(AB, BA)}
    random = resolve({"train": {"swap": "random"}})
    drawn = [orders_shown(random, members, step) for step in (1, 2, 3)]
    assert drawn[0] == orders_shown(random, members, 1)
    assert {orders for one in drawn for orders in one.values()} == {(AB,), (BA,)}


def test_rates_rise_from_zero_and_fall_to_zero() -> None:
    for schedule in ("linear", "cosine", "constant"):
        settings = resolve({"train": {"schedule": schedule, "warmup": 0.2}}).train
        factors = [rate_factor(settings, step, 50) for step in range(50)]
        assert factors[:10] == sorted(factors[:10])
        assert factors[10:] == sorted(factors[10:], reverse=True)
        assert 0 < factors[0] < 0.1
        assert max(factors) == factors[10] == 1.0
        assert factors[-1] == 1.0 if schedule == "constant" else factors[-1] < 0.05


def test_steps_follow_epochs_and_the_limit() -> None:
    assert total_steps(resolve({"train": {"epochs": 2, "rows_per_step": 16}}), 33) == 6
    assert total_steps(resolve({"train": {"epochs": 0.5, "rows_per_step": 16}}), 64) == 2
    assert total_steps(resolve({"train": {"epochs": 2, "rows_per_step": 16, "max_steps": 4}}), 33) == 4


def test_the_head_has_its_own_rate_and_no_decay(config_for: Callable[..., Config]) -> None:
    """torch ignores a group's key `learning_rate` without a word: read the rates back from the optimizer."""
    config = config_for("llama", train={"learning_rate": 1e-4, "head_learning_rate": 5e-3, "weight_decay": 0.3})
    classifier = build(config, CPU)
    optimizer = torch.optim.AdamW(parameter_groups(classifier, config))
    head = {id(one) for one in classifier.head.parameters()}
    for group in optimizer.param_groups:
        is_head = {id(one) for one in group["params"]} == head
        assert group["lr"] == (5e-3 if is_head else 1e-4)
        assert group["weight_decay"] == (0.0 if is_head else 0.3)
    grouped = [one for group in optimizer.param_groups for one in group["params"]]
    assert {id(one) for one in grouped} == {id(one) for one in classifier.parameters() if one.requires_grad}


def run(config: Config, folder: Path, rows: list[Row]) -> Classifier:
    return train(config, rows, encode(config, rows), folder, make_accelerator(config))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_it_learns_what_the_text_says_and_logs_it(
    config_for: Callable[..., Config], tmp_path: Path, quantization: str
) -> None:
    config = config_for(
        "gemma2", model={"quantization": quantization}, train={"epochs": 12, "head_learning_rate": 3e-2}
    )
    run(config, tmp_path, make_rows(24))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["loss"] < 0.3 < lines[0]["loss"]
    assert all(line["tokens"] > 0 and line["gradient_norm"] > 0 for line in lines)
    assert "learning_rate: 0.01" in (tmp_path / "config.yaml").read_text()


def weights(classifier: Classifier) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in classifier.parameters() if one.requires_grad])


def test_the_same_seed_gives_the_same_weights_and_micro_batches_change_nothing(
    config_for: Callable[..., Config], tmp_path: Path
) -> None:
    rows, trained = make_rows(16), {}
    for name, section in {"a": {}, "again": {}, "small": {"rows_per_batch": 2}}.items():
        trained[name] = weights(run(config_for("llama", train=section), tmp_path / name, rows))
    assert torch.equal(trained["a"], trained["again"])
    # AdamW turns rounding of the smallest gradients into whole steps; most weights must agree closely all the same.
    assert (trained["a"] - trained["small"]).abs().median() <= 1e-6


@pytest.mark.parametrize(
    "section",
    [
        {"learning_rate": 2e-2},
        {"head_learning_rate": 1e-1},
        {"weight_decay": 0.9},
        {"warmup": 0.6},
        {"schedule": "constant"},
        {"clip": 1e-3},
        {"swap": "none"},
        {"swap": "random"},
        {"epochs": 3},
        {"max_steps": 1},
        {"rows_per_step": 4},
    ],
    ids=str,
)
def test_every_dial_moves_the_weights(
    config_for: Callable[..., Config], tmp_path: Path, section: dict[str, Any]
) -> None:
    rows = make_rows(24)
    default = weights(run(config_for("llama"), tmp_path / "default", rows))
    turned = weights(run(config_for("llama", train=section), tmp_path / "turned", rows))
    assert not torch.equal(default, turned)


def test_recomputed_activations_give_the_same_gradients(config_for: Callable[..., Config], tmp_path: Path) -> None:
    rows = make_rows(8)
    plain = weights(run(config_for("gemma2"), tmp_path / "a", rows))
    saving = weights(run(config_for("gemma2", train={"gradient_checkpointing": True}), tmp_path / "b", rows))
    assert torch.allclose(plain, saving, atol=1e-6)


def test_no_rows_and_no_labels_are_errors(config_for: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        run(config_for("llama"), tmp_path, [])
    with pytest.raises(DataError, match="without a label") as caught:
        run(config_for("llama"), tmp_path, [*make_rows(2), Row("lost", make_rows(1)[0].fields)])
    assert caught.value.rows == ("lost",)


def test_a_loss_that_is_not_finite_stops_the_training_with_the_rows(
    config_for: Callable[..., Config], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="diverged") as caught:
        run(config_for("llama", train={"learning_rate": 1e30, "epochs": 3}), tmp_path, make_rows(16))
    assert set(caught.value.rows) <= {row.id for row in make_rows(16)}


def test_the_accelerator_is_on_the_cpu_here() -> None:
    accelerator: Accelerator = make_accelerator(resolve({}))
    assert accelerator.num_processes == 1
