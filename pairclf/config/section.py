"""The base class of all sections: unknown keys are errors, and one message lists all errors of a config."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from pairclf.console import counted
from pairclf.errors import ConfigError, cut, quoted

MAX_ISSUES = 50
"""Wrong settings that one error message lists."""


class Section(BaseModel):
    """A group of settings; unknown names are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    renamed: ClassVar[Mapping[str, str]] = {}
    """`{former dotted key: today's}`: an error about a former key names today's."""


_S = TypeVar("_S", bound=Section)


def as_list(value: Any) -> Any:
    """One name, or one mapping, as a list of one."""
    return [value] if isinstance(value, str | Path | Mapping) else value


def settings(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`(dotted key, description)` of every setting, sections included, in the order of the tree."""
    for name, field in section.model_fields.items():
        yield prefix + name, field.description or ""
        for part in _parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from settings(part, f"{prefix}{name}.")


def choices(annotation: Any) -> list[Any]:
    """The values that the `Literal`s in an annotation list."""
    return [value for part in _parts(annotation) if get_origin(part) is Literal for value in get_args(part)]


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation and what it is made of: `list[Source] | None`, `list[Source]`, `Source`, ..."""
    yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _parts(part)


def checked(section: type[_S], tree: object, where: object, remedy: str) -> _S:
    """A section, or any other file of settings, from what `parse_yaml` read.

    Raises:
        ConfigError: with every unknown key, wrong value and contradiction at once.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        count = error.error_count()
        lines = "\n".join(f"  {line}" for line in _explain(error, section))
        raise ConfigError(f"{counted(count, 'setting')} can't be used:\n{lines}", where=where, remedy=remedy) from error


def _explain(error: ValidationError, section: type[Section]) -> Iterator[str]:
    """A line for each wrong setting."""
    keys = {key: key for key, _ in settings(section)} | dict(section.renamed)
    for issue in error.errors()[:MAX_ISSUES]:
        key = cut(".".join(str(part) for part in issue["loc"]))
        if issue["type"] == "extra_forbidden" and key in section.renamed:
            yield f"{key} is now {section.renamed[key]}"
        elif issue["type"] == "extra_forbidden":
            nearest = difflib.get_close_matches(re.sub(r"\.\d+\.", ".", key), keys, n=1, cutoff=0.0)
            yield f"{key}: no such setting; the nearest is {keys[nearest[0]]}"
        else:
            value = "" if isinstance(issue["input"], dict | Section) else f" (given: {quoted(issue['input'])})"
            message = cut(issue["msg"], 1000)
            yield f"{key}: {message}{value}".removeprefix(": ").replace("Value error, ", "", 1)
    if error.error_count() > MAX_ISSUES:
        yield f"... and {error.error_count() - MAX_ISSUES:,} more"
