"""The kernel's code, made from its template: a notebook or a script; equal values give equal bytes.

The template (`kaggle/notebook.py`) is a Python file in percent format, so that linters read it:

    # %% [markdown] about            opens a markdown cell with the id `about`; its lines are comments
    # %% check                       opens a code cell with the id `check`
    # %% [submission] predict        ... which only kernels with the tag `submission` have

`{{name}}` stands for a value. In code it stands alone in quotes, which the value replaces too. Text before the first
cell is for readers of the template and is left out.
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
    """A cell with its values filled in."""

    identity: str
    markdown: bool
    source: str


def make_notebook(template: str, values: Mapping[str, Value], tag: str) -> str:
    """The text of the .ipynb file, without cells that have another tag; `values`: `{placeholder: value}`.

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
    heads = ((f"# %% {'[markdown]' if cell.markdown else cell.identity}", cell.source) for cell in cells)
    return "\n\n".join(f"{head}\n{source}" for head, source in heads) + "\n"


def _cells(template: str, values: Mapping[str, Value], tag: str) -> Iterator[Cell]:
    heads = list(_HEAD.finditer(template))
    if not heads:
        raise PackagingError("the kernel's template has no cell", remedy="open each cell with `# %% id`")
    ends = [*(head.start() for head in heads[1:]), len(template)]
    for head, end in zip(heads, ends, strict=True):
        text, tags = template[head.end() : end], set(re.findall(r"\[([a-z]+)\]", head["tags"]))
        if tags - {"markdown", tag}:
            continue
        if missing := sorted(set(_PLACEHOLDER.findall(text)) - values.keys()):
            raise PackagingError(f"the kernel's template asks for {missing}, which have no value", where=head["id"])
        markdown = "markdown" in tags
        if markdown:
            text = _PLACEHOLDER.sub(lambda match: str(values[match[1]]).replace("\n", "\n# "), text)
        else:
            text = _QUOTED.sub(lambda match: _literal(values[match[1]]), text)
        yield Cell(head["id"], markdown, text.strip())


def _uncommented(source: str) -> str:
    return re.sub(r"^# ?", "", source, flags=re.MULTILINE)


def _literal(value: Value) -> str:
    """A value as Python code. JSON is Python here, as it has no null, true or false; a mapping has one line per key."""
    return json.dumps(value, ensure_ascii=False, indent=4 if isinstance(value, Mapping) and value else None)
