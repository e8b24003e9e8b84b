"""Write docs/api.md, what `import pairclf` gives: signatures and docstrings of its names and of what they return.

    python scripts/apidocs.py

A test fails while the page differs from the docstrings.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pairclf
from pairclf.runs.blend import BlendReport
from pairclf.runs.compare import Comparison
from pairclf.runs.evaluation_report import ReportedEvaluation
from pairclf.runs.sweep import SweepResult

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/api.md"

NAMES = [
    "load", "Judge", "fit", "cross_validate", "evaluate", "report", "compare", "blend", "sweep", "PairClassifier",
    "PairclfError",
]  # fmt: skip
RESULTS = [pairclf.TrainedFolds, ReportedEvaluation, Comparison, BlendReport, SweepResult]

INTRODUCTION = """# import pairclf

This page is written by `python scripts/apidocs.py` from the docstrings.

<!-- run: runs -->
```python
import pairclf

judge = pairclf.load("runs/lmsys/classical/fold0/bundle")  # or a list, an ensemble's file, "owner/name" on the hub
judge.predict(frame)  # polars, pandas or a dict of lists -> probabilities
judge.rank(prompt, answers)  # best of n
folds = pairclf.cross_validate("configs/lmsys/classical.yaml", "classical.C=0.3", "output_dir=runs/c03")
pairclf.evaluate("configs/lmsys/classical.yaml")  # tables in Jupyter, figures as attributes
pairclf.PairClassifier(approach="classical").fit(frame, labels).predict_proba(frame)
```

In a script, put what scores under `if __name__ == "__main__":`, because the worker processes import the script.

Importing it loads neither torch nor polars: each name is imported as it is used. Settings, files, figures and errors
are those of the commands, which do the same work. A training runs in this process; for several GPUs start
`pairclf train --processes N`. Errors that a user can cause are a `pairclf.PairclfError`. Notebooks in `examples/` show
whole ways: train and submit, compare approaches, a judge for best of n.
"""

SECTIONS = ("Args", "Attributes", "Returns", "Raises")


def markdown(docstring: str) -> str:
    """A docstring's sections as lists, the rest as it is."""
    lines, section = [], ""
    for line in docstring.splitlines():
        if line.rstrip(":") in SECTIONS:
            section = line.rstrip(":")
            lines += [f"**{section}**", ""]
        elif section and line.startswith("    "):
            entry = re.match(r"    (\S[^:]*): (.*)", line) if section != "Returns" else None
            continued = line.startswith("     ") or (entry is None and section != "Returns")
            lines.append(f"- `{entry[1]}`: {entry[2]}" if entry and not continued else f"  {line.strip()}".rstrip())
            if section == "Returns":
                lines[-1] = line.strip()
        else:
            section = "" if line else section
            lines.append(line)
    return "\n".join(lines).rstrip()


def signature(value: Any, name: str) -> str:
    """`name(...)`, one argument a line where it is long."""
    found, arguments, named = inspect.signature(value), list[str](), False
    for key, part in found.parameters.items():
        if key == "self":
            continue
        if part.kind is part.KEYWORD_ONLY and not named:
            arguments += [] if any(text.startswith("*") for text in arguments) else ["*"]
            named = True
        star = {part.VAR_POSITIONAL: "*", part.VAR_KEYWORD: "**"}.get(part.kind, "")
        default = "" if part.default is part.empty else f" = {part.default!r}"
        arguments.append(f"{star}{key}: {part.annotation}{default}")
        arguments += ["/"] if part.kind is part.POSITIONAL_ONLY else []
    returned = "" if inspect.isclass(value) else f" -> {found.return_annotation}"
    short = f"{name}({', '.join(arguments)}){returned}"
    return short if len(short) <= 100 else f"{name}(\n    " + ",\n    ".join(arguments) + f",\n){returned}"


def entry(value: Any, name: str, *, level: int = 2, call: bool = True) -> str:
    code = f"```python\n{signature(value, name)}\n```\n\n" if call else ""
    return f"{'#' * level} {name.rpartition('.')[2]}\n\n{code}{markdown(inspect.getdoc(value) or '')}"


def members(kind: type, name: str) -> list[str]:
    """Its public methods and properties, in the order of the class."""
    parts = []
    for key, value in vars(kind).items():
        if key.startswith("_") or key == "tables":
            continue
        if isinstance(value, property):
            parts.append(f"### {key}\n\n{markdown(inspect.getdoc(value) or '')}")
        elif inspect.isfunction(value):
            parts.append(entry(value, f"{name}.{key}", level=3))
    return parts


def page() -> str:
    parts = [INTRODUCTION.rstrip()]
    for name in NAMES:
        value = getattr(pairclf, name)
        parts.append(entry(value, name, call=name not in ("Judge", "PairclfError")))
        if inspect.isclass(value) and name != "PairclfError":
            parts += members(value, name)
    parts.append("# Results\n\nAll of them show as tables in Jupyter.")
    for kind in RESULTS:
        parts += [entry(kind, kind.__name__, call=False), *members(kind, kind.__name__)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
