"""The notebook, from its template: cells with fixed ids, and the same bytes each time.

The template (`kaggle/notebook.py`) is a Python file in percent format, so that the linters read it:

    # %% [markdown] about        opens a markdown cell with the id `about`; its lines are comments
    # %% check                   opens a code cell with the id `check`

and `{{name}}` stands for a value; in code it stands in quotes, and a list takes the place of its quoted name. What
comes before the first cell is for the template's readers and is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import nbformat

from pairclf.errors import PackagingError

_HEAD = re.compile(r"^# %% (?P<markdown>\[markdown\] )?(?P<id>[a-z][a-z0-9-]*)\n", re.MULTILINE)
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_QUOTED = re.compile(r'"\{\{(\w+)\}\}"')

Value = str | Sequence[str]


def make_notebook(template: str, values: Mapping[str, Value]) -> str:
    """The text of the .ipynb file.

    Args:
        template: text of the template.
        values: `{placeholder: value}`; a list only where the placeholder stands in code.

    Raises:
        PackagingError: the template has no cells, or a placeholder without a value.
    """
    heads = list(_HEAD.finditer(template))
    if not heads:
        raise PackagingError("the notebook's template has no cell", remedy="open each cell with `# %% id`")
    ends = [head.start() for head in heads[1:]] + [len(template)]
    cells = [_cell(head, template[head.end() : end].strip(), values) for head, end in zip(heads, ends, strict=True)]
    notebook = nbformat.v4.new_notebook(
        cells=cells,
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
    )
    nbformat.validate(notebook)
    return str(nbformat.writes(notebook)) + "\n"


def _cell(head: re.Match[str], source: str, values: Mapping[str, Value]) -> Any:
    missing = sorted(set(_PLACEHOLDER.findall(source)) - values.keys())
    if missing:
        raise PackagingError(f"the notebook's template asks for {missing}, which have no value", where=head["id"])
    if head["markdown"]:
        text = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
        text = _PLACEHOLDER.sub(lambda found: str(values[found[1]]), text)
        return nbformat.v4.new_markdown_cell(text, id=head["id"])
    code = _QUOTED.sub(lambda found: _literal(values[found[1]]), source)
    return nbformat.v4.new_code_cell(code, id=head["id"])


def _literal(value: Value) -> str:
    """Python for a value: a string in quotes, or several with commas between (a JSON string is a Python one)."""
    return ", ".join(json.dumps(part) for part in ([value] if isinstance(value, str) else value))
