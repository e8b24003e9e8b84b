"""The preset templates `tagged` and `judge`, and the completion of a template from preset and task."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pairclf.config.inputs import Template
from pairclf.config.prompt import Prompt
from pairclf.task import SIDE, Task

PLACE = re.compile(r"\{([^\W\d]\w*)\}")
"""What may be a placeholder in a template; other braces are text."""

LABEL = "label"
"""The place of a label's text in a template that asks for each label by itself."""


def complete_template(
    template: Template,
    task: Task,
    *,
    one_sided: bool = False,
    by_label: bool = False,
    examples: bool = False,
    rationale: bool = False,
) -> None:
    """Fill in what a template leaves out, and check that it shows every field once.

    Args:
        template: as the config has it.
        task: its fields.
        one_sided: whether it shows one of the two sides, in the place `SIDE`.
        by_label: whether it asks for one label at a time, in the place `LABEL`.
        examples: whether it has a place for examples, before its text if it does not name it.
        rationale: whether the model writes a rationale behind it.

    Raises:
        ValueError: a field is missing or stands twice, `round` and `text` contradict each other, a field stands behind
            the one side or the label, or `labels` are not those of the task.
    """
    fields_shown = task.places(one_sided=one_sided)
    _complete_labels(template, task, by_label=by_label)
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
        label = "\n\n### Label\n{label}" if by_label else ""
        question = "Is it {label}? Answer yes or no." if by_label else _question(task, one_sided=one_sided)
        tagged = "\n\n### Rationale\n" if rationale else f"{label}\n\n### Verdict\n"
        ending = f"\n\n[End]\n{question}" if judge else tagged
        template.text = ("{rounds}" if interleaved else fields) + ending
    if examples and "{examples}" not in template.text:
        begins = template.round if template.text.startswith("{rounds}") else template.text
        template.text = "{examples}" + ("" if begins[:1].isspace() else "\n\n") + template.text
    if template.round and not interleaved:
        raise ValueError("inputs.template.round needs inputs.template.turns=interleaved")
    places = dict.fromkeys(fields_shown, "round" if interleaved else "text")
    places |= ({"rounds": "text"} if interleaved else {}) | ({"examples": "text"} if examples else {})
    places |= {LABEL: "text"} if by_label else {}
    for key in ("instruction", "text", "round"):
        names = [name for name, place in places.items() if place == key]
        _check_places(getattr(template, key), names, f"inputs.template.{key}")
    branch, count = (SIDE, "both sides") if one_sided else (LABEL, "all labels")
    if (one_sided or by_label) and PLACE.findall(template.text)[-1] != branch:
        raise ValueError(
            f"inputs.template.text must have {{{branch}}} behind the other fields: what stands before it is computed "
            f"once for {count}"
        )
    if not template.apply_chat_template and template.text.endswith(tuple(f"{{{name}}}" for name in places)):
        raise ValueError("inputs.template.text must not end with a field: the logits are read after its last words")


def _complete_labels(template: Template, task: Task, *, by_label: bool) -> None:
    """Fill in the labels' texts, and check that there is one for each.

    Raises:
        ValueError: there is not; nothing shows them; or a field has the name of their place.
    """
    if not by_label:
        if template.labels:
            raise ValueError(
                "inputs.template.labels changes nothing: it needs model.readout=label_tokens and a multi_label task"
            )
        return
    if LABEL in task.fields:
        raise ValueError(f"task.fields {list(task.fields)}: {{{LABEL}}} is a label's place; name the field otherwise")
    template.labels = template.labels or {name: name.replace("_", " ") for name in task.classes}
    if set(template.labels) != set(task.classes) or len(set(template.labels.values())) < len(task.classes):
        raise ValueError(
            f"inputs.template.labels {template.labels} must give each class a text of its own: {list(task.classes)}"
        )
    template.labels = {name: template.labels[name] for name in task.classes}


def complete_example(
    prompt: Prompt, template: Template, task: Task, words: Sequence[str], *, by_label: bool = False
) -> None:
    """Fill in the template of an example, and check that it shows every field once.

    Args:
        prompt: as the config has it.
        template: completed.
        task: its fields.
        words: for the classes, one of which follows: in a line of its own, unless white space parts it from the text.
        by_label: whether it asks for one label, in the place `LABEL`.

    Raises:
        ValueError: a field is missing or stands twice.
    """
    if not prompt.template:
        text = template.text.partition("{examples}")[2]
        parted = text[-1:].isspace() or all(word[:1].isspace() for word in words)
        prompt.template = text + ("" if parted else "\n")
    places = ["rounds"] if template.turns == "interleaved" else [*task.fields]
    _check_places(prompt.template, [*places, LABEL] if by_label else places, "prompt.template")


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
