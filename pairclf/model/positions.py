"""Positions: how long a row a base was made for, and what longer rows meet."""

from __future__ import annotations

import math
import re
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PretrainedConfig

from pairclf.config import Config
from pairclf.errors import ModelError
from pairclf.model.backbone import empty_model
from pairclf.model.batch import BackboneInputs
from pairclf.model.families import text_settings

_TABLE = re.compile(r"pos|wpe")
"""In the name of a tensor with a line for each position: `wpe` in GPT-2, `embed_positions` in OPT and GPT-J."""

_ORIGINAL = "original_max_position_embeddings"
"""Positions before they were stretched by `factor`; a config names these, or the stretched ones, as the model's own."""


class PositionLimit(NamedTuple):
    """The longest row that a base was made for.

    Attributes:
        tokens: of that row.
        why: what longer rows meet.
        is_hard: whether they can't be scored at all, or change the scores of other rows.
    """

    tokens: int
    why: str
    is_hard: bool

    def __str__(self) -> str:
        return f"the base model was made for rows of up to {self.tokens:,} tokens; {self.why}"


def first_position(model: nn.Module) -> int:
    """The number of a row's first position: RoBERTa and its like count from `padding_idx + 1`, others from 0."""
    numbers = (
        module.padding_idx + 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _TABLE.search(name) and module.padding_idx is not None
    )
    return next(numbers, 0)


def moved(inputs: BackboneInputs, first: int) -> BackboneInputs:
    """A batch's inputs with `position_ids` counted from `first` in place of 0."""
    positions = inputs.get("position_ids")
    return {**inputs, "position_ids": positions + first} if first and isinstance(positions, Tensor) else inputs


def position_limit(settings: PretrainedConfig) -> PositionLimit | None:
    """The limit by transformers' config of a model; None: it names none."""
    text = text_settings(settings)
    rope: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    parts = list(rope.values()) if all(isinstance(part, dict) for part in rope.values()) else [rope]
    if moving := [limit for part in parts if (limit := _moving_limit(text, part)) is not None]:
        why = "a longer one changes the positions of every row of its batch, as its rope_type is dynamic or longrope"
        return PositionLimit(min(moving), why, True)
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if not rope and (places := _places_in_table(settings, limit)) is not None:
        return PositionLimit(places, "it has no position for a token behind them", True)
    stretched = [
        int(part["factor"] * part[_ORIGINAL])
        for part in parts
        if math.isfinite(part.get("factor") or math.inf) and part.get(_ORIGINAL)
    ]
    return PositionLimit(max([limit, *stretched]), "it was not trained on the positions behind them", False)


def _moving_limit(text: Any, rope: dict[str, Any]) -> int | None:
    """Row length beyond which the rotary positions of all rows in a batch change; None: there is none."""
    kind = str(rope.get("rope_type"))
    if kind == "longrope":
        return int(rope.get(_ORIGINAL) or text.original_max_position_embeddings)
    return int(text.max_position_embeddings) if "dynamic" in kind else None


def _places_in_table(settings: PretrainedConfig, limit: int) -> int | None:
    """Tokens of the longest row if positions are read from a table of `limit` lines; None: there is none.

    No weights are read.
    """
    model = empty_model(settings)
    named = chain(model.named_parameters(), model.named_buffers())
    has_table = any(_TABLE.search(name) and tensor.ndim == 2 and len(tensor) >= limit for name, tensor in named)
    return limit - first_position(model) if has_table else None


def exceeded_limit(settings: PretrainedConfig, max_length: int) -> PositionLimit | None:
    """The model's limit if rows of `max_length` tokens are beyond it; else None."""
    limit = position_limit(settings)
    return limit if limit is not None and max_length > limit.tokens else None


def require_positions(config: Config, settings: PretrainedConfig) -> PositionLimit | None:
    """The model's limit, if rows of `inputs.max_length` are beyond it and can be scored nevertheless; else None.

    Raises:
        ModelError: they can't.
    """
    limit = exceeded_limit(settings, config.inputs.max_length)
    if limit is not None and limit.is_hard:
        raise ModelError(
            f"inputs.max_length={config.inputs.max_length} is too large for model.base={config.model.base}: {limit}",
            remedy=f"set inputs.max_length={limit.tokens} or less",
        )
    return limit
