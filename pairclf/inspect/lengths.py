"""`lengths`: compare values of `inputs.max_length`: truncated rows, lost tokens, padding, hours; tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from pairclf.bundles.base import resolve_base
from pairclf.config import Config
from pairclf.console import counted, progress, table
from pairclf.errors import ConfigError
from pairclf.files import write_json, write_text
from pairclf.inputs.cache import EncodedRows, TokenCache
from pairclf.inputs.plan import PLAIN, by_token_budget, micro_batches, random_steps, token_budget
from pairclf.inputs.render import InputBuilder, made_identical
from pairclf.inspect.show import with_all_rows_examples
from pairclf.page.html import Html, document, element, printed
from pairclf.page.plots import Series, plot
from pairclf.run import chunks_of, output_of
from pairclf.task import AB

if TYPE_CHECKING:
    from pairclf.model.cost import Cost

Lengths = NDArray[np.int64]
UNCUT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Budget:
    """The effect of one `max_length`. Tokens and operations are those of one order.

    Attributes:
        max_length: the budget in tokens.
        rows: number of rows.
        rows_cut: number of truncated rows.
        lost: truncated tokens, by field.
        lost_part: the same, as a fraction of the field's tokens.
        made_identical: number of rows whose sides differ, but are equal after truncation.
        tokens: of all rows, after truncation.
        padding: padding as a fraction of the computed tokens, by the way of batching.
        operations: floating-point operations of a forward pass, without padding.
    """

    max_length: int
    rows: int
    rows_cut: int
    lost: dict[str, int]
    lost_part: dict[str, float]
    made_identical: int
    tokens: int
    padding: dict[str, float]
    operations: float


def compare(
    config: Config, *, at: str | None, data: Path | None, rows: int | None, tflops: float, out: Path | None
) -> tuple[list[Table], tuple[Path, Path]]:
    """Measure budgets and write the report.

    Args:
        config: as for `measure`.
        at: the budgets, as `lengths_of` reads them.
        data: as for `measure`.
        rows: number of rows that costs are computed for; None: as many as were measured.
        tflops: speed that hours are computed for.
        out: folder of the report; None: the run folder.

    Returns:
        The tables, and the files of the report.
    """
    config.require("inputs", "lengths")
    budgets, uncut = measure(config, lengths_of(at, config), data)
    scale = Scale(rows or len(uncut), config.orders, tflops)
    title = f"pairclf lengths: {data or ', '.join(map(str, config.data.names))}, {config.model.base}"
    tables = render(budgets, scale)
    from pairclf.model.backbone import read_settings
    from pairclf.model.positions import exceeded_limit

    settings = read_settings(resolve_base(config.model.base), config.model.pooling)
    if limit := exceeded_limit(settings, max(budget.max_length for budget in budgets)):
        tables[0].caption, tables[0].caption_justify = f"note: {limit}", "left"
    return tables, write_report(out or output_of(config), budgets, uncut, scale, title)


def lengths_of(text: str | None, config: Config) -> list[int]:
    """`1024,2048` as numbers; None: seven values up to twice the config's.

    Raises:
        ConfigError: they are no numbers.
    """
    if text is None:
        return [round(config.inputs.max_length * part) for part in (0.25, 0.375, 0.5, 0.75, 1, 1.5, 2)]
    lengths = [int(number) if number.strip().isdecimal() else 0 for number in text.split(",")]
    if not all(0 < length < UNCUT for length in lengths):
        raise ConfigError(f"--at {text} is no list of whole numbers", remedy="e.g. --at 1024,1536,2048")
    return lengths


def measure(config: Config, max_lengths: Sequence[int], data: Path | None) -> tuple[list[Budget], Lengths]:
    """Each budget, and the rows' uncut lengths `(N,)`.

    Args:
        config: names the rows, the recipe, the base and how rows are batched.
        max_lengths: the budgets.
        data: an unlabelled file to measure instead of `data.train`.

    Raises:
        ConfigError: a budget is too small for the template.
        DataError: the rows can't be read.
    """
    chunks = chunks_of(config, data)
    from pairclf.model.cost import cost_of  # torch: mistyped arguments show before it
    from pairclf.model.inputs import open_inputs, run_cache

    largest = config.inputs.model_copy(update={"max_length": UNCUT})  # the config's own may be too small
    builder = with_all_rows_examples(config, open_inputs(config.model_copy(update={"inputs": largest})).builder)
    builders = [builder.within(length) for length in sorted(set(max_lengths))]
    cache, cost = run_cache(config, builder, chunks), cost_of(config)
    whole = EncodedRows(cache, builder)
    fields = cache.lengths.sum(axis=0)
    with progress("lengths", total=len(cache) * (1 + len(builders))) as advance:
        uncut = np.empty(len(cache), dtype=np.int64)
        for row, encoded in enumerate(whole):
            uncut[row] = len(encoded[AB].ids)
            advance()
        budgets = [_budget(config, cache, budget_builder, uncut, fields, cost, advance) for budget_builder in builders]
    return budgets, uncut


def _budget(
    config: Config,
    cache: TokenCache,
    builder: InputBuilder,
    uncut: Lengths,
    fields: Lengths,
    cost: Cost,
    advance: Callable[[float], None],
) -> Budget:
    lengths, task = uncut.copy(), config.task
    lost, identical = dict.fromkeys(task.fields, 0), 0
    cut = np.flatnonzero(uncut > builder.max_length).tolist()
    for row in cut:
        tokens = cache[row]
        encoded = builder.assemble(tokens, cache.ids[row])[AB]
        lengths[row] = len(encoded.ids)
        for name, count in encoded.dropped.items():
            lost[name] += count
        identical += made_identical(task, tokens, encoded)
        advance(1)
    advance(len(uncut) - len(cut))
    return Budget(
        max_length=builder.max_length,
        rows=len(lengths),
        rows_cut=len(cut),
        lost=lost,
        lost_part={name: lost[name] / max(1, int(whole)) for name, whole in zip(task.fields, fields, strict=True)},
        made_identical=identical,
        tokens=int(lengths.sum()),
        padding={name: _padding(batches, lengths) for name, batches in batchings(config, lengths).items()},
        operations=cost.of(lengths),
    )


def batchings(config: Config, lengths: Lengths) -> dict[str, Iterator[Sequence[int]]]:
    """Batches of row indices, by the name of the way of batching."""
    train, listed = config.train, lengths.tolist()
    size, step_size, rows = train.per_device_train_batch_size, train.global_batch_size, len(lengths)
    ordered = sorted(range(rows), key=lambda row: -listed[row])
    steps = random_steps(rows, step_size, seed=config.seed, epoch=0)
    in_steps = (micro_batches(step, listed, size, process=0, processes=1) for step in steps)
    budget = token_budget(config.predict.tokens_per_batch, gpu=True)
    return {
        f"random {size}": (batch.tolist() for batch in random_steps(rows, size, seed=config.seed, epoch=0)),
        "steps": chain.from_iterable(in_steps),
        f"sorted {size}": iter([ordered[start : start + size] for start in range(0, rows, size)]),
        "by tokens": iter(by_token_budget(listed, budget)),
        PLAIN: iter([[row] for row in range(rows)]),
    }


def _padding(batches: Iterator[Sequence[int]], lengths: Lengths) -> float:
    """Padding as a fraction of `rows x longest row`, over all batches."""
    real = computed = 0
    for rows in batches:
        batch_lengths = lengths[np.asarray(rows)]
        real += int(batch_lengths.sum())
        computed += int(batch_lengths.max()) * len(rows)
    return 1 - real / computed


# --- for people ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scale:
    """The scale of the printed costs: `rows` rows in `orders` orders, at `tflops` 10^12 operations per second."""

    rows: int
    orders: int
    tflops: float

    def hours(self, budget: Budget) -> float:
        return budget.operations * self.rows / budget.rows * self.orders / self.tflops / 1e12 / 3600


def render(budgets: Sequence[Budget], scale: Scale) -> list[Table]:
    """Two tables: truncation and costs."""
    first = budgets[0]
    cuts = table("What is cut: tokens lost by field", "max_length", "rows cut", *first.lost, "made identical")
    size = counted(scale.rows, "row") + (f" in {scale.orders} orders" if scale.orders > 1 else "")
    scaled = f"{size} at {scale.tflops:g} TFLOP/s; padding by batching"
    costs_hint = "random N, sorted N: batches of N rows; steps: as `train` batches; by tokens: as `predict` does"
    costs = table(f"What it costs: {scaled}", "max_length", "tokens", "hours", *first.padding)
    costs.caption, costs.caption_justify = costs_hint, "left"
    for budget in budgets:
        parts = (f"{part:.2%}" for part in budget.lost_part.values())
        cuts.add_row(
            f"{budget.max_length:,}",
            f"{budget.rows_cut:,} ({budget.rows_cut / budget.rows:.1%})",
            *parts,
            f"{budget.made_identical:,}",
        )
        tokens = budget.tokens * scale.rows / budget.rows * scale.orders
        wastes = (f"{part:.1%}" for part in budget.padding.values())
        costs.add_row(f"{budget.max_length:,}", f"{tokens / 1e6:,.1f} M", f"{scale.hours(budget):,.3g}", *wastes)
    return [cuts, costs]


def write_report(
    folder: Path, budgets: Sequence[Budget], uncut: Lengths, scale: Scale, title: str
) -> tuple[Path, Path]:
    """Write `lengths.json` (the figures) and `lengths.html` (the plots, which need no network), each atomically."""
    figures, page = folder / "lengths.json", folder / "lengths.html"
    hours = [scale.hours(budget) for budget in budgets]
    write_json(figures, {"scale": asdict(scale), "hours": hours, "budgets": [asdict(budget) for budget in budgets]})
    tables = [printed(summary) for summary in render(budgets, scale)]
    write_text(page, document(title, [*_plots(budgets, uncut, hours), *tables]))
    return figures, page


def _plots(budgets: Sequence[Budget], uncut: Lengths, hours: Sequence[float]) -> list[Html]:
    """The rows' lengths, and three plots over `max_length`."""
    lengths = [budget.max_length for budget in budgets]
    edges = np.geomspace(max(1, uncut.min()), uncut.max() + 1, 60)
    counts, _ = np.histogram(uncut, edges)
    rows = Series("rows", edges.tolist(), [*counts.tolist(), 0], style="histogram")
    marks = [(length, "") for length in lengths]
    cuts = {
        "rows cut": [100 * budget.rows_cut / budget.rows for budget in budgets],
        "made identical": [100 * budget.made_identical / budget.rows for budget in budgets],
        **{name: [100 * budget.lost_part[name] for budget in budgets] for name in budgets[0].lost_part},
    }
    padding = {name: [100 * budget.padding[name] for budget in budgets] for name in budgets[0].padding}

    def curves(title: str, y: str, named: Mapping[str, Sequence[float]]) -> Html:
        return plot(title, [Series(name, lengths, values) for name, values in named.items()], x="max_length", y=y)

    plots = (
        plot("Rows by their uncut length", [rows], x="tokens (dotted: the budgets)", y="rows", log=True, marks=marks),
        curves("Rows cut and tokens lost", "%", cuts),
        curves("Padding", "% of computed tokens", padding),
        curves("Hours", "hours", {"hours": hours}),
    )
    return [element("div", *plots, class_="plots")]
