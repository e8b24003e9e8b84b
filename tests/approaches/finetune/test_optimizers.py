"""What moves the weights: each rate reaches its weights, each optimizer is the one named, the average averages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pairclf.approaches.finetune.optimizers import (
    OPTIMIZERS,
    MovingAverage,
    copy_weights,
    make_optimizer,
    rate_factor,
    set_rates,
    trained_weights,
)
from pairclf.config import Config, resolve
from pairclf.model.engine import build

CPU = torch.device("cpu")


def rates_of(config: Config) -> dict[str, tuple[float, float]]:
    """`{weight: (rate, decay)}`, read back from the optimizer: torch ignores a group's key `learning_rate`."""
    classifier = build(config, CPU)
    optimizer = make_optimizer(classifier, config.train)
    named = {id(one): name for name, one in classifier.named_parameters()}
    read = {
        named[id(one)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for one in group["params"]
    }
    assert read.keys() == trained_weights(classifier).keys()
    return read


def test_head_and_both_factors_have_their_own_rates(config_for: Callable[..., Config]) -> None:
    rates = {"learning_rate": 1e-4, "head_learning_rate": 5e-3, "lora_b_learning_rate": 2e-3, "weight_decay": 0.3}
    for name, found in rates_of(config_for("llama", train=rates)).items():
        expected = (5e-3, 0.0) if name.startswith("head.") else (2e-3 if "lora_B" in name else 1e-4, 0.3)
        assert found == expected, name
    rates = {"learning_rate": 1e-4, "lora_a_learning_rate": 7e-3, "weight_decay": 0.3}
    for name, found in rates_of(config_for("llama", train=rates)).items():
        assert found[0] == (7e-3 if "lora_A" in name else 1e-4), name


@pytest.mark.parametrize(("kind", "lora"), [("bert", None), ("deberta-v2", None), ("modernbert", {"r": 4})])
def test_layer_decay_slows_lower_layers_and_neither_the_top_nor_the_head(
    config_for: Callable[..., Config], kind: str, lora: dict[str, object] | None
) -> None:
    rates = {"learning_rate": 1e-4, "head_learning_rate": 5e-3, "layer_decay": 0.5}
    found = {name: rate for name, (rate, _) in rates_of(config_for(kind, model={"lora": lora}, train=rates)).items()}
    layers = "layers" if kind == "modernbert" else "encoder.layer"
    parts = {"embeddings": 2.5e-5, f"{layers}.0.": 5e-5, f"{layers}.1.": 1e-4, "orm": 1e-4, "head": 5e-3}
    for name, rate in found.items():
        part = next(part for part in parts if part in name)
        assert rate == pytest.approx(parts[part]), name
    assert {1e-4, 5e-5, 5e-3} | ({2.5e-5} if lora is None else set()) == {round(rate, 8) for rate in found.values()}


def test_norms_biases_magnitudes_and_the_head_do_not_decay(config_for: Callable[..., Config]) -> None:
    for model in ({"lora": None}, {"lora": {"r": 4, "use_dora": True}}, {"lora": None, "head": "two_layer"}):
        found = rates_of(config_for("qwen2", model=model, train={"weight_decay": 0.3}))
        spared = {name for name, (_, decay) in found.items() if decay == 0}
        thin = {name for name in found if "norm" in name or name.endswith(".bias") or "magnitude" in name}
        assert spared == thin | {name for name in found if name.startswith("head.")}
        assert len(spared) > 2
        assert spared != found.keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_downhill_with_its_own_rule(config_for: Callable[..., Config], name: str) -> None:
    config = config_for("llama", train={"optim": name, "adam_betas": [0.5, 0.7]})
    classifier = build(config, CPU)
    optimizer = make_optimizer(classifier, config.train)
    wanted = {"adamw_torch": "AdamW", "adamw_8bit": "AdamW8bit", "paged_adamw_32bit": "PagedAdamW"}
    wanted |= {"paged_adamw_8bit": "PagedAdamW8bit", "adafactor": "Adafactor"}
    assert type(optimizer).__name__ == wanted[name]
    if name != "adafactor":
        assert [list(group["betas"]) for group in optimizer.param_groups] == [[0.5, 0.7]] * len(optimizer.param_groups)
    goal = {key: torch.randn_like(one) for key, one in trained_weights(classifier).items()}
    losses = []
    for _ in range(8):
        loss = sum((one - goal[key]).square().sum() for key, one in trained_weights(classifier).items())
        assert isinstance(loss, torch.Tensor)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)


def test_rates_rise_from_zero_and_fall_to_zero() -> None:
    for schedule in ("linear", "cosine", "constant_with_warmup"):
        settings = resolve({"train": {"lr_scheduler_type": schedule, "warmup_ratio": 0.2}}).train
        factors = [rate_factor(settings, step, 50) for step in range(50)]
        assert factors[:10] == sorted(factors[:10])
        assert factors[10:] == sorted(factors[10:], reverse=True)
        assert 0 < factors[0] < 0.1
        assert max(factors) == factors[10] == 1.0
        assert factors[-1] == 1.0 if schedule == "constant_with_warmup" else factors[-1] < 0.05


def test_the_schedule_multiplies_each_groups_own_rate() -> None:
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [weights[0]], "lr": 1.0}, {"params": [weights[1]], "lr": 3.0}])
    for factor in (0.5, 0.25):
        set_rates(optimizer, [1.0, 3.0], factor)
        assert [group["lr"] for group in optimizer.param_groups] == [factor, 3 * factor]


def test_the_average_follows_the_weights_and_steps_aside() -> None:
    weights = {"w": nn.Parameter(torch.tensor([1.0]))}
    average = MovingAverage(weights, decay=0.5)
    expected = 1.0
    for step, value in enumerate([3.0, 5.0, -1.0], start=1):
        weights["w"].data.fill_(value)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert float(average.averages["w"]) == pytest.approx(expected)
    with average.applied():
        assert float(weights["w"].detach()) == pytest.approx(expected)
    assert float(weights["w"].detach()) == -1.0


def test_weights_are_copied_by_name_or_not_at_all() -> None:
    with pytest.raises(KeyError, match="one side"):
        copy_weights({"a": torch.zeros(1)}, {"b": nn.Parameter(torch.zeros(1))})
