"""The commands `report`, `compare`, `blend`, `forecast-score`, `sweep`, `suspects` and `distill`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pairclf.cli.options import Folds, Group, LinkedFiles, TrustRemoteCode, permit, split_overrides
from pairclf.console import stdout
from pairclf.hardware import PROFILES
from pairclf.trust import REMOTE_CODE

if TYPE_CHECKING:
    from pairclf.runs.plan import PlanReport

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
Deadline = Annotated[
    str | None,
    typer.Option(help="time of the notebook, e.g. 8h30m: choose members, orders and cascades that are in time"),
]
Device = Annotated[str | None, typer.Option(help=f"with --deadline: {', '.join(PROFILES)}; default: t4x2")]
Hours = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=HOURS[,HOURS]",
        help="with --deadline: hours of a run's first and second order, in place of a forecast (repeat for more)",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="with --deadline: rows like the hidden ones, to forecast; default: data.test"),
]
HiddenRows = Annotated[
    int | None,
    typer.Option("--rows", min=1, help="with --deadline: rows of the hidden test; default: the competition's"),
]
Plot = Annotated[Path | None, typer.Option(help="with --deadline: HTML file for a plot of the log loss over hours")]
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
    out: Annotated[Path, typer.Option(help="the ensemble's file to write")] = Path("ensemble.yaml"),
    figures_only: Annotated[
        bool, typer.Option("--figures-only", help="print the tables alone, and write no ensemble's file")
    ] = False,
    scores: Annotated[
        Path | None, typer.Option(help="parquet file to write with the blend's scores by weights of other folds")
    ] = None,
    deadline: Deadline = None,
    device: Device = None,
    hours: Hours = None,
    data: Data = None,
    hidden_rows: HiddenRows = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Fit weights and temperatures to held-out scores, judge them on other folds, and write an ensemble's file.

    `pairclf predict` and `pairclf package` take the file. With `--deadline` it is the blend with the lowest log loss
    that is done in time: `pairclf blend RUN RUN --deadline 8h30m --device t4x2`. See docs/compare.md.
    """
    from pairclf.files import check_file_target
    from pairclf.inference.ensemble import SUFFIXES
    from pairclf.runs.blend import blend_runs, note_written, render, write_ensemble
    from pairclf.runs.held_out import open_runs
    from pairclf.runs.plan import plan_blend, write_planned

    planned = {"--device": device, "--hours": hours, "--data": data, "--rows": hidden_rows, "--plot": plot}
    _refuse_idle(
        planned if deadline is None else {"--method": method, "--scores": scores},
        "without --deadline" if deadline is None else "with --deadline",
    )
    if not figures_only:
        check_file_target(out, *SUFFIXES)
    for path, suffix in ((scores, ".parquet"), (plot, ".html")):
        if path is not None:
            check_file_target(path, suffix)
    if deadline is not None:
        from pairclf.inference.deadline import seconds_until

        seconds = seconds_until(deadline, datetime.now(UTC))
    rows = open_runs(runs, config, folds=fold or [], common=common)
    if deadline is not None:
        chosen = plan_blend(
            rows, deadline=seconds, device=device or "t4x2", hours=hours or [], data=data, hidden_rows=hidden_rows
        )
        _show_plan(chosen, plot, as_json=as_json)
        if not figures_only:
            note_written(out, write_planned(out, chosen, rows.runs))
        return
    report = blend_runs(rows, method=method, scores=scores)
    if as_json:
        stdout.print(json.dumps(report.as_dict(), indent=1))
    for table in [] if as_json else render(report):
        stdout.print(table, "")
    if not figures_only:
        note_written(out, write_ensemble(out, report, rows.runs))


def _show_plan(chosen: PlanReport, plot: Path | None, *, as_json: bool) -> None:
    from pairclf.runs import plan

    if as_json:
        stdout.print(json.dumps(chosen.as_dict(), indent=1))
    for table in [] if as_json else plan.render(chosen):
        stdout.print(table, "")
    if plot is not None:
        plan.write_page(chosen, plot)


def _refuse_idle(options: Mapping[str, object], when: str) -> None:
    """Refuse options that change nothing."""
    from pairclf.errors import ConfigError

    if idle := [name for name, value in options.items() if value is not None]:
        raise ConfigError(f"{', '.join(idle)} changes nothing {when}", remedy="leave it out")


@GROUP.command("pairclf report runs/lmsys/gemma2-9b-qlora")
def report(
    runs: Runs,
    config: LabelsFrom = None,
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write; default: report.html in the folder of the first run")
    ] = None,
) -> None:
    """Write an HTML report about a run: figures, plots, checks, and rows to look at.

    Further runs are compared with the first one. The file needs no network. It holds texts of your rows: share it only
    with people who may read them. See docs/report.md.
    """
    from pairclf.console import console
    from pairclf.reports.report import write_report

    path = write_report(runs, out, config)
    console.print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB, for any browser", soft_wrap=True)


@GROUP.command("pairclf compare runs/lmsys/gemma2-9b-qlora runs/lmsys/llama3-8b-qlora other-scores.csv")
def compare(
    runs: Runs,
    config: LabelsFrom = None,
    fold: Folds = None,
    common: Common = False,
    public_rows: Annotated[
        int | None, typer.Option(min=1, help="rows of the public leaderboard; default: those of the hidden test")
    ] = None,
    forecast: Annotated[
        bool,
        typer.Option("--forecast", help="forecast hours of language models too: loads torch, tokenises the test file"),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    linked_files: LinkedFiles = False,
    out: Annotated[
        Path | None, typer.Option(help="folder for compare.json, figures.parquet and losses.parquet; default: none")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs on the same rows: figures, differences to the best, whether they are real, and costs.

    A difference is real if it exceeds the noise of rows and of seeds. See docs/compare.md.
    """
    from pairclf.files import check_file_target
    from pairclf.runs.compare import compare_runs, render, write_comparison
    from pairclf.runs.held_out import open_runs

    permit(trust_remote_code, linked_files, bundles_only=True)
    if out is not None:
        check_file_target(out / "compare.json")
    rows = open_runs(runs, config, folds=fold or [], common=common)
    comparison = compare_runs(rows, public_rows=public_rows, language_models=forecast)
    if out is not None:
        write_comparison(out, comparison, rows)
    if as_json:
        stdout.print(json.dumps(comparison.as_dict(), indent=1))
    for table in [] if as_json else render(comparison):
        stdout.print(table, "")


@GROUP.command("pairclf forecast-score runs/lmsys/gemma2-9b-qlora ensemble.yaml --public-share 0.3")
def forecast_score(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="run folders, config files of runs, files of scores, or files that `blend` or `evaluate --calibrated` "
            "wrote",
        ),
    ],
    public_share: Annotated[
        float | None,
        typer.Option(
            help="part of the hidden rows that the public leaderboard has, as its page says; default: the "
            "competition's, where it is known"
        ),
    ] = None,
    config: LabelsFrom = None,
    fold: Folds = None,
    common: Common = False,
    data: Annotated[
        Path | None, typer.Option("--data", help="file of hidden rows, or of rows like them; default: data.test")
    ] = None,
    hidden_rows: Annotated[
        int | None,
        typer.Option("--rows", min=2, help="rows of the hidden test; default: the file's, or the competition's"),
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="file of the ledger: write the intervals beside the submissions of these runs")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Forecast the public and the private score of runs with 90% intervals, and suggest two final picks.

    A blend is judged on each row with weights that were fitted to other folds. If the test file has enough rows, the
    forecast measures how its texts differ from the held-out ones, and corrects for it. After `--ledger`, the command
    `pairclf ledger` says how many real scores lay in their intervals. See docs/last-week.md.
    """
    from pairclf.console import console, counted
    from pairclf.publish.ledger import ForecastIntervals, add_forecasts, refuse_empty
    from pairclf.runs.blended import open_runs_and_ensembles, seals_of
    from pairclf.runs.score_forecast import forecast_scores
    from pairclf.scores.score_forecast import LEVEL

    if ledger is not None:
        refuse_empty(ledger)
    rows = open_runs_and_ensembles(runs, config, folds=fold or [], common=common)
    forecast = forecast_scores(rows, public_share=public_share, data=data, hidden_rows=hidden_rows)
    if as_json:
        stdout.print(json.dumps(forecast.as_dict(), indent=1))
    for table in [] if as_json else forecast.tables():
        stdout.print(table, "")
    for remark in [] if as_json else forecast.remarks:
        stdout.print(remark, soft_wrap=True)
    if ledger is not None:
        known = [
            (*seals_of(run), ForecastIntervals(level=LEVEL, public=own.public.ends, private=own.private.ends))
            for run, own in zip(rows.runs, forecast.runs, strict=True)
            if isfinite(own.public.mean + own.private.mean)  # no draw of few rows may have a score
        ]
        found = add_forecasts(ledger, known)
        console.print(f"{ledger} has {counted(found, 'submission')} of these runs: see `pairclf ledger`")


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
        float | None,
        typer.Option(
            min=0, help="start no run that would end later, by the fit check or the longest; default: no limit"
        ),
    ] = None,
    halving: Annotated[
        bool,
        typer.Option(
            "--halving",
            help="train fold by fold; of the worse half, settings leave that are really worse than the best",
        ),
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="processes of each training, as in `cv`")] = 1,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Train a run for each combination of values, and say which effects exceed the noise of rows and seeds.

    Finished runs are kept: the same command continues. See docs/compare.md.
    """
    from pairclf.runs.halving import halve_arms
    from pairclf.runs.sweep import Arm, Sweep, effects_of, plan_sweep, render, train_arms

    permit(trust_remote_code)
    planned = plan_sweep(config, entries or [], fold or [])
    options, start = [REMOTE_CODE] * trust_remote_code, time.monotonic()

    def train(part: Sweep) -> list[Arm]:
        left = None if hours is None else max(0.0, hours - (time.monotonic() - start) / 3600)
        return train_arms(part, hours=left, processes=processes, options=options)

    result = effects_of(planned, *(halve_arms(planned, train) if halving else (train(planned),)))
    if as_json:
        stdout.print(json.dumps(result.as_dict(), indent=1))
    for table in [] if as_json else render(result):
        stdout.print(table, "")


@GROUP.command("pairclf distill runs/lmsys/gemma2-9b-qlora --to configs/recipes/minilm-cpu.yaml")
def distill(
    teachers: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|KEY=VALUE",
            help="the teachers, whose mean is taught: run folders, config files of runs, files of scores; and settings "
            "of the student, e.g. classical.C=0.1",
        ),
    ],
    to: Annotated[
        Path, typer.Option("--to", help="config file of the student; it gets the run's task, rows and folds")
    ],
    teacher_weight: Annotated[
        float, typer.Option(min=0, max=1, help="share of the teachers in the loss; the labels have the rest")
    ] = 0.5,
    out: Annotated[
        Path | None, typer.Option(help="folder of the student's runs; default: distill/NAME in the run's folder")
    ] = None,
    speed_rows: Annotated[int, typer.Option(min=0, help="rows to measure the speed on; 0: it is not measured")] = 256,
    as_json: AsJson = False,
) -> None:
    """Train a small student on out-of-fold scores of a run, and say what it loses and how fast it is.

    It is trained with its teachers and, to compare, on the labels alone. Finished folds are kept. See docs/labels.md.
    """
    from pairclf.console import console
    from pairclf.runs.distill import TAUGHT, plan_students, render
    from pairclf.runs.distill import distill as workflow

    runs, overrides = split_overrides(teachers)
    result = workflow(plan_students(runs, to, overrides, weight=teacher_weight, out=out), rows=speed_rows)
    if as_json:
        stdout.print(json.dumps(result.as_dict(), indent=1))
    for table in [] if as_json else render(result):
        stdout.print(table, "")
    console.print(f"the student: {result.folder / TAUGHT}")


@GROUP.command("pairclf suspects runs/lmsys/classical --out suspects.parquet")
def suspects(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="run folder, config file of a run, or a file of scores (CSV, parquet)")
    ],
    config: LabelsFrom = None,
    fold: Folds = None,
    out: Annotated[Path, typer.Option(help="parquet file of ids, P(wrong), reasons and soft labels")] = Path(
        "suspects.parquet"
    ),
    top: Annotated[int, typer.Option(min=1, help="rows to print, the most suspicious first")] = 20,
    as_json: AsJson = False,
) -> None:
    """Find labels that are probably wrong, by held-out scores in both orders and by rows with the same texts.

    It writes soft labels, and prints the command that trains on them. Held-out rows keep
    their labels. See docs/labels.md.
    """
    from pairclf.console import console, counted
    from pairclf.runs.suspects import check_out, find_suspects, next_command, render, write_suspects

    check_out(out, run)
    report = find_suspects(run, config, folds=fold)
    write_suspects(out, report)
    if as_json:
        stdout.print(json.dumps(report.as_dict(top), indent=1))
    else:
        stdout.print(render(report, top))
    console.print(f"wrote {out}: {counted(len(report.rows), 'row')}. To train on its soft labels:")
    console.print(next_command(run, config, out, report.config), soft_wrap=True)
