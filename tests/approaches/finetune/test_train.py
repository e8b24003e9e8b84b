"""The loop: the loss is that of the whole step however it is cut up, dials move what they say, and it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from support.training import log_lines, weights
from tests_support import make_rows

from pairclf.approaches.finetune.distributed import make_accelerator
from pairclf.approaches.finetune.monitor import estimate_resources
from pairclf.approaches.finetune.step import Examples, HeldOut, TrainState, accumulate, make_examples, orders_of_rows
from pairclf.approaches.finetune.train import construct, total_steps, train
from pairclf.config import Config, resolve
from pairclf.errors import DataError
from pairclf.inputs.render import Encoded
from pairclf.model.engine import Classifier, build
from pairclf.model.inputs import open_inputs
from pairclf.model.scoring import by_order, items_of, score
from pairclf.scores.probabilities import mean_of_orders
from pairclf.task import AB, BA, LMSYS, Row

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("without_forecast")


def encode(config: Config, rows: list[Row]) -> list[tuple[Encoded, ...]]:
    return open_inputs(config).builder.encode(rows)


def examples_of(config: Config, rows: list[Row]) -> Examples:
    return make_examples(rows, encode(config, rows), config)


def with_working_adapters(config: Config, rows: list[Row]) -> TrainState:
    """LoRA's B starts at zero, and A then has no gradient: fill it."""
    classifier = build(config, CPU)
    for name, one in classifier.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one, std=0.05)
    return construct(config, examples_of(config, rows), classifier, make_accelerator(config))


def gradients(config: Config, rows: list[Row]) -> tuple[float, dict[str, torch.Tensor]]:
    learner = with_working_adapters(config, rows)
    outcome = accumulate(learner, np.arange(len(rows)), 1, config.train.tokens_per_batch)
    assert outcome is not None
    return outcome.loss, gradients_of(learner)


def gradients_of(learner: TrainState) -> dict[str, torch.Tensor]:
    return {name: one.grad.clone() for name, one in learner.weights.items() if one.grad is not None}


def farthest(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize(("kind", "swap"), [("gemma2", "both"), ("llama", "none"), ("llama", "random")])
def test_accumulate_gives_the_same_gradients_in_batches_of_any_size(
    config_for: Callable[..., Config], kind: str, swap: str
) -> None:
    """FACTS: transformers' own loss is four times as large under 2 x 4."""
    rows = make_rows(7)  # an uneven last batch
    made = {
        size: gradients(config_for(kind, train={"per_device_train_batch_size": size, "swap": swap}), rows)
        for size in (8, 4, 2, 1)
    }
    loss, whole = made[8]
    assert len(whole) > 2
    for size in (4, 2, 1):
        assert made[size][0] == pytest.approx(loss, abs=1e-6)
        assert farthest(made[size][1], whole) <= 1e-5


def test_accumulate_would_show_a_loss_averaged_over_batches(config_for: Callable[..., Config]) -> None:
    """The wrong variant: the mean of the batches' means, which uneven batches weigh wrongly."""
    rows = make_rows(7)
    _, whole = gradients(config_for("llama"), rows)
    config = config_for("llama")
    learner = with_working_adapters(config, rows)
    for part in (np.arange(4), np.arange(4, 7)):
        accumulate(learner, part, step=1)
    wrong = {name: one / 2 for name, one in gradients_of(learner).items()}
    assert farthest(wrong, whole) > 1e-3


def test_accumulate_counts_row_weights_as_repeated_rows(config_for: Callable[..., Config]) -> None:
    rows = make_rows(3)
    repeated = gradients(config_for("llama"), [rows[0], rows[0], rows[1], rows[2]])
    heavy = Row(rows[0].id, rows[0].fields, rows[0].target, weight=2.0)
    weighted = gradients(config_for("llama"), [heavy, rows[1], rows[2]])
    assert weighted[0] == pytest.approx(repeated[0], abs=1e-6)
    assert farthest(weighted[1], repeated[1]) <= 1e-5


def test_prepare_swaps_targets_with_the_texts(config_for: Callable[..., Config]) -> None:
    examples = examples_of(config_for("llama"), make_rows(3))
    assert examples.targets[:, AB].argmax(dim=1).tolist() == [0, 1, 2]
    assert examples.targets[:, BA].argmax(dim=1).tolist() == [1, 0, 2]


def test_orders_shown_follow_swap() -> None:
    members = np.array([4, 9, 2, 7, 1, 3])
    assert set(orders_of_rows(resolve({"train": {"swap": "none"}}), members, 1).values()) == {(AB,)}
    assert set(orders_of_rows(resolve({"train": {"swap": "both"}}), members, 1).values()) == {(AB, BA)}
    random = resolve({"train": {"swap": "random"}})
    drawn = [orders_of_rows(random, members, step) for step in (1, 2, 3)]
    assert drawn[0] == orders_of_rows(random, members, 1)
    assert {orders for one in drawn for orders in one.values()} == {(AB,), (BA,)}


def test_total_steps_follow_epochs_and_the_limit() -> None:
    assert total_steps(resolve({"train": {"num_train_epochs": 2, "global_batch_size": 16}}), 33) == 6
    assert total_steps(resolve({"train": {"num_train_epochs": 0.5, "global_batch_size": 16}}), 64) == 2
    assert total_steps(resolve({"train": {"num_train_epochs": 2, "global_batch_size": 16, "max_steps": 4}}), 33) == 4


def run(config: Config, folder: Path, rows: list[Row], teachers: Any = None) -> Classifier:
    encoded = encode(config, rows)
    examples = make_examples(rows, encoded, config, teachers)
    held_out = HeldOut(encoded[:9], np.array([row.target for row in rows[:9] if row.target]), np.ones(9), "")
    return train(config, examples, folder, make_accelerator(config), held_out=held_out).classifier


def test_train_learns_what_the_text_says_and_logs_it(
    config_for: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pairclf.approaches.finetune.train.estimate_resources", estimate_resources)
    config = config_for(
        "gemma2", model={"quantization": "nf4"}, train={"num_train_epochs": 12, "head_learning_rate": 3e-2}
    )
    run(config, tmp_path, make_rows(24))
    logged = log_lines(tmp_path)
    assert [line["step"] for line in logged] == [10, 20, 30, 36]
    assert logged[-1]["loss"] < 0.3 < logged[0]["loss"]
    assert all(line["tokens"] > 0 and line["gradient_norm"] > 0 and line["padding"] == 0 for line in logged)
    assert "learning_rate: 0.01" in (tmp_path / "config.yaml").read_text()


def test_train_gives_the_same_weights_for_a_seed_and_any_batch_size(
    config_for: Callable[..., Config], tmp_path: Path
) -> None:
    rows, trained = make_rows(16), {}
    for name, section in {"a": {}, "again": {}, "small": {"per_device_train_batch_size": 2}}.items():
        trained[name] = weights(run(config_for("llama", train=section), tmp_path / name, rows))
    assert torch.equal(trained["a"], trained["again"])
    # AdamW turns rounding of the smallest gradients into whole steps; most weights must agree closely all the same.
    assert (trained["a"] - trained["small"]).abs().median() <= 1e-6


DIALS: list[dict[str, Any]] = [
    {"learning_rate": 2e-2},
    {"head_learning_rate": 1e-1},
    {"lora_a_learning_rate": 1e-1},
    {"lora_b_learning_rate": 1e-1},
    {"weight_decay": 0.9},
    {"adam_betas": [0.5, 0.9]},
    {"adam_epsilon": 1e-2},
    {"optim": "adafactor"},
    {"warmup_ratio": 0.6},
    {"lr_scheduler_type": "constant_with_warmup"},
    {"max_grad_norm": 1e-3},
    {"label_smoothing_factor": 0.3},
    {"swap": "none"},
    {"swap": "random"},
    {"consistency_weight": 1.0},
    {"num_train_epochs": 3},
    {"max_steps": 1},
    {"global_batch_size": 6},
    {"ema_decay": 0.5},
    {"save_steps": 1, "average_checkpoints": 2},
    {"eval_steps": 1, "keep_weights": "best", "learning_rate": 0.3},
    {"eval_steps": 1, "early_stopping_patience": 1, "learning_rate": 0.3},
]


def test_train_weights_move_with_every_dial(config_for: Callable[..., Config], tmp_path: Path) -> None:
    rows, base = make_rows(12), {"global_batch_size": 4}
    default = weights(run(config_for("llama", train=base), tmp_path / "default", rows))
    same = [
        dial
        for number, dial in enumerate(DIALS)
        if torch.equal(default, weights(run(config_for("llama", train=base | dial), tmp_path / str(number), rows)))
    ]
    assert same == []


def test_train_gives_the_same_weights_under_settings_of_memory(
    config_for: Callable[..., Config], tmp_path: Path
) -> None:
    """Packed or padded, in what batches, recomputed or not, looked at or not: the final weights are the same."""
    rows = make_rows(12)
    base = {"global_batch_size": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-3}  # AdamW's own divides noise by noise
    default = weights(run(config_for("gemma2", train=base), tmp_path / "default", rows))
    free: list[dict[str, Any]] = [
        {"layout": "padded"},
        {"tokens_per_batch": 200},
        {"per_device_train_batch_size": 3},
        {"gradient_checkpointing": True},
        {"logging_steps": 1, "save_steps": 1, "save_total_limit": 1},
        {"eval_steps": 1, "eval_rows": 3},
    ]
    for number, section in enumerate(free):
        turned = weights(run(config_for("gemma2", train={**base, **section}), tmp_path / str(number), rows))
        assert (default - turned).abs().max() <= 1e-5, section
    wrong = weights(run(config_for("gemma2", train={**base, "swap": "random"}), tmp_path / "wrong", rows))
    assert (default - wrong).abs().max() > 1e-3


def test_train_weights_move_with_teachers_of_known_rows(config_for: Callable[..., Config], tmp_path: Path) -> None:
    rows = make_rows(24)
    config = config_for("llama", train={"distill": {"scores": ["x.parquet"]}})
    plain, none, some = (
        weights(run(config, tmp_path / name, rows, teachers=teachers))
        for name, teachers in (
            ("plain", None),
            ("none", np.full((24, 3), np.nan)),
            ("some", np.random.default_rng(0).dirichlet(np.ones(3), size=24)),
        )
    )
    assert torch.equal(plain, none)
    assert not torch.equal(plain, some)


def test_train_refuses_no_rows_and_rows_without_labels(config_for: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        run(config_for("llama"), tmp_path, [])
    with pytest.raises(DataError, match="without a label") as caught:
        run(config_for("llama"), tmp_path, [*make_rows(2), Row("lost", make_rows(1)[0].fields)])
    assert caught.value.rows == ("lost",)


def test_train_keeps_the_best_evaluation_and_patience_ends_it(
    config_for: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a rate that is far too high the loss on what was held out goes up and down."""
    rows, kept = make_rows(24), {}
    dials = {"eval_steps": 1, "num_train_epochs": 5, "learning_rate": 0.3, "save_steps": 1, "save_total_limit": 99}
    for name, more in {
        "last": {},
        "best": {"keep_weights": "best"},
        "patience": {"keep_weights": "best", "early_stopping_patience": 2},
    }.items():
        kept[name] = weights(run(config_for("llama", train={**dials, **more}), tmp_path / name, rows))
    looks = {
        name: [line["held_out_log_loss"] for line in log_lines(tmp_path / name) if "loss" not in line] for name in kept
    }
    assert looks["best"] == looks["last"]
    assert len(looks["best"]) == 15
    best = looks["best"].index(min(looks["best"])) + 1
    assert best < 15
    said = f"kept the weights of step {best} of 15, which had the best log loss of the evaluations"
    assert " ".join(capsys.readouterr().err.split()).count(said) == 1
    saved = load_file(tmp_path / "last" / "checkpoints" / f"step-{best:08d}" / "weights.safetensors")
    assert torch.equal(kept["best"], torch.cat([saved[name].flatten() for name in trained_names(config_for("llama"))]))
    assert not torch.equal(kept["best"], kept["last"])
    ended = next(at for at in range(3, 16) if min(looks["last"][at - 2 : at]) >= min(looks["last"][: at - 2]))
    assert looks["patience"] == looks["last"][:ended]
    assert ended < 15


def trained_names(config: Config) -> list[str]:
    return [name for name, one in build(config, CPU).named_parameters() if one.requires_grad]


def test_train_keeps_the_mean_of_the_last_checkpoints(config_for: Callable[..., Config], tmp_path: Path) -> None:
    rows = make_rows(24)
    section = {"num_train_epochs": 2, "save_steps": 2, "save_total_limit": 3, "average_checkpoints": 2}
    kept = weights(run(config_for("llama", train=section), tmp_path, rows))
    saved = [load_file(tmp_path / f"checkpoints/step-{step:08d}/weights.safetensors") for step in (4, 6)]
    names = trained_names(config_for("llama"))
    mean = torch.cat([((saved[0][name] + saved[1][name]) / 2).flatten() for name in names])
    assert torch.allclose(kept, mean)
    assert not torch.allclose(kept, torch.cat([saved[1][name].flatten() for name in names]))


def test_train_evaluates_all_held_out_rows(config_for: Callable[..., Config], tmp_path: Path) -> None:
    rows, config = make_rows(24), config_for("llama", train={"eval_steps": 2, "metric_for_best_model": "accuracy"})
    trained = run(config, tmp_path, rows)
    items = items_of(encode(config, rows[:9]), orders=2)
    logits = score(trained, items, tokens_per_batch=1000)
    predicted = mean_of_orders(by_order(items, logits, 9), LMSYS)
    right = np.mean(predicted.argmax(axis=1) == [0, 1, 2] * 3)
    assert [line["step"] for line in log_lines(tmp_path) if "held_out_accuracy" in line] == [2, 3]
    assert next(line["held_out_accuracy"] for line in log_lines(tmp_path)[::-1] if "loss" not in line) == right


def test_make_accelerator_is_on_the_cpu_here() -> None:
    accelerator: Accelerator = make_accelerator(resolve({}))
    assert accelerator.num_processes == 1
