"""Texts and class names that a page must show and never obey."""

from __future__ import annotations

LONG = "x" * 100_000
HOSTILE = (
    "<script>alert(1)</script>", "</script><script>alert(2)</script>", "<!-- <script>",
    "]]></style><svg onload=alert(3)>",
    "\x00\x1b[2J\x08\x7f", "\u202eturned\u2066", "שלום <b>", "' onmouseover='alert(4)' x=\"", "&lt;img src=x&gt; &amp;",
    "<img src=x onerror=alert(5)>", "\u2028\u2029", "javascript:alert(6)", LONG, "# **bold** `code` [a](javascript:b)",
)  # fmt: skip
"""Texts that a page must show and never obey."""

CLASSES = ("<b>A</b>", "' onclick='alert(7)", "</script>tie")
