"""A message shows enough of what it quotes to find it, and nothing in it is a command to the terminal."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from pairclf import cli
from pairclf.errors import MAX_MESSAGE, MAX_SHOWN, PairclfError, cut, quoted

DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]
CIRCLE: dict[str, Any] = {}
CIRCLE["x"] = CIRCLE


VALUES = ["x" * 10**7, [["x"] * 10**6] * 10, DEEP, CIRCLE, 10**5000, Path("x" * 10**6), b"x" * 10**6, {1: 2}, None]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_a_quotation_is_short(value: object) -> None:
    assert 0 < len(quoted(value)) <= MAX_SHOWN + 30


def test_what_is_short_is_quoted_whole() -> None:
    assert (quoted("é\n"), quoted([1, 2.5]), quoted({"a": None})) == ("'é\\n'", "[1, 2.5]", "{'a': None}")
    assert quoted("\x1b[2J\u202e") == "'\\x1b[2J\\u202e'"
    assert cut("a" * MAX_SHOWN) == "a" * MAX_SHOWN


@pytest.mark.parametrize("part", ["what", "where", "rows", "remedy"])
def test_a_message_has_an_end_whatever_it_quotes(part: str) -> None:
    hostile = "\x1b]0;x\x07\u202e" + "x" * 10**6
    parts: dict[str, Any] = {"what": "w"} | {part: [hostile] * 10 if part == "rows" else hostile}
    text = str(PairclfError(parts.pop("what"), **parts))
    assert len(text) < 2 * MAX_MESSAGE
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "\\x1b" in text


def test_a_path_that_is_not_there_is_not_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remedies = {errno.ENOENT: "remedy: check the path", errno.ENOSPC: "remedy: free some disk space"}
    for number, remedy in remedies.items():

        def failing(number: int = number) -> None:
            raise OSError(number, os.strerror(number), "some/file")

        monkeypatch.setattr(cli, "app", failing)
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "some/file" in said
        assert remedy in said
