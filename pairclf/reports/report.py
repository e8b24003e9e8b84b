"""`report`: write what is known of runs, and rows to look at, as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pairclf.console import progress
from pairclf.errors import cut
from pairclf.files import check_file_target, write_text
from pairclf.own_files import or_shipped
from pairclf.page.html import Html, document, element
from pairclf.reports.articles import rows_section
from pairclf.reports.checks import CHECKS, CheckResult, check, interval
from pairclf.reports.contents import Contents, gather
from pairclf.reports.rows import ShownRow, shown_rows
from pairclf.reports.sections import figures_section, plots_section, runs_section
from pairclf.run import output_of
from pairclf.runs.held_out import config_of_run

REPORT = "report.html"


def write_report(paths: Sequence[Path], out: Path | None = None, labels: Path | None = None) -> Path:
    """Write a report of the first of these runs, which compares it with the others.

    Args:
        paths: run folders, config files of runs, or files of scores.
        out: the file; None: `REPORT` in the folder of the first run, or beside its file of scores.
        labels: config file whose `data.train` has the labels, where files of scores are given alone.

    Returns:
        The file.

    Raises:
        ConfigError, DataError, LeakError: as `gather`; or the file can't be written.
    """
    if out is None:
        own = config_of_run(paths[0]) if or_shipped(paths[0]).exists() else None
        out = (paths[0].parent if own is None else output_of(own)) / REPORT
    check_file_target(out, ".html")
    contents = gather(paths, labels)
    with progress("report", total=2) as advance:
        rows, why_whole = shown_rows(contents)
        advance(note="page")
        page = render(contents, rows, why_whole)
        advance()
    write_text(out, page)
    return out


def render(contents: Contents, rows: Sequence[ShownRow], why_whole: str) -> str:
    """The whole page."""
    findings = check(contents)
    sections: dict[str, list[Html | None]] = {
        "Checks": [_checks(findings)],
        "Figures": [*figures_section(contents)],
        "Plots": [element("div", *plots_section(contents), class_="plots")],
    }
    if contents.comparison is not None:
        sections["Runs"] = [*runs_section(contents)]
    sections["Rows"] = [*rows_section(contents, rows, why_whole)]
    links = (element("li", element("a", name, href=f"#{name.lower()}")) for name in sections)
    body = [
        element("p", summary(contents, findings), class_="verdict"),
        element("nav", element("ul", *links), aria_label="sections"),
        *(element("section", element("h2", name), *parts, id=name.lower()) for name, parts in sections.items()),
    ]
    name = contents.run.name if contents.is_foreign else output_of(contents.config).name
    ids, folder = [row.row.id for row in rows], Path(__file__).parent
    style, script = (folder.joinpath(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return document(f"Report of {cut(name)}", body, data={"ids": ids}, scripts=[script], style=style)


def summary(contents: Contents, findings: Mapping[str, CheckResult]) -> str:
    """What the report comes to, in one line."""
    evaluation = contents.evaluation
    gain, baseline = evaluation.gain, evaluation.baseline
    if gain.value <= 0:
        parts = [f"Worse than the class prior by {-gain.value:.3f} nats a row"]
    elif gain.low > 0:
        parts = [f"Better than the class prior by {interval(gain, 3)} nats a row"]
    else:
        parts = [f"Not distinguishable from the class prior: gain {interval(gain, 3)} nats a row"]
    if baseline is not None and contents.config.approach != "classical":
        what = "better than" if baseline.gain.low > 0 else "worse than" if baseline.gain.high < 0 else "no better than"
        parts.append(f"{what} the classical baseline: gain {interval(baseline.gain, 3)}")
    if contents.comparison is not None:
        winner = contents.comparison.winner
        best = contents.comparison.runs[0].name
        parts.append(
            f"{winner} is the best run" if winner else f"no winner among the runs ({best} has the best figure)"
        )
    found = [code for code, finding in findings.items() if finding.state == "found"]
    parts.append(f"checks that found something: {', '.join(found) or 'none'}")
    return "; ".join(parts) + "."


def _checks(findings: Mapping[str, CheckResult]) -> Html:
    """A line a check, those that found something first, with what to do."""
    words = {"found": ("bad", "look"), "fine": ("good", "fine"), "unknown": ("quiet", "not checked")}
    lines = []
    for code, (state, text) in sorted(findings.items(), key=lambda item: list(words).index(item[1].state)):
        style, word = words[state]
        title, remedy = CHECKS[code].title, CHECKS[code].remedy
        said: list[object] = [f"{title}: {text}", element("p", remedy)]
        if state != "found":
            said = [text, element("span", f" (looked for: {title})", class_="quiet")]
        lines.append(element("li", element("code", code), element("strong", word, class_=style), *said))
    return element("ul", *lines, class_="checks")
