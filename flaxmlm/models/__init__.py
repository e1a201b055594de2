"""Encoder architectures, one file each, as pure functions over a tree.

`MODELS[family](options, vocab_size=…, dtype=…)` returns a `Model`. Nothing
above this folder sees Flax.
"""

from __future__ import annotations

from flaxmlm.models import (
  albert,
  bert,
  distilbert,
  electra,
  modernbert,
  roberta,
)
from flaxmlm.models.model import Inputs, Model

__all__ = ["MODELS", "Inputs", "Model", "build"]

MODELS = {
  "albert": albert.build,
  "bert": bert.build,
  "distilbert": distilbert.build,
  "electra": electra.build,
  "modernbert": modernbert.build,
  "roberta": roberta.build,
}


def build(options, *, vocab_size: int, dtype: str) -> Model:
  """Returns the model of `options.family`.

  Args:
    options: The `model` keys of the config.
    vocab_size: V.
    dtype: Compute dtype, "float32" or "bfloat16"; parameters are float32.
  """
  return MODELS[options["family"]](options, vocab_size=vocab_size, dtype=dtype)
