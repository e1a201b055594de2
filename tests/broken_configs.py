"""Broken configs, drawn by a seed: what a user may get wrong, in every way.

Each has words that its one line must have, the wrong key's name among them.
`benchmarks.faults` counts what becomes of them too.
"""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import random
import shutil
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from flaxmlm import config, prepare, train

ROOT = pathlib.Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
HEAD = "from flaxmlm.config import defaults\n\ndef get_config():\n"


class Fault(NamedTuple):
  """Arguments of `train`, and words that must be in its error."""

  argv: list[str]
  words: tuple[str, ...]


class Outcome(NamedTuple):
  """What a program did: its exit code, its errors, and how long it took."""

  code: int | None
  error: str
  seconds: float


class _Accepted(Exception):  # noqa: N818
  pass


def attempt(argv: list[str]) -> Outcome:
  """Runs `train` in this process as its command line does.

  A config that is accepted ends before anything is compiled, with code None.
  """

  def accept(*args: Any) -> None:
    raise _Accepted

  streams = [io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2)]
  check_alike, code = train.hosts.check_alike, None
  start = time.perf_counter()
  with (
    contextlib.redirect_stdout(streams[0]),
    contextlib.redirect_stderr(streams[1]),
  ):
    train.hosts.check_alike = accept
    try:
      config.run(lambda: train.main(argv))
    except SystemExit as end:
      code = end.code
    except _Accepted:
      code = None
    finally:
      train.hosts.check_alike = check_alike
  seconds = time.perf_counter() - start
  streams[1].flush()
  error = streams[1].buffer.getvalue().decode()
  return Outcome(code, error, seconds)


def is_right(fault: Fault, outcome: Outcome) -> bool:
  """Whether the answer is code 2 and one line that has the words."""
  return (
    outcome.code == 2
    and outcome.error.startswith("error: ")
    and outcome.error.count("\n") == 1
    and outcome.error.endswith("\n")
    and outcome.error[:-1].isprintable()
    and len(outcome.error) < 5000
    and all(word in outcome.error for word in fault.words)
  )


def make_world(folder: pathlib.Path) -> pathlib.Path:
  """Writes what good configs name: a text, a vocabulary, a store."""
  folder.mkdir(parents=True, exist_ok=True)
  draw = random.Random(0)
  words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(100)]
  lines = [" ".join(draw.choices(words, k=20)) for _ in range(200)]
  (folder / "text.txt").write_text("\n".join(lines) + "\n")
  letters = [m + c for c in "abcdefgh" for m in ("", "##")]
  vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
  (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
  values = {
    "data.source": str(folder / "text.txt"),
    "data.document": "line",
    "data.validation_fraction": 0.1,
    "data.processes": 1,
    "tokenizer.path": str(folder / "vocab.txt"),
  }
  c = config.check_keys(values, where="test")
  prepare.prepare_store(c, str(folder / "store"), progress=False)
  return folder


def make(folder: pathlib.Path, count: int, seed: int) -> Iterator[Fault]:
  """Yields broken configs; `folder` is of `make_world`, and is written to."""
  draw = random.Random(seed)
  makers = [_key, _type, _type, _type, _range, _range, _choice]
  makers += [_combination, _file, _file, _python, _json]
  for number in range(count):
    place = folder / f"{seed}-{number}"
    place.mkdir()
    maker = makers[number % len(makers)]
    if maker in (_combination, _file, _python, _json):
      yield maker(draw, folder, place)
    else:
      name, text, value = maker(draw)
      yield _carry(draw, folder, place, name, text, value)


_NOT_SAID = object()  # no such value in JSON and Python, or on a command line


def _carry(
  draw: random.Random,
  folder: pathlib.Path,
  place: pathlib.Path,
  name: str,
  text: Any,
  value: Any,
) -> Fault:
  """Puts a wrong value on a command line, in a JSON or in a Python config."""
  ways = ["line"] * (text is not _NOT_SAID)
  ways += ["json", "python"] * (value is not _NOT_SAID)
  way = draw.choice(ways)
  good = {"data.source": str(folder / "text.txt"), "data.document": "line"}
  good = {k: v for k, v in good.items() if k != name}
  rest = [f"--config.{k}={v}" for k, v in good.items()]
  argv = [f"--workdir={place}/run", *rest]
  if way == "line":
    return Fault(
      [f"--config={QUICKSTART}", *argv, f"--config.{name}={text}"], (name,)
    )
  if way == "json":
    path = place / "config.json"
    node = value
    if draw.random() < 0.8:  # else with dots, which is right too
      for part in reversed(name.split(".")):
        node = {part: node}
    else:
      node = {name: value}
    path.write_text(json.dumps(node))
  else:
    path = place / "config.py"
    # A key that isn't there can't be set, and its line is named.
    *groups, leaf = name.split(".")
    target = "".join(f"[{group!r}]" for group in groups)
    shown = repr(value).replace("nan", "float('nan')")
    shown = shown.replace("inf", "float('inf')")
    path.write_text(
      HEAD + f"  c = defaults()\n  c{target}[{leaf!r}] = {shown}\n  return c\n"
    )
  word = name.rpartition(".")[2] if way == "python" else name
  if way == "python" and name not in config.KEYS:
    known = {k[: len(k) - len(rest)] for k in config.KEYS for rest in _ends(k)}
    parts = name.split(".")
    heads = [".".join(parts[: i + 1]) for i in range(len(parts))]
    word = next(h for h in heads if h not in known).rpartition(".")[2]
  return Fault([f"--config={path}", *argv], (word, path.name))


def _ends(name: str) -> list[str]:
  """Returns what follows each group in a key's name, and the key itself."""
  return [name[i:] for i in range(len(name)) if name[i] == "."] + [""]


def _key(draw: random.Random) -> tuple[str, Any, Any]:
  """A key that is nearly one."""
  while True:
    name = draw.choice(list(config.KEYS))
    place = draw.randrange(len(name.rpartition(".")[0]), len(name))
    match draw.randrange(4):
      case 0:
        wrong = name[:place] + name[place + 1 :]
      case 1:
        wrong = name[:place] + draw.choice("abcxyz_9") + name[place:]
      case 2:
        wrong = name[: place - 1] + name[place : place + 1] + name[place - 1]
        wrong += name[place + 1 :]
      case 3:
        wrong = name + draw.choice(["s", ".x", "_", "\u00e9", " "])
    parts = wrong.split(".")
    if wrong not in config.KEYS and all(parts) and "=" not in wrong:
      default = config.KEYS[name].default
      value = list(default) if isinstance(default, tuple) else default
      # A key below a value can't be written in the files.
      inside = wrong.rpartition(".")[0] in config.KEYS
      return wrong, str(default), _NOT_SAID if inside else value


_WRONG = {
  int: (
    ["many", "1.5", "nan", "inf", "[]", "{}", "(1, 2)", "'5'", "1e400", "--3"],
    ["5", 1.5, True, [], {}, [1], float("inf"), "", 10**400],
  ),
  float: (
    ["x", "nan", "inf", "-inf", "[]", "(1, 2)", "True", "1e999", "''"],
    ["1", True, [], {}, [0.5], float("nan"), float("inf")],
  ),
  bool: (
    ["maybe", "2", "", "yes", "[]", "'True'"],
    [0, 1, "true", [], {}, None, 1.0],
  ),
  str: ([""], [5, True, [], {}, "", 1.5, "a\0b", "\ud800"]),
  "strings": (
    ["(1, 2)", "()", "[", "('a', 3)", "('a', '')", "("],
    [5, [], [1], ["a", 2], {}, [""], "", [["a"]], "\ud800"],
  ),
  "floats": (
    ["x", "3", "(1, 'a')", "(nan,)", "{}", "(True,)"],
    [5, "x", ["a"], [None], [True], {}, [float("nan")]],
  ),
}


def _type(draw: random.Random) -> tuple[str, Any, Any]:
  """A value of another type."""
  name = draw.choice(list(config.KEYS))
  key = config.KEYS[name]
  texts, values = _WRONG[key.kind]
  values = [*values, *([] if key.optional else [None])]
  if not key.optional and key.kind not in (str, "strings"):
    texts = [*texts, "None"]
  return name, draw.choice(texts), draw.choice(values)


def _range(draw: random.Random) -> tuple[str, Any, Any]:
  """A number that is too small or too large."""
  while True:
    name = draw.choice(list(config.KEYS))
    key = config.KEYS[name]
    if key.kind not in (int, float, "floats"):
      continue
    whole = key.kind is int
    wrong = [10**30 if whole else 1e300]
    if key.high is not None:
      wrong.append(key.high + 1 if whole else key.high * 1.001 + 1e-6)
    if key.low is not None:
      wrong.append(key.low - 1 if whole else key.low - 0.001)
      wrong.append(-(10**30) if whole else -1e300)
    value = draw.choice(wrong)
    if key.kind == "floats":
      return name, f"({value},)", [value]
    return name, repr(value), value


def _choice(draw: random.Random) -> tuple[str, Any, Any]:
  """A word that is none of those that a key takes."""
  names = [name for name, key in config.KEYS.items() if key.choices]
  name = draw.choice(names)
  word = draw.choice(config.KEYS[name].choices)
  wrong = draw.choice([word + "x", word[1:] + "-", word.upper() + "1", "{}"])
  return name, wrong, wrong


# Keys that are good alone: what is said of them, the key that is named.
_TOGETHER = [
  ("model.heads=7", "model.heads=7"),
  ("data.row_length=4096", "data.row_length=4096"),
  ("model.family=distilbert model.segment_types=2", "model.segment_types=2"),
  ("model.embedding_size=64", "model.embedding_size=64"),
  ("model.attention=splash", "model.attention=splash"),
  ("model.attention=row mesh.tensor=2", "model.attention=row"),
  ("model.attention=cudnn model.attention_dropout=0", "model.attention=cudnn"),
  ("objective.mask_share=0.9 objective.random_share=0.3", "mask_share"),
  ("objective.name=('masked','span')", "objective.name"),
  ("objective.name=sentence_pair", "objective.labels"),
  ("objective.labels=('a','a')", "objective.labels"),
  ("objective.labels=a", "objective.labels"),
  ("objective.name=replaced_token", "model.family=electra"),
  ("objective.weights=(1,2,3)", "objective.weights"),
  ("objective.weights=(0,)", "objective.weights"),
  ("objective.span_boundary=True", "objective.span_boundary"),
  ("optimizer.warmup_steps=9 train.steps=5", "optimizer.warmup_steps"),
  ("optimizer.schedule=wsd optimizer.decay_steps=99999", "decay_steps"),
  ("train.batch_size=250", "train.batch_size=250"),
  ("train.microbatches=7", "train.microbatches=7"),
  ("mesh.data=3", "mesh.data"),
  ("mesh.data=-1 mesh.fsdp=-1", "mesh.fsdp=-1"),
  ("mesh.tensor=0", "mesh.tensor=0"),
  ("data.weights=(1,2)", "data.weights"),
  ("data.weights=(0,)", "data.weights"),
  ("data.pair_field=b", "data.pair_field"),
  ("data.encoding=utf-9", "data.encoding=utf-9"),
  ("data.encoding=undefined", "data.encoding=undefined"),
  ("data.source=nowhere/*.txt", "data.source"),
  ("data.source=tfds:", "tfds:"),
  ("data.source=tfds:none_of_these", "tfds:none_of_these"),
  ("data.validation_source=nowhere", "data.validation_source"),
  ("data.store=nowhere", "data.store"),
  ("tokenizer.path=nowhere", "tokenizer.path"),
  ("model.init_from=nowhere", "model.init_from"),
  ("train.continue_from=nowhere", "train.continue_from"),
  ("model.family=albert model.num_hidden_groups=99", "num_hidden_groups=99"),
  ("train=5", "train"),
  ("model.family=modernbert model.width=132 model.heads=4", "model.width"),
]


def _combination(
  draw: random.Random, folder: pathlib.Path, place: pathlib.Path
) -> Fault:
  settings, word = draw.choice(_TOGETHER)
  argv = [f"--config={QUICKSTART}", f"--workdir={place}/run"]
  if "source" not in settings:
    argv.append(f"--config.data.source={folder}/text.txt")
  argv += [f"--config.{setting}" for setting in settings.split()]
  return Fault(argv, (word,))


def _file(
  draw: random.Random, folder: pathlib.Path, place: pathlib.Path
) -> Fault:
  """A file that a key names, or an argument, and that isn't right."""
  argv = [f"--config={QUICKSTART}", f"--workdir={place}/run"]
  source = f"--config.data.source={folder}/text.txt"
  junk = draw.randbytes(draw.randrange(1, 300))
  match draw.randrange(12):
    case 0:
      (place / "a.pdf").write_bytes(junk)
      return Fault([*argv, f"--config.data.source={place}/a.pdf"], ("a.pdf",))
    case 1:
      (place / "texts").mkdir()
      return Fault([*argv, f"--config.data.source={place}/texts"], ("texts",))
    case 2 | 3 | 4:
      store = shutil.copytree(folder / "store", place / "store")
      files = [p for p in store.rglob("*") if p.is_file() and p.stat().st_size]
      path = draw.choice(sorted(f for f in files if "rows" not in f.parts))
      data = bytearray(path.read_bytes())
      match draw.randrange(3):
        case 0:
          data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
          path.write_bytes(data)
        case 1:
          path.write_bytes(data[: draw.randrange(len(data))])
        case 2:
          path.unlink()
      words = (str(path.relative_to(place)),)
      if path.name == "manifest.json" and not path.exists():
        words = ("data.store",)
      return Fault([*argv, f"--config.data.store={store}"], words)
    case 5 | 6:
      name = draw.choice(
        ["vocab.txt", "tokenizer.json", "a.model", "vocab.json", "a.bin"]
      )
      (place / name).write_bytes(b"\xff\n\n" + junk)
      return Fault(
        [*argv, source, f"--config.tokenizer.path={place}/{name}"], (name,)
      )
    case 7:
      (place / "empty").mkdir()
      key = draw.choice(
        ["tokenizer.path", "model.init_from", "train.continue_from"]
      )
      return Fault([*argv, source, f"--config.{key}={place}/empty"], (key,))
    case 8:
      model = place / "model"
      model.mkdir()
      (model / "config.json").write_bytes(
        draw.choice([junk, b'{"model_type": "gpt7"}', b"[]", b"{", b""])
      )
      return Fault(
        [*argv, source, f"--config.model.init_from={model}"], ("config.json",)
      )
    case 9:
      (place / "run").write_text("a file")
      return Fault([*argv, source], ("--workdir",))
    case 10:
      (place / "run").mkdir()
      (place / "run" / "config.json").write_bytes(b"{" + junk)
      return Fault([*argv, source], (f"{place}/run",))
    case _:
      wrong = draw.choice(
        ["--wrokdir=x", "--config.", "--steps=3", "--config.a"]
      )
      return Fault([*argv, source, wrong], (wrong.split("=")[0],))


def _python(
  draw: random.Random, folder: pathlib.Path, place: pathlib.Path
) -> Fault:
  """A Python config that doesn't do what it should."""
  path = place / "broken.py"
  text, word = draw.choice(
    [
      ("  c = defaults()\n  1 / 0\n", ":5: "),
      ("  return 3\n", "get_config()"),
      ("  return\n", "get_config()"),
      ("  if\n", ":4: "),
      ("  import sys\n  sys.exit(0)\n", ":5: "),
      ("  raise SystemExit('no')\n", ":4: no"),
      ("  import no_such_module\n", "no_such_module"),
      ("  raise ValueError('a\\nb')\n", ":4: a"),
      ("  from ml_collections import ConfigDict\n"
       "  return ConfigDict({'seed': 1, 'nonsense': 2})\n", "nonsense"),
      ("  from ml_collections import ConfigDict\n"
       "  return ConfigDict({3: 4})\n", "broken.py"),
      ("  return {'seed': 1}\n", "get_config()"),
      ("\treturn\n  return\n", "broken.py"),
    ]
  )  # fmt: skip
  path.write_text(HEAD + text)
  match draw.randrange(6):
    case 0:
      path.write_text("x = 1\n")
      word = "get_config"
    case 1:
      path.write_bytes(b"\xff\xfe" + draw.randbytes(50))
      word = "broken.py"
    case 2:
      path = place / draw.choice(["missing.py", "missing.json", ""])
      word = f"--config={path}"
  return Fault([f"--config={path}", f"--workdir={place}/run"], (word,))


def _json(
  draw: random.Random, folder: pathlib.Path, place: pathlib.Path
) -> Fault:
  """A JSON config that isn't one."""
  path = place / "config.json"
  good = config.to_json(config.load(QUICKSTART)).encode()
  data, word = draw.choice(
    [
      (good[: draw.randrange(len(good) - 2)], "config.json"),
      (b"[" * 100_000, "config.json"),
      (b'{"a":' * 50_000, "config.json"),
      (good.decode().encode("utf-16-le")[1:], "config.json"),
      (b"[]", "list"),
      (b"3", "int"),
      (b"null", "config.json"),
      (b'{"seed": 1, "seed": 2}', "seed"),
      (b'{"train": {"steps": 1}, "train.steps": 2}', "train.steps"),
      (b'{"train": 5}', "train"),
      (b'{"nonsense": {}}', "nonsense"),
      (b'{"data": {"nonsense": {}}}', "data.nonsense"),
      (b'{"a\\nb": 1}', "unknown key a b"),
      (b'{"a\\u001b[31mb": 1}', "config.json"),
      (b'{"seed": "' + b"x" * 10_000 + b'"}', "seed"),
      (b'{"seed": "' + b"x" * 2_000_000 + b'"}', "config.json"),
      (b'{"' + b"k" * 10_000 + b'": 1}', "kkkk"),
      (b'{"seed": 1e999}', "seed"),
      (b'{"seed": NaN}', "seed"),
      (b'{"seed": ' + b"1" * 5_000 + b"}", "config.json"),
      (b'{"data": {"source": ["a", {"b": 1}]}}', "data.source"),
      (b"", "config.json"),
      (draw.randbytes(100) + b"\xff", "config.json"),
    ]
  )
  path.write_bytes(data)
  return Fault([f"--config={path}", f"--workdir={place}/run"], (word,))
