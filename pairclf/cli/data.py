"""The commands `check`, `convert`, `folds`, `show`, `lengths` and `config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pairclf.cli.options import (
    Command,
    ConfigPath,
    Group,
    Overrides,
    TrustRemoteCode,
    load,
    permit,
    repeat_option,
    split_overrides,
)
from pairclf.console import console, counted, stdout
from pairclf.hardware import PROFILES

GROUP = Group("Data and settings")
TWO_T4S = PROFILES["t4x2"].tflops


class CheckCommand(Command):
    """`check`, whose `--exclude-overlap` takes all names up to the next option or setting, as shells expand globs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, repeat_option("--exclude-overlap", args))


@GROUP.command("pairclf check data/lmsys/train.csv --task lmsys data.rules.duplicate_row=drop", cls=CheckCommand)
def check(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE|KEY=VALUE",
            help="data files or globs: .csv, .parquet or .jsonl; and settings to override, e.g. "
            "data.rules.duplicate_row=drop",
        ),
    ],
    task: Annotated[
        str,
        typer.Option(
            "--task", help="lmsys, wsdm or llm-classification-finetuning, or a config: its task, data.rules and sources"
        ),
    ] = "lmsys",
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="the files are test files, without labels")] = False,
    ignore: Annotated[
        list[str] | None, typer.Option(help="another column to accept and ignore (repeat for more)")
    ] = None,
    out: Annotated[Path, typer.Option(help="JSON file for the findings")] = Path("audit.json"),
    unseen: Annotated[
        list[Path] | None,
        typer.Option(
            "--exclude-overlap",
            metavar="FILE...",
            help="files that training must not see (all names up to the next option or setting): report the rows "
            "whose prompt equals, or nearly equals (folds.near_duplicate_threshold), a prompt of these files",
        ),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(help="file for the rows that remain: .csv, .parquet or .jsonl, with the task's columns"),
    ] = None,
) -> None:
    """List the problems in data files, with row ids, and what `data.rules` does about each.

    Exit code 1: a rule with the action `error` found rows. Exit code 2: a file can't be read.
    """
    from pairclf.data.audit import render
    from pairclf.inspect.check import check as workflow
    from pairclf.inspect.check import config_of, refusal

    files, overrides = split_overrides(arguments)
    findings = workflow(
        files,
        config_of(task, overrides),
        out,
        labelled=not unlabelled,
        ignore=ignore or [],
        unseen=unseen or [],
        write=write,
    )
    stdout.print(render(findings))
    console.print(f"wrote {out}; docs/data.md says what each rule finds")
    if message := refusal(findings, write):
        console.print(message)
        raise typer.Exit(1)


@GROUP.command("pairclf convert data/arena/*.parquet --to data/arena.parquet --task lmsys")
def convert(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE|KEY=VALUE",
            help="labelled files or globs: .csv, .parquet or .jsonl, of the task or of a public preference set; and "
            "settings to override, e.g. data.rules.undecodable=drop",
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="the file to write: .csv, .parquet or .jsonl")],
    task: Annotated[
        str, typer.Option("--task", help="a preset, such as lmsys, or a config: its task, data.rules and sources")
    ] = "lmsys",
) -> None:
    """Write files of other formats as one file with the task's columns: ids, lists of turns, labels."""
    from pairclf.inspect.check import config_of
    from pairclf.inspect.check import convert as workflow

    files, overrides = split_overrides(arguments)
    rows = workflow(files, config_of(task, overrides), to)
    console.print(f"wrote {to} with {counted(rows, 'row')}")


@GROUP.command("pairclf folds configs/lmsys/gemma2-9b-qlora.yaml folds.n_splits=5")
def folds(config: ConfigPath, overrides: Overrides = None) -> None:
    """Assign rows to folds and print how balanced the folds are.

    Rows with equal or nearly equal prompts share a fold, and each fold has about the same share of each class. The
    run's earlier folds are replaced. With `folds.stable=true`, appended rows do not change the fold of earlier rows.
    """
    from pairclf.run import remake_folds

    stdout.print(remake_folds(load(config, overrides)))


@GROUP.command("pairclf show configs/lmsys/gemma2-9b-qlora.yaml --row 30192")
def show(
    config: ConfigPath,
    overrides: Overrides = None,
    row: Annotated[list[str] | None, typer.Option(help="id of a row (repeat for more); default: the first row")] = None,
    data: Annotated[Path | None, typer.Option(help="unlabelled file to read; default: the files of data.train")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Print the model's input for a row, in both orders, with coloured segments and the number of tokens cut."""
    permit(trust_remote_code)
    from pairclf.inspect.show import show_rows

    settings = load(config, overrides)
    for text in show_rows(settings, row or [], data, coloured=stdout.is_terminal):
        stdout.print(text)


@GROUP.command("pairclf lengths configs/lmsys/gemma2-9b-qlora.yaml --at 1024,1536,2048,3072 --rows 25000")
def lengths(
    config: ConfigPath,
    overrides: Overrides = None,
    at: Annotated[
        str | None,
        typer.Option(help="comma-separated values of max_length; default: seven, from 0.25x to 2x of the config's"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="unlabelled file to measure; default: the files of data.train")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="number of rows to compute costs for; default: the rows of the files")
    ] = None,
    tflops: Annotated[
        float,
        typer.Option(min=0.001, max=1e9, help=f"speed to compute hours for, in TFLOP/s; default: two T4s, {TWO_T4S:g}"),
    ] = TWO_T4S,
    out: Annotated[
        Path | None, typer.Option(help="folder for lengths.json and lengths.html; default: the run's folder")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare values of `inputs.max_length`: truncated rows, lost tokens, padding and hours, as tables and plots."""
    permit(trust_remote_code)
    from pairclf.inspect.lengths import compare

    tables, files = compare(load(config, overrides), at=at, data=data, rows=rows, tflops=tflops, out=out)
    for table in tables:
        stdout.print(table, "")
    console.print("wrote", *files)


@GROUP.command("pairclf config configs/demo/gemma2-tiny.yaml train.num_train_epochs=2")
def config(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file; default: no file, all settings as they are")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print all settings of a config, or the defaults, as YAML, with their help."""
    from pairclf.config import describe_config, resolve

    settings = resolve({}) if config is None else load(config, overrides)
    stdout.out(describe_config(settings), end="", highlight=False)
