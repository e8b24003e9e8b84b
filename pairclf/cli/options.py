"""Options that commands share, the parsing of `KEY=VALUE`, and the declaration of commands."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from pairclf.console import console
from pairclf.errors import ConfigError
from pairclf.trust import LINKED_FILES, REMOTE_CODE, Trust, grant

if TYPE_CHECKING:
    from pairclf.config import Config

Function = TypeVar("Function", bound=Callable[..., None])

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, e.g. configs/demo/gemma2-tiny.yaml")]
ConfigOrRun = Annotated[Path, typer.Argument(metavar="CONFIG|RUN", help="config file of a run, or its folder")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="settings to override, e.g. train.num_train_epochs=2 predict.swap=off"),
]
Folds = Annotated[
    list[int] | None, typer.Option("--fold", help="a fold, counted from 0 (repeat for more); default: all of the run")
]
OneFold = Annotated[
    list[int] | None, typer.Option("--fold", help="the fold to hold out, counted from 0; default: none")
]
Members = Annotated[
    list[str],
    typer.Argument(
        metavar="BUNDLE|KEY=VALUE",
        help="folders of bundles or of runs, or the YAML file of an ensemble; and settings, e.g. predict.swap=off",
    ),
]
BaseFolder = Annotated[
    Path | None, typer.Option("--base", help="local folder of the base model; default: the model that model.base names")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(REMOTE_CODE, help="run the Python files that come with a model; they can do anything that you can do"),
]
LinkedFiles = Annotated[
    bool, typer.Option(LINKED_FILES, help="accept symbolic links to files in a bundle, as in the Hugging Face cache")
]
MaxShift = Annotated[
    float, typer.Option(min=0, help="write no bundle if the log loss changes by more than this, in nats per row")
]


class Group:
    """Commands that `pairclf --help` lists together under a title."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._commands: list[tuple[Callable[..., None], dict[str, Any]]] = []

    def command(
        self, example: str, *, name: str | None = None, cls: type[TyperCommand] | None = None
    ) -> Callable[[Function], Function]:
        """Declare a function as a command, whose help ends with an example."""
        settings = {
            "name": name,
            "cls": cls or Command,
            "epilog": f"**Example:** `{example}`",
            "rich_help_panel": self._title,
        }

        def declare(function: Function) -> Function:
            self._commands.append((function, settings))
            return function

        return declare

    def add_to(self, app: typer.Typer) -> None:
        for function, settings in self._commands:
            app.command(**settings)(function)


class Command(TyperCommand):
    """A command whose settings are `KEY=VALUE` or `--set KEY=VALUE`, and that explains so if they have another form."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if any("KEY=VALUE" in str(param.metavar) for param in self.params):
            args = without_set(args)
            options = {name for param in self.params for name in (*param.opts, *param.secondary_opts)}
            refuse_settings_as_options(args, {*options, *ctx.help_option_names})
        return super().parse_args(ctx, args)


def without_set(arguments: Sequence[str]) -> list[str]:
    """The arguments with each `--set KEY=VALUE` as `KEY=VALUE` behind all others.

    >>> without_set(["--set", "seed=1", "a.yaml", "--set=seed=2"])
    ['a.yaml', 'seed=1', 'seed=2']

    Raises:
        ConfigError: what follows `--set` is no setting.
    """
    others, overrides, rest = list[str](), list[str](), iter(arguments)
    for argument in rest:
        name, _, value = argument.partition("=")
        if name != "--set":
            others.append(argument)
            continue
        overrides.append(value or next(rest, ""))
        if not is_override(overrides[-1]):
            raise ConfigError(f"--set {overrides[-1]} is no setting", remedy="--set KEY=VALUE, or KEY=VALUE alone")
    return others + overrides


def repeat_option(name: str, args: list[str]) -> list[str]:
    """The arguments with `name a b` spelled out as `name a name b`, up to the next option, setting or `--`."""
    spelled: list[str] = []
    several = False
    for place, arg in enumerate(args):
        several = arg == name or (several and not arg.startswith("-") and not is_override(arg))
        if several and arg != name and args[place - 1] != name:
            spelled.append(name)
        spelled.append(arg)
    return spelled


def one_fold(folds: Sequence[int] | None, instead: str) -> int | None:
    """The fold that is given; None without one.

    Raises:
        ConfigError: there are several; `instead` is for these.
    """
    if folds and len(folds) > 1:
        raise ConfigError(f"--fold is given {len(folds)} times, and this command takes one fold", remedy=instead)
    return folds[0] if folds else None


def refuse_settings_as_options(arguments: Sequence[str], options: Iterable[str]) -> None:
    """Refuse `--train.max_steps 2` and `--max-steps 2`: the form is `train.max_steps=2`.

    Raises:
        ConfigError: an argument before `--` is none of the command's options and means a setting.
    """
    for argument in takewhile(lambda argument: argument != "--", arguments):
        option = argument.partition("=")[0]
        if not option.startswith("--") or option in options:
            continue
        if forms := [f"{key}=VALUE" for key in _keys_like(option.removeprefix("--").replace("-", "_"))]:
            raise ConfigError(
                f"there is no option {option}", remedy=f"settings are arguments without dashes: {' or '.join(forms)}"
            )


def _keys_like(name: str) -> list[str]:
    """Keys of the settings that an option's name can mean."""
    if "." in name:
        return [name]
    from pairclf.config import ELSEWHERE, Config, settings

    if name in ELSEWHERE:
        return [ELSEWHERE[name]]
    keys = [key for key, _ in settings(Config)]
    sections = {key.rpartition(".")[0] for key in keys}
    return [key for key in keys if key.rpartition(".")[2] == name and key not in sections]


def is_override(argument: str) -> bool:
    """Whether an argument is `KEY=VALUE`: it has a `=` with no `/` before it, and no file or folder has this name."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and "/" not in key and not os.path.exists(argument)


def split_overrides(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Paths and overrides, which may be mixed.

    Raises:
        ConfigError: there is no path.
    """
    paths = [Path(argument) for argument in arguments if not is_override(argument)]
    overrides = [argument for argument in arguments if is_override(argument)]
    if not paths:
        raise ConfigError(
            f"{overrides[0]} is a setting, and no path is given", remedy="give a path before the settings"
        )
    return paths, overrides


def load(config: Path, overrides: Sequence[str] | None) -> Config:
    """`figures.read_config`, imported where it is needed."""
    from pairclf.scores.figures import read_config

    return read_config(config, overrides or [])


def load_run(run: Path, overrides: Sequence[str] | None) -> Config:
    """The settings of a config file, or those that a run's folder keeps, with overrides.

    Raises:
        ConfigError: as `load`; or the folder holds no finished training.
    """
    from pairclf.runs.held_out import config_of_run
    from pairclf.scores.figures import read_config

    kept = config_of_run(run) if run.is_dir() else None
    return read_config(run if kept is None else kept, overrides or [])


def permit(trust_remote_code: bool, linked_files: bool = False, *, bundles_only: bool = False) -> None:
    """Grant what the options permit, and print a note if code is run.

    `bundles_only`: the command loads what bundles name, and they may be a stranger's. Nothing is downloaded then,
    unless HF_HUB_OFFLINE=0 is set.
    """
    grant(Trust(remote_code=trust_remote_code, linked_files=linked_files))
    if trust_remote_code:
        from pairclf.runs.processes import is_first

        if is_first():
            console.print(f"note: {REMOTE_CODE}: Python files that come with a model are run")
    if bundles_only:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
