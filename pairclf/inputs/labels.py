"""Labels as tokens: which tokens a class's words are where they are scored, and why some words can't be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pairclf.errors import ConfigError, cut, quoted
from pairclf.inputs.render import InputBuilder
from pairclf.inputs.truncate import Ids

_AFTER_THESE_A_BLANK = ".,:;!?"
"""Signs that a word follows after a blank, as it does after a word."""

LOW_MASS = 0.5
"""Label mass below which a warning is printed: the model would rather say something else than any label."""

Path = tuple[int, ...]


class LabelTrie(NamedTuple):
    """The labels' tokens as a trie. Words `a b`, `a c` and `d` have two inner nodes, the root and that behind `a`.

    Attributes:
        nodes: the tokens from the root to each inner node; the root's, which are none, come first.
        edges: the inner node that each edge leaves, and its token.
        words: the class of each word, by its number, and the edges from the root to the word's end.
    """

    nodes: tuple[Path, ...]
    edges: tuple[tuple[int, int], ...]
    words: tuple[tuple[int, Path], ...]


def label_trie(builder: InputBuilder, words: Mapping[str, Sequence[str]], *, decoded: bool = False) -> LabelTrie:
    """The tokens of the classes' words behind the template's last words, or at a decoder's start.

    Args:
        builder: the recipe.
        words: class -> words, `model.label_words` in the order of the task's classes; or of `yes` and `no`.
        decoded: the words follow the start token of a decoder, which takes one step, and not the text, which the
            encoder reads.

    Raises:
        ConfigError: lists every word that has no token, does not follow there, or begins as another one ends.
    """
    named = [(name, word) for name, synonyms in words.items() for word in synonyms]
    tokenised = builder.tokenizer([word for _, word in named], special=True, start=decoded)
    paths = [tuple(ids.tolist()) for ids in tokenised]
    others = list(zip(paths, named, strict=True))
    why_not = _why_not_decoded if decoded else _why_not_continued
    problems = [
        f"  model.label_words.{name}={quoted(word)} {why}"
        for path, (name, word) in others
        if (why := why_not(builder, word, path) or _why_not_told_apart(builder, word, path, others))
    ]
    if problems and decoded:
        raise ConfigError(
            "the decoder can't begin with the label words:\n" + "\n".join(problems),
            where="model.label_words",
            remedy="give each class a word that is one token, such as A, B and C",
        )
    if problems:
        raise ConfigError(
            "the text can't be continued with the label words as tokens:\n" + "\n".join(problems),
            where=f"inputs.template, whose text ends in {quoted(builder.endings[0][-40:])}",
            remedy="change these words or the end of inputs.template.text; `pairclf show` prints the text as the model "
            "reads it",
        )
    nodes = sorted({path[:end] for path in paths for end in range(len(path))})  # the root is first: it is empty
    ways = [[(nodes.index(path[:end]), path[end]) for end in range(len(path))] for path in paths]
    edges = sorted({edge for way in ways for edge in way})
    labels = [list(words).index(name) for name, _ in named]
    numbered = [tuple(edges.index(edge) for edge in way) for way in ways]
    return LabelTrie(tuple(nodes), tuple(edges), tuple(zip(labels, numbered, strict=True)))


def _why_not_told_apart(
    builder: InputBuilder, word: str, path: Path, others: Sequence[tuple[Path, tuple[str, str]]]
) -> str | None:
    """Why a word's tokens can't be a label's; None: they can."""
    if not builder.tokenizer.unknown.isdisjoint(path):
        return "has no tokens: the tokenizer writes its token for unknown words"
    for other, (name, longer) in others:
        if other[: len(path)] == path and longer != word:
            relation = "the tokens" if len(other) == len(path) else "the first tokens"
            return f"has {relation} of {quoted(longer)}, the word of {name}; end both in a sign, or give another word"
    return None


def _why_not_decoded(builder: InputBuilder, word: str, path: Path) -> str | None:
    """Why a word is not the decoder's first token; None: it can be."""
    if not word.strip():
        return "is blank"
    return f"is {len(path)} tokens ({_tokens(builder, np.array(path))}); it must be one" if len(path) != 1 else None


def _why_not_continued(builder: InputBuilder, word: str, path: Path) -> str | None:
    """Why a word is not what the model continues the text with; None: it can be."""
    if len(builder.closing):
        return "does not follow the text, which the tokenizer ends; set inputs.template.add_special_tokens=false"
    return next((why for ending in builder.endings if (why := _why_not_behind(builder, word, ending))), None)


def _why_not_behind(builder: InputBuilder, word: str, ending: str) -> str | None:
    """Why a word is not what the model continues a text with that ends so; None: it can be."""
    last = ending[-1:]
    if not word.strip():
        return "is blank"
    if last.isspace() and word[0] == " ":
        return f"begins with a blank behind a text that ends in white space; give {quoted(word.lstrip())}"
    if last.isascii() and (last.isalnum() or last in _AFTER_THESE_A_BLANK) and word[0].isalnum():
        return f"begins without a blank behind a text that ends in {quoted(last)}; give {quoted(f' {word}')}"
    context, alone, both = builder.tokenizer([ending, word, ending + word], special=True)
    if not np.array_equal(both, np.concatenate([context, alone])):
        blank = "; end the text without its last blank, and begin the word with it" if last == " " else ""
        tokens = _tokens(builder, both[-len(alone) - 1 :])
        return f"joins the text in other tokens than it has alone (the last ones are {tokens}){blank}"
    return None


def _tokens(builder: InputBuilder, ids: Ids) -> str:
    """`"ti" "e"`."""
    return cut(" ".join(builder.tokenizer.names(ids)))
