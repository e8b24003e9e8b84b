"""Settings of the classical approach: hashed TF-IDF, its SVD, dense features, and the models that read them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from pairclf.config.section import Section, as_list

Estimator = Literal["logistic", "svm", "nb", "knn", "tree", "lightgbm"]

_LINEAR, _TREES, _SVD = {"logistic", "svm", "nb"}, {"tree", "lightgbm"}, {"knn", "tree", "lightgbm"}
_NGRAMS = {"analyzer", "ngram_range", "char_ngram_range", "n_features", "sublinear_tf"}
READ_BY = {
    "dense": _LINEAR | _TREES,
    "C": _LINEAR,
    "max_iter": _LINEAR,
    "n_components": _SVD,
    "n_neighbors": {"knn"},
    "n_estimators": {"lightgbm"},
    "learning_rate": {"lightgbm"},
    "n_bags": {"lightgbm"},
    "extra_trees": {"lightgbm"},
    "num_leaves": _TREES,
    "min_child_samples": _TREES,
}
"""Models that read a setting; all read those that are not listed."""


class Classical(Section):
    """The names are scikit-learn's; see HashingVectorizer, TfidfTransformer, LogisticRegression; LGBMClassifier."""

    model: Literal[Estimator, "stack"] = Field(
        "logistic",
        description="logistic regression; svm: linear SVM with a temperature; nb: naive Bayes log-ratios in a logistic "
        "regression (NBSVM); knn: nearest neighbours; tree: one decision tree; lightgbm: boosted trees; stack: several",
    )
    estimators: Annotated[tuple[Estimator, ...], BeforeValidator(as_list)] = Field(
        ("logistic", "knn", "lightgbm"), min_length=1, description="stack: models that are fitted"
    )
    final_estimator: Literal["sum", "lightgbm"] = Field(
        "sum",
        description="stack: what joins their inner out-of-fold logits: a weighted sum, or boosted trees that read the "
        "features, too",
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
    C: float = Field(1.0, gt=0, description="linear models: inverse of the L2 regularization strength")
    max_iter: int = Field(500, ge=1, description="linear models: most iterations of the solver")

    n_components: int = Field(
        24, ge=0, le=1024, description="knn, tree, lightgbm: directions of the SVD of the TF-IDF that they read"
    )
    n_neighbors: int = Field(50, ge=1, description="knn: training rows whose labels are averaged")
    n_estimators: int = Field(200, ge=1, le=10_000, description="lightgbm: rounds of boosting")
    learning_rate: float = Field(0.05, gt=0, le=1, description="lightgbm: part of each tree that is added")
    n_bags: int = Field(
        1, ge=1, le=100, description="lightgbm: fits with different random rows and columns, which are averaged"
    )
    extra_trees: bool = Field(
        False,
        description="lightgbm: try one random threshold a feature and node, as extremely randomized trees do; it suits "
        "few prompts with many rows each, and wants more rounds",
    )
    num_leaves: int = Field(15, ge=2, le=4096, description="tree, lightgbm: most leaves of a tree")
    min_child_samples: int = Field(40, ge=1, description="tree, lightgbm: fewest rows of a leaf, each order counted")

    @property
    def members(self) -> tuple[Estimator, ...]:
        """The models that are fitted: the one that is named, or those of a stack."""
        return self.estimators if self.model == "stack" else (self.model,)

    @property
    def reads_ngrams(self) -> bool:
        """Whether a model reads n-grams: itself, or their SVD."""
        return bool(self.n_components or _LINEAR & {*self.members})

    @property
    def boosts_stack(self) -> bool:
        """Whether boosted trees join the logits of the models."""
        return self.model == "stack" and self.final_estimator == "lightgbm"

    @model_validator(mode="after")
    def _ordered(self) -> Classical:
        for name, value in (("ngram_range", self.ngram_range), ("char_ngram_range", self.char_ngram_range)):
            shortest, longest = value or (1, 1)
            if not 1 <= shortest <= longest <= 10:
                raise ValueError(f"{name} [{shortest}, {longest}] must be two lengths from 1 to 10, the shorter first")
        if len(set(self.estimators)) < len(self.estimators):
            raise ValueError(f"estimators {list(self.estimators)} name a model twice")
        for name in sorted({*self.model_dump(exclude_defaults=True)}):
            readers = {"stack"} if name in ("estimators", "final_estimator") else READ_BY.get(name)
            models = {self.model, *self.members} | ({"lightgbm"} if self.boosts_stack else set())
            if readers is not None and not readers & models:
                raise ValueError(
                    f"{name} changes nothing with classical.model={self.model}; set classical.model="
                    f"{' or '.join(sorted(readers))}"
                )
        if not self.reads_ngrams and (unread := sorted(_NGRAMS & {*self.model_dump(exclude_defaults=True)})):
            raise ValueError(
                f"{unread[0]} changes nothing with classical.model={self.model} and n_components=0; set n_components "
                "to 1 or more"
            )
        if self.boosts_stack and "lightgbm" in self.estimators:
            raise ValueError("estimators names lightgbm, and final_estimator=lightgbm: a stack can hold it once")
        if "knn" in self.members and not self.n_components:
            raise ValueError("n_components=0 leaves knn nothing to compare; set n_components to 1 or more")
        return self
