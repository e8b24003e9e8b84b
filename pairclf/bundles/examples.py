"""The examples that a bundle shows its model before each row: `examples.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pairclf.bundles.bundle import Bundle
from pairclf.errors import BundleError, cut
from pairclf.files import MAX_JSON, read_plain, write_json
from pairclf.task import Row


@dataclass(frozen=True, slots=True)
class Example:
    """A row with its target `(C,)`."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    id: str
    fields: dict[str, list[str | None]]
    target: list[float]


_EXAMPLES = TypeAdapter(list[Example])


def write_examples(path: Path, rows: Sequence[Row]) -> None:
    """Write the examples, in the order in which they are shown."""
    examples = [
        Example(row.id, {name: list(turns) for name, turns in row.fields.items()}, list(row.target or ()))
        for row in rows
    ]
    write_json(path, [asdict(example) for example in examples])


def read_examples(bundle: Bundle) -> list[Row]:
    """The examples, in the order in which they are shown; empty: its config wants none.

    Raises:
        BundleError: they are not those that the config wants.
    """
    path, config, count = bundle.files.examples, bundle.config, bundle.config.num_examples
    if not count:
        return []
    try:
        examples = _EXAMPLES.validate_json(read_plain(path, MAX_JSON))
    except (OSError, ValidationError, ValueError) as error:
        raise BundleError(f"{path.name} can't be used: {cut(error)}", where=path) from error
    fields, classes = set(config.task.fields), len(config.task.classes)
    fitting = all(example.fields.keys() == fields and len(example.target) == classes for example in examples)
    most = count if config.prompt.examples == "fixed" else max(count, config.prompt.pool)
    if not count <= len(examples) <= most or not fitting:
        raise BundleError(
            f"{path.name} must hold from {count} (prompt.k) to {most} examples with the fields {sorted(fields)} and a "
            f"target of {classes} classes",
            where=path,
        )
    return [
        Row(example.id, {name: tuple(turns) for name, turns in example.fields.items()}, tuple(example.target))
        for example in examples
    ]
