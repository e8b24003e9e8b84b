"""The command line: arguments to jobs, and nothing else. Jobs are imported where they are called, so that `--help`
and a typing error cost no import of torch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperCommand

from pairclf import __version__
from pairclf.config import Config, Data, describe_config, load_config, override, resolve, run_folder
from pairclf.console import console, output
from pairclf.errors import ConfigError, PackagingError, PairclfError
from pairclf.task import PRESETS
from pairclf.trust import LINKED_FILES, REMOTE_CODE, Trust, grant

app = typer.Typer(
    name="pairclf",
    help="From preference pairs to a submission that is right and in time.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, e.g. configs/demo/gemma2-tiny.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings to override, e.g. train.epochs=2")
]
Bundles = Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="bundle folders")]
BaseFolder = Annotated[Path | None, typer.Option("--base", help="folder of the base model on this machine")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(REMOTE_CODE, help="run Python files that come with a model: they can do all that you can do"),
]
LinkedFiles = Annotated[
    bool, typer.Option(LINKED_FILES, help="accept symbolic links to files in a bundle (the hub's cache has them)")
]
PackageFolder = Annotated[Path, typer.Argument(metavar="PACKAGE", help="folder that `pairclf package` wrote")]


Processes = Annotated[
    int | None,
    typer.Option(
        min=1, help="processes that train together on this machine, one a GPU (docs/distributed.md); none: this one"
    ),
]


Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--no-resume",
        help="go on where a training stopped; or delete its checkpoints, and make what is finished anew; neither: "
        "leave what is finished, refuse what stopped half-way",
    ),
]


TrustCheckpoint = Annotated[
    bool,
    typer.Option(
        "--trust-checkpoint",
        help="with --resume under DeepSpeed or FSDP: load a checkpoint that you did not write on this machine; its "
        "pickles can run any code",
    ),
]


def _example(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command whose `--help` ends with an example."""
    return app.command(epilog=f"**Example:** `{text}`")


def _permit(trust_remote_code: bool, linked_files: bool = False, *, bundles_only: bool = False) -> None:
    """Grant what the person at the command permits, and say so.

    `bundles_only`: nothing but bundles says what to load. What a stranger's bundle names is not fetched from a hub
    then, unless HF_HUB_OFFLINE=0 asks for it.
    """
    grant(Trust(remote_code=trust_remote_code, linked_files=linked_files))
    if trust_remote_code and os.environ.get("RANK", "0") == "0":
        console.print(f"note: {REMOTE_CODE}: Python files that come with a model are run")
    if bundles_only:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _version(wanted: bool) -> None:
    if wanted:
        output.print(f"pairclf {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    return


def _load(config: Path, overrides: list[str] | None) -> Config:
    return load_config(config, overrides or [])


@_example("pairclf demo --folder runs/demo")
def demo(
    folder: Annotated[Path, typer.Option(help="where everything of the demo goes")] = Path("runs/demo"),
    overrides: Overrides = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Run the whole job on a synthetic arena: rows, folds, QLoRA, evaluation, an offline notebook's submission."""
    _permit(trust_remote_code)
    from pairclf.jobs.demo import demo as job

    job(folder, overrides or [])


class _Check(TyperCommand):
    """`check`, whose `--exclude-overlap` takes all names up to the next option, as shells expand globs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, repeat_option("--exclude-overlap", args))


def repeat_option(name: str, args: list[str]) -> list[str]:
    """The arguments with `name a b` spelled out as `name a name b`, up to the next option or `--`."""
    spelled: list[str] = []
    several = False
    for place, arg in enumerate(args):
        several = arg == name or (several and not arg.startswith("-"))
        if several and arg != name and args[place - 1] != name:
            spelled.append(name)
        spelled.append(arg)
    return spelled


@app.command(cls=_Check, epilog="**Example:** `pairclf check data/lmsys/train.csv --task lmsys`")
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help=".csv, .parquet or .jsonl, or globs")],
    task: Annotated[
        str, typer.Option("--task", help=f"{', '.join(PRESETS)}, or a config (YAML): its task, data.rules and sources")
    ] = "lmsys",
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="the files are test files")] = False,
    ignore: Annotated[list[str] | None, typer.Option(help="further column to accept and not read")] = None,
    out: Annotated[Path, typer.Option(help="where the findings go as JSON")] = Path("audit.json"),
    unseen: Annotated[
        list[Path] | None,
        typer.Option(
            "--exclude-overlap",
            metavar="FILE...",
            help="files that must stay unseen (all names up to the next option): report the rows whose prompt is equal "
            "or nearly equal (folds.near) to one of theirs",
        ),
    ] = None,
    write: Annotated[
        Path | None, typer.Option(help="write the rows that stay: .csv, .parquet or .jsonl, in the task's columns")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="e.g. data.rules.duplicate_row=drop")
    ] = None,
) -> None:
    """Audit files of rows: what is wrong with them, by row id, and what will be done about it.

    Exit code 1: a rule with the action `error` met rows (shown, and in the JSON file); 2: files can't be read.
    """
    from pairclf.data.audit import render
    from pairclf.jobs.check import check as job
    from pairclf.jobs.check import refuses

    if task not in PRESETS and not Path(task).is_file():
        remedy = f"one of {', '.join(PRESETS)}, or the path of a config"
        raise ConfigError(f"--task {task} is no preset and no file", remedy=remedy)
    settings = override(resolve({"task": task}), overrides or []) if task in PRESETS else _load(Path(task), overrides)
    findings = job(files, settings, out, labelled=not unlabelled, ignore=ignore or [], unseen=unseen or [], write=write)
    output.print(render(findings))
    console.print(f"wrote {out}")
    if refused := [f"data.rules.{finding.rule}" for finding in findings if refuses(finding)]:
        nothing = f"; {write} was not written" if write else ""
        console.print(f"refused by {', '.join(refused)}: training on these rows would stop{nothing}")
        raise typer.Exit(1)


@_example("pairclf folds configs/lmsys/gemma2-9b-qlora.yaml folds.n=5")
def folds(
    config: ConfigPath,
    overrides: Overrides = None,
    stable: Annotated[
        bool,
        typer.Option(
            "--stable",
            help="folds.stable=true: a row's fold hangs on its prompt and on rows before it alone, so that appended "
            "rows move no old one; balanced by chance alone, and a row near to prompts of several folds is set aside",
        ),
    ] = False,
) -> None:
    """Make the folds of a run anew, grouped by (nearly) equal prompts, stratified by label, and show their balance."""
    from pairclf.data.folds import report
    from pairclf.jobs.run import folds_of, labelled_rows

    settings = _load(config, [*(overrides or []), *(["folds.stable=true"] if stable else [])])
    frame = labelled_rows(settings)
    output.print(report(folds_of(settings, frame, renew=True), frame, settings.task))


@_example("pairclf show configs/lmsys/gemma2-9b-qlora.yaml --row 30192")
def show(
    config: ConfigPath,
    overrides: Overrides = None,
    row: Annotated[list[str] | None, typer.Option(help="id of a row (repeat for more); none: the first row")] = None,
    data: Annotated[
        Path | None, typer.Option(help="unlabelled file to look in, by its own path; none: data.train")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Print what the model sees of a row, in both orders: segments in colour, and what was cut."""
    _permit(trust_remote_code)
    from pairclf.jobs.inputs import chunks_of, open_inputs
    from pairclf.jobs.show import find_rows
    from pairclf.jobs.show import show as job

    settings = _load(config, overrides)
    rows = find_rows(chunks_of(settings, data)(), row or [], settings.task)
    opened = open_inputs(settings)
    for one in rows:
        for text in job(opened, one, coloured=output.is_terminal):
            output.print(text)


@_example("pairclf lengths configs/lmsys/gemma2-9b-qlora.yaml --at 1024,1536,2048,3072 --rows 25000")
def lengths(
    config: ConfigPath,
    overrides: Overrides = None,
    at: Annotated[
        str | None,
        typer.Option(help="values of max_length, with commas between; none: seven, up to twice the config's"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="unlabelled file to measure, by its own path; none: data.train")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="rows to show the costs for; none: those of the file")] = None,
    tflops: Annotated[
        float,
        typer.Option(
            min=0.001, max=1e9, help="10^12 operations a second; 48: two T4s at the 24 each that they sustain"
        ),
    ] = 48,
    out: Annotated[Path | None, typer.Option(help="folder for lengths.json and lengths.html; none: the run's")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare budgets: rows cut, tokens lost, pairs made identical, padding, hours; as a table and as a plot."""
    _permit(trust_remote_code)
    from pairclf.jobs.lengths import Scale, lengths_of, measure, render, write_report
    from pairclf.jobs.run import output_of

    settings = _load(config, overrides)
    budgets, uncut = measure(settings, lengths_of(at, settings), data)
    scale = Scale(rows or len(uncut), 2 if settings.task.swappable else 1, tflops)
    for table in render(budgets, scale):
        output.print(table, "")
    title = f"pairclf lengths: {data or ', '.join(map(str, settings.data.names))}, {settings.model.base}"
    console.print("wrote", *write_report(out or output_of(settings), budgets, uncut, scale, title))


def _spread(processes: int | None) -> None:
    """Run this very command in so many processes and leave with their exit code; in one of them, go on."""
    from pairclf.jobs.processes import become_worker, is_worker, run_processes

    if is_worker():
        become_worker()
    elif processes is not None:
        raise typer.Exit(run_processes(processes, sys.argv[1:]))


def _say_once(*lines: object) -> None:
    """The first of several processes speaks for all."""
    for line in lines if os.environ.get("RANK", "0") == "0" else ():
        output.print(line)


@_example("pairclf train configs/lmsys/gemma2-9b-qlora.yaml --fold 0 train.learning_rate=2e-4")
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    fold: Annotated[int | None, typer.Option(help="fold to hold out and score; none: train on all rows")] = None,
    processes: Processes = None,
    resume: Resume = None,
    trust_checkpoint: TrustCheckpoint = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Fine-tune one classifier and write its bundle."""
    _permit(trust_remote_code)
    settings = _load(config, overrides)
    _spread(processes)
    from pairclf.jobs.fit import fit

    _say_once(fit(settings, fold, resume=resume, trust_checkpoint=trust_checkpoint))


@_example("pairclf cv configs/lmsys/gemma2-9b-qlora.yaml folds.run=[0,1]")
def cv(
    config: ConfigPath,
    overrides: Overrides = None,
    processes: Processes = None,
    resume: Resume = None,
    trust_checkpoint: TrustCheckpoint = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train the folds one after another and join their out-of-fold scores."""
    _permit(trust_remote_code)
    settings = _load(config, overrides)
    _spread(processes)
    from pairclf.jobs.cv import cross_validate

    _say_once(*cross_validate(settings, resume=resume, trust_checkpoint=trust_checkpoint))


@_example(
    "pairclf predict runs/lmsys/gemma2-9b-qlora/fold0/bundle --data test.csv --sample sample_submission.csv "
    "--deadline 8h30m"
)
def predict(
    members: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="bundle folders, or one YAML file of an ensemble")
    ],
    data: Annotated[Path, typer.Option("--data", help="unlabelled file to predict")],
    sample: Annotated[Path | None, typer.Option("--sample", help="sample submission: ids, order and columns")] = None,
    out: Annotated[Path, typer.Option("--out", help="the submission to write")] = Path("submission.csv"),
    scores: Annotated[Path | None, typer.Option("--scores", help="write the scores as parquet too")] = None,
    deadline: Annotated[
        str | None,
        typer.Option(help="when all must be over: 8h30m from now, or 2026-01-31T18:00:00+00:00; none: when it is done"),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="exit code 3 if a row or a model could not be scored")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="go on where the same run was killed; or score all anew")
    ] = True,
    base: BaseFolder = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a setting")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    linked_files: LinkedFiles = False,
) -> None:
    """Score a test file with one or more bundles and write the submission: a valid one at once, then better ones.

    A run that was killed goes on where it was, if it is started again. See docs/prediction.md.
    """
    _permit(trust_remote_code, linked_files, bundles_only=True)
    from pairclf.jobs.predict import predict as job

    job(
        members,
        data,
        out,
        sample=sample,
        scores=scores,
        base=base,
        overrides=overrides or [],
        deadline=deadline,
        strict=strict,
        resume=resume,
        spent=_age(),
    )


def _age() -> float:
    """Seconds since this process began: what it imports takes many of them."""
    ticks = Path("/proc/self/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19]  # since the machine began
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")


@_example("pairclf forecast runs/lmsys/gemma2-9b-qlora/fold0/bundle --data test.csv --device t4x2 --rows 25000")
def forecast(
    members: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="bundle folders, or one YAML file of an ensemble")
    ],
    data: Annotated[Path, typer.Option("--data", help="unlabelled file whose rows are like those to come")],
    device: Annotated[
        str, typer.Option(help="t4, t4x2, l4x4, a100, h100, h200; here: some rows are scored on this machine")
    ] = "here",
    rows: Annotated[int | None, typer.Option(min=1, help="rows that there will be; none: those of the file")] = None,
    deadline: Annotated[
        list[str] | None, typer.Option(help="what it buys, e.g. 8h30m (repeat for more); none: parts of the whole")
    ] = None,
    base: BaseFolder = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a setting")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    linked_files: LinkedFiles = False,
) -> None:
    """Simulate a prediction: hours by stage, and what a deadline buys; the planner is that of the real run."""
    _permit(trust_remote_code, linked_files, bundles_only=True)
    from datetime import UTC, datetime

    from pairclf.inference.deadline import seconds_until
    from pairclf.jobs.forecast import forecast as job

    limits = [seconds_until(one, datetime.now(UTC)) for one in deadline or []]
    for shown in job(members, data, device=device, rows=rows, deadlines=limits, base=base, overrides=overrides or []):
        output.print(shown, "")


@_example("pairclf pseudo configs/lmsys/gemma2-9b-qlora.yaml --data extra.parquet --scores scores.parquet")
def pseudo(
    config: ConfigPath,
    data: Annotated[Path, typer.Option("--data", help="unlabelled file, by its own path")],
    scores: Annotated[Path, typer.Option("--scores", help="its scores, as `pairclf predict --scores` writes them")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help=".parquet, .jsonl or .csv to write")] = Path("pseudo.parquet"),
    weight: Annotated[float, typer.Option(help="weight of each row in the loss")] = 0.5,
    min_confidence: Annotated[
        float, typer.Option(min=0, max=1, help="leave rows out whose likeliest class has a lower probability")
    ] = 0.0,
    temperature: Annotated[float, typer.Option(help="above 1: softer labels; below 1: sharper ones")] = 1.0,
    hard: Annotated[bool, typer.Option("--hard", help="the likeliest class alone, instead of probabilities")] = False,
) -> None:
    """Turn scores on unlabelled rows into weighted training rows that share no prompt with data.train and data.test.

    Train on them with `data.train: [train.csv, {files: pseudo.parquet, train_only: true}]`.
    """
    from pairclf.jobs.pseudo import pseudo as job
    from pairclf.jobs.pseudo import render

    settings = _load(config, overrides)
    sharpness = {"min_confidence": min_confidence, "temperature": temperature}
    output.print(render(job(settings, data, scores, out, weight=weight, hard=hard, **sharpness), out))


@_example("pairclf evaluate configs/demo/gemma2-tiny.yaml --truth runs/demo/data/truth.parquet")
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    scores: Annotated[Path | None, typer.Option(help="scores to judge; none: the run's out-of-fold scores")] = None,
    truth: Annotated[Path | None, typer.Option(help="true probabilities, where they are known")] = None,
) -> None:
    """Judge scores against labels, the class prior and, where it is known, the best possible."""
    from pairclf.jobs.evaluate import evaluate as job
    from pairclf.jobs.evaluate import out_of_fold, render, scored
    from pairclf.jobs.run import labelled_rows, output_of

    settings = _load(config, overrides)
    task = settings.task
    found = scored(scores, task) if scores else out_of_fold(output_of(settings), task, settings.predict)
    output.print(render(job(labelled_rows(settings), found, task, truth=truth), task))


@_example("pairclf merge configs/lmsys/gemma2-9b-qlora.yaml --out runs/lmsys/merged --into bfloat16")
def merge(
    config: ConfigPath,
    out: Annotated[Path, typer.Option("--out", help="folder of the new bundle")],
    overrides: Overrides = None,
    fold: Annotated[
        list[int] | None, typer.Option(help="fold whose bundle to merge (repeat for more); none: all that the run has")
    ] = None,
    average: Annotated[
        str, typer.Option(help="mean of several adapters: exact (of the products BA) or factors (of A and of B)")
    ] = "exact",
    into: Annotated[
        str | None,
        typer.Option(help="merge into whole weights: bfloat16, float16 or float32; none: write an adapter"),
    ] = None,
    max_shift: Annotated[
        float, typer.Option(min=0, help="write nothing if the log loss moves by more nats a row (docs/merge.md)")
    ] = 0.002,
    rows: Annotated[int | None, typer.Option(min=1, help="out-of-fold rows to score; none: all")] = None,
    base: BaseFolder = None,
    trust_remote_code: TrustRemoteCode = False,
    linked_files: LinkedFiles = False,
) -> None:
    """Average the folds' adapters, or merge one into the weights; keep it if it still scores as before."""
    _permit(trust_remote_code, linked_files)
    from pairclf.jobs.merge import merge as job

    settings = _load(config, overrides)
    merged = job(settings, out, folds=fold or [], average=average, into=into, max_shift=max_shift, rows=rows, base=base)
    output.print(merged)


@_example("pairclf export configs/lmsys/gemma2-9b-qlora.yaml --fold 0 --to int8 --out runs/lmsys/int8")
def export(
    config: ConfigPath,
    to: Annotated[str, typer.Option("--to", help="bfloat16, float16, float32, int8, gptq (8 bits) or awq (4 bits)")],
    out: Annotated[Path, typer.Option("--out", help="folder of the new bundle")],
    overrides: Overrides = None,
    fold: Annotated[int | None, typer.Option(help="fold whose bundle to export; none: the run's only one")] = None,
    bundle: Annotated[Path | None, typer.Option(help="a bundle in place of the run's, e.g. a merged one")] = None,
    max_shift: Annotated[
        float, typer.Option(min=0, help="write nothing if the log loss moves by more nats a row (docs/export.md)")
    ] = 0.01,
    rows: Annotated[int | None, typer.Option(min=1, help="held-out rows to score; none: all")] = None,
    base: BaseFolder = None,
    trust_remote_code: TrustRemoteCode = False,
    linked_files: LinkedFiles = False,
) -> None:
    """Write a bundle without adapters, whole or quantised, for inference; keep it if it still scores as before."""
    _permit(trust_remote_code, linked_files)
    from pairclf.jobs.export import export as job

    settings = _load(config, overrides)
    output.print(job(settings, out, to=to, fold=fold, bundle=bundle, max_shift=max_shift, rows=rows, base=base))


@_example("pairclf package configs/kaggle/lmsys.yaml package.owner=me")
def package(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG|BUNDLE... [KEY=VALUE]...",
            help="a config: the bundles of its run; or folders of bundles; and settings to override",
        ),
    ],
    competition: Annotated[str | None, typer.Option(help="slug of the competition; none: package.competition")] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder; none: kaggle/build/ + the config's file name, or package.name")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    linked_files: LinkedFiles = False,
) -> None:
    """Build the folder to push to Kaggle: a kernel, the bundles, the wheels, their metadata. See docs/kaggle.md."""
    _permit(trust_remote_code, linked_files)
    from pairclf.jobs.run import bundles_of

    _needs_kaggle()
    from pairclf.packaging.build import package as job

    config, bundles, name = _packaged(what, [] if competition is None else [f"package.competition={competition}"])
    if not bundles and config.package.ensemble is None:
        bundles = bundles_of(config)
    output.print(job(config, bundles, out or Path("kaggle", "build", name)))


def _packaged(what: list[str], overrides: list[str]) -> tuple[Config, list[Path], str]:
    """The settings, the folders of bundles that were named, and what the package is called where nothing says."""
    paths = [Path(one) for one in what if "=" not in one or Path(one).exists()]
    overrides = [one for one in what if Path(one) not in paths] + overrides
    if not paths:
        raise ConfigError("nothing to package was named", remedy="pairclf package CONFIG, or pairclf package BUNDLE...")
    if paths[0].is_dir() and not (paths[0] / "bundle.json").is_file():
        raise ConfigError(f"{paths[0]} is no bundle", remedy="give bundles, such as RUN/fold0/bundle, or a config")
    if paths[0].is_dir():
        config = _of_bundle(paths[0], overrides)
        return config, paths, config.package.name
    return _load(paths[0], overrides), paths[1:], paths[0].stem


def _of_bundle(folder: Path, overrides: list[str]) -> Config:
    """A bundle's settings, without those that would let a stranger's bundle choose files and wheels."""
    from pairclf.model.bundle import open_bundle

    config = open_bundle(folder, proven=True).config
    named = config.package.model_copy(update={"ensemble": None, "images": None, "wheels": []})
    update = {"output": run_folder(folder / "config.yaml"), "package": named, "data": Data(rules=config.data.rules)}
    return override(config.model_copy(update=update), overrides)


def _needs_kaggle() -> None:
    """Refuse to begin what would end in an ImportError: notebooks on Kaggle have none of these packages."""
    missing = [name for name in ("hatchling", "ipykernel", "nbclient", "nbformat", "uv") if find_spec(name) is None]
    if missing:
        raise PackagingError(f"packaging needs {', '.join(missing)}", remedy="pip install 'pairclf[kaggle]'")


@_example("pairclf rehearse kaggle/build/lmsys --rows 25000 --inject oom,kill")
def rehearse(
    folder: PackageFolder,
    test: Annotated[Path | None, typer.Option(help="test file; none: the config's data.test")] = None,
    sample: Annotated[Path | None, typer.Option(help="its sample submission; none: the config's")] = None,
    base: BaseFolder = None,
    out: Annotated[Path | None, typer.Option(help="where report and submission go; none: PACKAGE/rehearsal")] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="rows of the hidden test: the file's, repeated with new ids; none: as it is"),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            help="here: this environment's versions; 3.12, 3.13: that Python with the image's own versions; "
            "none: here, if the package is for this Python, else its first"
        ),
    ] = None,
    speed: Annotated[
        float, typer.Option(min=1, help="of the clock: 60 makes 8 hours 8 minutes; a trial, which push does not take")
    ] = 1.0,
    inject: Annotated[
        str | None,
        typer.Option(
            help="faults, with commas between, each in a run of its own: oom, kill, slow, null-rows, extra-columns, "
            "missing-model, corrupt-bundle, wrong-python"
        ),
    ] = None,
    commit: Annotated[
        bool, typer.Option("--commit", help="as when the notebook is saved, not the hidden rerun; a trial")
    ] = False,
) -> None:
    """Execute the package offline, as the hidden rerun would: its mounts, limits, clock and faults; and judge it."""
    _needs_kaggle()
    from pairclf.rehearsal.rehearse import Options
    from pairclf.rehearsal.rehearse import rehearse as job

    faults = tuple(one.strip() for one in (inject or "").split(",") if one.strip())
    options = Options(
        test=test, sample=sample, base=base, out=out, rows=rows, image=image, speed=speed, inject=faults, commit=commit
    )
    output.print(job(folder, options).render())


Go = Annotated[bool, typer.Option("--go", help="send the requests; without it they are printed")]
LedgerFile = Annotated[Path, typer.Option("--ledger", help="table of all submissions")]
LEDGER = Path("runs/ledger.jsonl")


@_example("pairclf push kaggle/build/lmsys --go")
def push(folder: PackageFolder, go: Go = False) -> None:
    """Upload bundles and wheels, wait until they are ready, push the kernel and wait for its run.

    Only what a rehearsal has passed on this machine. Without `--go` nothing is sent: every request is printed. It can
    be repeated after any failure: what is there already is left alone.
    """
    _needs_kaggle()
    from pairclf.publish.push import push as job

    job(folder, go=go)


@_example('pairclf submit kaggle/build/lmsys -m "five folds, both orders" --go')
def submit(
    folder: PackageFolder,
    message: Annotated[str, typer.Option("--message", "-m", help="shown beside the submission on Kaggle")],
    go: Go = False,
    again: Annotated[bool, typer.Option("--again", help="submit a version that was submitted before")] = False,
    ledger: LedgerFile = LEDGER,
) -> None:
    """Submit the pushed kernel, wait for its score, and write it into the ledger. Without `--go` nothing is sent."""
    _needs_kaggle()
    from pairclf.publish.submit import submit as job

    job(folder, message, go=go, again=again, ledger=ledger)


@app.command("ledger", epilog="**Example:** `pairclf ledger --refresh --plot ledger.html`")
def show_ledger(
    ledger: LedgerFile = LEDGER,
    refresh: Annotated[bool, typer.Option("--refresh", help="ask Kaggle for scores that were missing")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="HTML file for a plot of leaderboard over out-of-fold scores")
    ] = None,
) -> None:
    """Show what was submitted: folds, out-of-fold, leaderboard; and whether one foretells the other."""
    from pairclf.publish import ledger as table

    if refresh:
        table.refresh(ledger)
    output.print(table.render(ledger))
    if plot is not None:
        table.plot(ledger, plot)
        console.print(f"wrote {plot}")


@_example("pairclf verify runs/lmsys/gemma2-9b-qlora/fold0/bundle")
def verify(
    bundles: Bundles,
    base: BaseFolder = None,
    out: Annotated[Path | None, typer.Option(help="write what was found as JSON too")] = None,
    trust_remote_code: TrustRemoteCode = False,
    linked_files: LinkedFiles = False,
) -> None:
    """Prove that bundles are what was saved: hashes of every file, and their probe rows scored again."""
    _permit(trust_remote_code, linked_files, bundles_only=True)
    from pairclf.jobs.verify import verify as job

    for folder, found in job(bundles, base, out):
        difference = found["largest_difference"]
        output.print(f"verified {folder}: {found['rows']} probe rows, logits differ by {difference:.1g}")


@_example("pairclf config configs/demo/gemma2-tiny.yaml train.epochs=2")
def config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved settings as YAML, each with its help."""
    output.out(describe_config(_load(config, overrides)), end="", highlight=False)


@_example("pairclf doctor")
def doctor() -> None:
    """Look at this machine: versions, devices, 4-bit arithmetic, disk."""
    from pairclf.jobs.doctor import doctor as job

    output.print(job())


def _complain(text: str) -> None:
    from pairclf.jobs.processes import leave_error

    if not leave_error(text):  # one of several processes leaves it to the one that started them
        console.print(Text.assemble(("error: ", "bold red"), text))


def keep_folder_out() -> None:
    """Let no process that this one starts import modules from the working folder, which a stranger may have filled.

    `python -m` and `python -c`, by which multiprocessing starts processes, look there before anywhere else: a file
    `random.py` in it would run. Where pairclf itself is imported from there, without being installed, all stays.
    """
    if not Path(__file__).parents[1].samefile("."):
        os.environ.setdefault("PYTHONSAFEPATH", "1")


def _remedy(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "check the path"
    return "free some disk space, or give another path"


def main() -> None:
    """Entry point: errors that a user can cause end in one message and exit code 2, never in a traceback."""
    # Nothing here ever phones a hub by itself; a hub id in the config is fetched only if this is unset by the user.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        keep_folder_out()
        app()
    except PairclfError as error:
        _complain(str(error))
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a folder without permission, a path through a file
        _complain(
            f"{error.filename or 'the system'}: {error.strerror or error}\n"
            f"  remedy: {_remedy(error)}; what was being written was not left half written"
        )
        sys.exit(PairclfError.exit_code)
    except RuntimeError as error:
        if "Symlink loop" not in str(error):  # as `Path.resolve` raises it up to Python 3.12
            raise
        _complain(f"{error}\n  remedy: give another path, or remove the links")
        sys.exit(PairclfError.exit_code)
    except KeyboardInterrupt:
        console.print("interrupted")
        sys.exit(130)
