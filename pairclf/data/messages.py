"""Lists of messages (`role`, `content`) as turns: what is asked and what is answered, with other roles marked."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

Side = Literal["asked", "answered"]

ROLES: dict[str, tuple[Side, str]] = {
    "user": ("asked", "user"),
    "human": ("asked", "user"),
    "prompter": ("asked", "user"),
    "system": ("asked", "system"),
    "developer": ("asked", "system"),
    "assistant": ("answered", "assistant"),
    "gpt": ("answered", "assistant"),
    "model": ("answered", "assistant"),
    "bot": ("answered", "assistant"),
    "chatbot": ("answered", "assistant"),
    "tool": ("answered", "tool"),
    "function": ("answered", "tool"),
    "observation": ("answered", "tool"),
}
"""`{role in lower case: (the side of its texts, its mark)}`, in the words of the chat formats in use."""

_UNMARKED = ("user", "assistant")
_NAMED = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")  # Anthropic/hh-rlhf: each turn, the first too
_FOLLOWED = re.compile(r"(?:\A|\n)<extra_id_1>(User|Assistant)\n")  # nvidia/HelpSteer2: each turn but the first
"""How texts that hold several turns name the next speaker."""

BROKEN_MESSAGES = re.compile(r"\s*\[\s*\{\s*(['\"])(role|content|from|value)\1\s*:")
"""The beginning of a list of messages; in a text that `decoded` leaves as it is, it was not written as JSON."""

Message = Mapping[str, Any]


@dataclass(slots=True)
class Conversation:
    """What is asked and what is answered, a turn each, in turns.

    Attributes:
        asked: texts of users, and marked texts of systems before them; None: a turn without text.
        answered: texts of assistants, and marked texts of tools.
        sound: every role is known, and every content is a text, null, or a list of parts.
        parts: how many parts are no text, by type; `[image]` stands for one in the turn.
    """

    asked: list[str | None]
    answered: list[str | None]
    sound: bool = True
    parts: Counter[str] = field(default_factory=Counter)


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages, with one at least.

    >>> is_messages([{"role": "user", "content": "hi"}]), is_messages([{"from": "gpt", "value": ""}]), is_messages([])
    (True, True, False)
    """
    if not isinstance(value, list) or not value:
        return False
    return all(
        isinstance(item, dict) and ({"role", "content"} <= {*item} or {"from", "value"} <= {*item}) for item in value
    )


def decoded(cell: Any) -> Any:
    """A cell, or the messages that it holds as JSON text: CSVs have them so.

    >>> decoded('[{"role": "user", "content": "hi"}]'), decoded('[{"a": 1}]')
    ([{'role': 'user', 'content': 'hi'}], '[{"a": 1}]')
    """
    if not isinstance(cell, str) or not cell.lstrip().startswith("["):
        return cell
    try:
        value = json.loads(cell, strict=False)
    except (ValueError, RecursionError):
        return cell
    return value if is_messages(value) else cell


def transcript(text: str, *, asked: bool = False) -> list[Message] | None:
    """The messages of a text that names its speakers; None: it does not begin with one.

    `asked`: a user speaks first without being named, as in nvidia/HelpSteer2's prompts of several turns.

    >>> transcript("\\n\\nHuman: hi\\n\\nAssistant: hello")
    [{'role': 'human', 'content': 'hi'}, {'role': 'assistant', 'content': 'hello'}]
    >>> transcript("hi\\n<extra_id_1>Assistant\\nhello\\n<extra_id_1>User\\nwhy?", asked=True)[0]
    {'role': 'user', 'content': 'hi'}
    """
    for pattern in (_NAMED, _FOLLOWED):
        before, *pieces = pattern.split(text)
        if pieces and (not before or (asked and pattern is _FOLLOWED)):
            first = [{"role": "user", "content": before}] if before else []
            named = zip(pieces[::2], pieces[1::2], strict=True)
            return [*first, *({"role": speaker.lower(), "content": content} for speaker, content in named)]
    return None


def has_question(messages: Sequence[Message]) -> bool:
    """Whether one of the messages is a user's."""
    return any(_place(message, "answered")[1] == "user" for message in messages)


def conversation(messages: Sequence[Message]) -> Conversation:
    """The turns of a conversation: messages of one side that follow each other are one turn.

    A turn of a user or an assistant alone is its text. Where others speak in it, each message is marked: `[system]`,
    `[tool]`. An unknown role belongs to the turn in which it stands.

    >>> conversation([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]).asked
    ['[system]\\nBe brief.\\n\\n[user]\\nHi']
    """
    result = Conversation([], [])
    for side, turn in _turns(messages, result):
        if side == "answered":
            if len(result.answered) == len(result.asked):
                result.asked.append(None)
            result.answered.append(turn)
        else:
            result.asked.append(turn)
    return result


def field_turns(messages: Sequence[Message]) -> tuple[list[str | None], bool]:
    """The turns of a field that holds messages, and whether they are sound.

    The turns of the other side than the last one are marked: a prompt may hold earlier answers.

    >>> field_turns([{"role": "assistant", "content": "Yes."}])
    (['Yes.'], True)
    """
    result = Conversation([], [])
    turns = _turns(messages, result)
    own = turns[-1][0]
    marks = {"asked": "[user]\n", "answered": "[assistant]\n"}
    marked = [turn if side == own or turn is None else marks[side] + turn for side, turn in turns]
    return marked, result.sound


def _turns(messages: Sequence[Message], result: Conversation) -> list[tuple[Side, str | None]]:
    side: Side = "asked"
    texts: list[tuple[Side, str, str | None]] = []
    for message in messages:
        side, mark, known = _place(message, side)
        result.sound &= known
        texts.append((side, mark, _text(message, result)))
    return [
        (side, _joined([(mark, text) for _, mark, text in group])) for side, group in groupby(texts, lambda t: t[0])
    ]


def _place(message: Message, before: Side) -> tuple[Side, str, bool]:
    """The side of a message, its mark, and whether its role is known."""
    role = message.get("role", message.get("from"))
    place = ROLES.get(str(role).strip().lower())
    return (*place, True) if place else (before, str(role), False)


def _joined(texts: Sequence[tuple[str, str | None]]) -> str | None:
    marked = any(mark not in _UNMARKED for mark, _ in texts)
    held = [f"[{mark}]\n{text}" if marked else text for mark, text in texts if text is not None]
    return "\n\n".join(held) if held else None


def _text(message: Message, result: Conversation) -> str | None:
    """The text of a message's content and of its calls of tools; None: it has none."""
    content = message.get("content", message.get("value"))
    parts = content if isinstance(content, list) else [content]
    texts = [_part(part, result) for part in parts]
    for key in ("tool_calls", "function_call"):
        if calls := message.get(key):
            texts.append("[tool call]\n" + json.dumps(calls, ensure_ascii=False, default=str))
    held = [text for text in texts if text is not None]
    return "\n".join(held) if held else None


def _part(part: Any, result: Conversation) -> str | None:
    if part is None or isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        result.sound = False
        return json.dumps(part, default=str)
    kind = str(part.get("type") or "text")
    text = part.get("text")
    if kind == "text" or isinstance(text, str):
        result.sound &= text is None or isinstance(text, str)
        return text if isinstance(text, str) else None
    kind = "image" if kind.startswith("image") else kind
    result.parts[kind] += 1
    return f"[{kind}]"
