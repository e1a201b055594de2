"""Preview: each hidden token is recognised and marked for what it is."""

import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from flaxmlm import config, objectives, preview
from flaxmlm.models.model import Inputs
from flaxmlm.objectives import Batch, Example

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCAB += ["▁the", "▁cat", "s", "▁sat", "▁dog", "\x1b[31m"]
SPECIALS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
PAD, CLS, SEP, MASK, THE, CAT, S, SAT, DOG, ESCAPE = 0, 2, 3, 4, *range(5, 11)

# Two documents and two slots of padding; of the four slots one is not used.
ORIGINAL = [CLS, THE, CAT, S, SEP, CLS, SAT, DOG, SEP, PAD, PAD]
SHOWN = [CLS, MASK, CAT, S, SEP, CLS, THE, DOG, SEP, PAD, PAD]
ROW = {
  "step": 3,
  "row": 1,
  "example": 77,
  "original_ids": ORIGINAL,
  "input_ids": SHOWN,
  "slots": [1, 6, 7, 0],
  "targets": [THE, SAT, DOG, CLS],
  "weights": [1.0, 1.0, 1.0, 0.0],
  "segments": [1] * 5 + [2] * 4 + [0] * 2,
  "positions": [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0],
  "token_types": [0] * 11,
  "flags": [1, 3, 1, 0, 1, 1, 1, 1, 1, 0, 0],
}


def tokens(ids):
  return [VOCAB[n] for n in ids]


def printed(row, **options):
  console = Console(file=io.StringIO(), width=100, **options)
  preview.show(row, tokens, SPECIALS, console)
  return console.file.getvalue()


def test_masked_replaced_and_kept_are_told_apart():
  assert preview.hidden(ROW, mask=MASK) == {
    1: "masked",
    6: "replaced",
    7: "kept",
  }


def test_a_random_token_equal_to_the_original_counts_as_kept():
  row = ROW | {"input_ids": [*SHOWN[:6], SAT, *SHOWN[7:]]}
  assert preview.hidden(row, mask=MASK)[6] == "kept"


def test_a_row_is_printed_with_signs_borders_padding_and_counts():
  lines = [line.rstrip() for line in printed(ROW).splitlines()]
  assert lines == [
    "step 3, row 1, example 77: hidden 3 of 5 = 60.0%; 1 masked, 1 replaced,"
    " 1 kept",
    "1 │ [CLS] [MASK]‹▁the› cats [SEP]",
    "2 │ [CLS] ‹▁sat→▁the› ‹▁dog=› [SEP]",
    "  │ +2 [PAD]",
  ]


def test_each_kind_has_a_colour_of_its_own():
  text = printed(ROW, force_terminal=True, color_system="standard")
  colours = [
    text[: text.index(sign)].rpartition("\x1b[")[2]
    for sign in ("[MASK]‹", "‹▁sat", "‹▁dog")
  ]
  assert len(set(colours)) == 3
  assert "" not in colours


def test_a_row_of_padding_has_nothing_hidden():
  row = ROW | {
    "original_ids": [PAD] * 11,
    "input_ids": [PAD] * 11,
    "segments": [0] * 11,
    "weights": [0.0] * 4,
  }
  text = printed(row)
  assert "hidden 0 of 0; 0 masked" in text
  assert "+11 [PAD]" in text


@pytest.mark.parametrize("place", [2, 7])
def test_a_token_can_do_nothing_to_the_terminal(place):
  original = [*ORIGINAL[:place], ESCAPE, *ORIGINAL[place + 1 :]]
  text = printed(ROW | {"original_ids": original})
  assert "\x1b" not in text
  assert "\N{REPLACEMENT CHARACTER}[31m" in text


def test_legend_has_every_sign():
  assert preview.legend("<mask>").plain == (
    "<mask>‹cat› masked   ‹cat→dog› replaced by a random token   ‹cat=› asked"
    " for, but kept"
  )


def test_objects_are_the_rows_and_json():
  batch = Batch(
    *(
      np.array([ROW[name], ROW[name][::-1]])
      for name in ("original_ids", "segments", "positions", "flags")
    ),
    np.array([77, 78], np.int32),
  )
  shown = np.array([SHOWN, SHOWN[::-1]])
  example = Example(
    Inputs(shown, batch.segments, batch.positions, np.zeros_like(shown)),
    *(np.array([ROW[name]] * 2) for name in ("slots", "targets", "weights")),
    units=np.zeros((2, 4), np.int32),
    counts={},
    flags=batch.flags,
  )
  found = list(preview.objects(example, batch.example, step=3))
  assert json.loads(json.dumps(found[0])) == ROW | {"row": 0}
  assert found[1]["row"] == 1
  assert found[1]["example"] == 78
  assert found[1]["input_ids"] == SHOWN[::-1]


def test_counts_of_what_the_objective_really_draws():
  V, L = 500, 128
  objective = objectives.build(
    config.defaults().objective,
    row_length=L,
    vocab=SPECIALS | {"size": V},
    steps=1,
  )
  rng = np.random.default_rng(0)
  ids = rng.integers(5, V, (64, L)).astype(np.int32)
  ids[:, 0], ids[:, -1] = CLS, SEP
  ones = np.ones_like(ids)
  flags = ones.astype(np.uint8)
  batch = Batch(ids, ones, ones, flags, np.arange(64, dtype=np.int32))
  keys = jax.random.split(jax.random.key(0), 64)
  example = jax.device_get(jax.jit(objective.corrupt)(keys, batch, 0))
  kinds = []
  for row in preview.objects(example, batch.example, step=0):
    hidden = preview.hidden(row, mask=MASK)
    changed = np.flatnonzero(ids[row["row"]] != row["input_ids"])
    assert {p for p, kind in hidden.items() if kind != "kept"} == set(changed)
    assert len(hidden) == round(0.15 * (L - 2))
    kinds += hidden.values()
  # Binomial, five standard deviations of n = 64 * 19.
  for kind, share in (("masked", 0.8), ("replaced", 0.1), ("kept", 0.1)):
    bound = 5 * (share * (1 - share) / len(kinds)) ** 0.5
    assert abs(kinds.count(kind) / len(kinds) - share) < bound
