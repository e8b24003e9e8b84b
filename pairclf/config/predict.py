"""`predict`: scoring rows with trained models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from pairclf.config.section import Section, as_list

Scale = Annotated[float, Field(ge=1e-3, le=1e3)]
"""What logits are divided by or multiplied with. Far outside of this range they overflow, and rows have no scores."""


class Predict(Section):
    swap: Literal["off", "full", "budget", "split"] = Field(
        "full",
        description="test-time augmentation: off (one order), full (the mean of both orders), budget (a second order "
        "for the most uncertain rows while --deadline allows), split (one order per model, alternating AB and BA)",
    )
    layout: Literal["auto", "padded", "packed", "shared"] = Field(
        "auto",
        description="padded: pad rows to the longest; packed: concatenate them; shared: packed, with common prefixes "
        "computed once; auto: the cheapest that the model supports",
    )
    tokens_per_batch: int | None = Field(
        None,
        ge=1,
        description="maximum tokens per forward pass (in padded batches T > 512 tokens count as T^2 / 512); affects "
        "memory and speed, not results; null: 16384 on a GPU, 2048 on a CPU",
    )
    temperature: Scale = Field(
        1.0, description="each order's logits are divided by it before the softmax; `pairclf evaluate` fits it"
    )
    devices: Annotated[list[str], BeforeValidator(as_list)] = Field(
        [], description="a device for each worker, e.g. [cuda:0, cuda:1] or [cpu, cpu]; empty: every GPU, or one CPU"
    )
    parallelism: Literal["auto", "replicas", "pipeline"] = Field(
        "auto",
        description="replicas: the whole model on each device; pipeline: the model's layers split over all devices; "
        "auto: replicas if the model fits on one device",
    )
    backend: Literal["transformers", "vllm"] = Field(
        "transformers", description="inference engine; vllm must be installed and support the model (docs/export.md)"
    )
