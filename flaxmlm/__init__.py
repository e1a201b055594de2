"""flaxmlm: pretrain masked language models on your own text with JAX."""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
  from flaxmlm.inference.loading import LoadedModel

__version__ = "0.1.0"


class InputError(ValueError):
  """Something the user gave us is wrong; the message is one line for them.

  It says what was wrong, where (file:line or config key) and what to do.
  Programs print it and exit with code 2.
  """


def load(folder: str) -> LoadedModel:
  """Loads a trained model from a workdir; see `inference.loading.load`."""
  from flaxmlm.inference.loading import load as load_folder

  return load_folder(folder)
