"""How far we are from Hugging Face's torch models; prints docs/parity.md.

  python -m benchmarks.parity [--quick] [--json] > docs/parity.md

For each family, random configs (widths, heads, layers, activations, epsilons,
positions, segments, padding, windows): torch writes a folder with random
weights, we load it; hidden states, logits, loss and the loss's gradient for
every parameter are compared in float32. Then the other way: our initial
parameters, exported, in torch. Needs the extra `hf`.
"""

from __future__ import annotations

import random
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from flaxmlm.inference import loading
from flaxmlm.interop import families, huggingface
from flaxmlm.models import Inputs, Model

CONFIGS = 20
HEAD = """# Parity with Hugging Face

This page is printed by `python -m benchmarks.parity`: the largest differences
from `transformers` in torch, float32, over random configs.
"""
FOOT = """
- **hidden, logits**: absolute, where both have unit scale.
- **argmax**: share of the tokens whose likeliest token differs.
- **gradient**: of a parameter's largest entry, or of a thousandth of the
  largest of all parameters where that is more.
- **exported**: logits of our own initial parameters, in torch.
"""
FAMILIES = tuple(families.FAMILIES)


def main() -> None:
  args = report.parser(__doc__).parse_args()
  rows = []
  for family in FAMILIES:
    found = [
      compare(family, seed) for seed in range(2 if args.quick else CONFIGS)
    ]
    rows.append(
      {"family": family, "configs": len(found)}
      | {name: max(one[name] for one in found) for name in found[0]}
    )
  print(HEAD)
  names = list(rows[0])
  print(f"| {' | '.join(names)} |")
  print(f"|{'---|' * len(names)}")
  for row in rows:
    cells = (
      v if isinstance(v, str | int) else f"{v:.1e}" for v in row.values()
    )
    print(f"| {' | '.join(map(str, cells))} |")
  print(FOOT)
  versions = report.machine(["jax", "flax", "torch", "transformers"])
  print(f"{versions['date']}, Python {versions['python']}, ", end="")
  print(", ".join(f"{k} {v}" for k, v in versions["versions"].items()) + ".")


def compare(family: str, seed: int) -> dict[str, float]:
  """Returns the largest differences of one random config."""
  import torch

  draw = random.Random(f"{family}{seed}")
  torch.manual_seed(seed)
  theirs = make_torch(family, draw)
  ids, valid, types, labels = make_batch(theirs.config, family, draw)
  with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    m = loading.load(folder)
  if m.unused:
    raise AssertionError(f"unused tensors: {m.unused}")
  hidden, logits = m.encode(ids, valid, types), m.logits(ids, valid, types)
  loss, gradient = loss_and_gradient(m, ids, valid, types, labels)

  given = {"input_ids": torch.tensor(ids, dtype=torch.long)}
  given["attention_mask"] = torch.tensor(valid, dtype=torch.long)
  if m.model.token_types:
    given["token_type_ids"] = torch.tensor(types, dtype=torch.long)
  out = theirs(
    **given,
    labels=torch.tensor(labels, dtype=torch.long),
    output_hidden_states=True,
  )
  out.loss.backward()
  real = valid > 0
  base = getattr(theirs, theirs.base_model_prefix)
  with torch.no_grad():
    last = base(**given).last_hidden_state.numpy()
  want = out.logits.detach().numpy()
  ours = huggingface.to_tensors(gradient, m.config["model"], pad=m.pad)
  gradients = {
    name: parameter.grad.numpy()
    for name, parameter in theirs.named_parameters()
    if parameter.grad is not None  # the other name of an untied decoder's bias
  }
  # A key's bias has the gradient 0 (it shifts all scores alike), so its noise
  # has no scale of its own.
  least = 1e-3 * max(np.abs(grad).max() for grad in gradients.values())
  errors = [
    np.abs(ours[name] - grad).max() / max(np.abs(grad).max(), least)
    for name, grad in gradients.items()
  ]
  scale = np.abs(last[real]).std()
  return {
    "hidden": np.abs(hidden - last)[real].max() / max(scale, 1),
    "logits": np.abs(logits - want)[real].max() / max(want[real].std(), 1),
    "argmax": float((logits.argmax(-1) != want.argmax(-1))[real].mean()),
    "loss": abs(loss - out.loss.item()),
    "gradient": max(errors),
    "exported": exported(m, ids, valid, types),
  }


def exported(m: Any, ids: Any, valid: Any, types: Any) -> float:
  """Returns how far torch's logits of our own initial parameters are."""
  import torch
  import transformers

  options = m.config["model"]
  params = jax.device_get(m.model.init(jax.random.key(0)))
  named = {"pad": m.pad, "cls": 1, "sep": 2}
  with tempfile.TemporaryDirectory() as folder:
    written = families.write_config(options, vocab_size=m.vocab_size, ids=named)
    huggingface.save(folder, params, written, options)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    again = loading.load(folder)
  given = {
    "input_ids": torch.tensor(ids, dtype=torch.long),
    "attention_mask": torch.tensor(valid, dtype=torch.long),
  }
  if m.model.token_types:
    given["token_type_ids"] = torch.tensor(types, dtype=torch.long)
  with torch.no_grad():
    want = theirs(**given).logits.numpy()
  got = again.logits(ids, valid, types)
  return np.abs(got - want)[valid > 0].max()


def make_batch(
  c: Any, family: str, draw: random.Random
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Returns ids, valid, token types and labels [B L] (-100: not asked)."""
  rng = np.random.default_rng(draw.randrange(2**31))
  most = c.max_position_embeddings
  if family == "roberta":
    most -= c.pad_token_id + 1
  B, L = draw.randint(1, 3), draw.randint(8, most)
  ids = rng.integers(3, c.vocab_size, (B, L)).astype(np.int32)
  valid = np.ones_like(ids)
  if draw.random() < 0.5:
    for row, length in enumerate(rng.integers(4, L + 1, B)):
      valid[row, length:] = 0
      ids[row, length:] = c.pad_token_id
  kinds = getattr(c, "type_vocab_size", 1)
  types = rng.integers(0, kinds, (B, L)).astype(np.int32)
  labels = np.where((rng.random((B, L)) < 0.3) & (valid > 0), ids, -100)
  labels[0, 0] = ids[0, 0]
  return ids, valid, types, labels


def loss_and_gradient(
  m: Any, ids: Any, valid: Any, types: Any, labels: Any
) -> tuple[float, Any]:
  """Returns the mean loss over the labels and its gradient."""
  positions = m._positions(ids)
  inputs = Inputs(*map(jnp.asarray, (ids, valid, positions, types)))
  rows, columns = np.nonzero(labels != -100)
  targets = jnp.asarray(labels[rows, columns])
  model: Model = m.model

  def loss(params: Any) -> jax.Array:
    hidden = model.encode(params, inputs, None)[rows, columns]
    logits = model.predict(params, hidden[None])[0]
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, targets[:, None], 1).mean()

  value, gradient = jax.jit(jax.value_and_grad(loss))(m.params)
  return float(value), jax.device_get(gradient)


def make_torch(family: str, draw: random.Random) -> Any:
  """Returns a torch model of a random config, all parameters random."""
  import torch
  import transformers

  heads = draw.randint(1, 4)
  width = heads * 2 * draw.randint(2, 7)
  act = draw.choice(["gelu", "gelu_new", "relu", "silu"])
  pad = draw.choice([0, 1, 2])
  eps = draw.choice([1e-12, 1e-6, 1e-5])
  shared: dict[str, Any] = {
    "vocab_size": draw.randint(50, 120),
    "max_position_embeddings": draw.randint(16, 70),
    "pad_token_id": pad,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": draw.random() < 0.8,
  }
  layers = draw.randint(1, 4)
  if family == "distilbert":
    c = transformers.DistilBertConfig(
      dim=width,
      n_heads=heads,
      n_layers=layers,
      hidden_dim=draw.randint(5, 60),
      activation=act,
      dropout=0.0,
      attention_dropout=0.0,
      **shared,
    )
  elif family == "modernbert":
    c = transformers.ModernBertConfig(
      hidden_size=width,
      num_attention_heads=heads,
      num_hidden_layers=layers + 1,
      intermediate_size=draw.randint(5, 60),
      hidden_activation=act,
      norm_eps=eps,
      local_attention=draw.choice([4, 8, 10, 128]),
      global_attn_every_n_layers=draw.randint(1, 4),
      rope_parameters={
        "full_attention": {
          "rope_type": "default",
          "rope_theta": draw.choice([1e4, 16e4]),
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
      },
      cls_token_id=None,
      sep_token_id=None,
      **shared,
    )
  else:
    names = {
      "bert": "Bert",
      "roberta": "Roberta",
      "albert": "Albert",
      "electra": "Electra",
    }
    kind = getattr(transformers, f"{names[family]}Config")
    more: dict[str, Any] = {}
    if family in ("albert", "electra"):
      more["embedding_size"] = draw.choice([width, draw.randint(4, 20)])
    if family == "albert":
      more["num_hidden_groups"] = draw.randint(1, layers)
      more["inner_group_num"] = draw.randint(1, 2)
    c = kind(
      hidden_size=width,
      num_attention_heads=heads,
      num_hidden_layers=layers,
      intermediate_size=draw.randint(5, 60),
      hidden_act=act,
      hidden_dropout_prob=0.0,
      attention_probs_dropout_prob=0.0,
      layer_norm_eps=eps,
      type_vocab_size=draw.randint(1, 3),
      **more,
      **shared,
    )
  model = transformers.AutoModelForMaskedLM.from_config(
    c, attn_implementation="eager"
  ).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model


if __name__ == "__main__":
  main()
