"""Write configs: a checked `Config` to YAML, with help or without, and to flat settings that can be compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter

from pairclf.config.section import choices
from pairclf.config.tree import Config
from pairclf.errors import quoted


def dump_config(config: Config) -> str:
    """The resolved tree as YAML, without sections that its approach does not read.

    `resolve(parse_yaml(dump_config(config))) == config`.
    """
    return yaml.safe_dump(tree_of(config), sort_keys=False, allow_unicode=True, width=110)


def describe_config(config: Config) -> str:
    """The resolved tree as YAML with each setting's help as a comment; reads back as the same config."""
    return "\n".join(_described(config, "", config.unread())) + "\n"


def flat_settings(config: Config) -> dict[str, Any]:
    """Every setting that the approach reads, by its dotted name, as JSON has it; lists stay as they are."""
    return _flat(tree_of(config), "")


FREE_SETTINGS = (
    *("output_dir", "data", "folds", "inputs.num_proc", "package"),
    *("predict.swap", "predict.layout", "predict.tokens_per_batch"),
    *("predict.devices", "predict.parallelism", "predict.backend"),
    *("train.per_device_train_batch_size", "train.tokens_per_batch", "train.layout", "train.gradient_checkpointing"),
    *("train.logging_steps", "train.report_to", "train.save_steps", "train.save_total_limit"),
    *("train.max_skipped_steps", "train.max_hours"),
)
"""Settings that change no weight, except by rounding and by dropout masks, which are drawn for each batch.

They may change when a training is resumed, and between the folds of a run. So may the paths of data and folds, as the
rows themselves are compared.
"""

BY_BASE = ("model.pooling", "train.swap")
"""Settings whose null is the default of the base's family; a training has that default written out."""


def deciding_settings(config: Config) -> dict[str, Any]:
    """The settings that decide weights and out-of-fold scores: all but `FREE_SETTINGS`, as `flat_settings`."""
    free = tuple(
        f"{name}." for name in FREE_SETTINGS if name != "train.save_steps" or config.train.average_checkpoints == 1
    )
    return {key: value for key, value in flat_settings(config).items() if not f"{key}.".startswith(free)}


def setting_changes(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, str]:
    """The settings of `now` that were different `before`, with both values.

    >>> setting_changes({"seed": 1, "train.max_steps": 5}, {"seed": 0, "train.max_steps": 5})
    {'seed': 'seed=1 (was 0)'}
    """
    values = settings_before(now, before)
    return {
        key: f"{key}={quoted(value)} (was {quoted(values[key])})" for key, value in now.items() if values[key] != value
    }


def settings_before(keys: Iterable[str], before: Mapping[str, Any]) -> dict[str, Any]:
    """The values of settings in a record that an earlier version may have written.

    A setting that it lacks, although it has others of the section, came with a later version, and had its default.
    """
    return {key: before[key] if key in before else _default_before(key, before) for key in keys}


def _default_before(key: str, before: Mapping[str, Any]) -> Any:
    """The default of a setting, as JSON has it; of a section that is null now, the settings that it had."""
    if settings := {other: value for other, value in before.items() if other.startswith(f"{key}.")}:
        return settings
    section, _, name = key.rpartition(".")
    if not any(other.rpartition(".")[0] == section for other in before):
        return None  # the section was null
    kind: Any = Config
    for part in section.split("."):
        field = kind.model_fields.get(part)
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        kind = next((each for each in kinds if isinstance(each, type) and issubclass(each, BaseModel)), None)
        if kind is None:
            return None
    field = kind.model_fields.get(name)
    if field is None or field.is_required():
        return None
    return TypeAdapter(Any).dump_python(field.get_default(call_default_factory=True), mode="json")


def tree_of(config: Config) -> dict[str, Any]:
    """The settings of the sections that the approach reads, as JSON has them."""
    return config.model_dump(mode="json", exclude=set(config.unread()))


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _described(section: BaseModel, indent: str, unread: Sequence[str] = ()) -> list[str]:
    lines, values = [], section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        if name in unread:
            continue
        value = getattr(section, name)
        text = "" if isinstance(value, BaseModel) else " " + json.dumps(values[name], ensure_ascii=False)
        listed = " | ".join(map(str, choices(field.annotation)))
        lines.append(f"{indent}{name}:{text}  # {field.description}{f' [{listed}]' * bool(listed)}")
        if isinstance(value, BaseModel):
            lines += _described(value, indent + "  ")
    return lines
