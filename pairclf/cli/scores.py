"""The commands `compare`, `blend` and `sweep`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pairclf.cli.options import Folds, Group
from pairclf.console import stdout

GROUP = Group("Judging runs")

Runs = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN...",
        help="run folders, config files of runs, or files of scores (CSV, parquet) with ids and a column per class",
    ),
]
LabelsFrom = Annotated[
    Path | None,
    typer.Option("--config", help="config file whose data.train has the labels; default: that of the first run"),
]
Common = Annotated[
    bool,
    typer.Option(
        "--common", help="use only the rows that all runs have scored; default: refuse runs whose rows differ"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print all figures as JSON in place of tables")]


@GROUP.command("pairclf blend runs/lmsys/gemma2-9b-qlora runs/lmsys/classical --out ensemble.yaml")
def blend(
    runs: Runs,
    config: LabelsFrom = None,
    fold: Folds = None,
    common: Common = False,
    method: Annotated[
        str | None, typer.Option(help="the blend to write, by its name in the table; default: the lowest log loss")
    ] = None,
    out: Annotated[Path, typer.Option(help="the ensemble's file")] = Path("ensemble.yaml"),
    figures_only: Annotated[bool, typer.Option("--figures-only", help="write no ensemble's file")] = False,
    scores: Annotated[
        Path | None, typer.Option(help="parquet file for the blend's held-out scores, by weights of other folds")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fit weights and temperatures to held-out scores, judge them on other folds, and write an ensemble's file.

    `pairclf predict` and `pairclf package` take the file. See docs/compare.md.
    """
    from pairclf.files import check_file_target
    from pairclf.inference.ensemble import SUFFIXES
    from pairclf.runs.blend import blend_runs, note_written, render, write_ensemble
    from pairclf.runs.held_out import open_runs

    if not figures_only:
        check_file_target(out, *SUFFIXES)
    if scores is not None:
        check_file_target(scores, ".parquet")
    rows = open_runs(runs, config, folds=fold or [], common=common)
    report = blend_runs(rows, method=method, scores=scores)
    if as_json:
        stdout.print(json.dumps(report.as_dict(), indent=1))
    for table in [] if as_json else render(report, rows.task):
        stdout.print(table, "")
    if not figures_only:
        note_written(out, write_ensemble(out, report, rows.runs))


@GROUP.command("pairclf compare runs/lmsys/gemma2-9b-qlora runs/lmsys/llama3-8b-qlora other-scores.csv")
def compare(
    runs: Runs,
    config: LabelsFrom = None,
    fold: Folds = None,
    common: Common = False,
    public_rows: Annotated[
        int | None, typer.Option(min=1, help="rows of the public leaderboard; default: those of the hidden test")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for compare.json and losses.parquet; default: none is written")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs on the same rows: figures, differences to the best, whether they are real, and costs.

    A difference is real if it exceeds the noise of rows and of seeds. See docs/compare.md.
    """
    from pairclf.files import check_file_target
    from pairclf.runs.compare import compare_runs, render, write_comparison
    from pairclf.runs.held_out import open_runs

    if out is not None:
        check_file_target(out / "compare.json")
    rows = open_runs(runs, config, folds=fold or [], common=common)
    comparison = compare_runs(rows, public_rows=public_rows)
    if out is not None:
        write_comparison(out, comparison, rows)
    if as_json:
        stdout.print(json.dumps(comparison.as_dict(), indent=1))
    for table in [] if as_json else render(comparison):
        stdout.print(table, "")


@GROUP.command("pairclf sweep configs/lmsys/gemma2-9b-qlora.yaml model.lora.r=8,16,32 seed=0,1 --hours 20")
def sweep(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="config file, or the file of a sweep, e.g. configs/sweeps/...")
    ],
    entries: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE,VALUE",
            help="settings to vary, e.g. seed=0,1; all values are combined; two settings in step: A+B=8+16,16+32",
        ),
    ] = None,
    fold: Annotated[
        list[int] | None, typer.Option("--fold", help="fold to train, counted from 0 (repeat for more); default: 0")
    ] = None,
    hours: Annotated[
        float | None, typer.Option(min=0, help="start no run that would end later than this; default: no limit")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="processes of each training, as in `cv`")] = 1,
    as_json: AsJson = False,
) -> None:
    """Train a run for each combination of values, and say which effects exceed the noise of rows and seeds.

    Finished runs are kept: the same command continues. See docs/compare.md.
    """
    from pairclf.runs.sweep import effects_of, plan_sweep, render, train_arms

    planned = plan_sweep(config, entries or [], fold or [])
    result = effects_of(planned, train_arms(planned, hours=hours, processes=processes))
    if as_json:
        stdout.print(json.dumps(result.as_dict(), indent=1))
    for table in [] if as_json else render(result):
        stdout.print(table, "")
