"""What truncation cut of a run's rows: the tokens that each field lost, by the run's recipes and token cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pairclf.bundles.bundle import Bundle, open_bundle
from pairclf.bundles.examples import read_examples
from pairclf.config import SECTIONS, Config
from pairclf.console import console, progress
from pairclf.errors import ModelError
from pairclf.files import MAX_JSON, read_plain
from pairclf.inputs.builder import builder_for
from pairclf.inputs.cache import RowSource, find_cache
from pairclf.inputs.examples import with_examples
from pairclf.inputs.tokenise import bare_tokenizer
from pairclf.run import Paths, output_of, tokens_of
from pairclf.task import Task


def lost_tokens(config: Config, labelled: pl.DataFrame, folds: pl.DataFrame) -> pl.DataFrame | None:
    """The tokens that each held-out row lost in the inputs of the model that scored it.

    Nothing is tokenised, which takes minutes: where the run has no token cache of these rows, a note says so.

    Args:
        config: of the run.
        labelled: all labelled rows, as they were tokenised.
        folds: `id` and `fold` of the rows that are wanted.

    Returns:
        `id`, and a column of Int64 for each field; None: the approach has no tokens, or they are not known.

    Raises:
        BundleError: a bundle is damaged.
    """
    if "inputs" not in SECTIONS[config.approach] or folds.is_empty():
        return None
    paths = {fold: Paths(output_of(config), fold).bundle for fold in folds["fold"].unique().sort().to_list()}
    bundles = {fold: open_bundle(path, verified=True) for fold, path in paths.items() if path.is_dir()}
    if len(bundles) < len(paths):
        console.print("note: what truncation cut is not known: the run's bundles are gone")
        return None
    try:
        return _lost(bundles, tokens_of(config), labelled, folds)
    except (OSError, ModelError) as error:  # the figures stand without these slices
        console.print(f"note: what truncation cut is not known: {error}")
        return None


def _lost(bundles: dict[int, Bundle], folder: Path, labelled: pl.DataFrame, folds: pl.DataFrame) -> pl.DataFrame | None:
    first = next(iter(bundles.values()))  # folds differ in their examples alone, and a tokenizer takes seconds to read
    fields = first.config.task.fields
    tokenizer = bare_tokenizer(read_plain(first.files.tokenizer / "tokenizer.json", MAX_JSON))
    plain = builder_for(first.config, tokenizer)
    cache = find_cache(folder, RowSource.of(labelled.iter_slices, fields), plain.tokenizer, fields)
    if cache is None:
        console.print(f"note: what truncation cut is not known: {folder} has no tokens of these rows")
        return None
    places = {row: place for place, row in enumerate(cache.ids)}
    builders = {fold: with_examples(one.config, plain, read_examples(one)) for fold, one in bundles.items()}
    lost = np.zeros((len(folds), len(fields)), dtype=np.int64)
    with progress("truncation", total=len(folds)) as advance:
        for line, (row, fold) in enumerate(folds.select("id", "fold").iter_rows()):
            found = builders[fold].lost(cache[places[row]], row)
            lost[line] = [found[name] for name in fields]
            advance()
    return folds.select("id").hstack([pl.Series(name, lost[:, at]) for at, name in enumerate(fields)])


def truncation_traits(lost: pl.DataFrame, task: Task) -> dict[str, Sequence[str | None]]:
    """By trait, `(N,)` names of slices: nothing cut, a field cut, and the two sides cut unequally; None: in none.

    A row may be in several, each a trait of its own.

    Args:
        lost: a column for each field; null: not known, and in no slice.
        task: names the fields and the sides.
    """
    slices = {"truncation": ("nothing cut", pl.sum_horizontal(task.fields) == 0)}
    slices |= {f"truncation of {name}": ("cut", pl.col(name) > 0) for name in task.fields}
    if task.swap_fields is not None:
        a, b = task.swap_fields
        slices[f"truncation of {a} and {b}"] = "unequal", pl.col(a) != pl.col(b)
    known = pl.all_horizontal(pl.col(name).is_not_null() for name in task.fields)
    columns = lost.select(
        pl.when(known & mask).then(pl.lit(name)).alias(trait) for trait, (name, mask) in slices.items()
    )
    return {trait: columns[trait].to_list() for trait in columns.columns}


def less_cut(lost: pl.DataFrame, task: Task) -> NDArray[np.int64]:
    """`(N,)`: the side (0: A, 1: B) that lost fewer tokens; -1: both lost as many, or it is not known."""
    a, b = (lost[name].fill_null(0).to_numpy() for name in task.swap_fields or ())
    return np.where(a == b, -1, (b < a).astype(np.int64))
