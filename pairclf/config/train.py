"""`train`: fine-tuning. A setting that transformers' `TrainingArguments` has too is called as there."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pairclf.config.section import Section


class Distill(Section):
    """Teachers' scores as a second target.

    The loss is `ce_weight * CE(labels) + kl_weight * T^2 * KL(teacher || student) + cosine_weight * (1 - cos)`, in the
    form of the LMSYS winner's; `T^2` keeps gradients of one size (https://arxiv.org/abs/1503.02531).
    """

    scores: list[Path] = Field(
        [],
        description="score files of teachers (parquet with id and a probability for each class), relative to the "
        "working directory; several teachers of a row are averaged",
    )
    ce_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy with the labels")
    kl_weight: float = Field(1.0, ge=0, description="weight of the KL divergence from the teachers' probabilities")
    temperature: float = Field(1.0, gt=0, description="temperature of teachers and student in the KL divergence")
    cosine_weight: float = Field(0.0, ge=0, description="weight of the cosine distance between the probabilities")
    allow_unknown_provenance: bool = Field(
        False, description="accept scores that don't record whether their models were trained on the row"
    )


Optimizer = Literal["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "adafactor"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Train(Section):
    num_train_epochs: float = Field(1.0, gt=0, description="passes over the training rows; may be a fraction")
    max_steps: int | None = Field(
        None,
        ge=0,
        description="stop after N optimizer steps; null: after num_train_epochs; 0: the base as it is, zero-shot",
    )
    global_batch_size: int = Field(16, ge=1, description="rows per optimizer step, over all processes")
    per_device_train_batch_size: int = Field(
        8, ge=1, description="maximum rows per forward pass and process; affects memory and speed, not results"
    )
    tokens_per_batch: int | None = Field(
        16_384,
        ge=1,
        description="maximum tokens per forward pass, padding and both orders included (a longer row runs alone; in "
        "padded batches T > 512 tokens count as T^2 / 512); affects memory and speed, not results; null: no limit",
    )
    layout: Literal["padded", "packed", "shared"] = Field(
        "packed",
        description="padded: pad the rows of a batch to the longest; packed: concatenate them without padding; shared: "
        "packed, with common prefixes computed once (model.readout=reward has no other)",
    )
    optim: Optimizer = Field("adamw_torch", description="8bit: 8-bit states; paged: states can move to CPU memory")
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate of the adapters (or of the whole model)")
    head_learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate of the head; null: learning_rate"
    )
    lora_a_learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate of LoRA's A matrices; null: learning_rate"
    )
    lora_b_learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate of LoRA's B matrices; null: learning_rate"
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor of the learning rate from each layer to the one below it, and from the lowest to the "
        "embeddings; the top layer and the head keep theirs",
    )
    adam_betas: tuple[float, float] = Field((0.9, 0.999), description="decay rates of AdamW's first and second moment")
    adam_epsilon: float = Field(1e-8, gt=0, description="term that AdamW adds to the denominator for stability")
    weight_decay: float = Field(0.01, ge=0, description="weight decay; not applied to norms, biases and the head")
    warmup_ratio: float = Field(
        0.1, ge=0, lt=1, description="fraction of the steps in which the learning rate rises linearly from 0"
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        "linear", description="learning rate schedule after the warm-up; linear and cosine decay to 0"
    )
    max_grad_norm: float | None = Field(1.0, gt=0, description="global gradient norm to clip to; null: no clipping")
    label_smoothing_factor: float = Field(
        0.0, ge=0, lt=1, description="fraction of each target that is spread evenly over all classes"
    )
    loss: Literal["labels", "vocabulary"] = Field(
        "labels",
        description="cross-entropy over the labels, or (model.readout=label_tokens) over the whole vocabulary at the "
        "place where the label is read",
    )
    swap: Literal["none", "random", "both"] | None = Field(
        None,
        description="order augmentation: none (as in the file), random (one random order per row and step), both (both "
        "orders in the same step); null: both for a decoder or with consistency_weight, none for an encoder",
    )
    consistency_weight: float = Field(
        0.0, ge=0, description="weight of the symmetric KL divergence between the predictions of a row's two orders"
    )
    center_rewards_coefficient: float | None = Field(
        None,
        gt=0,
        description="with model.readout=reward: weight of the squared sum of a row's two rewards, which keeps their "
        "mean at 0; null: none",
    )
    distill: Distill = Field(default_factory=Distill, description="distillation from teachers' scores")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay per step of an exponential moving average of the weights, which is evaluated and saved in "
        "place of the last weights; null: no average",
    )
    average_checkpoints: int = Field(
        1, ge=1, description="save the mean of the weights of the last N checkpoints; 1: no averaging"
    )
    eval_steps: int | None = Field(
        None, ge=1, description="evaluate on the held-out rows every N optimizer steps; null: only at the end"
    )
    eval_rows: int | None = Field(
        None, ge=1, description="evaluate on a random sample of N held-out rows (drawn by seed); null: on all"
    )
    metric_for_best_model: str = Field(
        "log_loss", description="metric that compares two evaluations: one of docs/training.md"
    )
    keep_weights: Literal["last", "best"] = Field(
        "last", description="weights that are saved: of the last step, or of the best evaluation"
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="stop after N evaluations without improvement; null: no early stopping"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, about 30% slower"
    )
    save_steps: int | None = Field(
        200, ge=1, description="write a checkpoint to resume from every N optimizer steps; null: none"
    )
    save_total_limit: int = Field(2, ge=1, description="maximum checkpoints on disk; older ones are deleted")
    max_skipped_steps: int = Field(
        10, ge=1, description="stop after N consecutive steps whose loss or gradient is not finite"
    )
    max_hours: float | None = Field(
        None,
        ge=0,
        description="refuse, before its first step, a training of a fold for which the fit check expects more hours; "
        "null: no limit",
    )
    logging_steps: int = Field(10, ge=1, description="write a line of metrics.jsonl every N optimizer steps")
    report_to: list[Tracker] = Field([], description="experiment trackers that get the lines of metrics.jsonl too")

    @property
    def orders(self) -> int:
        """Orders in which one step shows a row."""
        return 2 if self.swap in (None, "both") else 1

    @model_validator(mode="after")
    def _legal(self) -> Train:
        for name in ("keep_weights", "early_stopping_patience"):
            if getattr(self, name) not in ("last", None) and self.eval_steps is None:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs eval_steps, the steps between two evaluations on the held-out "
                    "rows"
                )
        if self.average_checkpoints > 1:
            if self.save_steps is None or self.save_total_limit < self.average_checkpoints:
                raise ValueError(
                    f"average_checkpoints={self.average_checkpoints} averages checkpoints on disk: set save_steps, and "
                    f"save_total_limit to {self.average_checkpoints} or more"
                )
            if self.ema_decay is not None or self.keep_weights == "best":
                raise ValueError(
                    "average_checkpoints, ema_decay and keep_weights=best each choose the weights that are saved; "
                    "ema_decay can be combined with keep_weights=best, average_checkpoints with neither"
                )
        if self.consistency_weight and self.swap not in (None, "both"):
            raise ValueError(f"consistency_weight compares a row's two orders and needs swap=both, not {self.swap}")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas {self.adam_betas} must be from 0 to 1, 1 excluded")
        return self
