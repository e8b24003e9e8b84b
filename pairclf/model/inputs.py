"""Make the model's inputs from a config: tokenizer, recipe and token cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import polars as pl
from transformers import PretrainedConfig

from pairclf.bundles.base import resolve_base
from pairclf.config import Config, Model
from pairclf.config.section import choices
from pairclf.errors import ModelError
from pairclf.inputs.builder import builder_for
from pairclf.inputs.cache import EncodedRows, Frames, TokenCache, token_cache
from pairclf.inputs.render import InputBuilder
from pairclf.inputs.tokenise import add_line_break, settle_template
from pairclf.model.backbone import load_tokenizer, read_settings
from pairclf.model.families import Family, family_of, require_pooling
from pairclf.run import tokens_of


class Opened(NamedTuple):
    """A config with the objects that turn its rows into inputs.

    Attributes:
        config: with the chat template written out, and without settings that are null until the base is known.
        tokenizer: of the base; one that reads line breaks as blanks has a token for them, if the base has room.
        builder: that both make.
        settings: transformers' config of the base.
    """

    config: Config
    tokenizer: Any
    builder: InputBuilder
    settings: PretrainedConfig


def open_inputs(config: Config) -> Opened:
    """Load the base's tokenizer and settle the wording, once for all that is done with it.

    Raises:
        ModelError: the tokenizer can't be loaded, is not a fast one, or has tokens that the base has no embedding for;
            or the base's family has no such pooling, readout or rows.
        ConfigError: the wording does not fit the tokenizer or the budget.
    """
    source = resolve_base(config.model.base)
    tokenizer = load_tokenizer(source)
    settings = read_settings(source, config.model.pooling)
    family, embeddings = family_of(settings), settings.get_text_config().vocab_size
    _require_legal(config, settings)
    add_line_break(tokenizer, embeddings)
    settled = _settled(config, family, tokenizer)
    builder = builder_for(settled, tokenizer)
    _require_special_tokens(settled, family, builder)
    builder.require_embeddings(embeddings)
    return Opened(settled, tokenizer, builder, settings)


def _require_legal(config: Config, settings: PretrainedConfig) -> None:
    """Raises `ModelError` where the base's family has no such pooling or readout."""
    model, family = config.model, family_of(settings)
    if model.pooling is not None:
        require_pooling(settings, model.pooling)
    if why := family.refuses.get(model.readout):
        legal = [name for name in choices(Model.model_fields["readout"].annotation) if name not in family.refuses]
        raise ModelError(
            f"model.readout={model.readout} does not go with model.base={model.base}: {why}",
            remedy=f"set model.readout={' or '.join(legal)}, or give a decoder as model.base",
        )
    if model.label_words and (why := family.refuses.get("label_words")):
        raise ModelError(f"model.label_words: {why}", remedy="remove model.label_words")


def _require_special_tokens(config: Config, family: Family, builder: InputBuilder) -> None:
    """Raises `ModelError` where a row lacks tokens that the family's rows have around them."""
    of_builder = {"opening": builder.opening, "closing": builder.closing}
    of_tokenizer = {"opening": builder.tokenizer.before, "closing": builder.tokenizer.after}
    for name in family.special_tokens:
        if len(of_builder[name]):
            continue
        if len(of_tokenizer[name]):
            raise ModelError(
                f"inputs.template leaves out the {name} token that model.base={config.model.base} was trained with "
                f"({', '.join(builder.tokenizer.names(of_tokenizer[name]))})",
                remedy="set inputs.template.add_special_tokens=true, or remove it and apply_chat_template",
            )
        raise ModelError(
            f"the tokenizer of model.base={config.model.base} puts no {name} token around a text, and the base was "
            "trained with one (such as [CLS] and [SEP])",
            remedy="use the tokenizer.json that the base model was published with: its post_processor adds them",
        )


def _settled(config: Config, family: Family, tokenizer: Any) -> Config:
    """The config with the chat template written out, and with the family's defaults where it names none."""
    template = settle_template(config.inputs.template, tokenizer)
    swap = config.train.swap or ("both" if config.train.consistency_weight else family.swap)
    return with_pooling(config, family).model_copy(
        update={
            "inputs": config.inputs.model_copy(update={"template": template}),
            "train": config.train.model_copy(update={"swap": swap}) if config.trains else config.train,
        }
    )


def with_pooling(config: Config, family: Family) -> Config:
    """The config with the family's pooling where it names none."""
    pooling = config.model.pooling or family.poolings[0]
    return config.model_copy(update={"model": config.model.model_copy(update={"pooling": pooling})})


def run_cache(config: Config, builder: InputBuilder, frames: Frames) -> TokenCache:
    """The token cache of a canonical table, in the run's folder or where `data.cache_dir` says."""
    return token_cache(
        tokens_of(config), frames, builder.tokenizer, config.task.fields, processes=config.inputs.num_proc
    )


def encoded_rows(config: Config, builder: InputBuilder, frame: pl.DataFrame) -> EncodedRows:
    """A canonical table as the builder shows it, from the run's token cache."""
    return EncodedRows(run_cache(config, builder, frame.iter_slices), builder)
