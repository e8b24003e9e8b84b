"""The command line: it turns arguments into calls of workflows, and exceptions into messages and exit codes.

Workflows, and what they need (pydantic, polars, torch, ...), are imported inside the commands, so that `--help` and a
typing error stay cheap.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

import pairclf
from pairclf.cli import data, kaggle, prediction, runs, scores
from pairclf.console import console
from pairclf.errors import PairclfError


class CommandGroup(TyperGroup):
    """The commands. Their `--help` costs no import of pydantic, which typer needs to convert `--help` from None."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option


app = typer.Typer(
    cls=CommandGroup,
    name="pairclf",
    help="Train LLM classifiers on preference data, predict test files, and package the models for Kaggle.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (runs.START, data.GROUP, runs.GROUP, scores.GROUP, prediction.GROUP, kaggle.GROUP):
    group.add_to(app)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"pairclf {pairclf.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    return


def _print_error(text: str) -> None:
    from pairclf.runs.processes import leave_error

    if not leave_error(text):  # a worker leaves its error to the process that started it
        console.print(Text.assemble(("error: ", "bold red"), text))


def keep_folder_out() -> None:
    """Let no process that this one starts import modules from the working folder, which a stranger may have filled.

    `python -m` and `python -c`, by which multiprocessing starts processes, look there before anywhere else: a file
    `random.py` in it would run. Where pairclf itself is imported from there, without being installed, all stays.
    """
    if not Path(pairclf.__file__).parents[1].samefile("."):
        os.environ.setdefault("PYTHONSAFEPATH", "1")


def set_waiting() -> None:
    """Set how OpenMP's threads wait for each other, here and in the processes that are started, unless the user did.

    By default they spin for milliseconds. On a busy machine they then wait for threads that are not running, and take
    ten times as long as threads that sleep. On a free machine, threads that sleep at once cost a small model up to half
    of its speed, and a spin of microseconds costs nothing (`benchmarks/busy.py`).
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        if os.getloadavg()[0] < (os.cpu_count() or 1) / 2:
            os.environ["GOMP_SPINCOUNT"] = "2000"
        else:
            os.environ["OMP_WAIT_POLICY"] = "passive"


def _remedy(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "check the path"
    return "free some disk space, or give another path"


def main() -> None:
    """Entry point: errors that a user can cause end in one message and exit code 2, never in a traceback."""
    # Nothing here ever phones a hub by itself; a hub id in the config is fetched only if this is unset by the user.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    set_waiting()
    try:
        keep_folder_out()
        app()
    except PairclfError as error:
        _print_error(str(error))
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a folder without permission, a path through a file
        _print_error(
            f"{error.filename or 'the system'}: {error.strerror or error}\n"
            f"  remedy: {_remedy(error)}; what was being written was not left half written"
        )
        sys.exit(PairclfError.exit_code)
    except RuntimeError as error:
        if "Symlink loop" not in str(error):  # as `Path.resolve` raises it up to Python 3.12
            raise
        _print_error(f"{error}\n  remedy: give another path, or remove the links")
        sys.exit(PairclfError.exit_code)
    except KeyboardInterrupt:
        console.print("interrupted")
        sys.exit(130)
