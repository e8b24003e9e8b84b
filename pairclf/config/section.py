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

    elsewhere: ClassVar[Mapping[str, str]] = {}
    """`{name in other libraries, dotted or without its section: key}`."""


_S = TypeVar("_S", bound=Section)


def as_list(value: Any) -> Any:
    """One name, number or mapping, as a list of one."""
    return [value] if isinstance(value, str | int | float | Path | Mapping) else value


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


def _meant(key: str, keys: Mapping[str, str], elsewhere: Mapping[str, str]) -> str:
    """Which setting an unknown key means: by its name in other libraries, by its name alone, or by its spelling."""
    name = key.rpartition(".")[2]
    same = {current for known, current in keys.items() if known.rpartition(".")[2] == name}
    if key in elsewhere:
        return f"pairclf calls it {elsewhere[key]}"
    if same:
        return f"its whole name is {' or '.join(sorted(same))}"
    if name in elsewhere:
        return f"pairclf calls it {elsewhere[name]}"
    spelled = {known.rpartition(".")[2].replace("_", "").lower(): current for known, current in elsewhere.items()}
    if current := spelled.get(name.replace("_", "").lower()):
        return f"pairclf calls it {current}"
    alike = difflib.get_close_matches(name, {known.rpartition(".")[2] for known in keys}, n=5)
    near = difflib.get_close_matches(
        key, [known for known in keys if known.rpartition(".")[2] in alike], n=1, cutoff=0.0
    )
    return f"the nearest is {keys[near[0]]}" if near else "no name is near to it"


def _explain(error: ValidationError, section: type[Section]) -> Iterator[str]:
    """A line for each wrong setting."""
    help_of = dict(settings(section))
    keys = {key: key for key in help_of} | dict(section.renamed)
    for issue in error.errors()[:MAX_ISSUES]:
        key = cut(".".join(str(part) for part in issue["loc"]))
        if issue["type"] == "extra_forbidden" and key in section.renamed:
            yield f"{key} is now {section.renamed[key]}"
        elif issue["type"] == "extra_forbidden":
            meant = _meant(re.sub(r"\.\d+\.", ".", key), keys, section.elsewhere)
            yield f"{key}: no such setting; {meant}"
        elif issue["type"] == "missing":
            above, _, name = key.rpartition(".")
            below = f" below `{above}`" if above else ""
            yield f"{key} is missing: add `{name}`{below} ({help_of.get(re.sub(r'[.][0-9]+[.]', '.', key), 'needed')})"
        else:
            value = "" if isinstance(issue["input"], dict | Section) else f" (given: {quoted(issue['input'])})"
            message = cut(issue["msg"], 1000)
            yield f"{key}: {message}{value}".removeprefix(": ").replace("Value error, ", "", 1)
    if error.error_count() > MAX_ISSUES:
        yield f"... and {error.error_count() - MAX_ISSUES:,} more"
