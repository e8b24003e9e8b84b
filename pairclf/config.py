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
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pairclf.errors import ConfigError
from pairclf.task import LMSYS, Task, as_task


class Section(BaseModel):
    """A group of settings; unknown names are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class Data(Section):
    folder: Path = Field(Path("."), description="folder that the file names below are relative to")
    train: list[Path] = Field([], description="labelled files: .csv, .parquet or .jsonl")
    test: Path | None = Field(None, description="unlabelled file to predict")
    sample_submission: Path | None = Field(None, description="file whose ids, order and columns a submission must have")
    max_rows: int | None = Field(None, ge=1, description="read no more than the first so many rows; null: all")
    ignore_columns: list[str] = Field([], description="further columns of training files to accept and not read")

    def path(self, name: Path) -> Path:
        return self.folder / name

    @property
    def train_paths(self) -> list[Path]:
        return [self.path(name) for name in self.train]


class Folds(Section):
    n: int = Field(5, ge=2, description="number of folds; rows with the same prompt share a fold")
    run: list[int] | None = Field(None, min_length=1, description="folds that `cv` trains, from 0; null: all")


class Template(Section):
    prefix: str = Field("", description="text at the very start (an instruction); never cut")
    labels: dict[str, str] = Field({}, description="text before each field; empty: derived from the field names")
    turn_break: str = Field("\n\n", description="text between two turns of one field")
    suffix: str = Field("\n\n### Verdict\n", description="text that asks for the verdict; never cut")


Cut = Literal["head", "tail", "head_tail"]


class Inputs(Section):
    max_length: int = Field(2048, ge=1, description="budget for one row in one order, in tokens, template included")
    template: Template = Field(default_factory=Template, description="the wording around the fields")
    shares: dict[str, float] = Field(
        {}, description="a field's share of the budget when all are too long; empty: alike. What one leaves, others get"
    )
    cut: dict[str, Cut] = Field({}, description="what stays of a field that is too long; empty: head_tail for each")
    head_ratio: float = Field(0.5, ge=0, le=1, description="under head_tail, the part of what stays that is the head")
    marker: str = Field(" … ", description="text where something was cut away; counted in the budget")


class Lora(Section):
    rank: int = Field(16, ge=1, description="rank of the adapters")
    alpha: int = Field(32, ge=1, description="scale; the adapters' output is multiplied by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout before the adapters")
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = Field(
        "all-linear", description="names of the linear modules that get adapters, or all-linear (head excluded)"
    )
    first_layer: int = Field(0, ge=0, description="layers below this one carry no adapter")


class Model(Section):
    base: str = Field(
        "embedded:gemma2-tiny", description="base model: a folder, a hub id, or embedded:NAME (shipped with pairclf)"
    )
    quantization: Literal["none", "nf4", "int8"] = Field("nf4", description="how the frozen base weights are stored")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of computation; auto: bfloat16 where the GPU has it, float16 on a T4, float32 on CPU"
    )
    attention: Literal["auto", "eager", "sdpa"] = Field(
        "auto", description="attention implementation; auto: eager where scores are soft-capped (Gemma-2), else sdpa"
    )
    lora: Lora | None = Field(default_factory=Lora, description="adapters; null: the whole model is trained")
    trust_remote_code: bool = Field(False, description="run code that comes with the base model")

    @model_validator(mode="after")
    def _legal(self) -> Model:
        if self.quantization != "none" and self.lora is None:
            raise ValueError(
                f"quantization={self.quantization} freezes the base weights, so lora=null leaves nothing to train but "
                "the head; set quantization=none or give lora"
            )
        return self


class Train(Section):
    epochs: float = Field(1.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="stop after so many optimizer steps; null: by epochs")
    rows_per_step: int = Field(16, ge=1, description="rows behind one optimizer step, over all processes")
    rows_per_batch: int = Field(8, ge=1, description="rows in one forward pass of one process; memory, not results")
    learning_rate: float = Field(1e-4, gt=0, description="peak rate of the adapters (or of the whole model)")
    head_learning_rate: float | None = Field(None, gt=0, description="peak rate of the head; null: learning_rate")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decay; norms, biases and the head are spared")
    warmup: float = Field(0.1, ge=0, lt=1, description="part of the steps in which the rate rises from 0")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="the rate after the warm-up")
    clip: float = Field(1.0, gt=0, description="largest global norm of the gradient")
    swap: Literal["none", "random", "both"] = Field(
        "both", description="orders a row is shown in: as it stands, one at random, or both in the same step"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in backward: less memory, ~30% slower"
    )
    log_every: int = Field(10, ge=1, description="optimizer steps between two lines of metrics.jsonl")


class Predict(Section):
    swap: Literal["off", "full"] = Field("full", description="full: score both orders and average the un-swapped")
    tokens_per_batch: int = Field(16_384, ge=1, description="padded tokens in one forward pass; memory, not results")
    temperature: float = Field(1.0, gt=0, description="logits are divided by it before the softmax")


class Package(Section):
    competition: str = Field("lmsys-chatbot-arena", description="slug of the competition whose input is attached")
    owner: str = Field("your-kaggle-name", description="Kaggle user that owns the notebook and the datasets")
    name: str = Field("pairclf-demo", description="slug of the notebook; datasets are NAME-bundle and NAME-wheels")
    base_model_source: str | None = Field(
        None, description="Kaggle model of the base: owner/model/framework/instance/version; null: inside the wheel"
    )
    machine_shape: str = Field("NvidiaTeslaT4", description="Kaggle's machine; NvidiaTeslaT4 is two T4s")
    licence: str = Field("Apache 2.0", description="licence of the datasets, in Kaggle's words")
    wheels: list[str] = Field(
        ["bitsandbytes"], description="packages that Kaggle's image lacks; exact installed versions"
    )


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
        fields = self.task.fields
        self.inputs.template.labels = self.inputs.template.labels or {
            name: f"\n\n### {name.replace('_', ' ').capitalize()}\n" for name in fields
        }
        self.inputs.shares = self.inputs.shares or {name: round(1 / len(fields), 6) for name in fields}
        self.inputs.cut = self.inputs.cut or dict.fromkeys(fields, "head_tail")
        for name, given in (
            ("inputs.template.labels", self.inputs.template.labels),
            ("inputs.shares", self.inputs.shares),
            ("inputs.cut", self.inputs.cut),
        ):
            if set(given) != set(fields):
                raise ValueError(f"{name} names {sorted(given)}; it must name each of the task's fields {list(fields)}")
        self._check_swap()
        return self

    def _check_swap(self) -> None:
        shares, cut = self.inputs.shares, self.inputs.cut
        if min(shares.values()) <= 0 or sum(shares.values()) > 1.001:
            raise ValueError(f"inputs.shares {shares} must be positive and sum to at most 1")
        if self.task.swap_fields is not None:
            a, b = self.task.swap_fields
            if shares[a] != shares[b] or cut[a] != cut[b]:
                raise ValueError(f"inputs.shares and inputs.cut must treat {a} and {b} alike, or a swap would cut anew")
        elif self.train.swap == "both" and self.task.swap_fields is None:
            self.train.swap = "none"
        elif self.train.swap == "random":
            raise ValueError(f"train.swap=random needs a task that can swap; {self.task.name} can not")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `off` and `no` are words and `1e-4` is a number (PyYAML alone reads YAML 1.1)."""


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
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}", where=where) from error


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
    if path.resolve() in seen:
        raise ConfigError(f"extends comes back to {path}", where=seen[0])
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} can't be read: {error}", remedy="give the path of a YAML file") from error
    tree = parse_yaml(text, path)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"a config is a mapping of sections, not a {type(tree).__name__}", where=path)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    return _merge(_read(path.parent / str(parent), (*seen, path.resolve())), tree)


def _override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value", remedy="e.g. train.epochs=2")
    value = parse_yaml(text, f"override {override!r}")
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
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from settings(kind, f"{prefix}{name}.")


def _explain(error: ValidationError) -> str:
    known = [key for key, _ in settings()]
    lines = []
    for issue in error.errors():
        key = ".".join(str(part) for part in issue["loc"]) or "config"
        if issue["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            lines.append(f"{key}: no such setting; the nearest is {near[0]}")
        else:
            shown = "" if isinstance(issue["input"], dict | Section) else f" (given: {issue['input']!r})"
            lines.append(f"{key}: {issue['msg'].removeprefix('Value error, ')}{shown}")
    return "\n".join(f"  {line}" for line in lines)


def resolve(tree: Mapping[str, Any], where: object = "config") -> Config:
    """A checked config from a plain mapping.

    Raises:
        ConfigError: with every unknown key, wrong value and contradiction at once.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        remedy = "`pairclf config FILE` prints every setting with its help"
        count = error.error_count()
        raise ConfigError(
            f"{count} setting{'s' * (count != 1)} can't be used:\n{_explain(error)}", where=where, remedy=remedy
        ) from error


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
            lines.append(f"{indent}{name}:{shown}  # {field.description}")
            if isinstance(value, BaseModel):
                walk(value, depth + 1)

    walk(config, 0)
    return "\n".join(lines) + "\n"
