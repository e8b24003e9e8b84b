"""The preset templates `tagged` and `judge`, and the completion of a template from preset and task."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pairclf.config.inputs import Template
from pairclf.config.prompt import Prompt
from pairclf.task import SIDE, Task

PLACE = re.compile(r"\{([^\W\d]\w*)\}")
"""What may be a placeholder in a template; other braces are text."""


def complete_template(template: Template, task: Task, *, one_sided: bool = False, examples: bool = False) -> None:
    """Fill in what a template leaves out, and check that it shows every field once.

    Args:
        template: as the config has it.
        task: its fields.
        one_sided: whether it shows one of the two sides, in the place `SIDE`.
        examples: whether it has a place for examples, before its text if it does not name it.

    Raises:
        ValueError: a field is missing or stands twice, `round` and `text` contradict each other, or a field stands
            behind the one side.
    """
    fields_shown = task.places(one_sided=one_sided)
    judge = template.preset == "judge"
    heading = "[{}]" if judge else "### {}"
    fields = "".join(f"\n\n{heading.format(name.replace('_', ' ').capitalize())}\n{{{name}}}" for name in fields_shown)
    interleaved = template.turns == "interleaved"
    if one_sided and interleaved:
        raise ValueError("inputs.template.turns=interleaved shows both sides, and model.readout=reward one; set sides")
    if template.instruction is None:
        template.instruction = _instruction(task, one_sided=one_sided) if judge and not template.text else ""
    if template.apply_chat_template is None:
        template.apply_chat_template = judge
    if template.add_special_tokens is None:
        template.add_special_tokens = not template.apply_chat_template
    if not template.round and interleaved:
        template.round = fields
    if not template.text:
        ending = f"\n\n[End]\n{_question(task, one_sided=one_sided)}" if judge else "\n\n### Verdict\n"
        template.text = ("{rounds}" if interleaved else fields) + ending
    if examples and "{examples}" not in template.text:
        begins = template.round if template.text.startswith("{rounds}") else template.text
        template.text = "{examples}" + ("" if begins[:1].isspace() else "\n\n") + template.text
    if template.round and not interleaved:
        raise ValueError("inputs.template.round needs inputs.template.turns=interleaved")
    places = dict.fromkeys(fields_shown, "round" if interleaved else "text")
    places |= ({"rounds": "text"} if interleaved else {}) | ({"examples": "text"} if examples else {})
    for key in ("instruction", "text", "round"):
        names = [name for name, place in places.items() if place == key]
        _check_places(getattr(template, key), names, f"inputs.template.{key}")
    if one_sided and PLACE.findall(template.text)[-1] != SIDE:
        raise ValueError(
            f"inputs.template.text must have {{{SIDE}}} behind the other fields: what stands before it is computed "
            "once for both sides"
        )
    if not template.apply_chat_template and template.text.endswith(tuple(f"{{{name}}}" for name in places)):
        raise ValueError("inputs.template.text must not end with a field: the logits are read after its last words")


def complete_example(prompt: Prompt, template: Template, task: Task, words: Sequence[str]) -> None:
    """Fill in the template of an example, and check that it shows every field once.

    Args:
        prompt: as the config has it.
        template: completed.
        task: its fields.
        words: for the classes, one of which follows: in a line of its own, unless white space parts it from the text.

    Raises:
        ValueError: a field is missing or stands twice.
    """
    if not prompt.template:
        text = template.text.partition("{examples}")[2]
        parted = text[-1:].isspace() or all(word[:1].isspace() for word in words)
        prompt.template = text + ("" if parted else "\n")
    _check_places(prompt.template, ["rounds"] if template.turns == "interleaved" else task.fields, "prompt.template")


def _check_places(text: str, names: Sequence[str], key: str) -> None:
    """Do nothing if a text of the template has `{name}` once for each name, and no other.

    Raises:
        ValueError: otherwise.
    """
    for name in names:
        if text.count(f"{{{name}}}") != 1:
            raise ValueError(f"{key} must contain {{{name}}} exactly once")
    if unknown := sorted(set(PLACE.findall(text)) - set(names)):
        listed = ", ".join(f"{{{name}}}" for name in unknown)
        raise ValueError(f"{key} contains {listed}; allowed placeholders: {list(names) or 'none'}")


def _instruction(task: Task, *, one_sided: bool) -> str:
    if one_sided or not task.swappable:
        return "Read what follows and judge it."
    return "Two assistants answered the same prompt. Judge which answer a person would prefer."


def _question(task: Task, *, one_sided: bool) -> str:
    """Asks for the classes by words that stand in the template: `response a, response b or tie`."""
    if one_sided:
        return "How good is it?"
    words = [name.rsplit("_", 1)[-1] if task.swappable else name for name in task.classes]
    for field, name in zip(task.swap_fields or (), task.swap_classes or (), strict=True):
        words[task.classes.index(name)] = field
    *first, last = (word.replace("_", " ") for word in words)
    return f"Which is it: {', '.join(first)} or {last}?" if first else f"Is it {last}?"
