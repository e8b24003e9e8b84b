"""Texts are shown and never obeyed; a page permits its own style and scripts, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclf.console import table as console_table
from pairclf.errors import visible
from pairclf.page.html import Html, document, element, escape, join, printed, table

if TYPE_CHECKING:
    from pathlib import Path

    from support.browser import Browser

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script><!--",
    '" onload="alert(3)" x=\'"',
    "\x00\x1b[2J\x07",
    "\u202eevil\u2066",
    "\u05e9\u05dc\u05d5\u05dd (1)",
    "half a pair \ud83d",
    "\u2028&amp;&#x3c;",
    "x" * 100_000,
]
"""What rows, ids and names of runs may hold."""


class Texts(HTMLParser):
    """The elements, attributes and texts of a page, as a parser of HTML reads it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text() | st.sampled_from(HOSTILE))
def test_any_text_is_read_back_as_a_text(text: str) -> None:
    """In an element and in an attribute; what is no letter is visible, and no element comes out of it."""
    shown = visible(text).encode("utf-8", "backslashreplace").decode()
    page = Texts(element("p", text, title=text))
    assert page.text == shown
    (name, attributes), *isolation = page.elements
    assert (name, attributes) == ("p", {"title": shown})
    assert [tag for tag, _ in isolation] in ([], ["bdi"])
    str(element("p", text)).encode()


def test_right_to_left_letters_are_isolated_where_an_element_may_lie() -> None:
    assert escape("\u05e9 (1)") == "<bdi>\u05e9 (1)</bdi>"
    assert element("text", "\u05e9") == "<text>\u05e9</text>", "SVG would not draw what is in <bdi>"
    assert escape("abc") == "abc"
    assert isinstance(escape(Html("<b>")), Html)
    assert escape(Html("<b>")) == join(["", None, Html("<b>")]) == "<b>"


def test_attributes_that_the_policy_forbids_are_refused() -> None:
    for name in ("style", "onclick"):
        with pytest.raises(ValueError, match=f"the attribute {name} has no effect"):
            element("p", **{name: "x"})
    assert element("input", class_="a", aria_label="<", disabled=True, hidden=False, value=None) == (
        '<input class="a" aria-label="&lt;" disabled>'
    )


@given(st.lists(st.text() | st.sampled_from(HOSTILE), min_size=1))
def test_data_come_back_as_they_were(texts: list[str]) -> None:
    page = document("Data", [], data={"rows": texts})
    [block] = re.findall(r'<script type="application/json" id="rows">(.*?)</script>', page, re.DOTALL)
    assert json.loads(block) == texts
    assert not set(block) & set("<>&\u2028\u2029")
    page.encode()


def policy_of(page: str) -> str:
    [policy] = [attributes["content"] or "" for _, attributes in Texts(page).elements if "http-equiv" in attributes]
    return policy


def test_the_policy_has_the_hash_of_each_script_and_of_the_style() -> None:
    scripts = ["console.log(1)", "console.log('\u05e9')"]
    page = document("Title <b>", [element("p", "text")], scripts=scripts)
    policy = policy_of(page)
    sources = re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", page, re.DOTALL)
    assert sources[1:] == scripts
    for source in sources:
        assert base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "connect-src 'none'" in policy
    assert "script-src 'none'" in policy_of(document("No script", []))
    assert "<title>Title &lt;b&gt;</title>" in page
    assert not re.findall(r"""(?:src|href)=["']?(?!data:,)[^"'>]""", page), "asks for nothing"
    for broken in ("</script>", "<!-- x"):
        with pytest.raises(ValueError, match="can't hold"):
            document("Broken", [], scripts=[broken])
    with pytest.raises(ValueError, match="not JSON compliant"):
        document("NaN", [], data={"x": float("nan")})


def test_columns_of_numbers_are_aligned_at_their_right() -> None:
    page = table(["name", "log loss", "note"], [["<b>", 1.5, "1 row"], ["b", "-", "none"]], bold=[1])
    rows = [attributes.get("class") for tag, attributes in Texts(page).elements if tag in ("th", "td")]
    assert rows == [None, "number", None] * 3
    assert '<tr class="bold"><td>b</td>' in page
    assert "<td>&lt;b&gt;</td>" in page
    assert Texts(table(["only", "titles"], [])).text == "onlytitles"


def test_a_table_of_the_terminal_is_one_of_the_page() -> None:
    summary = console_table("Runs [1]", "run", "log loss")
    summary.add_row("[red]<b>", "0.9", style="bold")
    summary.add_row("b", "1.0")
    summary.caption = "lower is better"
    page = printed(summary)
    assert Texts(page).text == "Runs [1]runlog loss[red]<b>0.9b1.0lower is better"
    assert page.count('class="bold"') == 1


@pytest.mark.thorough
def test_a_browser_shows_hostile_texts_and_runs_only_the_pages_scripts(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    injected = Html("<script>document.title = 'injected'</script><p onclick='1' style='color: red'>x</p>")
    body = [*(element("p", text, title=text) for text in HOSTILE), table(HOSTILE, [HOSTILE])]
    script = "window.rows = JSON.parse(document.getElementById('rows').textContent)"
    path.write_text(document("Hostile", body, data={"rows": HOSTILE}, scripts=[script]), encoding="utf-8")
    browser.open(path)
    assert browser.console() == []
    assert browser.requests() == []
    assert browser.run("return window.rows.map(row => row.length)")[-1] == 100_000
    assert browser.find("main > p")[0].text == HOSTILE[0]
    assert browser.overflow() == 0, "long lines break, and wide tables scroll in their box"
    path.write_text(document("Hostile", [injected], scripts=[script]), encoding="utf-8")
    browser.open(path)
    refused = "\n".join(browser.console())
    assert browser.driver.title == "Hostile", "a script that came past the escaping is not run"
    assert "script-src" in refused
    assert "style-src" in refused
