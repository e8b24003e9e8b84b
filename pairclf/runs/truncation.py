"""What truncation cut of a run's rows: the tokens that each field lost, by the run's recipes and token cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pairclf.bundles.bundle import open_bundle
from pairclf.bundles.examples import read_examples
from pairclf.config import SECTIONS, Config
from pairclf.console import console, progress
from pairclf.errors import ModelError
from pairclf.files import MAX_JSON, read_plain
from pairclf.inputs.builder import builder_for
from pairclf.inputs.cache import RowSource, find_cache
from pairclf.inputs.examples import with_examples
from pairclf.inputs.render import InputBuilder, made_identical
from pairclf.inputs.tokenise import bare_tokenizer
from pairclf.run import Paths, output_of, tokens_of
from pairclf.task import AB, Task

MADE_EQUAL = "sides_made_equal"
"""Column of `lost_tokens`: whether the sides differ, were both truncated, and are equal after it."""


def input_builders(config: Config, folds: Iterable[int]) -> dict[int, InputBuilder]:
    """The recipes of a run's models, by fold, without torch.

    Raises:
        BundleError: a bundle is damaged.
        ModelError: a bundle is gone, or its tokenizer fails.
        OSError: a tokenizer can't be read.
    """
    paths = {fold: Paths(output_of(config), fold).bundle for fold in folds}
    bundles = {fold: open_bundle(path, verified=True) for fold, path in paths.items() if path.is_dir()}
    if not bundles or len(bundles) < len(paths):
        raise ModelError("the run's bundles are gone")
    first = next(iter(bundles.values()))  # folds differ in their examples alone, and a tokenizer takes seconds to read
    tokenizer = bare_tokenizer(read_plain(first.files.tokenizer / "tokenizer.json", MAX_JSON))
    plain = builder_for(first.config, tokenizer)
    return {fold: with_examples(one.config, plain, read_examples(one)) for fold, one in bundles.items()}


def lost_tokens(config: Config, labelled: pl.DataFrame, folds: pl.DataFrame) -> pl.DataFrame | None:
    """The tokens that each held-out row lost in the inputs of the model that scored it.

    Nothing is tokenised, which takes minutes: where the run has no token cache of these rows, a note says so.

    Args:
        config: of the run.
        labelled: all labelled rows, as they were tokenised.
        folds: `id` and `fold` of the rows that are wanted.

    Returns:
        `id`, a column of Int64 for each field, and `MADE_EQUAL`; None: the approach has no tokens, or they are not
        known.

    Raises:
        BundleError: a bundle is damaged.
    """
    if "inputs" not in SECTIONS[config.approach] or folds.is_empty():
        return None
    try:
        return _lost(config, labelled, folds)
    except (OSError, ModelError) as error:  # the figures stand without these slices
        console.print(f"note: what truncation cut is not known: {error}")
        return None


def _lost(config: Config, labelled: pl.DataFrame, folds: pl.DataFrame) -> pl.DataFrame | None:
    task, folder = config.task, tokens_of(config)
    builders = input_builders(config, folds["fold"].unique().sort().to_list())
    tokenizer = next(iter(builders.values())).tokenizer
    cache = find_cache(folder, RowSource.of(labelled.iter_slices, task.fields), tokenizer, task.fields)
    if cache is None:
        console.print(f"note: what truncation cut is not known: {folder} has no tokens of these rows")
        return None
    places = {row: place for place, row in enumerate(cache.ids)}
    lost, equal = np.zeros((len(folds), len(task.fields)), dtype=np.int64), np.zeros(len(folds), dtype=np.bool_)
    with progress("truncation", total=len(folds)) as advance:
        for line, (row, fold) in enumerate(folds.select("id", "fold").iter_rows()):
            tokens, builder = cache[places[row]], builders[fold]
            dropped = builder.lost(tokens, row)
            lost[line] = [dropped[name] for name in task.fields]
            if task.swap_fields is not None and all(dropped[side] for side in task.swap_fields):
                equal[line] = made_identical(task, tokens, builder.assemble(tokens, row)[AB])
            advance()
    columns = [pl.Series(name, lost[:, at]) for at, name in enumerate(task.fields)]
    return folds.select("id").hstack([*columns, pl.Series(MADE_EQUAL, equal)])


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
