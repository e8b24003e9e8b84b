"""What moves the weights: groups and their rates, optimizers, the schedule, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW, PagedAdamW8bit
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers.optimization import Adafactor

from pairclf.config import Train
from pairclf.model.engine import Classifier

Groups = list[dict[str, Any]]


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, by name: the head, and the adapters or the whole backbone."""
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def parameter_groups(classifier: Classifier, train: Train) -> Groups:
    """A group a rate: the head, LoRA's A and LoRA's B may have their own; none of norms, biases and head decays.

    The key is `lr`: torch ignores a group's `learning_rate` without a word.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, one in trained_weights(classifier).items():
        head = name.startswith("head.")
        own = {
            "head": train.head_learning_rate if head else None,
            "A": train.lora_a_learning_rate if ".lora_A." in name else None,
            "B": train.lora_b_learning_rate if ".lora_B." in name else None,
        }
        rate = next((rate for rate in own.values() if rate is not None), train.learning_rate)
        groups.setdefault((rate, 0.0 if head or one.ndim <= 1 else train.weight_decay), []).append(one)
    return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]


def _adafactor(groups: Groups, **_moments: Any) -> Optimizer:
    """Adafactor at the rates that the schedule gives, as Adam has them: its own schedule and scaling are off."""
    made: Optimizer = Adafactor(  # type: ignore[no-untyped-call]
        groups, scale_parameter=False, relative_step=False, warmup_init=False
    )
    return made


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
    "paged_adamw": PagedAdamW,
    "paged_adamw8bit": PagedAdamW8bit,
    "adafactor": _adafactor,
}


def make_optimizer(classifier: Classifier, train: Train) -> Optimizer:
    """The optimizer that `train.optimizer` names, over `parameter_groups`."""
    return OPTIMIZERS[train.optimizer](parameter_groups(classifier, train), betas=train.betas, eps=train.epsilon)


def rate_factor(train: Train, step: int, steps: int) -> float:
    """What the peak rates are multiplied by at `step` (from 0) of `steps`: warm-up from 0, then the schedule to 0."""
    warmup = math.ceil(train.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = (steps - step) / max(1, steps - warmup)
    return {"linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left)), "constant": 1.0}[train.schedule]


def set_rates(optimizer: Optimizer, peaks: Sequence[float], factor: float) -> None:
    """Each group's rate for the coming step; it hangs on the step's number alone: nothing has to be resumed."""
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * factor


class MovingAverage:
    """Exponential moving average of the trained weights, in float32.

    The first steps count less of the past, `min(decay, (1 + step) / (10 + step))`: the average would otherwise hold the
    random head for `1 / (1 - decay)` steps.
    """

    def __init__(self, weights: dict[str, nn.Parameter], decay: float) -> None:
        self._weights = weights
        self._decay = decay
        self.averages: dict[str, Tensor] = {name: one.detach().float().clone() for name, one in weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step`, from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, one in self._weights.items():
            self.averages[name].lerp_(one.detach().float(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While it lasts, the model has the averages."""
        kept = {name: one.detach().clone() for name, one in self._weights.items()}
        copy_weights(self.averages, self._weights)
        try:
            yield
        finally:
            copy_weights(kept, self._weights)


@torch.no_grad()
def copy_weights(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy by name, in the target's dtype and onto its device.

    Raises:
        KeyError: the two do not hold the same names.
    """
    if missing := sorted(source.keys() ^ target.keys()):
        raise KeyError(f"weights that stand on one side alone: {missing[:5]}")
    for name, one in target.items():
        one.copy_(source[name].to(one.device))
