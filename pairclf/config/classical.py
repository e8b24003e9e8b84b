"""Settings of the classical approach: hashed TF-IDF, lengths and logistic regression."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pairclf.config.section import Section


class Classical(Section):
    """The names are scikit-learn's; see HashingVectorizer, TfidfTransformer and LogisticRegression."""

    analyzer: Literal["word", "char", "char_wb"] = Field(
        "word", description="n-grams of words and punctuation, of characters, or of characters inside word boundaries"
    )
    ngram_range: tuple[int, int] = Field((1, 2), description="shortest and longest n-gram, in words or characters")
    n_features: int = Field(
        2**18, ge=1, le=2**24, description="columns that n-grams are hashed to; fewer save memory, and n-grams collide"
    )
    sublinear_tf: bool = Field(True, description="count an n-gram 1 + log(n) times where it occurs n times")
    lengths: bool = Field(True, description="add the logarithms of characters, words, turns and lines of each field")
    C: float = Field(1.0, gt=0, description="inverse of the L2 regularization strength; smaller: stronger")
    max_iter: int = Field(500, ge=1, description="most iterations of the solver (L-BFGS)")

    @model_validator(mode="after")
    def _ordered(self) -> Classical:
        shortest, longest = self.ngram_range
        if not 1 <= shortest <= longest <= 10:
            raise ValueError(f"ngram_range [{shortest}, {longest}] must be two lengths from 1 to 10, the shorter first")
        return self
