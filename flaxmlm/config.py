"""Every config key: its default, type, unit, range and one line of help.

A config file is a short Python file whose `get_config()` starts from
`defaults()` and changes a few keys. Everything here runs before JAX is
imported, so that a mistake is answered at once.

`python -m flaxmlm.config` prints docs/config.md.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import errno
import glob
import json
import math
import os
import re
import sys
import traceback
import types
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Any, NamedTuple, NoReturn

from ml_collections import ConfigDict

from flaxmlm import InputError

# It has a mapping's methods without saying so; `Mapping` in signatures holds it.
Mapping.register(ConfigDict)


class Key(NamedTuple):
  """One config key. `kind` is a type, or "strings" / "floats" for tuples."""

  default: Any
  kind: type | str
  help: str
  unit: str = ""
  low: float | None = None
  high: float | None = None
  choices: tuple[str, ...] = ()
  optional: bool = False


# What `objective.name` may name: what hides tokens, and asks about pairs.
TOKEN_OBJECTIVES = ("masked", "ngram", "replaced_token", "span", "whole_word")
PAIR_OBJECTIVES = ("next_sentence", "sentence_order", "sentence_pair")
# What is to be done about errors that aren't of a program's making.
_OF_DISKS = {
  errno.ENOSPC: "make room",
  errno.EDQUOT: "make room",
  errno.EACCES: "let this user there",
  errno.EPERM: "let this user there",
  errno.EROFS: "mount it to be written",
  errno.EIO: "see to the disk",
  errno.ESTALE: "mount it anew",
}
# What JAX holds in an integer and in a float, for keys without a range.
_MOST_INT, _MOST_FLOAT = 2**31 - 1, 3e38
_MAX_CONFIG = 1 << 20  # bytes of a JSON config
_LONG = 200  # characters of a value that an error shows
_MAX_LABELS = 32  # five bits in the store's flags

# fmt: off
KEYS: dict[str, Key] = {
  "seed": Key(0, int, "Seed of everything that is drawn: parameters, order, masks, dropout.", low=0, high=2**31 - 1),

  "data.source": Key("embedded", "strings", "Training text: `embedded`, a path, glob or folder (.txt .jsonl .parquet .csv .tsv, plain or .gz .bz2 .xz .zst), `tfds:NAME[/CONFIG]`; or a tuple of these."),
  "data.weights": Key((), "floats", "One weight for each source: its share of the rows in a batch. Empty: each row once an epoch.", low=0),
  "data.validation_source": Key(None, "strings", "Validation text of its own, in the same forms as `data.source`. None: split off by `data.validation_fraction`.", optional=True),
  "data.validation_fraction": Key(0.02, float, "Share of documents split off for validation, by a hash of the text, so that the split never moves.", low=0, high=0.5),
  "data.store": Key(None, str, "Folder of a store made by `prepare`. None: WORKDIR/store, made when it is missing.", optional=True),
  "data.row_length": Key(128, int, "Row length L, [CLS] and [SEP] included.", unit="tokens", low=8, high=131072),
  "data.text_field": Key("text", str, "Field or column that holds the text, in .jsonl, .parquet, .csv, .tsv and tfds sources."),
  "data.pair_field": Key(None, str, "Field or column that holds a second text: documents are pairs then, with a label. None: they are texts.", optional=True),
  "data.label_field": Key("label", str, "Field or column that holds a pair's label, a string or an integer: one of `objective.labels`."),
  "data.document": Key("file", str, "What a document is in a .txt file: the `file`, a `paragraph` (block between blank lines) or a `line`.", choices=("file", "paragraph", "line")),
  "data.encoding": Key("utf-8", str, "Encoding of text files."),
  "data.on_bad_record": Key("error", str, "What to do with undecodable bytes, broken JSON, a missing field: stop, or skip and count.", choices=("error", "skip")),
  "data.max_bad_records": Key(1000, int, "With `data.on_bad_record=skip`: stop after this many bad records.", unit="records", low=0),
  "data.tfds_dir": Key(None, str, "`data_dir` of tfds sources. None: TensorFlow Datasets' own default.", optional=True),
  "data.processes": Key(0, int, "Processes that prepare the store; the store is the same for any number. 0: one a core.", unit="processes", low=0, high=1024),

  "data.cleaning.html": Key(False, bool, "Turn HTML into text."),
  "data.cleaning.mojibake": Key(True, bool, "Repair text that was decoded with the wrong encoding."),
  "data.cleaning.unicode": Key("NFC", str, "Unicode normal form.", choices=("none", "NFC", "NFKC")),
  "data.cleaning.control": Key(True, bool, "Remove control and zero-width characters."),
  "data.cleaning.unwrap": Key(False, bool, "Join the lines of hard-wrapped paragraphs."),
  "data.cleaning.whitespace": Key(True, bool, "Collapse runs of spaces and of blank lines, strip the ends."),
  "data.cleaning.min_chars": Key(1, int, "Drop documents that are shorter than this after cleaning.", unit="characters", low=1),
  "data.cleaning.deduplicate": Key(True, bool, "Drop exact copies of an earlier document (after cleaning)."),

  "tokenizer.kind": Key("unigram", str, "Tokenizer to train: SentencePiece `unigram` or `bpe`, or `wordpiece`.", choices=("unigram", "bpe", "wordpiece")),
  "tokenizer.vocab_size": Key(32768, int, "Vocabulary size V to train; taken from the tokenizer where `tokenizer.path` names one.", unit="tokens", low=8, high=2**31 - 1),
  "tokenizer.path": Key(None, str, "A tokenizer to use instead of training one: .model, vocab.txt, tokenizer.json, vocab.json (merges.txt beside it), or a folder with one of these.", optional=True),
  "tokenizer.lowercase": Key(False, bool, "Lower-case all text (in training a tokenizer, and for vocab.txt)."),
  "tokenizer.words": Key("whitespace", str, "What starts a word in the token flags: the tokenizer's own `whitespace` marks, or `jieba` for Chinese (extra zh).", choices=("whitespace", "jieba")),
  "tokenizer.sample_chars": Key(10_000_000, int, "Text that a tokenizer is trained on, at most; drawn evenly from the training documents.", unit="characters", low=1000),

  "model.family": Key("bert", str, "Architecture.", choices=("albert", "bert", "distilbert", "electra", "modernbert", "roberta")),
  "model.init_from": Key(None, str, "Folder whose parameters the run begins with, of a run or Hugging Face's; the architecture is taken from it. Dimensions that are set larger: its parameters are tiled. None: random ones.", optional=True),
  "model.layers": Key(12, int, "Encoder layers N.", low=1, high=1000),
  "model.width": Key(768, int, "Width D of the hidden states.", low=1),
  "model.heads": Key(12, int, "Attention heads H; they divide the width.", low=1),
  "model.ffn": Key(3072, int, "Inner width F of the feed-forward.", low=1),
  "model.max_positions": Key(512, int, "Learned positions; at least the row length.", unit="tokens", low=1),
  "model.segment_types": Key(None, int, "Segment embeddings (`token_type_ids`). None: the family's own (BERT, ALBERT, ELECTRA 2, RoBERTa 1, the others 0).", low=0, optional=True),
  "model.embedding_size": Key(None, int, "Width of the embeddings under ALBERT and ELECTRA. None: 128 for ALBERT, else as the hidden states.", low=1, optional=True),
  "model.hidden_act": Key("gelu", str, "Activation of the feed-forward: `gelu` (exact), `gelu_new` (by tanh), `relu`, `silu`.", choices=("gelu", "gelu_new", "relu", "silu")),
  "model.tie_word_embeddings": Key(True, bool, "Whether the MLM decoder is the matrix of the word embeddings."),
  "model.num_hidden_groups": Key(1, int, "ALBERT: groups of layers with parameters of their own.", low=1),
  "model.inner_group_num": Key(1, int, "ALBERT: layers in a group.", low=1),
  "model.global_attn_every_n_layers": Key(3, int, "ModernBERT: every so many layers, the first among them, see the whole document.", low=1),
  "model.local_attention": Key(128, int, "ModernBERT: window of the other layers, half of it to each side.", unit="tokens", low=2),
  "model.global_rope_theta": Key(160_000.0, float, "ModernBERT: rotary base of the layers that see everything.", low=1),
  "model.local_rope_theta": Key(10_000.0, float, "ModernBERT: rotary base of the others.", low=1),
  "model.attention": Key("auto", str, "What computes attention (docs/attention.md): `xla` runs everywhere, `splash` on TPUs, `cudnn` on NVIDIA's GPUs in bfloat16, `row` on TPUs without dropout, on trial; `auto` takes the best that can, never `row`. No part of what a model is: another machine may take another.", choices=("auto", "xla", "splash", "cudnn", "row")),
  "model.remat": Key("none", str, "What the backward pass computes again to save memory: nothing; all but the products with weights (`dots`); whole layers (`full`). See docs/training.md.", choices=("none", "dots", "full")),
  "model.scan_layers": Key(False, bool, "Whether one compiled layer runs N times: compiles faster, runs slower. See docs/training.md."),
  "model.dropout": Key(0.1, float, "Dropout of embeddings and layer outputs, in steps of 1/256.", low=0, high=0.9),
  "model.attention_dropout": Key(0.1, float, "Dropout of attention probabilities, in steps of 1/256.", low=0, high=0.9),
  "model.norm_eps": Key(1e-12, float, "Epsilon of LayerNorm.", low=1e-20, high=1),
  "model.init_stddev": Key(0.02, float, "Standard deviation of the truncated-normal init.", low=0, high=10),

  "objective.name": Key("masked", "strings", "What is hidden and asked (docs/objectives.md): tokens (`masked`), words (`whole_word`), n-grams of up to 3 words (`ngram`), spans of up to 10 (`span`), or ELECTRA's `replaced_token`; beside one of these, as a tuple, a question about pairs (`next_sentence`, `sentence_order`, or `sentence_pair`, whose labels come with the data). Pairs alone have `masked` beside them.", choices=(*TOKEN_OBJECTIVES, *PAIR_OBJECTIVES)),
  "objective.weights": Key((), "floats", "Weight of each of `objective.name` in the loss. Empty: 1.", low=0),
  "objective.labels": Key(None, "strings", "What `sentence_pair` tells apart: the labels of pairs, in the order of their classes.", optional=True),
  "objective.rate": Key(0.15, float, "Share of the tokens of a row that is to be predicted.", low=0.001, high=1),
  "objective.rate_end": Key(None, float, "That share at the end of the run, in a hundred stairs from `objective.rate`; validation keeps the first. None: it stays.", low=0.001, high=1, optional=True),
  "objective.rate_schedule": Key("linear", str, "How the share gets to `objective.rate_end`.", choices=("cosine", "linear")),
  "objective.temperature": Key(1.0, float, "Temperature τ of the loss: of softmax(logits / τ).", low=0.01, high=100),
  "objective.span_boundary": Key(False, bool, "SpanBERT: whether each token of a span is also asked of the two tokens around the span."),
  "objective.generator_size": Key(0.25, float, "ELECTRA: width, heads and feed-forward of the generator, as a share of the model's.", low=0.01, high=1),
  "objective.discriminator_weight": Key(50.0, float, "ELECTRA: weight of the discriminator's loss; the generator's is 1.", low=0),
  "objective.mask_share": Key(0.8, float, "Share of the chosen tokens that is replaced by [MASK].", low=0, high=1),
  "objective.random_share": Key(0.1, float, "Share of the chosen tokens that is replaced by a random token; the rest is kept.", low=0, high=1),

  "optimizer.name": Key("adamw", str, "Optimizer; `muon` takes Muon for the matrices of the layers and AdamW for the rest.", choices=("adamw", "lamb", "muon")),
  "optimizer.peak_lr": Key(5e-4, float, "Peak learning rate of AdamW or LAMB (under Muon: of what is not a layer's matrix).", low=0),
  "optimizer.muon_peak_lr": Key(0.02, float, "Peak learning rate of the layers' matrices under Muon.", low=0),
  "optimizer.weight_decay": Key(0.01, float, "Decoupled weight decay; never on norms and biases.", low=0),
  "optimizer.b1": Key(0.9, float, "Decay of the first moment.", low=0, high=0.99999),
  "optimizer.b2": Key(0.98, float, "Decay of the second moment.", low=0, high=0.9999999),
  "optimizer.eps": Key(1e-6, float, "Epsilon of Adam and LAMB.", low=1e-20),
  "optimizer.clip_norm": Key(1.0, float, "Global norm that gradients are clipped to. None: no clipping.", low=1e-12, optional=True),
  "optimizer.schedule": Key("linear", str, "After warm-up: `linear` or `cosine` decay to the end, `constant`, or `wsd` (constant, then linear decay in the last `optimizer.decay_steps`).", choices=("linear", "cosine", "constant", "wsd")),
  "optimizer.warmup_steps": Key(1000, int, "Linear warm-up from 0.", unit="steps", low=0),
  "optimizer.decay_steps": Key(1000, int, "Length of the decay under `wsd`.", unit="steps", low=0),
  "optimizer.end_lr_ratio": Key(0.0, float, "Learning rate at the end, as a share of the peak.", low=0, high=1),

  "train.steps": Key(100_000, int, "Optimizer steps of the whole run, those of the runs that it goes on from included.", unit="steps", low=1),
  "train.continue_from": Key(None, str, "Workdir of a run to go on from, in a workdir of its own: parameters, optimizer state and step are taken, and every key that isn't set here.", optional=True),
  "train.batch_size": Key(256, int, "Rows of the global batch B.", unit="rows", low=1),
  "train.microbatches": Key(1, int, "Parts that a batch is computed in, one after the other, to save memory.", low=1),
  "train.dtype": Key("float32", str, "Compute dtype; parameters, softmax, norms and loss stay float32.", choices=("float32", "bfloat16")),
  "train.max_hours": Key(None, float, "Stop after the step at which so much time has gone by since the start, as a signal does: saved, exit code 0, and the same line goes on. None: no limit.", unit="hours", low=0, optional=True),
  "train.stall_seconds": Key(None, float, "End the process, with exit code 75, if a step, an evaluation, a save or the reading of a batch takes longer (docs/reliability.md); the first of each has an hour. None: 20 times the median of the same so far, 300 at least.", unit="seconds", low=1, optional=True),
  "train.max_bad_steps": Key(10, int, "So many updates in a row that are skipped, for loss, gradient or update isn't finite, are too many.", unit="steps", low=1),
  "train.on_divergence": Key("stop", str, "What then: `stop`, with exit code 1, or `rollback`: go on from the last checkpoint with the rows that come after the ones skipped. See docs/reliability.md.", choices=("stop", "rollback")),
  "train.max_rollbacks": Key(3, int, "Rollbacks in the whole run before it stops nonetheless.", low=1),

  "mesh.data": Key(-1, int, "Devices along the data axis; -1: the rest.", unit="devices", low=-1),
  "mesh.fsdp": Key(1, int, "Devices that share one copy of the parameters; the batch is split over them too. -1: the rest.", unit="devices", low=-1),
  "mesh.tensor": Key(1, int, "Devices that share heads, feed-forward and vocabulary. -1: the rest.", unit="devices", low=-1),

  "eval.every": Key(1000, int, "Evaluate on the validation split each so many steps, before the first and after the last. 0: only these two.", unit="steps", low=0),
  "eval.rows": Key(2048, int, "Validation rows to evaluate, at most.", unit="rows", low=1),

  "checkpoint.every": Key(1000, int, "Save each so many steps, and at the end. 0: at the end only.", unit="steps", low=0),
  "checkpoint.keep": Key(2, int, "Newest checkpoints to keep.", low=1),
  "checkpoint.keep_best": Key(0, int, "Checkpoints of the least validation loss to keep beside these.", low=0),
  "checkpoint.keep_every": Key(0, int, "Keep the checkpoints of steps that this divides for ever. 0: none.", unit="steps", low=0),
  "checkpoint.strict": Key(False, bool, "Whether to refuse to go on if the newest checkpoint is damaged, and not take the newest whole one."),
  "checkpoint.max_failures": Key(10, int, "Stop, with exit code 1, after so many saves in a row that failed.", low=1),
  "checkpoint.retry_seconds": Key(60.0, float, "How long after a failed save to try again.", unit="seconds", low=0),

  "log.every": Key(50, int, "Write metrics each so many steps.", unit="steps", low=1),
}
# fmt: on

# What a model may have otherwise than the one that its parameters come from.
_FREE_OF_PARAMETERS = (
  "model.attention",
  "model.remat",
  "model.scan_layers",
  "model.dropout",
  "model.attention_dropout",
  "model.init_stddev",
  "model.global_rope_theta",
  "model.local_rope_theta",
)
# What it may have more of: a table of positions, and by tiling the rest.
_POSITIONS = "model.max_positions"
_TILED = ("model.layers", "model.width", "model.heads", "model.ffn")
# What a store isn't made of, under `data`.
_BESIDE_THE_STORE = (
  "data.row_length",
  "data.weights",
  "data.store",
  "data.processes",
)

# What a run may be resumed with changed: nothing that it computes hangs on it.
# The store is known by its hash, wherever it is.
FREE_ON_RESUME = (
  *("mesh", "eval", "checkpoint", "log"),
  *("model.attention", "model.remat", "model.scan_layers"),
  *("train.microbatches", "train.max_hours", "train.stall_seconds"),
  *("train.max_bad_steps", "train.on_divergence", "train.max_rollbacks"),
  *("data.processes", "data.store", "data.tfds_dir"),
)
# What may be changed by naming it: arrays and the order of the rows stay.
ALLOWED_ON_RESUME = (
  "optimizer.peak_lr",
  "optimizer.muon_peak_lr",
  "optimizer.weight_decay",
  "optimizer.b1",
  "optimizer.b2",
  "optimizer.eps",
  "optimizer.clip_norm",
  "optimizer.schedule",
  "optimizer.warmup_steps",
  "optimizer.decay_steps",
  "optimizer.end_lr_ratio",
  "objective.weights",
  "objective.rate",
  "objective.rate_end",
  "objective.rate_schedule",
  "objective.temperature",
  "objective.discriminator_weight",
  "objective.mask_share",
  "objective.random_share",
  "model.dropout",
  "model.attention_dropout",
  "train.steps",
  "train.dtype",
)


class _Config(ConfigDict):
  """A config that knows which of its keys were set again."""

  def __setitem__(self, key: str, value: Any) -> None:
    if key in self:
      if isinstance(value, bool) and isinstance(self[key], float):
        raise TypeError(f"{key}={value}: wants a number")  # it would take it
      self.__dict__.setdefault("_stated", set()).add(key)
    super().__setitem__(key, value)


def defaults() -> ConfigDict:
  """Returns a config with every key at its default; it takes no new keys."""
  return from_flat({name: key.default for name, key in KEYS.items()})


def from_flat(values: Mapping[str, Any]) -> ConfigDict:
  """Returns a locked config from `{"group.key": value}`."""
  config = _Config(type_safe=False)
  for name, value in values.items():
    node = config
    *groups, leaf = name.split(".")
    for group in groups:
      if group not in node:
        node[group] = _Config(type_safe=False)
      node = node[group]
    node[leaf] = value
  return config.lock()


def _stated(config: ConfigDict, prefix: str = "") -> set[str]:
  """Returns the keys of a config that were set after `defaults()`."""
  again = config.__dict__.get("_stated", set())
  names: set[str] = set()
  for name, value in config.items():
    if not isinstance(value, Mapping):
      names |= {prefix + name} if name in again else set()
    elif isinstance(value, _Config) and name not in again:
      names |= _stated(value, f"{prefix}{name}.")
    else:  # a whole group was set
      names |= set(to_flat(value, f"{prefix}{name}."))
  return names


def to_flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns `{"group.key": value}` of a config or of nested dicts."""
  return dict(_flatten(config, prefix))


def _flatten(
  config: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
  """Yields key and value of all that is set, be it a mapping by mistake."""
  for name, value in config.items():
    name = f"{prefix}{name}"
    is_group = isinstance(value, Mapping) and name not in KEYS
    if is_group and (value or name in _groups()):
      yield from _flatten(value, f"{name}.")
    else:
      yield name, value


def to_json(config: ConfigDict) -> str:
  """Returns the config as nested JSON."""
  return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(path: str) -> ConfigDict:
  """Reads what `to_json` wrote, or a part of that; no code is run.

  Raises:
    InputError: It isn't that; see `check_keys`.
  """
  return check_keys(_read_json(path), where=path)


def _read_json(path: str) -> dict[str, Any]:
  """Returns the values that a JSON config sets, by key."""
  from flaxmlm.storage import bounded

  def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
      if name in result:
        raise ValueError(f"it sets {_cut(name)} twice")
      result[name] = value
    return result

  text = bounded.read(path, most=_MAX_CONFIG)
  try:
    found = bounded.parse_json(text, object_pairs_hook=once)
    if not isinstance(found, dict):
      raise ValueError(f"it holds no object, but {type(found).__name__}")
    return once(_flatten(found))
  except (ValueError, RecursionError) as error:
    raise InputError(f"{path}: not a JSON config: {error}") from error


def _groups() -> set[str]:
  return {
    name[:end] for name in KEYS for end in range(len(name)) if name[end] == "."
  }


def load(path: str | None, overrides: Sequence[str] = ()) -> ConfigDict:
  """Loads a config file and applies `--config.key=value` arguments.

  Args:
    path: A Python file with `get_config()`, or a JSON file as in a workdir.
      None gives the defaults.
    overrides: Arguments of the form `--config.group.key=value`.

  Returns:
    The config, each key of the right type and in its range.

  Raises:
    InputError: The file can't be loaded, or a key is unknown, of the wrong
      type or out of range.
  """
  return check_keys(_read(path, overrides)[0], where="--config")


def _read(
  path: str | None, overrides: Sequence[str]
) -> tuple[dict[str, Any], set[str]]:
  """Returns values as `load` does, and the names of those that were set."""
  if path is None:
    values, stated = to_flat(defaults()), set()
  elif not os.path.isfile(path):
    raise InputError(f"--config={path}: no such file; see configs/")
  elif path.endswith(".json"):
    found = _read_json(path)
    values, stated = to_flat(check_keys(found, where=path)), set(found)
  else:
    config = _load_python(path)
    values, stated = to_flat(config), _stated(config)
  for argument in overrides:
    match = re.fullmatch(r"--config\.([^=]+)=(.*)", argument, re.DOTALL)
    if match is None:
      raise InputError(
        f"{argument}: not an argument of this program; a config key is set by"
        " --config.group.key=value"
      )
    name, text = match.groups()
    key = _key(name, argument)
    try:
      values[name] = _checked(_parse(text, key), key)
    except ValueError as error:
      raise InputError(f"{argument}: {error}") from None
    stated.add(name)
  return values, stated


def _load_python(path: str) -> ConfigDict:
  """Returns what `get_config()` in a file returns, each key checked."""
  # Not imported: an import would leave bytecode beside it, and take old one.
  module = types.ModuleType("flaxmlm_config")
  module.__file__ = path
  try:
    with open(path, "rb") as file:
      code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, module.__dict__)  # a config is code; docs/training.md says so
    config = module.get_config()
    flat = to_flat(config) if isinstance(config, ConfigDict) else {}
  except (Exception, SystemExit) as error:  # anything can come
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if f.filename == path]
    line = lines[-1] if lines else getattr(error, "lineno", None) or 1
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    first = (text.strip() or type(error).__name__).splitlines()[0]
    raise InputError(f"{path}:{line}: {first}") from error
  if not isinstance(config, ConfigDict):
    raise InputError(f"{path}: get_config() returned no ConfigDict")
  check_keys(flat, where=path)
  return config


def _key(name: str, where: str) -> Key:
  if name in KEYS:
    return KEYS[name]
  leaves = {n.rpartition(".")[2]: n for n in KEYS}
  near = difflib.get_close_matches(name, KEYS, n=1) or [
    leaves[leaf]
    for leaf in difflib.get_close_matches(name.rpartition(".")[2], leaves, n=1)
  ]
  hint = f"; did you mean {near[0]}?" if near else "; see docs/config.md"
  if name in _groups():
    hint = f": it is a group of keys, like {next(_keys_of(name))}"
  raise InputError(f"{where}: unknown key {_cut(name)}{hint}")


def _keys_of(group: str) -> Iterator[str]:
  return (name for name in KEYS if name.startswith(f"{group}."))


def _cut(text: str) -> str:
  """Returns a text, in short if it is long: values come from anybody."""
  return text if len(text) <= _LONG else f"{text[:_LONG]}…"


def _parse(text: str, key: Key) -> Any:
  """Reads a value from the command line by the key's type."""
  if key.optional and text == "None":
    return None
  if key.kind is bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
      raise ValueError("wants True or False")
    return values[text.lower()]
  if key.kind is str or (key.kind == "strings" and text[:1] not in "(["):
    return text
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    try:
      return float(text)
    except ValueError:
      raise ValueError(f"wants {_kind(key)}") from None


def _kind(key: Key) -> str:
  name = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    "strings": "a string or a tuple of strings",
    "floats": "a tuple of numbers, like (1, 2)",
  }[key.kind]
  return name + (" or None" if key.optional else "")


def check_keys(values: Mapping[str, Any], *, where: str) -> ConfigDict:
  """Checks each value by itself and returns the config in KEYS' order.

  Raises:
    InputError: An unknown key, a wrong type, a value out of range.
  """
  for name in values:
    _key(name, where)
  checked = {}
  for name, key in KEYS.items():
    value = values.get(name, key.default)
    try:
      checked[name] = _checked(value, key)
    except ValueError as error:
      shown = _cut(repr(value))
      raise InputError(f"{where}: {name}={shown}: {error}") from None
  return from_flat(checked)


def _checked(value: Any, key: Key) -> Any:
  if value is None and key.optional:
    return None
  numbers: tuple[float, ...] = ()
  if key.kind is bool:
    good = isinstance(value, bool)
  elif key.kind is str:
    good = isinstance(value, str) and value != ""
  elif key.kind == "strings":
    value = tuple(value) if isinstance(value, (list, tuple)) else value
    parts = value if isinstance(value, tuple) else (value,)
    good = bool(parts) and all(isinstance(p, str) and p for p in parts)
  elif key.kind == "floats":
    good = isinstance(value, (list, tuple)) and all(map(_is_number, value))
    numbers = value = tuple(float(v) for v in value) if good else ()
  else:
    good = _is_number(value) and (
      key.kind is float or float(value).is_integer()
    )
    if good:
      value = key.kind(value)
      numbers = (value,)
  if not good:
    raise ValueError(f"wants {_kind(key)}")
  if key.kind in (str, "strings"):
    for part in as_tuple(value):
      if "\0" in part or not _is_unicode(part):
        raise ValueError("has a character that isn't text")
  for part in as_tuple(value) if key.choices else ():
    if part not in key.choices:
      near = difflib.get_close_matches(str(part), key.choices, n=1)
      hint = f"; did you mean {near[0]}?" if near else ""
      raise ValueError(f"wants one of {', '.join(key.choices)}{hint}")
  high = _MOST_FLOAT if key.kind in (float, "floats") else _MOST_INT
  high = high if key.high is None else key.high
  for number in numbers:
    if key.low is not None and number < key.low:
      raise ValueError(f"must be at least {key.low}")
    if number > high:
      raise ValueError(f"must be at most {high}")
  return value


def _is_unicode(text: str) -> bool:
  """Says whether a string can be written: halves of characters can't.

  Python has bytes of file names that aren't UTF-8 as some of these halves.
  """
  try:
    text.encode("utf-8", "surrogateescape")
  except UnicodeEncodeError:
    return False
  return True


def _is_number(value: Any) -> bool:
  if not isinstance(value, (int, float)) or isinstance(value, bool):
    return False
  try:
    return math.isfinite(value)
  except OverflowError:  # an integer that no float holds
    return False


def validate(
  config: ConfigDict, *, devices: int | None = None, sources: bool = True
) -> None:
  """Checks that the keys fit each other, the files and the devices.

  Args:
    config: A config of `load`.
    devices: Number of devices, where it is known. Without JAX it is known only
      for emulated CPU devices (XLA_FLAGS); `train` calls again once JAX is up.
    sources: Whether the text must be there: not if its store is made already.

  Raises:
    InputError: One line that names the keys that don't fit.
  """
  c = config

  def need(condition: bool, message: str) -> None:
    if not condition:
      raise InputError(message)

  need(
    c.model.width % c.model.heads == 0,
    f"model.heads={c.model.heads} doesn't divide model.width={c.model.width}",
  )
  family = c.model.family
  need(
    not c.model.segment_types or family not in ("distilbert", "modernbert"),
    f"model.segment_types={c.model.segment_types}: {family} has no segments;"
    " leave it at None",
  )
  need(
    c.model.embedding_size is None or family in ("albert", "electra"),
    f"model.embedding_size={c.model.embedding_size}: {family}'s embeddings are"
    " as wide as model.width; leave it at None",
  )
  need(
    family != "albert" or c.model.num_hidden_groups <= c.model.layers,
    f"model.num_hidden_groups={c.model.num_hidden_groups} is more than"
    f" model.layers={c.model.layers}",
  )
  need(
    family != "modernbert" or (c.model.width // c.model.heads) % 2 == 0,
    f"model.width={c.model.width} / model.heads={c.model.heads} is odd; rotary"
    " positions turn pairs",
  )
  backend = c.model.attention
  need(
    backend in ("auto", "xla") or c.model.attention_dropout == 0,
    f"model.attention={backend} has no dropout; set model.attention_dropout=0,"
    " or take auto or xla",
  )
  need(
    backend != "row" or (family != "modernbert" and c.mesh.tensor == 1),
    "model.attention=row is for BERT's layers (no modernbert) whole on a device"
    " (mesh.tensor=1); take auto",
  )
  need(
    backend != "splash" or c.data.row_length >= 512,
    f"model.attention=splash, but data.row_length={c.data.row_length} is less"
    " than 512; take auto or xla",
  )
  need(
    backend != "cudnn" or c.train.dtype == "bfloat16",
    f"model.attention=cudnn can't compute in {c.train.dtype}; set"
    " train.dtype=bfloat16, or take auto or xla",
  )
  size = c.model.width // c.model.heads
  need(
    backend != "cudnn" or (size % 8 == 0 and size <= 128),
    f"model.attention=cudnn wants heads of a multiple of 8 up to 128, not"
    f" {size} (model.width / model.heads); take auto or xla",
  )
  need(
    c.data.row_length <= c.model.max_positions,
    f"data.row_length={c.data.row_length} is longer than"
    f" model.max_positions={c.model.max_positions}",
  )
  _validate_objective(c, need)
  need(
    c.objective.mask_share + c.objective.random_share <= 1 + 1e-9,
    "objective.mask_share + objective.random_share is more than 1",
  )
  need(
    c.optimizer.warmup_steps <= c.train.steps,
    f"optimizer.warmup_steps={c.optimizer.warmup_steps} is more than"
    f" train.steps={c.train.steps}",
  )
  need(
    c.train.on_divergence == "stop" or c.checkpoint.every > 0,
    "train.on_divergence=rollback wants checkpoints to go back to, and"
    " checkpoint.every=0 has one at the end only",
  )
  best, evals = c.checkpoint.keep_best, c.eval.every
  need(
    not best or (evals > 0 and c.checkpoint.every % evals == 0),
    f"checkpoint.keep_best={best} wants a validation loss of each checkpoint:"
    f" checkpoint.every={c.checkpoint.every} must be a multiple of"
    f" eval.every={evals}",
  )
  if c.optimizer.schedule == "wsd":
    need(
      c.optimizer.warmup_steps + c.optimizer.decay_steps <= c.train.steps,
      "optimizer.warmup_steps + optimizer.decay_steps is more than"
      f" train.steps={c.train.steps}",
    )
  need(
    c.train.batch_size % c.train.microbatches == 0,
    f"train.microbatches={c.train.microbatches} doesn't divide"
    f" train.batch_size={c.train.batch_size}",
  )
  _validate_mesh(c, devices or _emulated_devices(), need)
  texts = as_tuple(c.data.source)
  if c.data.store is None:
    need(
      len(c.data.weights) in (0, len(texts)),
      f"data.weights has {len(c.data.weights)} numbers for {len(texts)} sources"
      " in data.source",
    )
  need(
    not c.data.weights or min(c.data.weights) > 0,
    "data.weights must be more than 0; leave a source out of data.source",
  )
  try:
    "".encode(c.data.encoding)
  except (LookupError, ValueError):
    need(
      False,
      f"data.encoding={c.data.encoding}: Python knows no such encoding; try"
      " utf-8, latin-1, utf-16 or cp1252",
    )
  if c.data.store is None and sources:
    validation = as_tuple(c.data.validation_source or ())
    for name, paths in (
      ("data.source", texts),
      ("data.validation_source", validation),
    ):
      for path in paths:
        need(_source_exists(path), f"{name}={path}: no such file or folder")
  if c.data.store is not None:
    manifest = os.path.join(c.data.store, "manifest.json")
    need(
      "://" in manifest or os.path.isfile(manifest),
      f"data.store={c.data.store}: no store (manifest.json) there; make it by"
      f" python -m flaxmlm.prepare --out={c.data.store}",
    )
  if c.tokenizer.path is not None and sources:
    need(
      "://" in c.tokenizer.path or os.path.exists(c.tokenizer.path),
      f"tokenizer.path={c.tokenizer.path}: no such file or folder",
    )
  if c.tokenizer.words == "jieba":
    import importlib.util

    need(
      importlib.util.find_spec("jieba") is not None,
      "tokenizer.words=jieba needs the extra zh: pip install 'flaxmlm[zh]'",
    )


def _validate_objective(
  c: ConfigDict, need: Callable[[bool, str], None]
) -> None:
  names, weights = as_tuple(c.objective.name), c.objective.weights
  shown = f"objective.name={c.objective.name!r}"
  for kind, of in (
    ("hides tokens", TOKEN_OBJECTIVES),
    ("asks about pairs", PAIR_OBJECTIVES),
  ):
    need(
      sum(name in of for name in names) <= 1,
      f"{shown}: more than one that {kind}; name one",
    )
  need(
    len(weights) in (0, len(names)),
    f"objective.weights has {len(weights)} numbers, {shown} {len(names)}",
  )
  need(not weights or max(weights) > 0, "objective.weights: wants one above 0")
  need(
    not weights or any(name in TOKEN_OBJECTIVES for name in names),
    f"objective.weights, but {shown} alone has masked beside it; name both",
  )
  need(
    not c.objective.span_boundary or "span" in names,
    f"objective.span_boundary wants objective.name=span, not {shown}",
  )
  labels, store = c.objective.labels, c.data.store
  need(
    labels is None or 2 <= len(set(as_tuple(labels))) <= _MAX_LABELS,
    f"objective.labels={labels!r}: wants 2 to {_MAX_LABELS} different labels",
  )
  need(
    labels is None or len(set(as_tuple(labels))) == len(as_tuple(labels)),
    f"objective.labels={labels!r}: names one twice",
  )
  need(
    labels is not None or c.data.pair_field is None,
    f"data.pair_field={c.data.pair_field} wants objective.labels, the values of"
    f" the field {c.data.label_field!r}",
  )
  fields = (c.data.text_field, c.data.pair_field, c.data.label_field)
  need(
    c.data.pair_field is None or len(set(fields)) == 3,
    "data.text_field, data.pair_field and data.label_field are"
    f" {', '.join(map(str, fields))}: wants three fields",
  )
  if "sentence_pair" in names:
    need(
      labels is not None,
      f"{shown} wants objective.labels, the labels of the pairs",
    )
    need(
      c.data.pair_field is not None or store is not None,
      f"{shown} wants data.pair_field, the field that holds the second text",
    )
  if "replaced_token" in names:
    need(
      c.model.family == "electra",
      f"{shown} wants model.family=electra, not {c.model.family}",
    )
    share = c.objective.generator_size
    sizes = {name: c.model[name] * share for name in ("width", "heads", "ffn")}
    need(
      all(
        size >= 1 and abs(size - round(size)) < 1e-6 for size in sizes.values()
      )
      and round(sizes["width"]) % round(sizes["heads"]) == 0,
      f"objective.generator_size={share} of model.width={c.model.width},"
      f" model.heads={c.model.heads}, model.ffn={c.model.ffn} is no whole"
      " number of each",
    )
    heads = round(sizes["heads"])
    need(
      heads % max(c.mesh.tensor, 1) == 0,
      f"mesh.tensor={c.mesh.tensor} doesn't divide the {heads} heads of a"
      f" generator of objective.generator_size={share}",
    )


def row_kind(objective: Mapping[str, Any]) -> str:
  """Returns what the objective's rows are made of; see `data.rows.load`."""
  names = as_tuple(objective["name"])
  if "sentence_pair" in names:
    return "pairs"
  return "sentences" if set(names) & set(PAIR_OBJECTIVES) else "packed"


def asked_of_pairs(objective: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns what the classes of the head of pairs mean: a name, and labels."""
  found = set(as_tuple(objective["name"])) & set(PAIR_OBJECTIVES)
  labels = objective["labels"] if "sentence_pair" in found else ()
  return (*found, *labels)


def wants_others(c: ConfigDict) -> bool:
  """Whether the objective wants, beside a row, one of another document."""
  return "next_sentence" in as_tuple(c.objective.name)


def _validate_mesh(
  c: ConfigDict, devices: int | None, need: Callable[[bool, str], None]
) -> None:
  sizes = {name: c.mesh[name] for name in ("data", "fsdp", "tensor")}
  shown = " ".join(f"mesh.{name}={size}" for name, size in sizes.items())
  need(0 not in sizes.values(), f"{shown}: 0 devices; use -1 for the rest")
  free = [name for name, size in sizes.items() if size == -1]
  need(len(free) <= 1, f"{shown}: only one axis can take the rest (-1)")
  known = math.prod(size for size in sizes.values() if size != -1)
  if devices is not None:
    fits = devices % known == 0 if free else devices == known
    need(fits, f"{shown} doesn't fit {devices} devices")
    for name in free:
      sizes[name] = devices // known
  rows = c.train.batch_size // c.train.microbatches
  # With the rest unknown, only the known part of data x fsdp can be checked.
  ways = math.prod(max(sizes[name], 1) for name in ("data", "fsdp"))
  need(
    rows % ways == 0,
    f"train.batch_size={c.train.batch_size} / train.microbatches="
    f"{c.train.microbatches} doesn't divide by the {ways} devices of"
    " mesh.data x mesh.fsdp",
  )
  tensor = max(sizes["tensor"], 1)
  need(
    c.model.heads % tensor == 0 and c.model.ffn % tensor == 0,
    f"mesh.tensor={tensor} doesn't divide model.heads={c.model.heads} and"
    f" model.ffn={c.model.ffn}",
  )


def _emulated_devices() -> int | None:
  """Returns the CPU devices that the environment asks for, in all processes."""
  flags = os.environ.get("XLA_FLAGS", "")
  match = re.search(r"xla_force_host_platform_device_count=(\d+)", flags)
  count = os.environ.get("JAX_NUM_CPU_DEVICES", match and match[1])
  processes = os.environ.get("JAX_NUM_PROCESSES", "1")
  if count is None or not (count + processes).isdecimal():
    return None
  return int(count) * int(processes)


def as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
  """Returns a "strings" value as a tuple."""
  return (value,) if isinstance(value, str) else tuple(value)


def _source_exists(path: str) -> bool:
  return (
    path == "embedded"
    or path.startswith("tfds:")
    or "://" in path  # which isn't looked for before it is to be read
    or os.path.exists(path)
    or any(True for _ in glob.iglob(path, recursive=True))
  )


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
  """Returns `key: old -> new` for each key in which two configs differ."""
  a, b = to_flat(old), to_flat(new)
  return [
    f"{name}: {a.get(name)!r} -> {b.get(name)!r}"
    for name in KEYS
    if a.get(name) != b.get(name)
  ]


def is_named(name: str, among: Collection[str]) -> bool:
  """Whether a key, or a group that it is in, is among some.

  >>> is_named("mesh.data", ["mesh"]), is_named("mesh.data", ["mesh.dat"])
  (True, False)
  """
  return any(name == other or name.startswith(f"{other}.") for other in among)


class Parser(argparse.ArgumentParser):
  """An argument parser whose errors are one line too."""

  def error(self, message: str) -> NoReturn:
    """Raises InputError with what is wrong."""
    raise InputError(f"{message}; --help explains the arguments")


def parser(doc: str | None, *, workdir: bool = True) -> argparse.ArgumentParser:
  """Returns the argument parser that programs start from."""
  result = Parser(
    description=doc,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
    epilog="--config.KEY=VALUE sets any key of docs/config.md.",
  )
  result.add_argument(
    "--config",
    metavar="FILE",
    help="a Python file like those in configs/, which is run; or a JSON file",
  )
  result.add_argument(
    "--print_config",
    action="store_true",
    help="print the config, check it and stop",
  )
  if workdir:
    result.add_argument(
      "--workdir", metavar="DIR", required=True, help="folder of the run"
    )
  return result


def parse(
  parser: argparse.ArgumentParser,
  argv: Sequence[str] | None = None,
  *,
  huggingface: bool = False,
  sources: bool = True,
) -> tuple[argparse.Namespace, ConfigDict]:
  """Returns a program's arguments and its config, checked and validated.

  Without --config, the config of the run in the workdir is taken. With
  `--print_config` prints it first, and exits if it is a good one.

  Args:
    parser: Of `parser`.
    argv: The arguments; None: the command line's.
    huggingface: Whether the workdir may be a Hugging Face folder. The keys of
      the model are those of the folder then, the tokenizer is the one there,
      and the other keys are at their defaults where nothing sets them.
    sources: Whether the text must be there, unless its store is.

  Raises:
    InputError: See `load` and `validate`.
  """
  from flaxmlm.interop.families import is_folder
  from flaxmlm.storage.remote import list_names, localize, origin
  from flaxmlm.training.chain import newest_step

  args, overrides = parser.parse_known_args(argv)
  path, workdir = args.config, localize(getattr(args, "workdir", None) or "")
  if workdir:
    args.workdir = workdir
  given = workdir if workdir and is_folder(workdir) else None
  if given and not huggingface:
    raise InputError(
      f"--workdir={workdir} is a Hugging Face folder, and no run is there; name"
      " the folder of a run (model.init_from begins one with the parameters)"
    )
  goes_on = any(
    o.startswith("--config.train.continue_from=") for o in overrides
  )
  # A phase that has saved nothing begins anew, from what is said this time.
  anew = goes_on and newest_step(workdir) is None
  if path is None and workdir and not given and not anew:
    path = os.path.join(workdir, "config.json")
    if not os.path.isfile(path):
      raise InputError(
        f"{workdir} has no run (no config.json there); name a config by"
        " --config=FILE, like configs/quickstart.py, or another --workdir"
      )
  values, stated = _read(path, overrides)
  config = check_keys(values, where="--config")
  if given:
    config = _take_folder(values, stated, given)
  else:
    config = take_rest(config, stated, workdir)
  if args.print_config:
    print(to_json(config), end="", flush=True)
  outs = [getattr(args, name, None) for name in ("json", "html")]
  for name, path in zip(("json", "html"), outs, strict=True):
    check_file(name, path)
  if None not in outs and len(set(map(os.path.realpath, outs))) == 1:
    raise InputError(f"--json and --html are one file, {outs[0]}; name another")
  made = os.path.join(workdir, "store", "manifest.json")
  url = origin(workdir) if workdir else None
  if url is not None:
    there = "manifest.json" in list_names(f"{url}/store")
  else:
    there = bool(workdir) and (given is not None or os.path.exists(made))
  validate(config, sources=sources and not there)
  if args.print_config:
    sys.exit(0)
  return args, config


def take_rest(
  config: ConfigDict, stated: Collection[str], workdir: str
) -> ConfigDict:
  """Returns the config with what it takes from where the run begins.

  With `model.init_from`, the architecture that isn't stated is the folder's;
  with `train.continue_from`, every key that isn't stated is the run's. A run
  that has saved something has its own config, and reads neither again.

  Args:
    config: What was set, and defaults.
    stated: The keys that were set.
    workdir: Where the run is to be; "" if nowhere.

  Raises:
    InputError: The folder is none that can be begun from, or a key is set to
      something that its parameters can't be used with.
  """
  from flaxmlm.storage.remote import localize, origin
  from flaxmlm.training.chain import newest_step

  run, folder = config.train.continue_from, config.model.init_from
  values = to_flat(config)
  if run is None and folder is None:
    return config
  names = {os.path.realpath(workdir), origin(workdir)} if workdir else set()
  if run and {os.path.realpath(run), run.rstrip("/")} & names:
    raise InputError(
      f"train.continue_from={run} is the --workdir; the next phase needs"
      " another one"
    )
  if workdir and newest_step(workdir) is not None:
    path = os.path.join(workdir, "config.json")
    own = to_flat(from_json(path))
    return check_keys(own | {k: values[k] for k in stated}, where=path)
  if run is None:
    return _take_architecture(values, stated, folder)
  step = newest_step(localize(run))
  if step is None:
    raise InputError(
      f"train.continue_from={run}: no run that has saved anything there; to"
      " begin with the parameters of a Hugging Face folder, set"
      " model.init_from"
    )
  return _take_run(values, stated, run, step)


def _take_architecture(
  values: dict[str, Any], stated: Collection[str], folder: str
) -> ConfigDict:
  """Returns the config with the architecture of `model.init_from`."""
  theirs = _read_architecture(folder)
  ours = {k: values[k] for k in stated if values[k] is not None}
  _check_architecture(ours, theirs, folder, (_POSITIONS, *_TILED))
  result = check_keys(values | theirs | ours, where=folder)
  size = theirs["model.width"] // theirs["model.heads"]
  if result.model.width != size * result.model.heads:
    raise InputError(
      f"model.width={result.model.width} and model.heads={result.model.heads}:"
      f" a head stays {size} wide, as in {folder};"
      f" model.heads={result.model.width // size} does"
    )
  return result


def _take_folder(
  values: dict[str, Any], stated: Collection[str], folder: str
) -> ConfigDict:
  """Returns the config with the model and tokenizer of a Hugging Face folder."""
  theirs = _read_architecture(folder)
  for name in [n for n in KEYS if n.startswith("model.") and n in stated]:
    own = theirs.get(name, KEYS[name].default)
    if values[name] not in (None, own):
      raise InputError(
        f"{name}={values[name]!r}, but {folder} has {own!r}, and is taken as it"
        " is; leave the key out"
      )
  for name, key in KEYS.items():
    if name.startswith("tokenizer."):
      theirs[name] = key.default
  theirs["tokenizer.path"] = folder
  if "data.row_length" not in stated:
    longest = theirs["model.max_positions"]
    theirs["data.row_length"] = min(values["data.row_length"], longest)
  return check_keys(values | theirs, where=folder)


def _read_architecture(folder: str) -> dict[str, Any]:
  """Returns the `model` keys of a run's or a Hugging Face folder, flat."""
  from flaxmlm.storage.remote import localize

  here = localize(folder)
  path = os.path.join(here, "config.json")
  if not os.path.isfile(path):
    raise InputError(
      f"model.init_from={folder}: neither a run nor a Hugging Face folder (no"
      " config.json there)"
    )
  from flaxmlm.storage import bounded

  data = bounded.read_json(path)
  if isinstance(data, dict) and "model_type" in data:
    from flaxmlm.interop.families import read_config

    found = read_config(data, here)[1]
  else:
    found = from_json(path).model.to_dict()
  theirs = {f"model.{name}": value for name, value in found.items()}
  # How it was computed there is no part of what it is.
  for name in ("init_from", "attention", "remat", "scan_layers"):
    theirs.pop(f"model.{name}", None)
  return theirs


def _check_architecture(
  ours: Mapping[str, Any],
  theirs: Mapping[str, Any],
  folder: str,
  growing: Sequence[str],
) -> None:
  """Raises InputError at a key with which parameters can't be used."""
  for name, value in theirs.items():
    if ours.get(name, value) == value or name in _FREE_OF_PARAMETERS:
      continue
    if name in growing and ours[name] > value:
      continue
    hint = "leave the key out"
    if name in growing:
      hint = "it can be made larger, not smaller"
    elif name in _TILED and growing:
      hint = "a run keeps its size; model.init_from begins a larger one"
    raise InputError(
      f"{name}={ours[name]!r}, but {folder} has {value!r}; {hint}"
    )


def _take_run(
  values: Mapping[str, Any], stated: Collection[str], run: str, step: int
) -> ConfigDict:
  """Returns the config with what isn't stated as in `train.continue_from`."""
  from flaxmlm.storage.remote import localize

  path = os.path.join(localize(run), "config.json")
  theirs = to_flat(from_json(path))
  theirs["model.init_from"] = None  # its parameters are the run's now
  named = theirs["data.store"]
  if named is None:
    theirs["data.store"] = os.path.join(run, "store")
  own_tokenizer = os.path.join(run, "tokenizer")
  # A whole config of before states every key; with these values, two of them
  # say nothing.
  unsaid = {"data.store"} if values["data.store"] is None else set()
  if values["tokenizer.path"] in (None, own_tokenizer):
    unsaid.add("tokenizer.path")
  stated = set(stated) - unsaid
  ours = {name: values[name] for name in stated}
  result = theirs | ours

  if result["model.init_from"] is not None:
    raise InputError(
      f"model.init_from={result['model.init_from']}: the parameters are those"
      f" of train.continue_from={run}; leave one of the two out"
    )
  _check_architecture(
    ours,
    {k: v for k, v in theirs.items() if k.startswith("model.")},
    run,
    (_POSITIONS,),
  )
  tokenizer = [name for name in KEYS if name.startswith("tokenizer.")]
  text = [
    name
    for name in KEYS
    if name.startswith("data.") and name not in _BESIDE_THE_STORE
  ]
  text.append("objective.labels")
  if "data.store" in stated:
    # A store of another making: its text and tokenizer are what it says.
    for name in {*text, *tokenizer} - set(stated):
      result[name] = KEYS[name].default
    tokenizer = []
  elif changed := [name for name in text if result[name] != theirs[name]]:
    unknown = named is not None and theirs["data.source"] == "embedded"
    if unknown and "data.source" not in stated:
      raise InputError(
        f"{changed[0]}={result[changed[0]]!r} asks for a new store, but {run}"
        f" had data.store={named} and may not name its text; set data.source"
        " too, or data.store"
      )
    result["data.store"] = None
  for name in ("optimizer.name", *tokenizer):
    if result[name] != theirs[name]:
      raise InputError(
        f"{name}={result[name]!r}, but {run} has {theirs[name]!r}; a run goes"
        f" on with its {name.split('.')[0]}: leave the key out"
      )
  if result["data.store"] is None and "tokenizer.path" not in stated:
    result["tokenizer.path"] = own_tokenizer
  asked, before = (
    asked_of_pairs({k: v[f"objective.{k}"] for k in ("name", "labels")})
    for v in (result, theirs)
  )
  if asked and before and asked != before:
    raise InputError(
      f"{run} was asked {', '.join(before)} of pairs, not {', '.join(asked)};"
      " take the parameters alone, by model.init_from"
    )
  if result["train.steps"] <= step:
    raise InputError(
      f"train.steps={result['train.steps']}: {run} has done {step} already, and"
      " they count; set more"
    )
  return check_keys(result, where=path)


def check_file(name: str, path: str | None) -> None:
  """Raises InputError if the file of `--NAME` can't be written, before work."""
  if path is not None and (
    os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK)
  ):
    raise InputError(f"--{name}={path}: can't be written; is the folder there?")


def run(main: Callable[[], None]) -> None:
  """Runs a program's main; a user's mistake is one line and exit code 2.

  A disk that is full, fails or may not be written, or a bucket that doesn't
  answer, is one line too, and exit code 1: another try may do.
  """
  from flaxmlm.storage.files import BucketError

  for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(errors="replace")  # a terminal without Unicode
  try:
    main()
    sys.stdout.flush()
  except InputError as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    _leave(2)
  except BucketError as error:
    line = f"error: {error.filename}: {error.strerror}; it may do another time"
    print(line, file=sys.stderr, flush=True)
    _leave(1)
  except BrokenPipeError:  # `| head` has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
  except OSError as error:
    if error.errno not in _OF_DISKS:
      raise
    line = f"error: {error}; {_OF_DISKS[error.errno]}, and start again"
    print(line, file=sys.stderr, flush=True)
    _leave(1)
  except KeyboardInterrupt:
    sys.exit(130)


def _leave(code: int) -> NoReturn:
  """Exits; with other processes at once, as a proper end would wait for them."""
  if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
    sys.stdout.flush()
    os._exit(code)
  sys.exit(code)


def markdown() -> Iterator[str]:
  """Yields the lines of docs/config.md."""
  yield "# Config keys"
  yield ""
  yield "Set a key in a config file (`config.train.steps = 200`) or on the"
  yield "command line (`--config.train.steps=200`). Tuples are written as in"
  yield "Python: `--config.data.source=\"('a.txt', 'b.jsonl')\"`."
  yield "This page is printed by `python -m flaxmlm.config`."
  group = ""
  for name, key in KEYS.items():
    head = name.rpartition(".")[0] or "seed"
    if head != group:
      group = head
      yield ""
      yield f"## {group}"
      yield ""
      yield "| key | default | type | range | |"
      yield "|---|---|---|---|---|"
    allowed = ", ".join(key.choices)
    if key.low is not None or key.high is not None:
      ends = ["" if end is None else f"{end:g}" for end in (key.low, key.high)]
      allowed = " … ".join(ends).strip()
    text = key.help + (f" [{key.unit}]" if key.unit else "")
    kind = _kind(key).removeprefix("an ").removeprefix("a ")
    yield f"| `{name}` | `{key.default!r}` | {kind} | {allowed} | {text} |"


if __name__ == "__main__":
  print("\n".join(markdown()))
