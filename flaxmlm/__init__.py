"""flaxmlm: pretrain masked language models on your own text with JAX."""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
  from flaxmlm.inference.loading import LoadedModel

__version__ = "0.1.0"

_MOST = 4000  # characters of an error


class InputError(ValueError):
  """Something the user gave us is wrong; the message is one line for them.

  It says what was wrong, where (file:line or config key) and what to do.
  Programs print it and exit with code 2. What a file or a name puts into it can
  neither break the line nor steer a terminal: such characters are escaped, and
  the middle of a very long message is left out.
  """

  def __init__(self, message: str):
    line = " ".join(str(message).split("\n"))
    if not line.isprintable():
      line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    if len(line) > _MOST:
      line = f"{line[: _MOST // 2]} … {line[-_MOST // 2 :]}"
    super().__init__(line)


def load(folder: str) -> LoadedModel:
  """Loads a trained model from a workdir; see `inference.loading.load`."""
  from flaxmlm.inference.loading import load as load_folder

  return load_folder(folder)
