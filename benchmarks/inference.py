"""What `flaxmlm.load(folder)` gives, against torch and ONNX Runtime.

  python -m benchmarks.inference [--shape=NAME ...] [--quick] [--json]

One Hugging Face folder with random weights, the same for all, and a WordPiece
vocabulary of 30,522 made-up words. Interleaved in one run, and compared first:

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

A process that calls `load` has pages of 4 KiB, unlike `flaxmlm.train`;
`--huge_pages` shows what huge ones would be worth.
"""

from __future__ import annotations

import itertools
import os
import statistics
import string
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import flaxmlm
from benchmarks import report
from flaxmlm.training import memory

SPECIALS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
VOCAB = 30_522
TOLERANCE = 1e-4  # of hidden states and logits
TOP_K = 5
SHAPES = {"bert_4x256": (4, 256, 4), "bert_12x768": (12, 768, 12)}
PACKAGES = ("flaxmlm", "jax", "flax", "torch", "transformers", "onnxruntime")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
Run = Callable[[], Any]


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
  if args.huge_pages:
    memory.use_huge_pages()
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
  ours = flaxmlm.load(folder)
  bert, pipeline = make_torch(folder)
  sessions = make_onnx(folder, heads, width)
  rounds, seconds = (3, 0.1) if quick else (9, 0.5)
  figures = {}
  for work in WORKS:
    ids, texts = make_rows(work)
    if work.kind == "encode":
      peers = {
        "flaxmlm": lambda ids=ids: ours.encode(ids),
        "torch": lambda ids=ids: bert(ids),
      }
    else:
      peers = {
        "flaxmlm": lambda texts=texts: ours.fill_mask(texts, TOP_K),
        "transformers pipeline": lambda texts=texts: pipeline(
          texts, top_k=TOP_K, batch_size=len(texts)
        ),
      }
    for name, session in sessions[work.kind].items():
      peers[name] = lambda ids=ids, session=session: session(ids)
    results = {name: run() for name, run in peers.items()}
    (check_hidden if work.kind == "encode" else check_guesses)(ids, results)
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
  work: Work, peers: dict[str, Run], rounds: int, seconds: float
) -> dict[str, Any]:
  """Prints and returns milliseconds a call of each peer."""
  calls, times = {}, {name: [] for name in peers}
  for name, run in peers.items():
    start = time.perf_counter()
    run()
    calls[name] = max(1, round(seconds / (time.perf_counter() - start)))
  for _ in range(rounds):
    for name, run in peers.items():
      start = time.perf_counter()
      for _ in range(calls[name]):
        run()
      spent = time.perf_counter() - start
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


def make_vocab() -> list[str]:
  """Returns 30,522 tokens: BERT's special ones at their ids, and words."""
  words = (
    "".join(letters)
    for size in itertools.count(1)
    for letters in itertools.product(string.ascii_lowercase, repeat=size)
  )
  special = {number: token for token, number in SPECIALS.items()}
  return [special.get(i) or next(words) for i in range(VOCAB)]


def make_rows(work: Work) -> tuple[np.ndarray, list[str]]:
  """Returns ids [B L], and the same as texts, with a [MASK] in each."""
  random = np.random.default_rng(0)
  ids = random.integers(1000, VOCAB, (work.rows, work.length))
  ids[:, 0], ids[:, -1] = SPECIALS["[CLS]"], SPECIALS["[SEP]"]
  ids[:, work.length // 2] = SPECIALS["[MASK]"]
  vocab = make_vocab()
  return ids, [" ".join(vocab[i] for i in row[1:-1]) for row in ids]


def make_torch(folder: str) -> tuple[Callable[[np.ndarray], Any], Any]:
  """Returns `ids -> hidden`, and the pipeline, both of Hugging Face's model."""
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  model = transformers.BertForMaskedLM.from_pretrained(
    folder, attn_implementation="sdpa"
  ).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

  def run(ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
      return model.bert(torch.from_numpy(ids)).last_hidden_state.numpy()

  return run, transformers.pipeline(
    "fill-mask", model=model, tokenizer=tokenizer
  )


def make_onnx(
  folder: str, heads: int, width: int
) -> dict[str, dict[str, Callable[[np.ndarray], np.ndarray]]]:
  """Returns, by kind of work and name, `ids -> hidden` and `ids -> logits`."""
  import onnxruntime
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

  def start(path: str) -> Callable[[np.ndarray], np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = physical_cores()
    options.graph_optimization_level = (
      onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    )
    session = onnxruntime.InferenceSession(
      path, options, providers=["CPUExecutionProvider"]
    )

    def run(ids: np.ndarray) -> np.ndarray:
      given = (ids, np.ones_like(ids), np.zeros_like(ids))
      return session.run(None, dict(zip(INPUTS, given, strict=True)))[0]

    return run

  example = tuple(torch.ones(2, 16, dtype=torch.long) for _ in INPUTS)
  sessions = {}
  for kind, part in (
    ("encode", Part(model.bert, "last_hidden_state")),
    ("fill_mask", Part(model, "logits")),
  ):
    plain = os.path.join(folder, f"{kind}.onnx")
    fused = os.path.join(folder, f"{kind}-fused.onnx")
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
    ).save_model_to_file(fused)
    sessions[kind] = {
      "onnxruntime": start(plain),
      "onnxruntime fused": start(fused),
    }
  return sessions


def physical_cores() -> int:
  """Returns the number of cores to run on, two threads of one counted once."""
  path = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
  cores = set()
  for number in os.sched_getaffinity(0):
    with open(path.format(number), encoding="utf-8") as file:
      cores.add(file.read())
  return len(cores)


def check_hidden(ids: np.ndarray, results: dict[str, np.ndarray]) -> None:
  """Raises AssertionError unless all hidden states agree."""
  for name, got in results.items():
    np.testing.assert_allclose(
      got, results["torch"], rtol=0, atol=TOLERANCE, err_msg=name
    )


def check_guesses(ids: np.ndarray, results: dict[str, Any]) -> None:
  """Raises AssertionError unless all guess the same tokens."""
  want = [
    [guess["token"] for guess in guesses]
    for guesses in _each(results["transformers pipeline"])
  ]
  for name, got in results.items():
    if name.startswith("onnxruntime"):
      at_masks = got[ids == SPECIALS["[MASK]"]]
      got = np.argsort(-at_masks, axis=-1)[:, :TOP_K].tolist()
    else:
      got = [[guess["token"] for guess in guesses] for guesses in _each(got)]
    assert got == want, f"{name}: other guesses"


def _each(results: Sequence[Any]) -> Sequence[Any]:
  """Returns a list a text; the pipeline gives a single text's list as it is."""
  return [results] if isinstance(results[0], dict) else results


if __name__ == "__main__":
  main()
