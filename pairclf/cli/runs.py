"""The commands `demo`, `doctor`, `train`, `cv`, `runs`, `evaluate`, `merge`, `export` and `pseudo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pairclf.cli.options import (
    BaseFolder,
    ConfigOrRun,
    ConfigPath,
    Folds,
    Group,
    LinkedFiles,
    MaxShift,
    OneFold,
    Overrides,
    TrustRemoteCode,
    load,
    load_run,
    one_fold,
    permit,
)
from pairclf.console import console, counted, stdout

if TYPE_CHECKING:
    from pairclf.config import Config
    from pairclf.runs.evaluate import Evaluation
    from pairclf.runs.thresholds import LabelThresholds
    from pairclf.task import Task

START, GROUP = Group("Start here"), Group("Training")

Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="number of processes to train in, one per GPU of this machine (docs/distributed.md); default: this one",
    ),
]
Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--no-resume",
        help="--resume: continue from the last checkpoint. --no-resume: delete checkpoints and results, and train "
        "again. Default: skip finished folds, and fail on unfinished ones",
    ),
]
TrustCheckpoint = Annotated[
    bool,
    typer.Option(
        "--trust-checkpoint",
        help="with --resume under DeepSpeed or FSDP: load a checkpoint that was not written on this machine; its "
        "pickle files can run any code",
    ),
]


def _run_processes(processes: int | None) -> None:
    """With `--processes`, run this command in that many processes and exit as they did; a worker goes on."""
    from pairclf.runs.processes import spread

    if (exit_code := spread(processes, sys.argv[1:])) is not None:
        raise typer.Exit(exit_code)


def _check_training(config: Config, folds: list[int] | None) -> None:
    """Find what is mistyped before torch is imported, which takes seconds."""
    from pairclf.run import check_training

    check_training(config, folds or [])


def _check_bundles(config: Config, command: str, folds: list[int] | None, bundle: Path | None = None) -> None:
    """As `_check_training`, for commands that read language models of a run, or one that is named."""
    from pairclf.bundles.manifest import read_manifest
    from pairclf.run import bundles_of, check_rows

    config.require("model", command)
    check_rows(config, folds or [])
    for folder in [bundle] if bundle else bundles_of(config, folds or []):
        read_manifest(folder)


def _print_once(*lines: object) -> None:
    """Print in the first process alone."""
    from pairclf.runs.processes import is_first

    for line in lines if is_first() else ():
        stdout.print(line)


@START.command("pairclf demo --folder runs/demo")
def demo(
    folder: Annotated[Path, typer.Option(help="folder for all files of the demo")] = Path("runs/demo"),
    overrides: Overrides = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Run all steps on synthetic data: rows, folds, QLoRA training, evaluation, and an offline notebook."""
    permit(trust_remote_code)
    from pairclf.packaging.kaggle_extra import require_extra

    require_extra()
    from pairclf.demo.demo import demo as workflow

    workflow(folder, overrides or [])


@START.command("pairclf example sentiment")
def example(
    name: Annotated[str, typer.Argument(metavar="NAME", help="sentiment, topics, patents, toxic, answers or verdicts")],
    folder: Annotated[
        Path | None, typer.Option(help="folder for the files; default: data/NAME, where the example's config looks")
    ] = None,
    rows: Annotated[int, typer.Option(min=30, help="number of training rows")] = 600,
) -> None:
    """Write a small data set of a kind of task, and its config: a pattern for files and config of your own.

    sentiment: one text, two classes. topics: one text, ten classes. patents: several labels. toxic: one label. answers:
    pairs, two classes. verdicts: pairs with ties. The commands that are printed lead from there to a submission.
    """
    from pairclf.demo.examples import next_commands, write_example

    config = write_example(name, folder, rows=rows)
    stdout.print(next_commands(config), soft_wrap=True)


@START.command("pairclf doctor")
def doctor() -> None:
    """Check this machine: package versions, GPUs, 4-bit arithmetic, disk space."""
    from pairclf.inspect.doctor import doctor as workflow

    stdout.print(workflow())


@GROUP.command("pairclf train configs/lmsys/gemma2-9b-qlora.yaml --fold 0 train.learning_rate=2e-4")
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    fold: OneFold = None,
    processes: Processes = None,
    resume: Resume = None,
    trust_checkpoint: TrustCheckpoint = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train one classifier and write its bundle: without `--fold` on all rows, else without that fold's."""
    permit(trust_remote_code)

    settings, held_out = load(config, overrides), one_fold(fold, "pairclf cv CONFIG --fold 0 --fold 1")
    _run_processes(processes)
    _check_training(settings, fold)
    from pairclf.runs.fit import fit

    _print_once(fit(settings, held_out, resume=resume, trust_checkpoint=trust_checkpoint, config_file=config))


@GROUP.command("pairclf cv configs/lmsys/gemma2-9b-qlora.yaml --fold 0 --fold 1")
def cv(
    config: ConfigPath,
    overrides: Overrides = None,
    fold: Folds = None,
    processes: Processes = None,
    resume: Resume = None,
    trust_checkpoint: TrustCheckpoint = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Cross-validate: train one classifier per fold, and write out-of-fold scores."""
    permit(trust_remote_code)

    settings = load(config, [*(overrides or []), *([f"folds.run={fold}"] if fold else [])])
    _run_processes(processes)
    _check_training(settings, settings.folds.run)
    from pairclf.runs.cv import cross_validate

    _print_once(*cross_validate(settings, resume=resume, trust_checkpoint=trust_checkpoint, config_file=config))


@GROUP.command("pairclf runs runs/lmsys")
def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder with run folders below it")] = Path("runs"),
) -> None:
    """List the runs below a folder: folds, out-of-fold metric, hours, and the settings that differ from the config."""
    from pairclf.runs.listing import list_runs

    stdout.print(list_runs(folder))


@GROUP.command("pairclf evaluate configs/demo/gemma2-tiny.yaml --truth runs/demo/data/truth.parquet")
def evaluate(
    config: ConfigOrRun,
    overrides: Overrides = None,
    scores: Annotated[
        Path | None, typer.Option(help="file of scores to evaluate; default: the run's out-of-fold scores")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="labelled file with the rows of --scores; default: data.train")
    ] = None,
    fold: Folds = None,
    truth: Annotated[
        Path | None,
        typer.Option(help="file of true probabilities (id and a column per class), as `demo` and `example` write it"),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="run folder or scores of a simpler model; default: a classical run beside this one"),
    ] = None,
    calibrated: Annotated[
        Path | None,
        typer.Option(help="ensemble's file to write with the run's bundles and their calibration, if it is worth it"),
    ] = None,
    losses: Annotated[
        Path | None, typer.Option("--losses", help="parquet file to write with each row's probabilities and losses")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", help="parquet file to write with all figures of --json, one a row")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print all figures as JSON in place of the tables")] = False,
    in_sample: Annotated[
        bool, typer.Option("--in-sample", help="exit with 0 although the models were trained on some of these rows")
    ] = False,
) -> None:
    """Compare scores with labels: figures with intervals, calibration, both orders, slices, and the class prior.

    docs/scores.md says what each figure means. Exit code 1: the models were trained on some of the rows, and
    `--in-sample` is not given.
    """
    from pairclf.files import check_file_target
    from pairclf.runs.calibrated import check_calibrated, write_calibrated
    from pairclf.runs.evaluate import evaluate_run
    from pairclf.runs.evaluation_report import write_figures, write_rows
    from pairclf.runs.thresholds import fit_run

    settings = load_run(config, overrides)
    if calibrated is not None:
        check_calibrated(settings, calibrated, scores)
    for path in filter(None, (losses, figures)):
        check_file_target(path, ".parquet")
    evaluation = evaluate_run(settings, scores, folds=fold or [], truth=truth, data=data, baseline=baseline)
    thresholds = fit_run(settings, scores, folds=fold or []) if settings.task.multi_label else None
    tree = _shown(evaluation, thresholds, settings.task, as_json=as_json)
    if losses is not None:
        write_rows(losses, evaluation)
        console.print(f"wrote {losses}: {counted(evaluation.rows, 'row')}")
    if figures is not None:
        write_figures(figures, tree)
        console.print(f"wrote {figures}")
    if calibrated is not None:
        is_written = write_calibrated(evaluation, settings, fold or [], calibrated)
        use = f"wrote {calibrated}: pairclf predict {calibrated} --data FILE"
        console.print(use if is_written else f"{calibrated} is not written: no calibration is worth it")
    if evaluation.seen and not in_sample:
        console.print("these figures do not hold for new rows (in sample); --in-sample accepts them")
        raise typer.Exit(1)


def _shown(evaluation: Evaluation, thresholds: LabelThresholds | None, task: Task, *, as_json: bool) -> dict[str, Any]:
    """Print an evaluation, and the thresholds of several labels; returns their figures as JSON has them."""
    from pairclf.runs.evaluation_report import as_tree, render
    from pairclf.runs.thresholds import render_thresholds

    tree = as_tree(evaluation) | ({} if thresholds is None else {"thresholds": thresholds.as_dict()})
    if as_json:
        stdout.print_json(data=tree)
        return tree
    stdout.print(render(evaluation, task))
    if thresholds is not None:
        stdout.print(render_thresholds(thresholds))
    return tree


@GROUP.command("pairclf merge configs/lmsys/gemma2-9b-qlora.yaml --out runs/lmsys/merged --into bfloat16")
def merge(
    config: ConfigOrRun,
    out: Annotated[Path, typer.Option("--out", help="folder for the new bundle")],
    overrides: Overrides = None,
    fold: Folds = None,
    average: Annotated[
        Literal["exact", "factors"],
        typer.Option(help="how to average adapters: exact (the products BA) or factors (A and B separately)"),
    ] = "exact",
    into: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="merge the adapter into the base's weights, in this dtype; default: write an adapter"),
    ] = None,
    max_shift: MaxShift = 0.002,
    rows: Annotated[int | None, typer.Option(min=1, help="number of out-of-fold rows to score; default: all")] = None,
    base: BaseFolder = None,
    trust_remote_code: TrustRemoteCode = False,
    linked_files: LinkedFiles = False,
) -> None:
    """Average the adapters of the folds, or merge an adapter into the weights of the base model.

    The new bundle is written only if its scores are those of the old ones, within `--max-shift`. See docs/merge.md.
    """
    permit(trust_remote_code, linked_files)
    settings = load_run(config, overrides)
    _check_bundles(settings, "merge", fold)
    from pairclf.approaches.finetune.merge import merge as workflow

    folder = workflow(
        settings, out, folds=fold or [], average=average, into=into, max_shift=max_shift, rows=rows, base=base
    )
    stdout.print(folder)


@GROUP.command("pairclf export configs/lmsys/gemma2-9b-qlora.yaml --fold 0 --to int8 --out runs/lmsys/int8")
def export(
    config: ConfigOrRun,
    to: Annotated[
        Literal["bfloat16", "float16", "float32", "int8", "gptq", "awq", "transformers"],
        typer.Option(
            "--to",
            help="type of the weights; gptq has 8 bits, awq 4; transformers: a folder for its "
            "AutoModelForSequenceClassification, in float32",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="folder for the new bundle")],
    overrides: Overrides = None,
    fold: OneFold = None,
    bundle: Annotated[
        Path | None, typer.Option(help="bundle to export in place of a fold's, e.g. a merged one")
    ] = None,
    max_shift: MaxShift = 0.01,
    rows: Annotated[int | None, typer.Option(min=1, help="number of held-out rows to score; default: all")] = None,
    base: BaseFolder = None,
    trust_remote_code: TrustRemoteCode = False,
    linked_files: LinkedFiles = False,
) -> None:
    """Write a bundle with whole weights, quantised or not, for inference.

    The new bundle is written only if its scores are those of the old one, within `--max-shift`. See docs/export.md.
    `--to transformers` writes no bundle, and compares logits of probe rows.
    """
    permit(trust_remote_code, linked_files)
    settings, source = load_run(config, overrides), one_fold(fold, "pairclf merge CONFIG, or one export per fold")
    _check_bundles(settings, "export", fold, bundle)
    from pairclf.approaches.finetune.export import export as workflow
    from pairclf.approaches.finetune.export import source_bundle

    if to == "transformers":
        from pairclf.approaches.finetune.stock import export_stock

        stdout.print(export_stock(source_bundle(settings, source, bundle, out).folder, out, base=base))
        return
    stdout.print(workflow(settings, out, to=to, fold=source, bundle=bundle, max_shift=max_shift, rows=rows, base=base))


@GROUP.command("pairclf pseudo configs/lmsys/gemma2-9b-qlora.yaml --data extra.parquet --scores scores.parquet")
def pseudo(
    config: ConfigPath,
    data: Annotated[Path, typer.Option("--data", help="file of unlabelled rows")],
    scores: Annotated[Path, typer.Option("--scores", help="scores of these rows, by `pairclf predict --scores`")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="file for the training rows: .parquet, .jsonl or .csv")] = Path(
        "pseudo.parquet"
    ),
    weight: Annotated[float, typer.Option(help="weight of each row in the loss")] = 0.5,
    min_confidence: Annotated[
        float, typer.Option(min=0, max=1, help="leave out rows whose top class has a lower probability")
    ] = 0.0,
    temperature: Annotated[
        float, typer.Option(help="temperature of the labels: above 1 is softer, below 1 is sharper")
    ] = 1.0,
    hard: Annotated[
        bool, typer.Option("--hard", help="label rows with their top class, not with probabilities")
    ] = False,
) -> None:
    """Turn scores of unlabelled rows into weighted training rows (pseudo-labels).

    Rows that share a prompt with data.train or data.test are left out. Train on the others with
    `data.train: [train.csv, {files: pseudo.parquet, train_only: true}]`.
    """
    from pairclf.runs.pseudo import pseudo as workflow
    from pairclf.runs.pseudo import render

    settings = load(config, overrides)
    sharpness = {"min_confidence": min_confidence, "temperature": temperature}
    stdout.print(render(workflow(settings, data, scores, out, weight=weight, hard=hard, **sharpness), out))
