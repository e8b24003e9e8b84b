"""Settings of the classical approach: hashed TF-IDF, dense features and logistic regression."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pairclf.config.section import Section

_TREES = {"n_estimators", "learning_rate", "num_leaves", "min_child_samples"}


class Classical(Section):
    """The names are scikit-learn's; see HashingVectorizer, TfidfTransformer, LogisticRegression; LGBMClassifier."""

    model: Literal["logistic", "lightgbm"] = Field(
        "logistic", description="logistic regression, or LightGBM that reads its out-of-fold logits and the measures"
    )
    analyzer: Literal["word", "char", "char_wb"] = Field(
        "word", description="n-grams of words and punctuation, of characters, or of characters inside word boundaries"
    )
    ngram_range: tuple[int, int] = Field((1, 2), description="shortest and longest n-gram, in words or characters")
    char_ngram_range: tuple[int, int] | None = Field(
        None, description="besides, n-grams of characters inside word boundaries, shortest and longest; null: none"
    )
    n_features: int = Field(
        2**18,
        ge=1,
        le=2**24,
        description="columns that n-grams of each kind are hashed to; fewer save memory, and n-grams collide",
    )
    sublinear_tf: bool = Field(True, description="count an n-gram 1 + log(n) times where it occurs n times")
    dense: bool = Field(
        True,
        description="add about forty measures of each text (lengths, lists, code, repetition) and comparisons of two",
    )
    C: float = Field(1.0, gt=0, description="inverse of the L2 regularization strength; smaller: stronger")
    max_iter: int = Field(500, ge=1, description="most iterations of the solver (L-BFGS)")

    n_estimators: int = Field(200, ge=1, le=10_000, description="lightgbm: rounds of boosting")
    learning_rate: float = Field(0.05, gt=0, le=1, description="lightgbm: part of each tree that is added")
    num_leaves: int = Field(15, ge=2, le=4096, description="lightgbm: most leaves of a tree")
    min_child_samples: int = Field(40, ge=1, description="lightgbm: fewest rows of a leaf, each order counted")

    @model_validator(mode="after")
    def _ordered(self) -> Classical:
        for name, value in (("ngram_range", self.ngram_range), ("char_ngram_range", self.char_ngram_range)):
            shortest, longest = value or (1, 1)
            if not 1 <= shortest <= longest <= 10:
                raise ValueError(f"{name} [{shortest}, {longest}] must be two lengths from 1 to 10, the shorter first")
        if self.model == "logistic" and (unread := sorted(_TREES & {*self.model_dump(exclude_defaults=True)})):
            raise ValueError(f"{unread[0]} changes nothing with classical.model=logistic; set classical.model=lightgbm")
        return self
