"""HTML: escaped texts, elements, tables, and whole pages that need no other file and ask for none."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairclf.errors import visible

if TYPE_CHECKING:
    from rich.table import Table

_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]")
_TEXT_ONLY = frozenset({"title", "option", "text", "tspan"})  # no element lies in these: SVG draws no <bdi>
_VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})
_NUMBER = re.compile(r"[-+±]?\.?\d.*|-?", re.DOTALL)
_IN_JSON = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


class Html(str):
    """A text that is HTML already, and is not escaped again."""

    __slots__ = ()


def escape(text: object) -> Html:
    """A text as HTML: what it holds is shown and never obeyed; one that is HTML already stays as it is.

    Control characters and marks of direction show as `\\x1b`, `\\u202e`. A text with letters that run from right to
    left is isolated, so that it does not reorder what stands beside it.

    >>> escape("<b>\\x00")
    '&lt;b&gt;\\\\x00'
    """
    if isinstance(text, Html):
        return text
    escaped = _escaped(text)
    return Html(f"<bdi>{escaped}</bdi>") if _RIGHT_TO_LEFT.search(escaped) else escaped


def _escaped(text: object) -> Html:
    """As `escape`, without an element, as attributes and SVG's texts need it."""
    encodable = visible(text).encode("utf-8", "backslashreplace").decode("utf-8")  # half of a surrogate pair
    return Html(html.escape(encodable))


def join(parts: Iterable[object]) -> Html:
    """The parts as HTML, one after the other; `None` is nothing."""
    return Html("".join(escape(part) for part in parts if part is not None))


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """An element of HTML or SVG.

    Args:
        name: of the element.
        children: texts are escaped, `Html` is not, `None` is left out.
        attributes: `class_` is `class`, `text_anchor` is `text-anchor`; True stands alone, None and False are left out.

    Raises:
        ValueError: an attribute that the page's content policy forbids: `style`, or a handler of events.

    >>> element("a", "1 < 2", class_="x", href="#y")
    '<a class="x" href="#y">1 &lt; 2</a>'
    """
    written = "".join(_attribute(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{written}>")
    write = _escaped if name in _TEXT_ONLY else escape
    inner = "".join(child if isinstance(child, Html) else write(child) for child in children if child is not None)
    return Html(f"<{name}{written}>{inner}</{name}>")


def _attribute(name: str, value: object) -> str:
    if name == "style" or name.startswith("on"):
        raise ValueError(f"the attribute {name} has no effect under the page's content policy; use a class or a script")
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{_escaped(value)}"'


def table(
    columns: Sequence[object], rows: Iterable[Sequence[object]], *, caption: object = None, bold: Collection[int] = ()
) -> Html:
    """A table that scrolls in its own box where it is wide. Columns of numbers are aligned at their right.

    Args:
        columns: their titles.
        rows: cells, as many as there are columns.
        caption: stands above it; None: nothing.
        bold: places of rows that stand out.
    """
    body = [list(row) for row in rows]
    sides = [
        "number" if all(_NUMBER.fullmatch(str(cell)) for cell in cells) else None for cells in zip(*body, strict=True)
    ]

    def line(name: str, cells: Sequence[object], class_: str | None = None, **attributes: object) -> Html:
        sided = zip(cells, sides or [None] * len(columns), strict=True)
        return element("tr", *(element(name, cell, class_=side, **attributes) for cell, side in sided), class_=class_)

    head = element("thead", line("th", columns, scope="col"))
    lines = (line("td", row, "bold" if place in bold else None) for place, row in enumerate(body))
    title = None if caption is None else element("caption", caption)
    whole = element("table", title, head, element("tbody", *lines))
    return element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption or "table")


def printed(summary: Table) -> Html:
    """A table of the terminal as one of a page, with what stands below it."""
    rows = zip(*(column.cells for column in summary.columns), strict=True)
    bold = [place for place, row in enumerate(summary.rows) if row.style == "bold"]
    whole = table([column.header for column in summary.columns], rows, caption=summary.title, bold=bold)
    return join([whole, element("p", summary.caption, class_="quiet below") if summary.caption else None])


def document(
    title: str,
    body: Iterable[object],
    *,
    data: Mapping[str, Any] | None = None,
    scripts: Sequence[str] = (),
    style: str = "",
    connect_src: str = "'none'",
) -> str:
    """A whole page as one file. Its policy permits its own style and scripts, by their hashes, and nothing else.

    Args:
        title: of the page, also its heading.
        body: parts of the page.
        data: values by name, which a script reads with `JSON.parse(document.getElementById(NAME).textContent)`.
        scripts: sources in JavaScript, which run in this order when the page is read.
        style: rules in CSS of this page alone, behind those of all pages.
        connect_src: whom scripts may ask: `'none'`, or `'self'`, the server that the page came from.

    Raises:
        ValueError: `data` holds NaN or infinity, or a script holds the end of its own element.
    """
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8") + style
    hashes = " ".join(map(_hash, scripts)) or "'none'"
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {hashes}; "
        f"connect-src {connect_src}; img-src data:; base-uri 'none'; form-action 'none'"
    )
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("link", rel="icon", href="data:,"),  # else browsers ask a server for one
        element("title", title),
        element("style", Html(style)),
    ]
    blocks = [element("script", _json(value), type="application/json", id=name) for name, value in (data or {}).items()]
    blocks += [element("script", Html(script)) for script in scripts]
    main = element("main", element("h1", title), *body)
    page = element("html", element("head", *head), element("body", main, *blocks), lang="en")
    return f"<!doctype html>\n{page}\n"


def _hash(source: str) -> str:
    """A source in a content policy: the hash of an inline style or script."""
    if re.search("</(script|style)|<!--", source, re.IGNORECASE):
        raise ValueError("a script or style that is part of a page can't hold </script, </style or <!--")
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _json(value: object) -> Html:
    """JSON that no parser of HTML takes for an element, and that UTF-8 can hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_IN_JSON)
    # Half of a surrogate pair becomes an escape such as \ud83d, which JSON reads.
    return Html(text.encode("utf-8", "backslashreplace").decode("utf-8"))
