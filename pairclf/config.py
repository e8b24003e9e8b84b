"""Every setting, once: its type, unit, default and help.

YAML files, `key=value` overrides, `pairclf config` and the docs all derive from the classes below. Unknown
keys are errors that name the nearest key, and all errors of a config are shown at once.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pairclf.errors import ConfigError, cut, quoted
from pairclf.files import read_plain
from pairclf.task import LMSYS, Task, as_task
from pairclf.trust import REMOTE_CODE

MAX_YAML, MAX_NODES = 1 << 20, 100_000
"""Bytes of a YAML file, and values that it may stand for once every alias is written out."""

MAX_ISSUES = 50
"""Settings of which an error says what is wrong with them."""


class Section(BaseModel):
    """A group of settings; unknown names are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


_S = TypeVar("_S", bound=Section)


def as_list(value: Any) -> Any:
    """One name, or one mapping, as a list of one."""
    return [value] if isinstance(value, str | Path | Mapping) else value


def as_source(value: Any) -> Any:
    """A file's name as a source; anything else is left to pydantic."""
    return {"files": [value]} if isinstance(value, str | Path) else value


class Source(Section):
    """Files of rows whose columns have other names, or that are to count otherwise: an entry of `data.train`."""

    files: Annotated[list[Path], BeforeValidator(as_list)] = Field(min_length=1, description="file names or globs")
    columns: dict[str, str | None] = Field(
        {}, description="our column: the files' column, e.g. {prompt: question}; id: null numbers the rows"
    )
    label_column: str | None = Field(
        None, description="the files' column that names the class; null: as the task has it"
    )
    labels: dict[str, str] = Field({}, description="label as the files have it: class, e.g. {A: winner_model_a}")
    id_prefix: str = Field("", description="text put before every id, so that ids of several sets stay apart")
    weight: float = Field(1.0, gt=0, description="weight of these rows in the loss")
    ignore_columns: list[str] | Literal["all"] = Field(
        [], description="further columns to accept and not read; all: any (the mapping says which are read)"
    )
    exclude_overlap: list[Path] = Field(
        [], description="files or globs that must stay unseen: rows with a prompt (nearly) equal to one of theirs go"
    )
    train_only: bool = Field(
        False, description="rows are trained on in every fold and never held out (pseudo-labels, extra sets)"
    )
    escape: Literal["backslash"] | None = Field(
        None, description="backslash: a backslash in the CSVs takes the next character as it is; null: RFC 4180"
    )


class Rules(Section):
    """What is done about each thing that `pairclf check` finds.

    keep: as it is; fix: repaired as described; drop: the row goes (training rows alone); error: nothing runs.
    Test rows are repaired where a repair exists and kept otherwise, but ids must be there, once each.
    """

    missing_id: Literal["error", "fix", "drop"] = Field("error", description="no id; fix: the row's number in its file")
    duplicate_id: Literal["error", "fix", "drop"] = Field(
        "error", description="an id that stood before; fix: #2, #3 ... is put behind it; drop: the later rows go"
    )
    bad_label: Literal["error", "drop"] = Field("error", description="no class of the task, or no probabilities")
    undecodable: Literal["error", "fix", "drop"] = Field(
        "error", description="a cell that is no list of turns; fix: its text is one turn"
    )
    missing_cell: Literal["keep", "drop", "error"] = Field("keep", description="an empty cell: one turn without text")
    null_literal: Literal["keep", "drop", "error"] = Field("keep", description="the word null as a cell: the same")
    null_list: Literal["keep", "drop", "error"] = Field("keep", description="[null], a list of nulls alone: the same")
    null_turn: Literal["keep", "drop", "error"] = Field("keep", description="a null among texts: a turn without text")
    no_turns: Literal["keep", "drop", "error"] = Field("keep", description="[], a list without turns")
    empty_turn: Literal["keep", "drop", "error"] = Field("keep", description='"" or white space as a turn')
    empty_prompt: Literal["keep", "drop", "error"] = Field(
        "keep", description="no text in the first field; such rows share no group in the folds"
    )
    one_side_empty: Literal["keep", "drop", "error"] = Field(
        "keep", description="no text on one side: it tends to lose"
    )
    both_sides_empty: Literal["keep", "drop", "error"] = Field("keep", description="no text on either side")
    identical_with_winner: Literal["keep", "fix", "drop", "error"] = Field(
        "keep", description="equal sides, and one won; fix: both sides share the winner's part of the label"
    )
    identical_without_winner: Literal["keep", "drop", "error"] = Field("keep", description="equal sides, and none won")
    surrogate: Literal["fix", "drop", "error"] = Field(
        "fix", description="half a surrogate pair, which UTF-8 can't hold; fix: U+FFFD stands for it"
    )
    control_character: Literal["keep", "fix", "drop", "error"] = Field(
        "keep", description="control characters besides tab and line breaks; fix: they are removed"
    )
    turn_counts_differ: Literal["keep", "drop", "error"] = Field(
        "keep", description="fields with unlike numbers of turns"
    )
    duplicate_row: Literal["keep", "drop", "error"] = Field(
        "keep", description="the same texts and label again; drop: the later rows go"
    )
    conflicting_label: Literal["keep", "fix", "drop", "error"] = Field(
        "keep",
        description="the same texts, in either order, with another label (people disagree); fix: each gets the mean "
        "label, in which rows count by their weight, and train_only rows only where no other has the texts",
    )
    mirrored_pair: Literal["keep", "drop", "error"] = Field(
        "keep", description="a pair that also stands with its sides exchanged; drop: the later rows go"
    )
    prompt_overlap: Literal["keep", "drop", "error"] = Field(
        "keep", description="a prompt that stood in an earlier file; drop: the later file's rows go"
    )


class Data(Section):
    folder: Path = Field(Path("."), description="folder that the file names below are relative to")
    train: Annotated[list[Annotated[Source, BeforeValidator(as_source)]], BeforeValidator(as_list)] = Field(
        [],
        description="labelled files (.csv, .parquet, .jsonl) or globs; or mappings of files, columns, label_column, "
        "labels, id_prefix, weight, ignore_columns, exclude_overlap, train_only, escape (docs/data.md)",
    )
    test: Path | None = Field(None, description="unlabelled file to predict")
    sample_submission: Path | None = Field(None, description="file whose ids, order and columns a submission must have")
    max_rows: int | None = Field(None, ge=1, description="read no more than the first so many rows; null: all")
    ignore_columns: list[str] = Field([], description="further columns of training files to accept and not read")
    rules: Rules = Field(default_factory=Rules, description="what is done about each flaw that `pairclf check` finds")
    cache: Path | None = Field(None, description="folder of token caches; null: tokens/ in the run folder")

    def path(self, name: Path) -> Path:
        return self.folder / name

    @property
    def names(self) -> list[Path]:
        """The files and globs of `train`, as they are written."""
        return [name for source in self.train for name in source.files]

    @property
    def sources(self) -> list[Source]:
        """The entries of `train` with names relative to the working directory, and `ignore_columns` for each.

        Those that are `train_only` stand last: of two equal rows the first stays, and it may be held out.
        """
        made = []
        for one in self.train:
            ignored = "all" if one.ignore_columns == "all" else [*one.ignore_columns, *self.ignore_columns]
            changes = {
                "files": [self.path(name) for name in one.files],
                "exclude_overlap": [self.path(name) for name in one.exclude_overlap],
                "ignore_columns": ignored,
            }
            made.append(one.model_copy(update=changes))
        return sorted(made, key=lambda source: source.train_only)


class Folds(Section):
    n: int = Field(5, ge=2, description="number of folds; rows with the same prompt share a fold")
    near: float | None = Field(
        0.8,
        gt=0,
        le=1,
        description="prompts at least so alike (Jaccard index of 5-grams of characters) share a fold; null: equal",
    )
    stable: bool = Field(
        False, description="a row's fold hangs on its prompt and on rows before it alone: appended rows move no old one"
    )
    run: list[int] | None = Field(None, min_length=1, description="folds that `cv` trains, from 0; null: all")


class Template(Section):
    """The wording around the fields. What is not given follows from the rest."""

    preset: Literal["tagged", "judge"] = Field(
        "tagged", description="wording: tagged (headings), or judge (a task for a chat model, in its chat template)"
    )
    turns: Literal["sides", "interleaved"] = Field(
        "sides", description="each field's turns together, or turn by turn: prompt, A, B, prompt, A, B"
    )
    instruction: str | None = Field(None, description="text that stands first; never cut; null: the preset's")
    text: str = Field("", description="the wording, with {field} for each field, or {rounds}; empty: the preset's")
    round: str = Field(
        "", description="interleaved: the wording of one turn, with {field} for each; empty: the preset's"
    )
    turn_break: str = Field("\n\n", description="text between two turns of one field")
    chat: bool | None = Field(
        None, description="put the wording into the tokenizer's chat template; null: the preset's"
    )
    add_special_tokens: bool | None = Field(
        None,
        description="put before and after the wording what tokenizer(text) puts there, such as BOS; null: without chat "
        "alone, as a chat template writes its own",
    )


def as_template(value: Any) -> Any:
    """A preset's name as its mapping; anything else is left to pydantic."""
    return {"preset": value} if isinstance(value, str) else value


Cut = Literal["head", "tail", "head_tail"]


class Inputs(Section):
    max_length: int = Field(2048, ge=1, description="budget for one row in one order, in tokens, template included")
    template: Annotated[Template, BeforeValidator(as_template)] = Field(
        default_factory=Template, description="tagged, judge, or the wording spelled out"
    )
    shares: dict[str, float] = Field(
        {}, description="a field's share of the budget if all are too long, 0.001 to 1; empty: alike. A rest goes on"
    )
    minimums: dict[str, int] = Field({}, description="tokens that a field keeps before shares count; empty: 1 each")
    cut: dict[str, Cut] = Field({}, description="what stays of a field that is too long; empty: head_tail for each")
    head_ratio: float | dict[str, float] = Field(
        0.5, description="under head_tail, the part of what stays that is the head; one number, or one a field"
    )
    marker: str = Field(
        " [… {cut} tokens cut …] ",
        description="text where something was cut, {cut} tokens of it; counted in the budget",
    )
    processes: int | None = Field(
        None, ge=1, description="processes that tokenise; null: one a core, if it is worth it"
    )


class Lora(Section):
    rank: int = Field(16, ge=1, description="rank of the adapters")
    alpha: int = Field(32, ge=1, description="scale; the adapters' output is multiplied by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout before the adapters")
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = Field(
        "all-linear", description="names of the linear modules that get adapters, or all-linear (head excluded)"
    )
    first_layer: int = Field(0, ge=0, description="layers below this one carry no adapter")
    dora: bool = Field(False, description="train the magnitude of each weight apart from its direction (DoRA)")
    rslora: bool = Field(False, description="multiply by alpha / sqrt(rank) instead (rsLoRA)")


class Model(Section):
    base: str = Field(
        "embedded:gemma2-tiny", description="base model: a folder, a hub id, or embedded:NAME (shipped with pairclf)"
    )
    quantization: Literal["none", "nf4", "int8"] = Field("nf4", description="how the frozen base weights are stored")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of computation; auto: bfloat16 where the GPU has it, float16 on a T4, float32 on CPU"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="attention implementation; auto: pairclf's own, which reads padded and packed batches"
    )
    lora: Lora | None = Field(default_factory=Lora, description="adapters; null: the whole model is trained")
    head: Literal["linear", "two_layer"] = Field(
        "linear", description="from a hidden state to logits: one linear layer, or two with a GELU between them"
    )
    pooling: Literal["last", "mean"] = Field(
        "last", description="the hidden state that the head reads: the last token's, or the mean over the sequence"
    )
    label_words: dict[str, str] = Field(
        {}, description="class: word; a linear head starts from the rows of the base's lm_head for these words"
    )

    @model_validator(mode="before")
    @classmethod
    def _trusts_nobody(cls, tree: Any) -> Any:
        """Files of older versions say `trust_remote_code: false`, which is what holds now; none may say `true`."""
        if not isinstance(tree, Mapping) or "trust_remote_code" not in tree:
            return tree
        if tree["trust_remote_code"] is not False:
            raise ValueError(
                "trust_remote_code is not a setting any more: remove this line, and give "
                f"{REMOTE_CODE} on the command line if you trust the model's code"
            )
        return {name: value for name, value in tree.items() if name != "trust_remote_code"}

    @model_validator(mode="after")
    def _legal(self) -> Model:
        if self.quantization != "none" and self.lora is None:
            raise ValueError(
                f"quantization={self.quantization} freezes the base weights, so lora=null leaves nothing to train but "
                "the head; set quantization=none or give lora"
            )
        if self.label_words and self.head != "linear":
            raise ValueError(f"label_words fill a linear head; head={self.head} has no such rows")
        return self


class Distill(Section):
    """Teachers' scores as a second target: `ce * CE(labels) + kl * T^2 * KL(teacher || student) + cosine * (1 - cos)`.

    The form of the LMSYS winner's loss; `T^2` keeps gradients of one size (https://arxiv.org/abs/1503.02531).
    """

    scores: list[Path] = Field(
        [],
        description="scores of teachers (parquet: id, a probability a class), by their own paths; a row's teachers are "
        "averaged",
    )
    ce: float = Field(1.0, ge=0, description="weight of the cross-entropy with the labels")
    kl: float = Field(1.0, ge=0, description="weight of the divergence from the teachers' probabilities")
    temperature: float = Field(1.0, gt=0, description="softens teachers and student alike in the divergence")
    cosine: float = Field(0.0, ge=0, description="weight of 1 - cosine between the two vectors of probabilities")
    unproven: bool = Field(
        False, description="accept scores that do not say whether their models were trained on the row"
    )


Optimizer = Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "adafactor"]
Metric = Literal["log_loss", "accuracy", "expected_calibration_error"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Train(Section):
    epochs: float = Field(1.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="stop after so many optimizer steps; null: by epochs")
    rows_per_step: int = Field(16, ge=1, description="rows behind one optimizer step, over all processes")
    rows_per_batch: int = Field(8, ge=1, description="rows in one forward pass of one process; memory, not results")
    tokens_per_batch: int | None = Field(
        16_384,
        ge=1,
        description="tokens in one forward pass (padding and both orders counted); a row that is longer goes alone; "
        "memory, not results; null: no limit",
    )
    layout: Literal["padded", "packed"] = Field(
        "packed", description="padded: a batch's rows side by side, filled up to the longest; packed: end to end"
    )
    optimizer: Optimizer = Field("adamw", description="8bit: states of 8 bits; paged: states that may leave the GPU")
    learning_rate: float = Field(1e-4, gt=0, description="peak rate of the adapters (or of the whole model)")
    head_learning_rate: float | None = Field(None, gt=0, description="peak rate of the head; null: learning_rate")
    lora_a_learning_rate: float | None = Field(None, gt=0, description="peak rate of LoRA's A; null: learning_rate")
    lora_b_learning_rate: float | None = Field(None, gt=0, description="peak rate of LoRA's B; null: learning_rate")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's decay of its two moments")
    epsilon: float = Field(1e-8, gt=0, description="AdamW's term that keeps its denominator from zero")
    weight_decay: float = Field(0.01, ge=0, description="decay of the weights; norms, biases and the head are spared")
    warmup: float = Field(0.1, ge=0, lt=1, description="part of the steps in which the rate rises from 0")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="the rate after the warm-up")
    clip: float | None = Field(1.0, gt=0, description="largest global norm of the gradient; null: no limit")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="part of each target that is spread over all classes")
    swap: Literal["none", "random", "both"] = Field(
        "both", description="orders a row is shown in: as it stands, one at random, or both in the same step"
    )
    consistency: float = Field(
        0.0, ge=0, description="weight of the symmetric KL between the un-swapped predictions of a row's two orders"
    )
    distill: Distill = Field(default_factory=Distill, description="teachers' scores as a second target")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay a step of a moving average of the weights, which is what is kept; null: none",
    )
    average_last: int = Field(1, ge=1, description="keep the mean of the weights of the last so many checkpoints")
    evaluate_every: int | None = Field(
        None, ge=1, description="optimizer steps between two looks at the held-out rows; null: at the end alone"
    )
    evaluate_rows: int | None = Field(
        None, ge=1, description="look at so many held-out rows, drawn by the seed; null: at all of them"
    )
    metric: Metric = Field("log_loss", description="what is compared between two looks")
    keep: Literal["last", "best"] = Field(
        "last", description="weights that are kept: the last, or the best by `metric`"
    )
    patience: int | None = Field(
        None, ge=1, description="stop after so many looks without a better one; null: never before the end"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in backward: less memory, ~30% slower"
    )
    checkpoint_every: int | None = Field(
        200, ge=1, description="optimizer steps between two checkpoints to go on from; null: none"
    )
    checkpoints: int = Field(2, ge=1, description="checkpoints on disk; the oldest goes when a new one is whole")
    max_skipped: int = Field(
        10, ge=1, description="steps in a row whose loss or gradient is not finite, before training stops"
    )
    log_every: int = Field(10, ge=1, description="optimizer steps between two lines of metrics.jsonl")
    trackers: list[Tracker] = Field([], description="where the lines of metrics.jsonl go besides")

    @property
    def orders(self) -> int:
        """Orders that a row is shown in, in one step."""
        return 2 if self.swap == "both" else 1

    @model_validator(mode="after")
    def _legal(self) -> Train:
        looks = [f"keep={self.keep}"] * (self.keep == "best") + [f"patience={self.patience}"] * bool(self.patience)
        if looks and self.evaluate_every is None:
            raise ValueError(f"{looks[0]} needs evaluate_every, the steps between two looks at the held-out rows")
        if self.average_last > 1:
            if self.checkpoint_every is None or self.checkpoints < self.average_last:
                raise ValueError(
                    f"average_last={self.average_last} averages checkpoints on disk: set checkpoint_every, and "
                    f"checkpoints to {self.average_last} or more"
                )
            if self.ema is not None or self.keep == "best":
                raise ValueError(
                    "average_last, ema and keep=best each choose the weights that are kept; ema goes with "
                    "keep=best, average_last with neither"
                )
        if self.consistency and self.swap != "both":
            raise ValueError(f"consistency compares a row's two orders and needs swap=both, not {self.swap}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must be from 0 to 1, 1 excluded")
        return self


class Predict(Section):
    swap: Literal["off", "full", "budget", "split"] = Field(
        "full",
        description="full: both orders of every row, un-swapped and averaged; budget: the second order for the most "
        "uncertain rows while time remains (--deadline); split: one order a model, AB for the first, BA for the next",
    )
    layout: Literal["auto", "padded", "packed", "shared"] = Field(
        "auto",
        description="how rows lie in a batch; packed: end to end; shared: packed, and what both orders of a row (or "
        "all rows) begin with is computed once; auto: the cheapest that the model allows",
    )
    tokens_per_batch: int | None = Field(
        None, ge=1, description="tokens in one forward pass; memory, not results; null: 16384 on a GPU, 2048 on a CPU"
    )
    temperature: float = Field(
        1.0, gt=0, description="logits of each order are divided by it before the softmax; `pairclf evaluate` fits it"
    )
    devices: Annotated[list[str], BeforeValidator(as_list)] = Field(
        [], description="where the processes compute, e.g. [cuda:0, cuda:1] or [cpu, cpu]; none: every GPU, or one CPU"
    )
    spread: Literal["auto", "replicas", "pipeline"] = Field(
        "auto",
        description="replicas: the whole model on each device, which draw from one queue; pipeline: its layers over "
        "all of them; auto: replicas where one device holds the model",
    )
    backend: Literal["transformers", "vllm"] = Field(
        "transformers", description="what runs the model; vllm: where it is installed and can serve it (docs/export.md)"
    )


class Package(Section):
    competition: str = Field("lmsys-chatbot-arena", description="slug of the competition whose input is attached")
    owner: str = Field("your-kaggle-name", description="Kaggle user that owns the notebook and what it attaches")
    name: str = Field(
        "pairclf-demo", description="slug of the notebook; what it attaches is NAME-bundle and NAME-wheels"
    )
    kernel: Literal["notebook", "script", "server"] = Field(
        "notebook",
        description="script: the same as a .py; server: a notebook that answers batch by batch, through the "
        "competition's kaggle_evaluation",
    )
    ensemble: Path | None = Field(
        None,
        description="YAML of an ensemble (docs/export.md) whose members are packaged; null: the mean of the bundles",
    )
    bundles_as: Literal["dataset", "model"] = Field("dataset", description="what the bundles become on Kaggle")
    base_model_source: str | None = Field(
        None,
        description="what holds the base model on Kaggle: owner/model/framework/instance/version of a model, or "
        "owner/slug of a dataset; null: inside pairclf's wheel, or in the bundles",
    )
    machine_shape: str = Field("NvidiaTeslaT4", description="Kaggle's machine; NvidiaTeslaT4 is two T4s")
    hours: float = Field(9, gt=0, description="that the competition gives a notebook, by the clock on the wall")
    deadline: str = Field(
        "8h30m", description="when the submission must be complete, from the notebook's first second on"
    )
    pythons: list[Annotated[str, BeforeValidator(str), Field(pattern=r"^3\.\d+$")]] = Field(
        ["3.12", "3.13"], min_length=1, description="versions of Python that the image may have"
    )
    images: Path | None = Field(
        None, description="folder of what the images hold, python3.12.txt and so on: pip freezes; null: pairclf's own"
    )
    wheels: list[str] = Field(
        [], description="further packages to carry; what pairclf needs and an image lacks comes along"
    )
    licence: str = Field("Apache 2.0", description="licence of what is uploaded, in Kaggle's words")


def _derive_template(template: Template, task: Task) -> None:
    """Fill what a template leaves out from its preset, and check that it shows every field once.

    Raises:
        ValueError: a field is missing or stands twice, or `round` and `text` contradict each other.
    """
    judge = template.preset == "judge"
    heading = "[{}]" if judge else "### {}"
    shown = "".join(f"\n\n{heading.format(name.replace('_', ' ').capitalize())}\n{{{name}}}" for name in task.fields)
    interleaved = template.turns == "interleaved"
    if template.instruction is None:
        template.instruction = _instruction(task) if judge and not template.text else ""
    if template.chat is None:
        template.chat = judge
    if template.add_special_tokens is None:
        template.add_special_tokens = not template.chat
    if not template.round and interleaved:
        template.round = shown
    if not template.text:
        asked = f"\n\n[End]\n{_question(task)}" if judge else "\n\n### Verdict\n"
        template.text = ("{rounds}" if interleaved else shown) + asked
    if template.round and not interleaved:
        raise ValueError("inputs.template.round is given, which needs inputs.template.turns=interleaved")
    once = dict.fromkeys(task.fields, "round" if interleaved else "text")
    once |= {"rounds": "text"} if interleaved else {}
    for key in ("instruction", "text", "round"):
        _check_places(
            getattr(template, key), [name for name, at in once.items() if at == key], f"inputs.template.{key}"
        )
    if not template.chat and template.text.endswith(tuple(f"{{{name}}}" for name in once)):
        raise ValueError("inputs.template.text must end in words of its own: the verdict is read there")


PLACE = re.compile(r"\{([^\W\d]\w*)\}")
"""What may be a place holder in a wording; other braces are text."""


def _check_places(wording: str, wanted: Sequence[str], where: str) -> None:
    """Do nothing if the wording holds `{name}` once for each name wanted, and no other.

    Raises:
        ValueError: otherwise.
    """
    for name in wanted:
        if wording.count(f"{{{name}}}") != 1:
            raise ValueError(f"{where} must hold {{{name}}} exactly once")
    if unknown := sorted(set(PLACE.findall(wording)) - set(wanted)):
        shown = ", ".join(f"{{{name}}}" for name in unknown)
        raise ValueError(f"{where} holds {shown}, which has no place there; wanted: {list(wanted) or 'none'}")


def _instruction(task: Task) -> str:
    if not task.swappable:
        return "Read what follows and judge it."
    return "Two assistants answered the same prompt. Judge which answer a person would prefer."


def _question(task: Task) -> str:
    """Asks for the classes by words that stand in the wording: `response a, response b or tie`."""
    words = [name.rsplit("_", 1)[-1] if task.swappable else name for name in task.classes]
    for field, name in zip(task.swap_fields or (), task.swap_classes or (), strict=True):
        words[task.classes.index(name)] = field
    *first, last = (word.replace("_", " ") for word in words)
    return f"Which is it: {', '.join(first)} or {last}?" if first else f"Is it {last}?"


class Config(Section):
    """The whole tree. A run folder, a bundle and a Kaggle package each keep the resolved one."""

    task: Annotated[Task, BeforeValidator(as_task)] = Field(LMSYS, description="lmsys, wsdm, or a task spelled out")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of folds, order of rows, initial head and dropout")
    output: Path | None = Field(None, description="run folder; null: runs/ + the config's path below configs/")
    data: Data = Field(default_factory=Data, description="files")
    folds: Folds = Field(default_factory=Folds, description="cross-validation")
    inputs: Inputs = Field(default_factory=Inputs, description="from text to tokens")
    model: Model = Field(default_factory=Model, description="backbone and adapters")
    train: Train = Field(default_factory=Train, description="fine-tuning")
    predict: Predict = Field(default_factory=Predict, description="scoring")
    package: Package = Field(default_factory=Package, description="the Kaggle notebook")

    @model_validator(mode="after")
    def _derive(self) -> Config:
        _derive_template(self.inputs.template, self.task)
        fields, inputs = self.task.fields, self.inputs
        inputs.shares = inputs.shares or {name: round(1 / len(fields), 6) for name in fields}
        inputs.minimums = inputs.minimums or dict.fromkeys(fields, 1)
        inputs.cut = inputs.cut or dict.fromkeys(fields, "head_tail")
        if not isinstance(inputs.head_ratio, dict):
            inputs.head_ratio = dict.fromkeys(fields, inputs.head_ratio)
        for name in ("shares", "minimums", "cut", "head_ratio"):
            given = getattr(inputs, name)
            if set(given) != set(fields):
                raise ValueError(
                    f"inputs.{name} names {sorted(given)}; it must name each of the task's fields {list(fields)}"
                )
        self._check_inputs(inputs.head_ratio)
        self._check_training()
        return self

    def _check_training(self) -> None:
        train, task, words = self.train, self.task, self.model.label_words
        if not task.swappable and (train.swap == "random" or train.consistency):
            raise ValueError(f"train.swap=random and train.consistency need a task that can swap; {task.name} can not")
        if train.swap == "both" and not task.swappable:
            train.swap = "none"
        if train.layout == "packed" and self.model.attention in ("eager", "sdpa"):
            raise ValueError(
                f"model.attention={self.model.attention} would let packed rows see each other; set train.layout=padded "
                "or model.attention=auto"
            )
        if words and set(words) != set(task.classes):
            raise ValueError(f"model.label_words names {sorted(words)}; it must name each class: {list(task.classes)}")
        if len(set(words.values())) < len(words):
            raise ValueError(f"model.label_words {words} gives two classes one word: they would start as one class")
        if train.distill.scores and task.multi_label:
            raise ValueError("train.distill knows probabilities that sum to 1, and this task has several labels a row")

    def _check_inputs(self, head_ratio: dict[str, float]) -> None:
        inputs = self.inputs
        if min(inputs.shares.values()) < 0.001 or sum(inputs.shares.values()) > 1.001:
            raise ValueError(f"inputs.shares {inputs.shares} must be at least 0.001 and sum to at most 1")
        if min(inputs.minimums.values()) < 1:
            raise ValueError(f"inputs.minimums {inputs.minimums} must be at least 1")
        if not all(0 <= ratio <= 1 for ratio in head_ratio.values()):
            raise ValueError(f"inputs.head_ratio {head_ratio} must be from 0 to 1")
        if self.task.swap_fields is not None:
            a, b = self.task.swap_fields
            for name in ("shares", "minimums", "cut", "head_ratio"):
                given = getattr(inputs, name)
                if given[a] != given[b]:
                    raise ValueError(f"inputs.{name} must treat {a} and {b} alike, or a swap would cut anew")


_UNUSABLE = re.compile("[\0\ud800-\udfff]")
"""NUL and surrogates: quoted YAML can write them, and whatever is given them as a path raises."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `off` and `no` are words and `1e-4` is a number (PyYAML alone reads YAML 1.1).

    Aliases of aliases, which let a few lines stand for billions of values, are refused before a value is made.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _expanded(node, {}) > MAX_NODES:
            raise yaml.YAMLError(f"with its aliases written out it has more than {MAX_NODES:,} values")
        return node


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """Values that a node stands for. One that stands within itself stands for more than any limit.

    Raises:
        yaml.YAMLError: a text has a character that neither a file's name nor any other text can have.
    """
    if isinstance(node, yaml.ScalarNode):
        if found := _UNUSABLE.search(node.value):
            raise yaml.YAMLError(f"{quoted(node.value)} has the character U+{ord(found[0]):04X}\n{node.start_mark}")
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1  # until it is counted, whoever meets it is within it
        pairs = isinstance(node, yaml.MappingNode)
        children = [one for pair in node.value for one in pair] if pairs else node.value
        known[id(node)] = min(1 + sum(_expanded(one, known) for one in children), MAX_NODES + 1)
    return known[id(node)]


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$", re.IGNORECASE), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|nan)$", re.IGNORECASE),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: object) -> Any:
    """Parse YAML as this project reads it.

    Raises:
        ConfigError: with YAML's own line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise ConfigError(f"not valid YAML: {cut(' '.join(str(error).split()), 1000)}", where=where) from error


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section; lists and scalars are replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = _merge(dict(below), value) if both and below is not None else value
    return merged


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, laid on the file that its `extends` names (relative to it)."""
    try:
        whole = path.resolve()
        if whole in seen:
            raise ConfigError(f"extends comes back to {path}", where=seen[0])
        text = read_plain(path, MAX_YAML)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config {cut(path)} can't be read: {cut(error)}", remedy="give the path of a YAML file"
        ) from error
    tree = parse_yaml(text, path)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"a config is a mapping of sections, not a {type(tree).__name__}", where=path)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    return _merge(_read(path.parent / str(parent), (*seen, whole)), tree)


def _override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {quoted(override)} is not of the form key=value", remedy="e.g. train.epochs=2")
    value = parse_yaml(text, f"override {quoted(override)}")
    for part in reversed(key.split(".")):
        value = {part: value}
    return _merge(tree, value)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `key=value` overrides laid on it, checked anew.

    Raises:
        ConfigError: an override is malformed, unknown or wrong.
    """
    tree = config.model_dump(mode="json")
    for one in overrides:
        tree = _override(tree, one)
    return resolve(tree, f"overrides {' '.join(overrides)}")


def settings(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """`(dotted key, description)` of every setting, sections included, in the order of the tree."""
    for name, field in section.model_fields.items():
        yield prefix + name, field.description or ""
        for kind in _kinds(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from settings(kind, f"{prefix}{name}.")


def _kinds(annotation: Any) -> Iterator[Any]:
    """An annotation and what it is made of: `list[Source] | None`, `list[Source]`, `Source`, ..."""
    yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _kinds(part)


def _choices(annotation: Any) -> list[Any]:
    """The values that a setting can have, where they are named."""
    return [value for kind in _kinds(annotation) if get_origin(kind) is Literal for value in get_args(kind)]


def _explain(error: ValidationError, section: type[Section]) -> str:
    known = [key for key, _ in settings(section)]
    lines = []
    for issue in error.errors()[:MAX_ISSUES]:
        key = cut(".".join(str(part) for part in issue["loc"]))
        if issue["type"] == "extra_forbidden":
            near = difflib.get_close_matches(re.sub(r"\.\d+\.", ".", key), known, n=1, cutoff=0.0)
            lines.append(f"{key}: no such setting; the nearest is {near[0]}")
        else:
            shown = "" if isinstance(issue["input"], dict | Section) else f" (given: {quoted(issue['input'])})"
            lines.append(f"{key}: {cut(issue['msg'], 1000)}{shown}".removeprefix(": ").replace("Value error, ", "", 1))
    lines += [f"... and {error.error_count() - MAX_ISSUES:,} more"] * (error.error_count() > MAX_ISSUES)
    return "\n".join(f"  {line}" for line in lines)


def resolve(tree: Mapping[str, Any], where: object = "config") -> Config:
    """A checked config from a plain mapping.

    Raises:
        ConfigError: with every unknown key, wrong value and contradiction at once.
    """
    return checked(Config, tree, where, "`pairclf config FILE` prints every setting with its help")


def checked(section: type[_S], tree: object, where: object, remedy: str) -> _S:
    """A section, or any other file of settings, from what `parse_yaml` read.

    Raises:
        ConfigError: with every unknown key, wrong value and contradiction at once.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        count = error.error_count()
        wrong = f"{count} setting{'s' * (count != 1)} can't be used:\n{_explain(error, section)}"
        raise ConfigError(wrong, where=where, remedy=remedy) from error


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, lay `key=value` overrides on it, check it, and settle where its run goes.

    Raises:
        ConfigError: the file can't be read, is not YAML, or holds settings that can't be used.
    """
    tree = _read(path)
    for override in overrides:
        tree = _override(tree, override)
    config = resolve(tree, path)
    config.output = config.output or run_folder(path)
    return config


def run_folder(path: Path) -> Path:
    """`configs/lmsys/a.yaml` -> `runs/lmsys/a`: the run folder mirrors the config's path."""
    parts = path.with_suffix("").parts
    below = parts[len(parts) - parts[::-1].index("configs") :] if "configs" in parts else parts[-1:]
    return Path("runs", *below)


def dump_config(config: Config) -> str:
    """The resolved tree as YAML; `resolve(parse_yaml(dump_config(c))) == c`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def describe_config(config: Config) -> str:
    """The resolved tree as YAML with each setting's help behind it as a comment; reads back as the same config."""
    lines: list[str] = []

    def walk(section: BaseModel, depth: int) -> None:
        values = section.model_dump(mode="json")
        for name, field in type(section).model_fields.items():
            value, indent = getattr(section, name), "  " * depth
            shown = "" if isinstance(value, BaseModel) else " " + json.dumps(values[name], ensure_ascii=False)
            choices = " | ".join(map(str, _choices(field.annotation)))
            help_text = f"{field.description} [{choices}]" if choices else field.description
            lines.append(f"{indent}{name}:{shown}  # {help_text}")
            if isinstance(value, BaseModel):
                walk(value, depth + 1)

    walk(config, 0)
    return "\n".join(lines) + "\n"
