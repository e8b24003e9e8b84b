"""The kernel's code, from its template: a notebook or a script, and the same bytes each time.

The template (`kaggle/notebook.py`) is a Python file in percent format, so that the linters read it:

    # %% [markdown] about            opens a markdown cell with the id `about`; its lines are comments
    # %% check                       opens a code cell with the id `check`
    # %% [submission] predict        ... which only kernels with the tag `submission` have

and `{{name}}` stands for a value; in code it stands alone in quotes, and the value takes their place too. What comes
before the first cell is for the template's readers and is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import nbformat

from pairclf.errors import PackagingError

_HEAD = re.compile(r"^# %% (?P<tags>(\[[a-z]+\] )*)(?P<id>[a-z][a-z0-9-]*)\n", re.MULTILINE)
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_QUOTED = re.compile(r'"\{\{(\w+)\}\}"')

Value = str | int | float | Sequence[str] | Mapping[str, "Value"]


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell whose values are filled in."""

    identity: str
    markdown: bool
    source: str


def make_notebook(template: str, values: Mapping[str, Value], tag: str) -> str:
    """The text of the .ipynb file.

    Args:
        template: text of the template.
        values: `{placeholder: value}`.
        tag: cells with other tags are left out.

    Raises:
        PackagingError: the template has no cells, or a placeholder without a value.
    """
    cells = [
        nbformat.v4.new_markdown_cell(_uncommented(cell.source), id=cell.identity)
        if cell.markdown
        else nbformat.v4.new_code_cell(cell.source, id=cell.identity)
        for cell in _cells(template, values, tag)
    ]
    notebook = nbformat.v4.new_notebook(
        cells=cells,
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
    )
    nbformat.validate(notebook)
    return str(nbformat.writes(notebook)) + "\n"


def make_script(template: str, values: Mapping[str, Value], tag: str) -> str:
    """The text of the .py file: the same cells in percent format, markdown as comments. See `make_notebook`."""
    cells = _cells(template, values, tag)
    return (
        "\n\n".join(
            f"# %% [markdown]\n{cell.source}" if cell.markdown else f"# %% {cell.identity}\n{cell.source}"
            for cell in cells
        )
        + "\n"
    )


def _cells(template: str, values: Mapping[str, Value], tag: str) -> list[Cell]:
    heads = list(_HEAD.finditer(template))
    if not heads:
        raise PackagingError("the kernel's template has no cell", remedy="open each cell with `# %% id`")
    ends = [head.start() for head in heads[1:]] + [len(template)]
    return list(
        _filled(zip(heads, [template[a.end() : b] for a, b in zip(heads, ends, strict=True)], strict=True), values, tag)
    )


def _filled(cells: Iterator[tuple[re.Match[str], str]], values: Mapping[str, Value], tag: str) -> Iterator[Cell]:
    for head, text in cells:
        tags = set(re.findall(r"\[([a-z]+)\]", head["tags"]))
        if tags - {"markdown", tag}:
            continue
        if missing := sorted(set(_PLACEHOLDER.findall(text)) - values.keys()):
            raise PackagingError(f"the kernel's template asks for {missing}, which have no value", where=head["id"])
        markdown = "markdown" in tags
        if not markdown:
            text = _QUOTED.sub(lambda match: _literal(values[match[1]]), text)
        else:
            text = _PLACEHOLDER.sub(lambda match: str(values[match[1]]).replace("\n", "\n# "), text)
        yield Cell(head["id"], markdown, text.strip())


def _uncommented(source: str) -> str:
    return re.sub(r"^# ?", "", source, flags=re.MULTILINE)


def _literal(value: Value) -> str:
    """Python for a value: JSON is, where there is no null, true or false; a mapping has a line for each key."""
    return json.dumps(value, ensure_ascii=False, indent=4 if isinstance(value, Mapping) and value else None)
