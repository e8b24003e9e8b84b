"""Make the model's inputs from a config: tokenizer, recipe and token cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import polars as pl
from transformers import PretrainedConfig

from pairclf.bundles.base import resolve_base
from pairclf.bundles.bundle import Bundle
from pairclf.bundles.examples import read_examples
from pairclf.config import Config
from pairclf.inputs.cache import EncodedRows, Frames, TokenCache, token_cache
from pairclf.inputs.examples import require_room, with_examples
from pairclf.inputs.labels import LabelTrie, label_trie
from pairclf.inputs.render import InputBuilder
from pairclf.inputs.tokenise import settle_template
from pairclf.model.backbone import load_tokenizer, read_settings
from pairclf.run import output_of


class Opened(NamedTuple):
    """A config with the objects that turn its rows into inputs.

    Attributes:
        config: with the chat template written out.
        tokenizer: of the base.
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
        ModelError: the tokenizer can't be loaded, is not a fast one, or has tokens that the base has no embedding for.
        ConfigError: the wording does not fit the tokenizer or the budget.
    """
    source = resolve_base(config.model.base)
    tokenizer = load_tokenizer(source)
    template = settle_template(config.inputs.template, tokenizer)
    settled = config.model_copy(update={"inputs": config.inputs.model_copy(update={"template": template})})
    builder = builder_for(settled, tokenizer)
    settings = read_settings(source)
    builder.require_embeddings(settings.get_text_config().vocab_size)
    return Opened(settled, tokenizer, builder, settings)


def run_cache(config: Config, builder: InputBuilder, frames: Frames) -> TokenCache:
    """The token cache of a canonical table, in the run's folder or where `data.cache_dir` says."""
    folder = config.data.cache_dir or output_of(config) / "tokens"
    return token_cache(folder, frames, builder.tokenizer, config.task.fields, processes=config.inputs.num_proc)


def encoded_rows(config: Config, builder: InputBuilder, frame: pl.DataFrame) -> EncodedRows:
    """A canonical table as the builder shows it, from the run's token cache."""
    return EncodedRows(run_cache(config, builder, frame.iter_slices), builder)


def builder_of(bundle: Bundle) -> InputBuilder:
    """The input builder with the bundle's own tokenizer, recipe and examples."""
    builder = builder_for(bundle.config, load_tokenizer(str(bundle.files.tokenizer)))
    return with_examples(bundle.config, builder, read_examples(bundle))


def builder_for(config: Config, tokenizer: Any) -> InputBuilder:
    """The input builder of a config with this tokenizer, which shows no examples yet.

    Raises:
        ConfigError: as `InputBuilder`; a label word can't follow the text; or examples have no room.
    """
    one_sided, example = config.model.one_sided, config.prompt.template
    builder = InputBuilder(tokenizer, config.task, config.inputs, one_sided=one_sided, example=example)
    if config.model.scored_words:
        builder = builder.continued_by(trie_of(config, builder).branches)
    require_room(config, builder)
    return builder


def trie_of(config: Config, builder: InputBuilder) -> LabelTrie:
    """The tokens of `model.label_words` behind the builder's text, in the order of the classes."""
    return label_trie(builder, {name: config.model.scored_words[name] for name in config.task.classes})
