"""A report is one page that shows what it is made of, and obeys no text of it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from clocks_support import comes_true
from scipy.special import softmax
from support.hostile import CLASSES, HOSTILE
from support.runs import config_of

import pairclf
from pairclf.config import dump_config, resolve
from pairclf.errors import ConfigError, DataError, PairclfError, visible
from pairclf.page.html import Html
from pairclf.reports import articles
from pairclf.reports.articles import fitting
from pairclf.reports.checks import CHECKS, check
from pairclf.reports.contents import Contents, gather
from pairclf.reports.report import render, summary, write_report
from pairclf.reports.rows import Piece, ShownRow, shown_rows
from pairclf.task import LMSYS, Row

if TYPE_CHECKING:
    from support.browser import Browser

Cli = Callable[..., tuple[int, str]]


class Parsed(HTMLParser):
    """The elements, attributes and texts of a page, as HTML's own parser has them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.comments: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def obeyed(page: str) -> list[str]:
    """What a browser would run, load or draw of the texts in a page."""
    parsed = Parsed(page)
    scripts = parsed.elements["script"]
    met = [f"{scripts} scripts"] if scripts != 2 else []  # the ids, and report.js
    met += [name for name in ("img", "iframe", "object", "b", "svg:script", "base") if parsed.elements[name]]
    met += [f"{name}={value}" for name, value in parsed.attributes if name.startswith("on") or name == "style"]
    met += [value for name, value in parsed.attributes if name in ("href", "src") and value[:1] not in ("#", "d")]
    met += parsed.comments
    drawn = page.partition('<script type="application/json" id="ids">')[0]  # JSON has the ids exactly
    return met + [f"{letter!r}" for letter in "\x00\x08\x1b\x7f\u202e\u2066" if letter in drawn]


@pytest.fixture(scope="module")
def page(contents: Contents) -> str:
    return render(contents, *shown_rows(contents))


def test_hostile_texts_are_shown_and_not_obeyed(page: str, contents: Contents) -> None:
    assert obeyed(page) == []
    parsed = Parsed(page)
    text = "\n".join(parsed.texts)
    rows, _ = shown_rows(contents)
    assert len(rows) == parsed.elements["article"] > 60
    for row in rows:
        assert visible(row.row.id) in text
        for pieces in row.texts.values():
            shown = visible(pieces[0].text)
            assert (shown if len(shown) < 1_000 else shown[:1_000]) in text
    for name in contents.config.task.classes:
        assert name in text


@pytest.mark.parametrize("spoilt", ["one text", "all texts"])
def test_a_page_that_does_not_escape_them_is_caught(
    spoilt: str, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, why = shown_rows(contents)
    if spoilt == "one text":
        rows[0] = replace(rows[0], texts={"prompt": [Piece(Html("<img src=x onerror=alert(5)>"))]})
    else:
        monkeypatch.setattr("pairclf.page.html._escaped", Html)
    assert obeyed(render(contents, rows, why))


def test_ids_are_exported_exactly(page: str, contents: Contents) -> None:
    block = page.split('<script type="application/json" id="ids">')[1].split("</script>")[0]
    rows, _ = shown_rows(contents)
    assert json.loads(block) == [row.row.id for row in rows]
    assert any("\x00" in row.row.id for row in rows)


def test_every_section_is_there(page: str, contents: Contents) -> None:
    text = "\n".join(Parsed(page).texts)
    for words in ("log loss", "Calibration: log loss", "Reliability: the decision", "Labels and decisions", *CHECKS):
        assert words in text, words
    assert summary(contents, check(contents)) in text
    assert "suspect labels" in " ".join(contents.missing) or contents.suspicions


def shown(identity: str, text: str, **classes: float) -> ShownRow:
    fields = dict.fromkeys(LMSYS.fields, (text,))
    scores = {"loss": 0.5, **{f"p_{name}": 1 / 3 for name in LMSYS.classes}}
    scores |= {f"target_{name}": float(place == 0) for place, name in enumerate(LMSYS.classes)}
    pieces = {name: [Piece(text)] for name in fields}
    return ShownRow(Row(identity, fields), ["worst"], "train.csv", 0, scores, pieces, None, [])


def test_the_rows_never_exceed_their_bytes() -> None:
    texts = ["<" * 20_000, "\x00" * 20_000, "\ud83d" * 20_000, "שלום" * 9_000]
    rows = [shown(f"row {place}", texts[place % 4]) for place in range(40)]
    for most in (2_000_000, 500_000, 100_000):
        made, limit = fitting(rows, LMSYS, most)
        assert sum(len(article.encode()) for article in made) <= most
        assert limit in articles.LIMITS
        assert len(made) == len(rows) or limit == articles.LIMITS[-1]
    whole, limit = fitting(rows[:1], LMSYS, 4_000_000)
    assert limit == articles.LIMITS[0]
    assert "12,000 characters are not in this file" in whole[0]
    made, _ = fitting([shown("i" * 100_000, "text")], LMSYS, 100_000)
    assert len(made) == 1, "a long id is cut where it is shown"


def run_of_scores(folder: Path, kind: str, rows: int = 40) -> tuple[Path, Path]:
    """A file of scores that nobody trained, and a config with their labels."""
    random = np.random.default_rng(0)
    texts = [[f"{name} {place} {'word ' * (place % 7)}" for place in range(rows)] for name in ("p", "a", "b")]
    pair = {"fields": ["p", "a", "b"], "swap_fields": ["a", "b"]}
    tasks: dict[str, dict[str, Any]] = {
        "single": {"fields": ["p"], "classes": ["x", "y", "z"], "label_column": "label"},
        "labels": {"fields": ["p"], "classes": ["x", "y", "z"], "multi_label": True},
        "one label": {"fields": ["p"], "classes": ["x"], "multi_label": True},
        "many": {"fields": ["p"], "classes": [f"c{place}" for place in range(12)], "label_column": "label"},
        "hard": {**pair, "classes": ["x", "y"], "swap_classes": ["x", "y"], "label_column": "label"},
        "soft": {**pair, "classes": ["x", "y", "tie"], "swap_classes": ["x", "y"]},
        "one class": {**pair, "classes": ["x", "y"], "swap_classes": ["x", "y"], "label_column": "label"},
    }
    task = {"name": "small", **tasks[kind]}
    classes = task["classes"]
    columns: dict[str, Any] = dict(zip(["p", "a", "b"], texts, strict=True))
    columns = {name: columns[name] for name in task["fields"]}
    if "label_column" in task:
        columns["label"] = [classes[0 if kind == "one class" else place % len(classes)] for place in range(rows)]
    elif kind == "soft":
        shares = random.dirichlet(np.ones(3), rows)
        columns |= dict(zip(classes, shares.T.tolist(), strict=True))
    else:
        columns |= {name: random.integers(2, size=rows).tolist() for name in classes}
    ids = {"id": [f"r{place}" for place in range(rows)]}
    pl.DataFrame(ids | columns).write_csv(folder / "train.csv")
    scores = random.dirichlet(np.ones(max(2, len(classes))), rows)[:, : len(classes)]
    pl.DataFrame(ids | dict(zip(classes, scores.T.tolist(), strict=True))).write_csv(folder / "scores.csv")
    config = resolve({"task": task, "data": {"folder": str(folder), "train": ["train.csv"]}})
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return folder / "scores.csv", folder / "config.yaml"


@pytest.mark.parametrize("kind", ["single", "labels", "one label", "many", "hard", "soft", "one class"])
def test_every_kind_of_task_has_a_report(tmp_path: Path, kind: str) -> None:
    scores, config = run_of_scores(tmp_path, kind)
    out = pairclf.report(scores, config=config)
    assert out == tmp_path / "report.html"
    parsed = Parsed(out.read_text(encoding="utf-8"))
    text = "\n".join(parsed.texts)
    assert parsed.elements["article"] == 40
    assert "a file of scores does not say what its models saw" in text
    if "label" in kind:
        assert "suspects need labels that exclude each other" in text
        assert "decided and right" in text
    if kind == "many":
        assert "The commonest confusions" in text


def test_what_calibration_changes_is_drawn(tmp_path: Path) -> None:
    scores, config = run_of_scores(tmp_path, "hard", rows=300)
    targets = np.eye(2)[np.arange(300) % 2]
    chances = softmax(4 * (0.8 * targets + np.random.default_rng(1).normal(size=targets.shape)), axis=1)  # too sure
    pl.read_csv(scores).with_columns(x=chances[:, 0], y=chances[:, 1]).write_csv(scores)
    contents = gather([scores], config)
    assert contents.evaluation.advised is not None
    page = render(contents, *shown_rows(contents))
    text = "\n".join(Parsed(page).texts)
    assert text.count("after temperature, fitted to other folds") >= 2
    bins = {name: [line for line in contents.evaluation.reliability if line["class"] == name] for name in ("x", None)}
    first = bins["x"][0]
    assert f"{first['predicted']:,.6g}: {first['observed']:,.6g}" in text


def test_runs_with_bundles_have_a_front_of_figure_and_cost(hostile: Path, tmp_path: Path) -> None:
    shutil.copytree(hostile, tmp_path / "copy")
    out = write_report([hostile, tmp_path / "copy"], tmp_path / "report.html")
    text = "\n".join(Parsed(out.read_text(encoding="utf-8")).texts)
    assert "no other run is better and costs less" in text
    assert "equal on all rows" in text
    assert obeyed(out.read_text(encoding="utf-8")) == []


def test_one_row_is_enough(tmp_path: Path) -> None:
    scores, config = run_of_scores(tmp_path, "hard", rows=1)
    text = write_report([scores], tmp_path / "one.html", config).read_text(encoding="utf-8")
    assert Parsed(text).elements["article"] == 1
    assert "nan" not in " ".join(Parsed(text).texts).lower().split()


def test_the_command_compares_runs_and_says_where_the_page_is(tmp_path: Path, cli: Cli) -> None:
    scores, config = run_of_scores(tmp_path, "hard")
    rows = pl.read_csv(scores)
    rows.with_columns(x=1 - pl.col("x"), y=1 - pl.col("y")).write_csv(tmp_path / "other.csv")
    code, said = cli("report", scores, tmp_path / "other.csv", "--config", config, "--out", tmp_path / "both.html")
    assert code == 0, said
    assert f"wrote {tmp_path / 'both.html'}: 0." in " ".join(said.split())
    text = "\n".join(Parsed((tmp_path / "both.html").read_text(encoding="utf-8")).texts)
    for words in ("2 runs on 40 rows", "Blends of 2 runs", "no cost is known of all runs"):
        assert words in text


def test_a_run_of_which_only_probabilities_are_left(contents: Contents, hostile: Path, tmp_path: Path) -> None:
    config = contents.config.model_copy(update={"output_dir": tmp_path / "run"})
    (tmp_path / "run").mkdir()
    shutil.copyfile(hostile / "oof.parquet", tmp_path / "run" / "oof.parquet")
    with pytest.raises(ConfigError, match="holds no finished training"):
        write_report([tmp_path / "run"])
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    text = write_report([tmp_path / "config.yaml"]).read_text(encoding="utf-8")
    assert "the scores of both orders are not known" in text
    assert Parsed(text).elements["article"] > 60


def test_a_run_that_can_not_be_reported_is_one_message(tmp_path: Path) -> None:
    scores, config = run_of_scores(tmp_path, "hard")
    with pytest.raises(ConfigError, match="there is no"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="files of scores alone"):
        write_report([scores])
    (tmp_path / "ensemble.yaml").write_text("members: []\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="is an ensemble's file, and no run"):
        write_report([scores, tmp_path / "ensemble.yaml"], None, config)
    with pytest.raises(ConfigError, match="is an ensemble's file, and no run"):
        write_report([tmp_path / "ensemble.yaml"])
    with pytest.raises(PairclfError, match=r"must end in \.html"):
        write_report([scores], tmp_path / "report.txt", config)
    with pytest.raises(DataError):
        pl.read_csv(scores).with_columns(x=pl.lit(0.9)).write_csv(tmp_path / "bad.csv")
        write_report([tmp_path / "bad.csv"], None, config)


def test_texts_are_those_that_the_model_saw(trained_run: Callable[[str], Path]) -> None:
    from pairclf.model.inputs import open_inputs
    from pairclf.task import AB

    contents = gather([trained_run("llama") / "run"])
    rows, why = shown_rows(contents)
    assert why == ""
    opened = open_inputs(config_of(trained_run("llama")))
    cut = 0
    for row in rows:
        encoded = opened.builder.encode([row.row])[0][AB]
        for name in LMSYS.fields:
            spans = [span for span in encoded.spans if span.name == name]
            seen = [opened.builder.tokenizer.text(encoded.ids[span.start : span.stop]) for span in spans]
            assert "".join(piece.text for piece in row.texts[name] if not piece.cut) == "".join(seen)
            assert sum(piece.cut for piece in row.texts[name]) == encoded.dropped[name]
            cut += encoded.dropped[name]
    assert cut > 0
    page = render(contents, rows, why)
    text = "\n".join(Parsed(page).texts)
    assert "the model did not see this" in text
    assert "Learning curve: training loss" in text
    assert "What a second order gains" in text
    assert obeyed(page) == []


@pytest.mark.thorough
def test_a_browser_shows_hostile_texts_and_obeys_keys_filters_and_export(
    browser: Browser, page: str, contents: Contents, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    for size in ("wide", "phone"):
        for dark in (False, True):
            browser.open(path, size=size, dark=dark)
            assert browser.overflow() == 0, (size, dark)
            assert (browser.console(), browser.requests()) == ([], [])
    ids = [row.row.id for row in shown_rows(contents)[0]]
    browser.open(path)
    assert browser.run("return [...document.querySelectorAll('script')].length") == 2

    def current() -> int:
        return int(browser.run("return Number(document.activeElement.dataset.row)"))

    def visible_rows() -> list[int]:
        return list(browser.run("return [...document.querySelectorAll('.row:not([hidden])')].map(r => +r.dataset.row)"))

    browser.press("j")
    assert current() == 0
    browser.press("j", "j", "k")
    assert current() == 1
    browser.press("x")
    browser.press("j", "x")
    [count] = browser.find("#count")
    assert count.text == f"{len(ids)} of {len(ids)} rows, 2 ticked"
    for action, lines in (("text", ids[1:3]), ("csv", None)):
        browser.run(f"document.querySelector('[data-action={action}]').click()")
        name = {"text": "ids.txt", "csv": "ids.csv"}[action]
        written = wait_for(browser.downloads / name)
        if lines is None:
            assert pl.read_csv(written, infer_schema=False)["id"].to_list() == ids[1:3]
        else:
            assert written.read_text(encoding="utf-8") == "".join(f"{line}\n" for line in lines)
    browser.press("k", "c")
    assert count.text.startswith("copied ")
    browser.press("/")
    browser.press("\ue009v")  # Ctrl+V
    pasted = browser.run("return document.querySelector('[name=search]').value")
    assert [letter for letter in pasted if letter.isprintable()] == [
        letter for letter in ids[1] if letter.isprintable()
    ]
    browser.run("document.querySelector('[name=search]').value = ''")
    browser.press("onmouseover='alert(4)'")
    browser.run("document.querySelector('[name=search]').dispatchEvent(new Event('input', {bubbles: true}))")
    found = visible_rows()
    assert 0 < len(found) < len(ids)
    browser.run("const s = document.querySelector('[name=search]'); s.value = ''; s.form.elements.labels.value = '1';"
                "s.dispatchEvent(new Event('input', {bubbles: true}))")  # fmt: skip
    rows = shown_rows(contents)[0]
    assert visible_rows() == [
        place for place, row in enumerate(rows) if articles.label_places(row, contents.config.task) == [1]
    ]
    assert browser.console() == []


@pytest.mark.thorough
def test_a_browser_shows_a_report_of_57_477_rows_within_two_seconds(browser: Browser, tmp_path: Path) -> None:
    """Texts are hostile, and of all lengths up to 100,000 characters."""
    count, random = 57_477, np.random.default_rng(0)
    lengths = np.minimum(random.lognormal(5.5, 1.2, count), 100_000).astype(int) + 1
    texts = [f"{place} {HOSTILE[place % 12] * (length // 20)}"[:length] for place, length in enumerate(lengths)]
    labels = random.integers(3, size=count)
    columns = {"p": texts, "a": texts[1:] + texts[:1], "b": texts[2:] + texts[:2]}
    ids = {"id": [f"{HOSTILE[place % 12][:30]} {place}" for place in range(count)]}
    columns |= {"label": [CLASSES[place] for place in labels]}
    pl.DataFrame(ids | columns).write_parquet(tmp_path / "train.parquet")
    scores = 0.7 * random.dirichlet(np.ones(3), count) + 0.3 * np.eye(3)[labels]
    pl.DataFrame(ids | dict(zip(CLASSES, scores.T, strict=True))).write_parquet(tmp_path / "scores.parquet")
    task = {
        "name": "large", "fields": ["p", "a", "b"], "classes": CLASSES, "label_column": "label",
        "swap_fields": ["a", "b"], "swap_classes": CLASSES[:2],
    }  # fmt: skip
    config = resolve({"task": task, "data": {"folder": str(tmp_path), "train": ["train.parquet"]}})
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    path = write_report([tmp_path / "scores.parquet"], None, tmp_path / "config.yaml")
    assert path.stat().st_size < 6_000_000
    assert obeyed(path.read_text(encoding="utf-8")) == []
    for size in ("wide", "phone"):
        browser.open(path, size=size)
        assert browser.first_view() < 2
        assert (browser.console(), browser.requests(), browser.overflow()) == ([], [], 0)


def wait_for(path: Path) -> Path:
    assert comes_true(path.is_file)
    return path
