"""pairclf trains classifiers on preference pairs, predicts test files and packages the models for Kaggle."""

import logging
import warnings

__version__ = "0.1.0"

# Two messages of libraries to each other, which a user can do nothing about:
# on CPUs with AVX512-BF16 bitsandbytes (0.50) says at import that a bfloat16 kernel is missing, which pairclf never
# uses, so that scores are the same on every CPU; and peft (0.21) reads an attribute that transformers 5.20 renamed.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
