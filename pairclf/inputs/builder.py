"""The input builder of a config: wording, label words and budget, with a tokenizer."""

from __future__ import annotations

from typing import Any

from pairclf.config import Config
from pairclf.inputs.examples import require_room
from pairclf.inputs.labels import LabelTrie, label_trie
from pairclf.inputs.render import InputBuilder


def builder_for(config: Config, tokenizer: Any) -> InputBuilder:
    """The input builder of a config with this tokenizer, which shows no examples yet.

    Raises:
        ConfigError: as `InputBuilder`; a label word can't follow the text; or examples have no room.
    """
    builder = InputBuilder(
        tokenizer,
        config.task,
        config.inputs,
        one_sided=config.model.one_sided and not config.is_pointwise,
        example=config.prompt.template,
        rationale=config.rationale,
        trigger=config.prompt.answer_trigger,
    )
    if config.model.scored_words:
        builder = builder.continued_by(trie_of(config, builder).nodes)
    require_room(config, builder)
    return builder


def trie_of(config: Config, builder: InputBuilder) -> LabelTrie:
    """The tokens of `model.label_words` where they are read, in the order of the classes; or of yes and no."""
    words = {name: config.model.scored_words[name] for name in config.answers}
    return label_trie(builder, words, decoded=config.model.pooling == "decoder")
