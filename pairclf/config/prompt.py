"""`prompt`: examples before each row, for a base that is asked for a label word and not trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pairclf.config.section import Section


class Prompt(Section):
    """Zero-shot or few-shot prompting."""

    k: int = Field(4, ge=0, le=64, description="examples before each row, training rows with their label; 0: zero-shot")
    examples: Literal["fixed", "random", "nearest"] = Field(
        "fixed",
        description="fixed: the same k for all rows; random: drawn for each row, by its id; nearest: those with the "
        "most similar prompts (TF-IDF of their tokens), but for near duplicates of the row",
    )
    pool: int = Field(
        256, ge=1, le=10_000, description="with examples=random or nearest: training rows to choose from; the shortest"
    )
    template: str = Field(
        "",
        description="text of an example, with {field} for each field (or {rounds}), before its label word; empty: what "
        "stands behind {examples} in inputs.template.text",
    )
    max_length: int | None = Field(
        None,
        ge=1,
        description="maximum tokens of an example, label included; null: half of inputs.max_length, shared by k",
    )
    rationale: int = Field(
        0,
        ge=0,
        le=4096,
        description="maximum tokens that the model writes before its label is scored, greedily and up to its end of "
        "turn; 0: none",
    )
    answer_trigger: str = Field(
        "\n\n### Verdict\n", min_length=1, description="with rationale: text between the rationale and the label word"
    )
    calibration: Literal["none", "batch", "contextual"] = Field(
        "none",
        description="divide each class's probability by its mean. batch: over 200 training rows, whose labels are not "
        "looked at; contextual: over rows without content, whose fields are N/A, nothing and [MASK]",
    )

    @model_validator(mode="after")
    def _with_examples(self) -> Prompt:
        fields, names = type(self).model_fields, ("examples", "pool", "template", "max_length")
        changed = [name for name in names if getattr(self, name) != fields[name].default]
        if not self.rationale and self.answer_trigger != fields["answer_trigger"].default:
            raise ValueError("answer_trigger changes nothing with rationale=0, which writes nothing; remove it")
        if self.k and self.rationale:
            raise ValueError(f"k={self.k} shows examples without a rationale; set k=0, or rationale=0")
        if self.k == 0 and changed:
            raise ValueError(f"{changed[0]} changes nothing with k=0, which shows no examples; remove it or set k")
        if self.examples == "fixed" and "pool" in changed:
            raise ValueError(f"pool={self.pool} changes nothing with examples=fixed; remove it")
        return self
