"""A chat template is rendered as transformers does it, and can reach, waste or delay nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pairclf.config import resolve
from pairclf.errors import ConfigError
from pairclf.inputs import chat
from pairclf.inputs.chat import render_chat_template
from pairclf.inputs.tokenise import settle_template
from pairclf.model.backbone import load_tokenizer

MESSAGES = [{"role": "user", "content": "é {prompt} \u2028"}]
SOUND = "{% for one in messages %}<start_of_turn>{{ one.content | trim }}<end_of_turn>\n{% endfor %}{{ date_string }}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
ENDLESS = LOOP + "{% endfor %}{% endfor %}"
DOUBLED = "{% set n = namespace(x='a' * 1000) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}"


@pytest.fixture
def tokenizer(base_of: Callable[[str], Path]) -> Any:
    return load_tokenizer(str(base_of("llama")))


def test_it_writes_what_transformers_writes(tokenizer: Any) -> None:
    tokenizer.chat_template = SOUND
    told = {"add_generation_prompt": True, "date_string": "today"}
    wanted = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **told)
    assert "é {prompt}" in wanted
    assert render_chat_template(tokenizer, MESSAGES, **told) == wanted


@pytest.mark.parametrize(
    "escape",
    [
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.__builtins__.open('CANARY', 'w') }}",
        "{% include 'CANARY' %}",
    ],
)
def test_the_sandbox_holds(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, escape: str) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer.chat_template = escape
    with pytest.raises(
        ConfigError, match=r"(?s)chat template fails: (SecurityError|UndefinedError|TypeError|Template)"
    ):
        render_chat_template(tokenizer, MESSAGES)
    assert list(tmp_path.iterdir()) == []


def test_without_the_sandbox_the_escape_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The canary above would be there."""
    from jinja2 import Environment

    monkeypatch.chdir(tmp_path)
    Environment().from_string("{{ cycler.__init__.__globals__.os.system('touch CANARY') }}").render()
    assert (tmp_path / "CANARY").exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ENDLESS, "ended at its limits"),
        ("{{ 'a' * 10 ** 11 }}", "MemoryError"),
        (DOUBLED, "MemoryError"),
        ("{{ 'a' * 2000000 }}", "writes 2,000,000 characters"),
        ("{#" + "x" * 2_000_000 + "#}", "has more than"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{" + "(" * 5000 + ")" * 5000 + "}}", "chat template"),
        ("{{ raise_exception('no ' * 5000) }}", r"characters\)"),
    ],
)
def test_time_memory_and_size_are_limited(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str, message: str
) -> None:
    monkeypatch.setattr(chat, "CPU_SECONDS", 1)
    monkeypatch.setattr(chat, "MEMORY", 64 << 20)
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=message) as raised:
        render_chat_template(tokenizer, MESSAGES)
    assert len(str(raised.value)) < 3000


def test_the_wording_is_written_out_within_the_limits(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ 'a' * 10 ** 11 }}"
    config = resolve({"inputs": {"template": "judge"}})
    with pytest.raises(ConfigError, match="MemoryError"):
        settle_template(config.inputs.template, tokenizer)


def test_a_child_that_hangs_is_given_up(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "PATIENCE", 0.1)
    monkeypatch.setattr(chat, "_limit", lambda: chat.select.select([], [], []))  # for ever
    tokenizer.chat_template = SOUND
    with pytest.raises(ConfigError, match="ended at its limits"):
        render_chat_template(tokenizer, MESSAGES)
