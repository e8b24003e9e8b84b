"""The input builder of a bundle: its own tokenizer, recipe and examples, read without transformers."""

from __future__ import annotations

from pairclf.bundles.bundle import Bundle
from pairclf.bundles.examples import read_examples
from pairclf.errors import ModelError, cut
from pairclf.files import MAX_JSON, read_plain
from pairclf.inputs.builder import builder_for
from pairclf.inputs.examples import with_examples
from pairclf.inputs.render import InputBuilder
from pairclf.inputs.tokenise import bare_tokenizer


def builder_of(bundle: Bundle) -> InputBuilder:
    """The input builder with the bundle's own tokenizer, recipe and examples.

    transformers made the tokenizer.json out of the tokenizer that the model was trained with, so that its own loading,
    which imports torch, adds nothing.

    Raises:
        ModelError: the tokenizer can't be read.
    """
    path = bundle.files.tokenizer / "tokenizer.json"
    try:
        text = read_plain(path, MAX_JSON)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer can't be read: {cut(error)}", where=path) from error
    return with_examples(bundle.config, builder_for(bundle.config, bare_tokenizer(text)), read_examples(bundle))
