"""The commands `demo`, `doctor`, `train`, `cv`, `evaluate`, `merge`, `export` and `pseudo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pairclf.cli.options import (
    BaseFolder,
    ConfigPath,
    Group,
    LinkedFiles,
    MaxShift,
    Overrides,
    TrustRemoteCode,
    load,
    permit,
)
from pairclf.console import stdout

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
    from pairclf.demo.demo import demo as workflow

    workflow(folder, overrides or [])


@START.command("pairclf doctor")
def doctor() -> None:
    """Check this machine: package versions, GPUs, 4-bit arithmetic, disk space."""
    from pairclf.inspect.doctor import doctor as workflow

    stdout.print(workflow())


@GROUP.command("pairclf train configs/lmsys/gemma2-9b-qlora.yaml --fold 0 train.learning_rate=2e-4")
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    fold: Annotated[int | None, typer.Option(help="fold to hold out and score; default: train on all rows")] = None,
    processes: Processes = None,
    resume: Resume = None,
    trust_checkpoint: TrustCheckpoint = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train one classifier and write its bundle."""
    permit(trust_remote_code)

    settings = load(config, overrides)
    _run_processes(processes)
    from pairclf.runs.fit import fit

    _print_once(fit(settings, fold, resume=resume, trust_checkpoint=trust_checkpoint))


@GROUP.command("pairclf cv configs/lmsys/gemma2-9b-qlora.yaml folds.run=[0,1]")
def cv(
    config: ConfigPath,
    overrides: Overrides = None,
    processes: Processes = None,
    resume: Resume = None,
    trust_checkpoint: TrustCheckpoint = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Cross-validate: train one classifier per fold, and write out-of-fold scores."""
    permit(trust_remote_code)

    settings = load(config, overrides)
    _run_processes(processes)
    from pairclf.runs.cv import cross_validate

    _print_once(*cross_validate(settings, resume=resume, trust_checkpoint=trust_checkpoint))


@GROUP.command("pairclf evaluate configs/demo/gemma2-tiny.yaml --truth runs/demo/data/truth.parquet")
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    scores: Annotated[
        Path | None, typer.Option(help="file of scores to evaluate; default: the run's out-of-fold scores")
    ] = None,
    truth: Annotated[Path | None, typer.Option(help="file of true probabilities, as the demo writes it")] = None,
) -> None:
    """Compare scores with labels and with the class prior: log loss, accuracy, calibration, gain of both orders."""
    from pairclf.runs.evaluate import evaluate_run, render

    settings = load(config, overrides)
    stdout.print(render(evaluate_run(settings, scores, truth=truth), settings.task))


@GROUP.command("pairclf merge configs/lmsys/gemma2-9b-qlora.yaml --out runs/lmsys/merged --into bfloat16")
def merge(
    config: ConfigPath,
    out: Annotated[Path, typer.Option("--out", help="folder for the new bundle")],
    overrides: Overrides = None,
    fold: Annotated[
        list[int] | None, typer.Option(help="fold whose bundle to merge (repeat for more); default: all of the run")
    ] = None,
    average: Annotated[
        str, typer.Option(help="how to average adapters: exact (the products BA) or factors (A and B separately)")
    ] = "exact",
    into: Annotated[
        str | None,
        typer.Option(
            help="merge the adapter into the base's weights, as bfloat16, float16 or float32; default: write an adapter"
        ),
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
    from pairclf.approaches.finetune.merge import merge as workflow

    settings = load(config, overrides)
    folder = workflow(
        settings, out, folds=fold or [], average=average, into=into, max_shift=max_shift, rows=rows, base=base
    )
    stdout.print(folder)


@GROUP.command("pairclf export configs/lmsys/gemma2-9b-qlora.yaml --fold 0 --to int8 --out runs/lmsys/int8")
def export(
    config: ConfigPath,
    to: Annotated[
        str, typer.Option("--to", help="type of the weights: bfloat16, float16, float32, int8, gptq (8 bits), awq (4)")
    ],
    out: Annotated[Path, typer.Option("--out", help="folder for the new bundle")],
    overrides: Overrides = None,
    fold: Annotated[int | None, typer.Option(help="fold whose bundle to export; default: the run's only one")] = None,
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
    """
    permit(trust_remote_code, linked_files)
    from pairclf.approaches.finetune.export import export as workflow

    settings = load(config, overrides)
    stdout.print(workflow(settings, out, to=to, fold=fold, bundle=bundle, max_shift=max_shift, rows=rows, base=base))


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
