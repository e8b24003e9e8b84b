"""From a config to what the model sees of its rows: tokenizer, recipe, token cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from pairclf.config import Config
from pairclf.data.audit import ACROSS_ROWS, Finding, clean
from pairclf.data.tables import read_rows, scan_rows
from pairclf.inputs.cache import EncodedRows, Frames, TokenCache, token_cache
from pairclf.inputs.render import InputBuilder
from pairclf.inputs.tokenise import settle_template
from pairclf.jobs.run import labelled_rows, output_of
from pairclf.model.backbone import load_tokenizer, resolve_base


class Opened(NamedTuple):
    """`config` with the chat template written out, the base's tokenizer, and the builder that both make."""

    config: Config
    tokenizer: Any
    builder: InputBuilder


def open_inputs(config: Config) -> Opened:
    """Load the base's tokenizer and settle the wording, once for all that is done with it.

    Raises:
        ModelError: the tokenizer can't be loaded, or is not a fast one.
        ConfigError: the wording does not fit the tokenizer or the budget.
    """
    tokenizer = load_tokenizer(resolve_base(config.model.base))
    template = settle_template(config.inputs.template, tokenizer)
    settled = config.model_copy(update={"inputs": config.inputs.model_copy(update={"template": template})})
    return Opened(settled, tokenizer, InputBuilder(tokenizer, settled.task, settled.inputs))


def chunks_of(config: Config, data: Path | None) -> Frames:
    """The rows of `data.train` as `train` has them, or those of an unlabelled file as `predict` has them, in chunks.

    No more than a chunk is held in memory, unless a rule or an `exclude_overlap` looks at several rows at once.
    """
    if data:
        return unlabelled(config, data)
    task, rules = config.task, config.data.rules
    together = any(getattr(rules, rule) in ("fix", "drop") for rule in ACROSS_ROWS)
    if together or any(source.exclude_overlap for source in config.data.sources):
        return labelled_rows(config).iter_slices
    return lambda: (
        clean(chunk, task, rules, labelled=True)[0]
        for chunk in scan_rows(config.data.sources, task, labelled=True, max_rows=config.data.max_rows)
    )


def unlabelled(config: Config, data: Path, note: Callable[[list[Finding]], None] = lambda found: None) -> Frames:
    """The rows of a test file, repaired as `data.rules` says, in chunks; `note` is told what was found in each."""
    task, rules = config.task, config.data.rules
    # Which id stood before can be said of a whole file alone; repeated ids that are not to be mended show otherwise.
    whole = rules.duplicate_id == "fix"

    def frames() -> Iterator[pl.DataFrame]:
        for chunk in [read_rows([data], task, labelled=False)] if whole else scan_rows([data], task, labelled=False):
            frame, found = clean(chunk, task, rules, labelled=False)
            note(found)
            yield frame

    return frames


def run_cache(config: Config, builder: InputBuilder, frames: Frames) -> TokenCache:
    """The token cache of a canonical table, in the run's folder or where `data.cache` says."""
    folder = config.data.cache or output_of(config) / "tokens"
    return token_cache(folder, frames, builder.tokenizer, config.task.fields, processes=config.inputs.processes)


def encoded_rows(config: Config, builder: InputBuilder, frame: pl.DataFrame) -> EncodedRows:
    """A canonical table as the builder shows it, from the run's token cache."""
    return EncodedRows(run_cache(config, builder, frame.iter_slices), builder)
