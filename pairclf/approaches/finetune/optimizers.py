"""Optimizers, parameter groups, learning-rate schedule, and moving average of the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW, PagedAdamW8bit
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers.optimization import Adafactor

from pairclf.config import Train
from pairclf.model.backbone import layer_number
from pairclf.model.engine import Classifier
from pairclf.model.families import decoder_layers, text_settings

Groups = list[dict[str, Any]]

_BELOW = re.compile(r"emb|shared|wte|wpe|relative_attention_bias")
"""In names of weights that are no layer's and go into the first one: `wte` and `wpe` are embeddings of GPT-2."""


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained weights by name: the head, and the adapters or the whole backbone."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def parameter_groups(classifier: Classifier, train: Train) -> Groups:
    """One group for each learning rate: head, LoRA A, LoRA B and layers may differ. No decay of norms, biases and head.

    The key is `lr`: torch silently ignores a group's `learning_rate`.
    """
    settings: Any = classifier.backbone.config
    layers, behind = text_settings(settings).num_hidden_layers, decoder_layers(settings)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in trained_weights(classifier).items():
        head = name.startswith("head.")
        own_rates = {
            "head": train.head_learning_rate if head else None,
            "A": train.lora_a_learning_rate if ".lora_A." in name else None,
            "B": train.lora_b_learning_rate if ".lora_B." in name else None,
        }
        rate = next((rate for rate in own_rates.values() if rate is not None), train.learning_rate)
        rate *= 1.0 if head else train.layer_decay ** _layers_above(name, layers, behind)
        groups.setdefault((rate, 0.0 if head or weight.ndim <= 1 else train.weight_decay), []).append(weight)
    return [{"params": weights, "lr": rate, "weight_decay": decay} for (rate, decay), weights in groups.items()]


def _layers_above(name: str, layers: int, behind: int = 0) -> int:
    """Layers of the backbone above a weight: all above embeddings, none above a last norm.

    Args:
        name: of the weight.
        layers: that read the text.
        behind: layers of the decoder behind an encoder.

    >>> [_layers_above(f"backbone.{name}", 12) for name in ("embeddings.word", "layers.0.q", "layers.11.q", "norm")]
    [12, 11, 0, 0]
    >>> [_layers_above(f"backbone.{name}", 12) for name in ("wte.weight", "h.0.attn", "ln_f", "layer_norm_emb.bias")]
    [12, 11, 0, 12]
    >>> [_layers_above(f"backbone.{name}", 12, 6) for name in ("shared", "encoder.block.11.q", "decoder.block.5.q")]
    [18, 6, 0]
    """
    above = behind if behind and "decoder." not in name else 0
    if (layer := layer_number(name)) >= 0:
        return (behind if behind and not above else layers) - 1 - layer + above
    return layers + behind if _BELOW.search(name) else above


def _adafactor(groups: Groups, **_moments: Any) -> Optimizer:
    """Adafactor with the schedule's rates, like Adam: its own schedule and scaling are off."""
    optimizer: Optimizer = Adafactor(  # type: ignore[no-untyped-call]
        groups, scale_parameter=False, relative_step=False, warmup_init=False
    )
    return optimizer


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw_torch": AdamW,
    "adamw_8bit": AdamW8bit,
    "paged_adamw_32bit": PagedAdamW,
    "paged_adamw_8bit": PagedAdamW8bit,
    "adafactor": _adafactor,
}


def make_optimizer(classifier: Classifier, train: Train) -> Optimizer:
    """The optimizer that `train.optim` names, over `parameter_groups`."""
    return OPTIMIZERS[train.optim](parameter_groups(classifier, train), betas=train.adam_betas, eps=train.adam_epsilon)


def rate_factor(train: Train, step: int, steps: int) -> float:
    """Factor of the peak rates at `step` (from 0) of `steps`: warm-up from 0, then the schedule to 0."""
    warmup = math.ceil(train.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = (steps - step) / max(1, steps - warmup)
    factors = {"linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left)), "constant_with_warmup": 1.0}
    return factors[train.lr_scheduler_type]


def set_rates(optimizer: Optimizer, peaks: Sequence[float], factor: float) -> None:
    """Set each group's rate for the next step. It depends on the step's number only, so no state is saved."""
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * factor


class MovingAverage:
    """Exponential moving average of the trained weights, in float32.

    The decay rises with the steps, `min(decay, (1 + step) / (10 + step))`: otherwise the average would contain the
    random initial head for `1 / (1 - decay)` steps.
    """

    def __init__(self, weights: dict[str, nn.Parameter], decay: float) -> None:
        self._weights = weights
        self._decay = decay
        self.averages: dict[str, Tensor] = {name: weight.detach().float().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update after optimizer step number `step`, from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, weight in self._weights.items():
            self.averages[name].lerp_(weight.detach().float(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model has the averaged weights."""
        originals = {name: weight.detach().clone() for name, weight in self._weights.items()}
        copy_weights(self.averages, self._weights)
        try:
            yield
        finally:
            copy_weights(originals, self._weights)


@torch.no_grad()
def copy_weights(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy by name, in the target's dtype and onto its device.

    Raises:
        KeyError: the two do not hold the same names.
    """
    if missing := sorted(source.keys() ^ target.keys()):
        raise KeyError(f"weights that exist on one side only: {missing[:5]}")
    for name, tensor in target.items():
        tensor.copy_(source[name].to(tensor.device))
