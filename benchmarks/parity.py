"""How far we are from Hugging Face's torch models, on random configs.

  python -m benchmarks.parity [--quick] [--json] [--docs]

For each family, torch writes folders of random configs (widths, heads, layers,
activations, epsilons, padding, segments, windows, rotary bases, …) with random
weights, and we load them. Compared in float32: hidden states, logits, the loss,
its gradient for every parameter, and the parameters after steps of AdamW. Then
the other way: our own initial parameters, exported, in torch. Needs the extra
`hf`.

`--docs` writes docs/parity.md. Nearly all of the time goes into compiling, so
that is done without LLVM's optimisation and by XLA's older emitters (in a
quarter of the time), and by a process a core.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import report
from flaxmlm.inference import loading
from flaxmlm.inference.loading import LoadedModel
from flaxmlm.interop import families, huggingface
from flaxmlm.models import Inputs
from flaxmlm.objectives import Example, hiding
from flaxmlm.training import optimizers

CONFIGS = 20
STEPS = 3
TARGETS = {
  "hidden": 2e-5,
  "logits": 2e-5,
  "argmax": 0.0,
  "loss": 2e-5,
  "gradient": 1e-4,
  "one_step": 1e-6,
  "three_steps": 1e-6,
  "exported": 2e-5,
}
KEY_BIASES = ("key.bias", "k_lin.bias")
FAMILIES = tuple(families.FAMILIES)
PACKAGES = ("flaxmlm", "jax", "flax", "optax", "torch", "transformers")
DOCS = os.path.join(
  os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
  "docs",
  "parity.md",
)
# What makes XLA compile four times as fast; the arithmetic is the same.
QUICK_COMPILE = {
  "xla_backend_optimization_level": 0,
  "xla_cpu_use_fusion_emitters": False,
}
# An entry moves by lr · m / (√v + eps), which is lr itself in the first step
# however small the gradient is: with the usual eps, rounding noise in a
# gradient of 0 (a key's bias) moves it as far as a real one. With this eps,
# noise of 1e-8 moves it by 1e-7, while most entries still move by about lr.
ADAMW = {
  "name": "adamw",
  "peak_lr": 1e-3,
  "b1": 0.9,
  "b2": 0.98,
  "eps": 1e-4,
  "weight_decay": 0.1,
  "clip_norm": 1.0,
  "schedule": "constant",
  "warmup_steps": 0,
  "end_lr_ratio": 0.0,
}


class Rows(NamedTuple):
  """Rows, [B L] each.

  Attributes:
    ids: Token ids.
    valid: 1 for tokens, 0 for padding; None: nothing is said, all are tokens.
    types: Token types.
    labels: The token that is asked for, -100 where none is.
  """

  ids: np.ndarray
  valid: np.ndarray | None
  types: np.ndarray
  labels: np.ndarray


def main() -> None:
  parser = report.parser(__doc__)
  parser.add_argument(
    "--docs", action="store_true", help="write docs/parity.md"
  )
  args = parser.parse_args()
  configs = 2 if args.quick else CONFIGS
  start = time.perf_counter()
  flags = (f"--{name}={value}" for name, value in QUICK_COMPILE.items())
  # The processes of the pool begin with these.
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["XLA_FLAGS"] = " ".join(flags).lower()
  jobs = [(family, seed) for family in FAMILIES for seed in range(configs)]
  with concurrent.futures.ProcessPoolExecutor(
    len(os.sched_getaffinity(0)),
    multiprocessing.get_context("spawn"),
    initializer=keep_quiet,
  ) as pool:
    found = pool.map(compare, *zip(*jobs, strict=True))
    of_family: dict[str, list[dict[str, float]]] = {f: [] for f in FAMILIES}
    for (family, seed), one in zip(jobs, found, strict=True):
      of_family[family].append(one)
      shown = " ".join(f"{name}={value:.1e}" for name, value in one.items())
      print(f"{family} {seed}: {shown}", flush=True)
  rows = [
    {"family": family, "configs": configs}
    | {name: max(one[name] for one in found) for name in TARGETS}
    for family, found in of_family.items()
  ]
  report.table(rows)
  if args.docs:
    with open(DOCS, "w", encoding="utf-8") as file:
      file.write(page(rows))
  report.finish(
    args,
    "parity",
    {
      "targets": TARGETS,
      "families": {row["family"]: row for row in rows},
      "seconds": round(time.perf_counter() - start),
    },
    packages=PACKAGES,
  )


def keep_quiet() -> None:
  """Sets up a process of the pool: no progress bars, one thread for torch."""
  import torch
  import transformers

  transformers.utils.logging.disable_progress_bar()
  torch.set_num_threads(1)


def compare(family: str, seed: int) -> dict[str, float]:
  """Returns the largest differences of one random config.

  `hidden`, `logits` and `exported` are absolute, over what isn't padding;
  where torch's values have a standard deviation above 1, they are divided by
  it. `argmax` is the share of tokens whose likeliest token differs. `gradient`
  is relative to the largest entry of the parameter's gradient; only a key's
  bias is compared with the gradient of the key's matrix. It shifts all scores
  of a token alike, so its gradient is 0: what is computed is rounding noise,
  which has no scale of its own. `one_step` and `three_steps` are absolute, of
  the parameters after one and after three steps of AdamW (see `ADAMW`), the
  moments 0 at first.

  Args:
    family: The family.
    seed: Of the config, the weights and the rows.

  Raises:
    AssertionError: A tensor that one side has and the other hasn't.
  """
  import torch

  draw = random.Random(f"{family}{seed}")
  torch.manual_seed(seed)
  theirs = make_torch(family, draw)
  with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    m = loading.load(folder)
  assert not m.unused, f"{family} {seed}: nothing took {m.unused}"
  batches = make_rows(theirs.config, m, draw)
  return (
    compare_outputs(theirs, m, batches[0])
    | {"exported": compare_exported(m, batches[0])}
    | compare_training(theirs, m, batches)
  )


def compare_outputs(theirs: Any, m: LoadedModel, rows: Rows) -> dict[str, Any]:
  """Returns the differences of hidden states and logits."""
  import torch

  given = for_torch(m, rows)
  with torch.no_grad():
    base = getattr(theirs, theirs.base_model_prefix)
    want_hidden = base(**given).last_hidden_state.numpy()
    want = theirs(**given).logits.numpy()
  hidden, logits = m.encode(*rows[:3]), m.logits(*rows[:3])
  real = np.ones_like(rows.ids) if rows.valid is None else rows.valid
  differs = logits.argmax(-1) != want.argmax(-1)
  return {
    "hidden": difference(hidden, want_hidden, real),
    "logits": difference(logits, want, real),
    "argmax": float(differs[real > 0].mean()),
  }


def compare_exported(m: LoadedModel, rows: Rows) -> float:
  """Returns how far torch is, reading our own initial parameters."""
  import transformers

  options = m.config["model"]
  init = jax.jit(m.model.init, compiler_options=QUICK_COMPILE)
  params = jax.device_get(init(jax.random.key(0)))
  named = {"pad": m.pad, "cls": 1, "sep": 2}
  written = families.write_config(
    options, vocab_size=m.vocab_size, ids=named, heads=m.params
  )
  again = families.read_config(written, "")[1]
  assert again == options, f"{again} is not {options}"
  with tempfile.TemporaryDirectory() as folder:
    huggingface.save(folder, params, written, options)
    theirs, found = transformers.AutoModelForMaskedLM.from_pretrained(
      folder, output_loading_info=True
    )
  assert not any(found.values()), f"torch did not take all: {found}"
  # The same functions, so that nothing is compiled anew.
  ours = dataclasses.replace(m, params=jax.tree.map(jnp.asarray, params))
  differences = compare_outputs(theirs.eval(), ours, rows)
  return max(differences["hidden"], differences["logits"])


def compare_training(
  theirs: Any, m: LoadedModel, batches: list[Rows]
) -> dict[str, float]:
  """Returns the differences of loss, gradient and parameters; changes theirs.

  A step a batch; loss and gradient are those of the first.
  """
  import torch

  options = m.config["model"]
  groups = [
    {"params": [p for p in theirs.parameters() if p.ndim > 1]},
    {
      "params": [p for p in theirs.parameters() if p.ndim == 1],
      "weight_decay": 0.0,
    },
  ]
  adamw = torch.optim.AdamW(
    groups,
    lr=ADAMW["peak_lr"],
    betas=(ADAMW["b1"], ADAMW["b2"]),
    eps=ADAMW["eps"],
    weight_decay=ADAMW["weight_decay"],
  )
  step, state = make_step(m)
  result = {}
  for number, rows in enumerate(batches, 1):
    adamw.zero_grad()
    labels = torch.tensor(rows.labels, dtype=torch.long)
    their_loss = theirs(**for_torch(m, rows), labels=labels).loss
    their_loss.backward()
    loss, gradient, state = step(state, for_us(m, rows))
    if number == 1:
      result["loss"] = abs(float(loss) - their_loss.item())
      ours = huggingface.to_tensors(gradient, options, pad=m.pad)
      result["gradient"] = compare_gradients(theirs, ours)
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), ADAMW["clip_norm"])
    adamw.step()
    name = {1: "one_step", STEPS: "three_steps"}.get(number)
    if name:
      ours = huggingface.to_tensors(state[0], options, pad=m.pad)
      result[name] = max(
        float(np.abs(used(ours[n], n, m) - used(p.detach(), n, m)).max())
        for n, p in shared(theirs, ours)
      )
  return result


def compare_gradients(theirs: Any, ours: dict[str, np.ndarray]) -> float:
  """Returns the largest difference of a gradient; see `compare`."""
  pairs = {n: (ours[n], p.grad.numpy()) for n, p in shared(theirs, ours)}
  scales = {n: np.abs(want).max() for n, (_, want) in pairs.items()}
  for name in scales:
    if name.endswith(KEY_BIASES):
      scales[name] = scales[name.removesuffix("bias") + "weight"]
  return max(
    float(np.abs(got - want).max() / scales[name])
    for name, (got, want) in pairs.items()
  )


def shared(theirs: Any, ours: dict[str, np.ndarray]) -> list[tuple[str, Any]]:
  """Returns torch's parameters under names that we have.

  Raises:
    AssertionError: A parameter that only one side has.
  """
  # A tied one has two names. An untied decoder's bias has two names and two
  # parameters, of which torch uses one.
  named = {
    name: parameter
    for name, parameter in theirs.named_parameters(remove_duplicate=False)
    if parameter.grad is not None
  }
  missing = {n for n in ours if n not in named and not n.endswith("bias")}
  assert not missing, f"torch has no {missing}"
  found = [(name, p) for name, p in named.items() if name in ours]
  known = {id(p) for _, p in found}
  missing = {n for n, p in named.items() if id(p) not in known}
  assert not missing, f"we have no {missing}"
  return found


def used(value: Any, name: str, m: LoadedModel) -> np.ndarray:
  """Returns a parameter without the rows of positions that nothing reads.

  RoBERTa's positions begin behind the id of padding; rows before that only
  decay, and we don't have them.
  """
  first = m.pad if m.model.skips_padding and "position_emb" in name else 0
  return np.asarray(value)[first:]


def difference(ours: np.ndarray, want: np.ndarray, real: np.ndarray) -> float:
  """Returns the largest difference; see `compare`."""
  ours, want = ours[real > 0], want[real > 0]
  return float(np.abs(ours - want).max() / max(want.std(), 1))


def for_torch(m: LoadedModel, rows: Rows) -> dict[str, Any]:
  """Returns what torch's model is given."""
  import torch

  given = {"input_ids": rows.ids, "attention_mask": rows.valid}
  if m.model.token_types:
    given["token_type_ids"] = rows.types
  return {
    name: torch.tensor(value, dtype=torch.long)
    for name, value in given.items()
    if value is not None
  }


def for_us(m: LoadedModel, rows: Rows) -> Example:
  """Returns what our objective is given: a slot a label."""
  valid = np.ones_like(rows.ids) if rows.valid is None else rows.valid
  positions = np.arange(rows.ids.shape[1]) + np.zeros_like(rows.ids)
  if m.model.skips_padding:
    positions = np.where(valid > 0, valid.cumsum(axis=1) - 1, -1)
  inputs = Inputs(rows.ids, valid, positions.astype(np.int32), rows.types)
  # Labels first, in order; the slots behind them have no weight.
  slots = np.argsort(rows.labels < 0, axis=1, kind="stable").astype(np.int32)
  targets = np.take_along_axis(rows.labels, slots, axis=1)
  weights = (targets >= 0).astype(np.float32)
  return Example(
    inputs,
    slots,
    np.maximum(targets, 0),
    weights,
    counts={},
    flags=np.zeros(rows.ids.shape, np.uint8),
  )


def make_step(m: LoadedModel) -> tuple[Callable[..., Any], Any]:
  """Returns `(state, example) -> (loss, gradient, state)`, and the state."""
  optimizer = optimizers.make_optimizer(ADAMW, steps=STEPS)

  def loss(params: Any, example: Example) -> jax.Array:
    hidden = m.model.encode(params, example.inputs, None)
    logits = hiding.predict_slots(m.model, params, hidden, example)
    sums = hiding.add_up(logits, example, temperature=1.0)
    return sums["nll"] / sums["weight"]

  @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
  def step(state: Any, example: Example) -> Any:
    params, opt_state = state
    value, gradient = jax.value_and_grad(loss)(params, example)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    state = optax.apply_updates(params, updates), opt_state
    return value, gradient, state

  return step, (m.params, optimizer.init(m.params))


def make_rows(c: Any, m: LoadedModel, draw: random.Random) -> list[Rows]:
  """Returns a batch a step, all of one shape."""
  rng = np.random.default_rng(draw.randrange(2**31))
  B, L = draw.randint(1, 3), draw.randint(8, min(24, m.max_length))
  padding = draw.choice(["none", "right", "left"])
  result = []
  for _ in range(STEPS):
    ids = rng.integers(0, c.vocab_size - 1, (B, L)).astype(np.int32)
    ids += ids >= c.pad_token_id
    valid = None
    if padding != "none":
      valid = np.ones_like(ids)
      for row, length in enumerate(rng.integers(4, L + 1, B)):
        empty = slice(length, L) if padding == "right" else slice(L - length)
        valid[row, empty], ids[row, empty] = 0, c.pad_token_id
    types = rng.integers(0, max(m.model.token_types, 1), (B, L))
    asked = (rng.random((B, L)) < 0.3) & (ids != c.pad_token_id)
    asked[0] |= ids[0] == ids[0].max()  # at least one
    labels = np.where(asked, ids, -100)
    result.append(Rows(ids, valid, types.astype(np.int32), labels))
  return result


def make_torch(family: str, draw: random.Random) -> Any:
  """Returns a torch model of a random config, all parameters random."""
  import torch
  import transformers

  heads, layers = draw.randint(1, 4), draw.choice([1, 1, 2, 2, 3])
  # At least 8 wide: LayerNorm makes signs of two numbers, whatever they are,
  # and hardly anything has a gradient then.
  head_size = draw.randint(max(2, -(-8 // heads)), 14)
  if family == "modernbert":
    head_size += head_size % 2  # rotary positions turn pairs
  vocab_size = draw.randint(30, 120)
  names = {
    "width": heads * head_size,
    "heads": heads,
    "layers": layers,
    "ffn": draw.randint(5, 60),
    "hidden_act": draw.choice(["gelu", "gelu_new", "relu", "silu"]),
    "norm_eps": draw.choice([1e-12, 1e-7, 1e-5, 1e-3]),
    "segment_types": draw.randint(1, 3),
    "max_positions": draw.randint(20, 60),
    "tie_word_embeddings": draw.random() < 0.7,
    "dropout": 0.0,
    "attention_dropout": 0.0,
  }
  kind = family
  more: dict[str, Any] = {"pad_token_id": draw.choice([0, 1, 2, 5])}
  if family == "roberta":
    kind = draw.choice(["roberta", "xlm-roberta", "camembert"])
  if family in ("albert", "electra"):
    names["embedding_size"] = draw.choice([names["width"], draw.randint(7, 20)])
  if family == "albert":
    names["num_hidden_groups"] = draw.randint(1, layers)
    names["inner_group_num"] = draw.randint(1, 2)
  if family == "modernbert":
    names["layers"] = layers + 1  # a local one among them
    names["local_attention"] = draw.choice([2, 5, 8, 10, 128])
    bases = [1e2, 1e4, 16e4]
    more |= {
      "global_attn_every_n_layers": draw.randint(1, 4),
      "rope_parameters": {
        which: {"rope_type": "default", "rope_theta": draw.choice(bases)}
        for which in ("full_attention", "sliding_attention")
      },
      "cls_token_id": None,
      "sep_token_id": None,
    }
  keys = families.FAMILIES[family].keys
  given = {keys[ours][0]: v for ours, v in names.items() if ours in keys}
  config = transformers.AutoConfig.for_model(
    kind,
    vocab_size=vocab_size,
    bos_token_id=None,
    eos_token_id=None,
    **given,
    **more,
  )
  model = transformers.AutoModelForMaskedLM.from_config(
    config, attn_implementation=draw.choice(["eager", "sdpa"])
  ).eval()
  spread = draw.choice([0.05, 0.1, 0.2])
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(spread * torch.randn_like(parameter))
  return model


def page(rows: list[dict[str, Any]]) -> str:
  """Returns docs/parity.md."""
  columns = ["family", "configs", *TARGETS]
  shown = [
    [v if isinstance(v, str) else f"{v:.1e}" if v else "0" for v in cells]
    for cells in (
      *([row["family"], str(row["configs"])] + _figures(row) for row in rows),
      ["at most", "", *TARGETS.values()],
    )
  ]
  titles = [c.replace("_", " ") for c in columns]
  table = "\n".join(
    f"| {' | '.join(cells)} |"
    for cells in (titles, ["---"] * len(columns), *shown)
  )
  found = report.machine(PACKAGES)
  versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
  return PAGE.format(
    table=table, date=found["date"], python=found["python"], versions=versions
  )


def _figures(row: dict[str, Any]) -> list[float]:
  return [row[name] for name in TARGETS]


PAGE = """# Parity with Hugging Face

The largest differences from `transformers` in torch, both in float32 on a CPU.
This page is written by

```bash
python -m benchmarks.parity --docs
```

{table}

{date}, Python {python}, {versions}.

Each config is drawn anew: width and number of heads, layers, activation
(`gelu`, `gelu_new`, `relu`, `silu`), epsilon of the norms, vocabulary, segment
types, positions, the id of padding, padding on the right, on the left or none
(and no mask), a tied decoder or one of its own; ALBERT's and ELECTRA's
embedding size, ALBERT's groups; ModernBERT's windows, global layers and both
rotary bases; RoBERTa as XLM-R and CamemBERT too. All parameters are random,
biases and norms included. torch writes the folder, `load` reads it. XLA
compiles without LLVM's optimisation here, for speed; a test compares some
configs as they are compiled by default.

- **hidden**, **logits**: `load(FOLDER).encode` and `.logits`; absolute, in
  units of torch's standard deviation where that is above 1.
- **argmax**: share of the tokens whose likeliest token differs.
- **loss**, **gradient**: of the masked tokens, for every parameter. Relative
  to the largest entry of the parameter's gradient. Only the bias of the keys is
  compared with the gradient of their matrix: it shifts all scores of a token
  alike and changes nothing, so its gradient is 0, and what is computed is
  rounding without a scale of its own.
- **one step**, **three steps**: parameters after AdamW (rate 1e-3, weight decay
  0.1 on matrices only, gradients clipped to a norm of 1, epsilon 1e-4), each
  side by its own gradients; the second and third step start from moments that
  aren't 0. With an epsilon much smaller than that, Adam's first step moves an
  entry by the whole rate in the direction of its sign even where the gradient
  is rounding noise.
- **exported**: hidden states and logits of our own initial parameters, written
  as a folder that torch reads.
"""


if __name__ == "__main__":
  main()
