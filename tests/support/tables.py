"""Canonical tables, as `read_rows` makes them."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

Turns = list[str | None]


def canonical(
    prompts: Sequence[Turns | str],
    winners: Sequence[int] | None = None,
    *,
    a: str = "a",
    b: str = "b",
    prefix: str = "r",
) -> pl.DataFrame:
    """A canonical LMSYS table with these prompts and these winners (none: unlabelled)."""
    count = len(prompts)
    targets = [[float(place == winner) for place in range(3)] for winner in winners] if winners else [None] * count
    turns = [[prompt] if isinstance(prompt, str) else prompt for prompt in prompts]
    texts = {"prompt": turns, "response_a": [[a]] * count, "response_b": [[b]] * count}
    kinds = {**dict.fromkeys(texts, pl.List(pl.String)), "target": pl.List(pl.Float64), "group": pl.String()}
    columns = {"id": [f"{prefix}{row}" for row in range(count)], **texts, "target": targets, "group": [None] * count}
    return pl.DataFrame(columns, schema_overrides=kinds).with_columns(weight=pl.lit(1.0), train_only=pl.lit(False))
