"""`inputs`: how a row's texts become tokens. `wording.py` fills in what a template leaves out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pairclf.config.section import Section
from pairclf.task import Label

Truncation = Literal["head", "tail", "head_tail"]


class Template(Section):
    """The text around the fields."""

    preset: Literal["tagged", "judge"] = Field(
        "tagged", description="tagged: a heading before each field; judge: an instruction in the model's chat template"
    )
    turns: Literal["sides", "interleaved"] = Field(
        "sides",
        description="sides: all turns of a field together; interleaved: turn by turn (prompt, A, B, prompt, A, B)",
    )
    instruction: str | None = Field(None, description="text at the start, never truncated; null: the preset's")
    text: str = Field("", description="template with {field} for each field, or with {rounds}; empty: the preset's")
    round: str = Field(
        "", description="with turns=interleaved: template of one turn, with {field} for each field; empty: the preset's"
    )
    labels: dict[Label, str] = Field(
        {},
        description="text in place of {label} for each class, with readout=label_tokens and a multi_label task; empty: "
        "its name, with blanks for underscores",
    )
    turn_separator: str = Field("\n\n", description="text between two turns of one field")
    apply_chat_template: bool | None = Field(
        None, description="wrap the text in the tokenizer's chat template as one user message; null: the preset's"
    )
    add_special_tokens: bool | None = Field(
        None,
        description="add the special tokens that tokenizer(text) adds, such as BOS; null: only without "
        "apply_chat_template, as a chat template writes its own",
    )


def as_template(value: Any) -> Any:
    """A preset's name as its mapping; anything else is left to pydantic."""
    return {"preset": value} if isinstance(value, str) else value


class Inputs(Section):
    max_length: int = Field(2048, ge=1, description="maximum tokens of one row in one order, template included")
    template: Annotated[Template, BeforeValidator(as_template)] = Field(
        default_factory=Template, description="name of a preset (tagged, judge), or a mapping"
    )
    budget_shares: dict[str, float] = Field(
        {},
        description="fraction of the token budget for each field when all are too long, from 0.001 to 1; what a field "
        "leaves unused goes to the others; empty: equal",
    )
    min_tokens: dict[str, int] = Field(
        {}, description="tokens that each field keeps before budget_shares apply; empty: 1 each"
    )
    truncation: dict[str, Truncation] = Field(
        {}, description="part of each field that is kept when it is too long; empty: head_tail for each"
    )
    head_ratio: float | dict[str, float] = Field(
        0.5,
        description="with head_tail: fraction of the kept tokens that is the head; one number, or one for each field",
    )
    truncation_marker: str = Field(
        " [… {cut} tokens cut …] ",
        description="text in place of truncated tokens, with their number for {cut}; counts towards max_length",
    )
    num_proc: int | None = Field(
        None, ge=1, description="processes that tokenise; null: one per core if there are enough rows"
    )
