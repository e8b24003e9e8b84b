"""Arguments of the functions of `import pairclf`: types are checked at once, and errors name them, not options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pairclf.errors import ConfigError, PairclfError, quoted

P = ParamSpec("P")
R = TypeVar("R")

EXPECTED = {"AnyConfig": "the path of a YAML file, or a dict of its sections", "Frame": "a frame, or a dict of lists"}
"""What an alias of types means to a user."""

OTHERWISE = {"--fold": "folds", "--figures-only": "out=None"}
"""By option, the argument of another name that stands for it."""

_OPTION = re.compile(
    r"(?P<command>pairclf [a-z][^;)`\n]*)"  # a remedy's command stays one
    r"|(?P<option>--(?P<no>no-)?(?P<name>[a-z]+(?:-[a-z]+)*))"
    r"(?:[ =](?P<value>\d+(?:,\d{3})*|'[^']*'|[A-Z]+\b|[\w.-]*[./][\w./-]*\w))?"
)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function; an argument of a wrong type is a `ConfigError`, and errors name arguments in place of options."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        _check_types(function, inspect.signature(function).bind(*args, **kwargs))
        try:
            return function(*args, **kwargs)
        except PairclfError as error:
            error.reword(lambda text: in_python(text, _hints(function)))
            raise

    return call


def _check_types(function: Callable[..., Any], given: inspect.BoundArguments) -> None:
    hints, parameters = _hints(function), given.signature.parameters
    for name, value in _single_arguments(given):
        hint = hints.get(name, Any)
        permitted = {hint, *get_args(hint)}
        # A config is checked already, and pydantic would check it as if it were written by hand.
        is_fine = Any in permitted or type(value) in permitted
        if is_fine or parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            continue
        try:
            _adapter(hint).validate_python(_plain(value))
        except ValidationError as error:
            words = str(parameters[name].annotation).replace("os.PathLike[str]", "path")
            raise ConfigError(
                f"{name}={quoted(value)} is of type {type(value).__name__}; it must be {EXPECTED.get(words, words)}",
                where=f"{function.__qualname__}()",
            ) from error


def _single_arguments(given: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
    for name, value in given.arguments.items():
        several = given.signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        yield from ((name, each) for each in (value if several else [value]))


def _plain(value: Any) -> Any:
    """A value of numpy, pandas or polars as one of Python."""
    to_list = getattr(value, "tolist", None) or getattr(value, "to_list", None)
    return to_list() if callable(to_list) else value


@cache
def _hints(function: Callable[..., Any]) -> Mapping[str, Any]:
    return get_type_hints(function)


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))


def in_python(text: str, hints: Mapping[str, Any]) -> str:
    """A message for the command line with the arguments of a function for its options.

    >>> in_python("give --pairs 3, or --common; pairclf cv --fold 0", {"pairs": int, "common": bool})
    'give pairs=3, or common=True; pairclf cv --fold 0'
    """

    def argument(match: re.Match[str]) -> str:
        own_name = str(match["name"]).replace("-", "_")
        name, _, constant = OTHERWISE.get(str(match["option"]), own_name).partition("=")
        if match["command"] or name not in hints:
            return match[0]
        if value := constant or match["value"]:
            return f"{name}=[{value}]" if name == "folds" else f"{name}={value}"
        return f"{name}={not match['no']}" if bool in {hints[name], *get_args(hints[name])} else name

    return _OPTION.sub(argument, text)
