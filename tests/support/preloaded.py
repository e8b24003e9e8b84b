"""What the server of `support.forked` has imported before it forks: no thread may have begun there."""

from __future__ import annotations

import gc

gc.disable()  # collecting takes a quarter of an import's time
import hypothesis  # noqa: F401
import polars.testing  # noqa: F401
import pytest  # noqa: F401
import sklearn.model_selection  # noqa: F401 - transformers imports it with its first model
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import pairclf.approaches.finetune.train
import pairclf.approaches.finetune.trainer
import pairclf.approaches.prompt_trainer
import pairclf.inference.pool
import pairclf.inference.predict
import pairclf.runs.fit  # noqa: F401
from support import faults  # noqa: F401

get_checkpoint_conversion_mapping("llama")  # a process makes it when it first loads a model
gc.collect()
gc.freeze()  # a worker collects garbage after each batch that failed, and need not walk through libraries
gc.enable()
