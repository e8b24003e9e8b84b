"""The page of `pairclf try`, whose script asks the server for verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pairclf.page.html import document, element


def page(form: Mapping[str, Any]) -> str:
    """The page for a judge's `Playground.form`."""
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    judges = element("p", f"Task {form['task']}, judged by {', '.join(form['bundles'])}.", class_="quiet")
    body = [
        judges,
        element("noscript", element("p", "This page needs JavaScript.", class_="bad")),
        element("form", id="loader", class_="buttons") if form["data"] else None,
        element("form", id="row"),
        element("p", id="status", role="status", class_="quiet"),
        element("pre", id="error", role="alert", class_="bad"),
        element("section", id="verdict", aria_label="verdict"),
    ]
    return document("Try a judge", body, data={"form": form}, scripts=[script], connect_src="'self'")
