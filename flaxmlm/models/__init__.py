"""Encoder architectures, one file each, as pure functions over a tree.

`MODELS[family](options, vocab_size=…, dtype=…)` returns a `Model`. Nothing
above this folder sees Flax.
"""

from __future__ import annotations

from flaxmlm.models import bert
from flaxmlm.models.model import Inputs, Model

__all__ = ["MODELS", "Inputs", "Model", "build"]

MODELS = {"bert": bert.build}


def build(options, *, vocab_size: int, dtype: str) -> Model:
  """Returns the model of `options.family`.

  Args:
    options: The `model` keys of the config.
    vocab_size: V.
    dtype: Compute dtype, "float32" or "bfloat16"; parameters are float32.
  """
  return MODELS[options["family"]](options, vocab_size=vocab_size, dtype=dtype)
