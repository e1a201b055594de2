"""A loaded model as a Hugging Face folder, and proof that it is the same."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from flaxmlm import InputError, models
from flaxmlm.config import as_tuple
from flaxmlm.inference.loading import LoadedModel, load
from flaxmlm.interop import families, huggingface

# Of logits, in float32: the same parameters go through the same program, and
# only an accelerator that adds up in another order each time may differ at all.
TOLERANCE = 1e-4
_ROLES = ("pad", "unk", "cls", "sep", "mask")


def write_folder(
  m: LoadedModel, folder: str, *, tokenizer_json: bytes, card: str
) -> None:
  """Writes config, weights, tokenizer and card into an empty folder.

  Args:
    m: With a tokenizer. Of its parameters, `kept` are written.
    folder: Is there.
    tokenizer_json: See `tokenizers.exporting.to_json`.
    card: README.md.
  """
  vocab, options = m.tokenizer.vocab, m.config["model"]
  ids = {role: getattr(vocab, role) for role in _ROLES}
  params = {name: m.params[name] for name in kept(m)}
  config = families.write_config(
    options, vocab_size=m.vocab_size, ids=ids, heads=params
  )
  huggingface.save(folder, params, config, options)
  tokens = {
    f"{role}_token": name
    for role, name in zip(_ROLES, m.tokenizer.tokens(ids.values()), strict=True)
  }
  settings = {
    # The one that takes tokenizer.json as it is, whatever the family.
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": m.max_length,
    "model_input_names": _input_names(m),
    "clean_up_tokenization_spaces": False,
    **tokens,
  }
  files = {
    "tokenizer.json": tokenizer_json,
    "tokenizer_config.json": _json(settings),
    "special_tokens_map.json": _json(tokens),
    "README.md": card.encode(),
  }
  for name, data in files.items():
    with open(os.path.join(folder, name), "wb") as file:
      file.write(data)


def kept(m: LoadedModel) -> list[str]:
  """Returns the parts of a model that its family's folders can have.

  Their head of pairs has two classes, which mean what NSP or SOP means by them:
  that of `sentence_pair` isn't one.
  """
  heads = families.heads_of(m.config["model"]["family"])
  names = m.config.get("objective", {}).get("name", ())
  own = "pair" if "sentence_pair" in as_tuple(names) else None
  return [
    name
    for name in m.params
    if name == "encoder" or (name in heads and name != own)
  ]


def check_logits(
  m: LoadedModel, folder: str, rows: Sequence[np.ndarray]
) -> float:
  """Loads a folder and compares its logits with a model's.

  They are those of the MLM head, or of the discriminator.

  Args:
    m: The model, whatever its compute dtype: float32 is compared.
    folder: Of `write_folder`.
    rows: Token ids, [CLS] and [SEP] included.

  Returns:
    The largest difference.

  Raises:
    InputError: It is more than `TOLERANCE`, or not a number.
  """
  again = load(folder)
  same = models.build(
    m.config["model"], vocab_size=m.vocab_size, dtype="float32"
  )
  whole = dataclasses.replace(m, model=same)
  worst = 0.0
  for number, row in enumerate(rows, 1):
    ours, theirs = (
      one.logits(row[None]) if "mlm" in m.params else one.detect(row[None])
      for one in (whole, again)
    )
    difference = np.abs(ours - theirs)
    if not difference.max() <= TOLERANCE:
      raise InputError(
        f"{folder}: its logits differ by {difference.max():.2g} in row"
        f" {number} of {len(rows)}; nothing was exported"
      )
    worst = max(worst, float(difference.max()))
  return worst


def _input_names(m: LoadedModel) -> list[str]:
  names = ["input_ids", "attention_mask"]
  return [*names, "token_type_ids"] if m.model.token_types > 1 else names


def _json(value: Any) -> bytes:
  return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
