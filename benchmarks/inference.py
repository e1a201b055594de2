"""What `flaxmlm.load(folder)` gives, against torch and ONNX Runtime.

  python -m benchmarks.inference [--shape=NAME ...] [--quick] [--json]

One Hugging Face folder with random weights, the same for all, and a WordPiece
vocabulary of 30,522 made-up words. In turns of one run, each in a process of
its own (`benchmarks.turns`), and compared first:

- encode: the last layer's hidden states of token ids, 32 rows or one. The peers
  are `BertModel` in torch (eval, inference_mode, SDPA) and the same exported to
  ONNX and run by ONNX Runtime.
- fill_mask: texts with one mask each, and five guesses a mask. Ours and
  transformers' `pipeline("fill-mask")` go from text to text; the pipeline
  computes the logits of all tokens, ours those of the masked ones. ONNX Runtime
  gets ids and only computes logits, of all tokens, which is what an exported
  masked language model does: no tokenizer, no ranking.

ONNX Runtime is given the export that it is best at (eager attention by
TorchScript, which its fusions know) and all graph optimizations, as it is and
with `onnxruntime.transformers.optimizer` first ("fused"). torch and ONNX
Runtime have a thread a physical core. Needs the extra `bench`.

Our rows and lengths are rounded up to some sizes, which the others need not do:
10 rows of 100 tokens are no such size, the other works are.

All have pages of 4 KiB, as a process that calls `load` has; `--huge_pages`
shows what huge ones are worth.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import string
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import flaxmlm
from benchmarks import report, turns

SPECIALS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
VOCAB = 30_522
TOLERANCE = 1e-4  # of hidden states and logits
TOP_K = 5
SHAPES = {"bert_4x256": (4, 256, 4), "bert_12x768": (12, 768, 12)}
PACKAGES = ("flaxmlm", "jax", "flax", "torch", "transformers", "onnxruntime")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
Functions = tuple[
  Callable[[np.ndarray], np.ndarray],
  Callable[[np.ndarray, list[str]], Any],
]
"""`ids -> hidden`, and `(ids, texts) -> guesses`, or logits [B L V]."""


class Work(NamedTuple):
  """What is asked for: rows of tokens, by `encode` or by `fill_mask`."""

  kind: str
  rows: int
  length: int

  def __str__(self) -> str:
    return f"{self.kind} {self.rows} x {self.length}"


WORKS = (
  Work("encode", 32, 128),
  Work("encode", 1, 128),
  Work("encode", 1, 24),
  Work("encode", 10, 100),
  Work("fill_mask", 32, 128),
  Work("fill_mask", 1, 24),
)


def main() -> None:
  parser = report.parser(__doc__)
  parser.add_argument("--huge_pages", action="store_true")
  parser.add_argument(
    "--shape", action="append", choices=SHAPES, help="by default the first"
  )
  args = parser.parse_args()
  if args.huge_pages:  # see `flaxmlm.training.memory`
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
  for name in args.shape or list(SHAPES)[:1]:
    print(name)
    with tempfile.TemporaryDirectory() as folder:
      figures = measure(folder, *SHAPES[name], quick=args.quick)
    report.finish(
      args,
      f"inference-{name}",
      figures | {"huge_pages": args.huge_pages},
      packages=PACKAGES,
    )


def measure(
  folder: str, layers: int, width: int, heads: int, *, quick: bool
) -> dict[str, Any]:
  """Times the peers in turn, so that a drifting machine is fair."""
  write_folder(folder, layers, width, heads)
  write_onnx(folder, heads, width)
  peers = {name: turns.start(make_peer, folder, name) for name in PEERS}
  rounds, seconds = (3, 0.1) if quick else (9, 0.5)
  figures = {}
  for work in WORKS:
    results = {name: turn(work, 1)[1] for name, turn in peers.items()}
    check(work, results)
    figures[str(work)] = time_peers(work, peers, rounds, seconds)
  return {
    "layers": layers,
    "width": width,
    "heads": heads,
    "vocab": VOCAB,
    "works": figures,
    "rounds": rounds,
  }


def time_peers(
  work: Work, peers: dict[str, turns.Turn], rounds: int, seconds: float
) -> dict[str, Any]:
  """Prints and returns milliseconds a call of each peer."""
  calls = {
    name: max(1, round(seconds / turn(work, 1)[0]))
    for name, turn in peers.items()
  }
  times: dict[str, list[float]] = {name: [] for name in peers}
  for _ in range(rounds):
    for name, turn in peers.items():
      turn(work, 1)  # the peer before has left its own in the caches
      spent, _ = turn(work, calls[name])
      times[name].append(1000 * spent / calls[name])
  median = {name: statistics.median(spent) for name, spent in times.items()}
  mine = median["flaxmlm"]
  report.table(
    [
      {
        str(work): name,
        "ms": median[name],
        "least": min(spent),
        "most": max(spent),
        "tokens/s": 1000 * work.rows * work.length / median[name],
        "its time / ours": median[name] / mine,
      }
      for name, spent in times.items()
    ]
  )
  best = min(m for n, m in median.items() if n.startswith("onnxruntime"))
  return {
    "milliseconds": median,
    "least": {name: min(spent) for name, spent in times.items()},
    "most": {name: max(spent) for name, spent in times.items()},
    "time_to_onnxruntime_best": mine / best,
  }


def make_peer(folder: str, name: str) -> Callable[[Work, int], np.ndarray]:
  """Returns what does a work several times.

  It returns the hidden states, or the ids of the guesses [B TOP_K].
  """
  functions = PEERS[name](folder)

  def run(work: Work, calls: int) -> np.ndarray:
    ids, texts = make_rows(work)
    encode, fill_mask = functions
    if work.kind == "encode":
      for _ in range(calls):
        hidden = encode(ids)
      return hidden
    for _ in range(calls):
      found = fill_mask(ids, texts)
    if isinstance(found, np.ndarray):  # logits
      at_masks = found[ids == SPECIALS["[MASK]"]]
      return np.argsort(-at_masks, axis=-1)[:, :TOP_K]
    # The pipeline gives a single text's list as it is.
    each = [found] if isinstance(found[0], dict) else found
    return np.array([[guess["token"] for guess in one] for one in each])

  return run


def write_folder(folder: str, layers: int, width: int, heads: int) -> None:
  """Writes a Hugging Face folder: BERT of random weights, a vocabulary."""
  import torch
  import transformers

  transformers.logging.disable_progress_bar()
  torch.manual_seed(0)
  config = transformers.BertConfig(
    vocab_size=VOCAB,
    hidden_size=width,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    intermediate_size=4 * width,
  )
  transformers.BertForMaskedLM(config).save_pretrained(folder)
  path = os.path.join(folder, "vocab.txt")
  with open(path, "w", encoding="utf-8") as file:
    file.writelines(f"{token}\n" for token in make_vocab())
  transformers.BertTokenizer(path).save_pretrained(folder)


@functools.cache
def make_vocab() -> list[str]:
  """Returns 30,522 tokens: BERT's special ones at their ids, and words."""
  words = (
    "".join(letters)
    for size in itertools.count(1)
    for letters in itertools.product(string.ascii_lowercase, repeat=size)
  )
  special = {number: token for token, number in SPECIALS.items()}
  return [special.get(i) or next(words) for i in range(VOCAB)]


@functools.cache
def make_rows(work: Work) -> tuple[np.ndarray, list[str]]:
  """Returns ids [B L], and the same as texts, with a [MASK] in each."""
  random = np.random.default_rng(0)
  ids = random.integers(1000, VOCAB, (work.rows, work.length))
  ids[:, 0], ids[:, -1] = SPECIALS["[CLS]"], SPECIALS["[SEP]"]
  ids[:, work.length // 2] = SPECIALS["[MASK]"]
  vocab = make_vocab()
  return ids, [" ".join(vocab[i] for i in row[1:-1]) for row in ids]


def make_ours(folder: str) -> Functions:
  m = flaxmlm.load(folder)
  return m.encode, lambda ids, texts: m.fill_mask(texts, TOP_K)


def make_torch(folder: str) -> Functions:
  """Returns those of Hugging Face's model and pipeline."""
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  model = transformers.BertForMaskedLM.from_pretrained(
    folder, attn_implementation="sdpa"
  ).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  pipeline = transformers.pipeline(
    "fill-mask", model=model, tokenizer=tokenizer
  )

  def encode(ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
      return model.bert(torch.from_numpy(ids)).last_hidden_state.numpy()

  def fill_mask(ids: np.ndarray, texts: list[str]) -> Any:
    return pipeline(texts, top_k=TOP_K, batch_size=len(texts))

  return encode, fill_mask


def make_onnx(folder: str, suffix: str = "") -> Functions:
  """Returns those of ONNX Runtime, of what `write_onnx` wrote."""
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = physical_cores()
  options.graph_optimization_level = (
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
  )

  @functools.cache
  def open_session(kind: str) -> Any:
    return onnxruntime.InferenceSession(
      os.path.join(folder, f"{kind}{suffix}.onnx"),
      options,
      providers=["CPUExecutionProvider"],
    )

  def run(kind: str, ids: np.ndarray, texts: Any = None) -> np.ndarray:
    given = (ids, np.ones_like(ids), np.zeros_like(ids))
    inputs = dict(zip(INPUTS, given, strict=True))
    return open_session(kind).run(None, inputs)[0]

  return (
    functools.partial(run, "encode"),
    functools.partial(run, "fill_mask"),
  )


PEERS: dict[str, Callable[[str], Functions]] = {
  "flaxmlm": make_ours,
  "transformers": make_torch,
  "onnxruntime": make_onnx,
  "onnxruntime fused": functools.partial(make_onnx, suffix="-fused"),
}


def write_onnx(folder: str, heads: int, width: int) -> None:
  """Writes encoder and whole model for ONNX Runtime, plain and fused."""
  import torch
  import transformers
  from onnxruntime.transformers import optimizer

  model = transformers.BertForMaskedLM.from_pretrained(
    folder, attn_implementation="eager"
  ).eval()

  class Part(torch.nn.Module):
    """The encoder, or the whole model, with one tensor as its output."""

    def __init__(self, part: torch.nn.Module, output: str):
      super().__init__()
      self.part, self.output = part, output

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
      return self.part(**dict(zip(INPUTS, inputs, strict=True)))[self.output]

  example = tuple(torch.ones(2, 16, dtype=torch.long) for _ in INPUTS)
  for kind, part in (
    ("encode", Part(model.bert, "last_hidden_state")),
    ("fill_mask", Part(model, "logits")),
  ):
    plain = os.path.join(folder, f"{kind}.onnx")
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      torch.onnx.export(
        part,
        example,
        plain,
        dynamo=False,
        opset_version=17,
        input_names=[*INPUTS],
        output_names=["output"],
        dynamic_axes={name: {0: "B", 1: "L"} for name in (*INPUTS, "output")},
      )
    optimizer.optimize_model(
      plain, "bert", num_heads=heads, hidden_size=width, opt_level=0
    ).save_model_to_file(os.path.join(folder, f"{kind}-fused.onnx"))


def physical_cores() -> int:
  """Returns the number of cores to run on, two threads of one counted once."""
  path = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
  cores = set()
  for number in os.sched_getaffinity(0):
    with open(path.format(number), encoding="utf-8") as file:
      cores.add(file.read())
  return len(cores)


def check(work: Work, results: dict[str, np.ndarray]) -> None:
  """Raises AssertionError unless all hidden states or guesses agree."""
  for name, got in results.items():
    np.testing.assert_allclose(
      got,
      results["transformers"],
      rtol=0,
      atol=TOLERANCE if work.kind == "encode" else 0,
      err_msg=f"{work}: {name}",
    )


if __name__ == "__main__":
  main()
