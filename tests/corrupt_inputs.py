"""Corrupt inputs, drawn by a seed, and a process that reads them all.

  python tests/corrupt_inputs.py FOLDER COUNT SEED

prints a line of JSON for each input: its kind, what became of it, the seconds.
Good are "named" (an InputError that names the file), "skipped" (counted as bad
records) and "read" (what is left is good input: a letter of a text that became
another). All else is a fault, among it: another exception, an error that
doesn't name the file or has two lines, a write outside of FOLDER, code or a
program that is run, a pickle that is read.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import pathlib
import random
import shutil
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

sys.dont_write_bytecode = True
SECONDS = 120  # after which an input is taken to hang
TEXTS = [
  "The quick brown fox jumps over the lazy dog. It was tired!",
  "<div><p>naïve caf\u00e9 &amp; 中文</p><b>bold</div> schÃ¶n \u200b",
  "an old cat and a new hat, and a bat\n\nthat sat",
]
Use = Callable[[pathlib.Path], str]


class Hang(BaseException):
  """An input takes too long."""


# --- damage -----------------------------------------------------------------


def damage(draw: random.Random, data: bytes) -> bytes:
  """Returns the bytes otherwise than they were."""
  size = max(len(data), 1)
  place = draw.randrange(size)
  match draw.randrange(9):
    case 0:
      return data[:place]
    case 1:
      return draw.randbytes(draw.randrange(200))
    case 2:
      return data[:place] + draw.randbytes(draw.randrange(1, 20)) + data[place:]
    case 3:
      return data[:place] + data[place + draw.randrange(1, 40) :]
    case 4:
      wild = draw.choice([b"\xff" * 4, b"\0" * 8, b"\xff" * 8, b"\x7f" * 4])
      return data[:place] + wild + data[place + len(wild) :]
    case 5:
      return data[place:] + data[:place]
    case _:
      changed = bytearray(data or b"x")
      for _ in range(draw.choice([1, 1, 1, 4, 30])):
        changed[draw.randrange(size)] ^= 1 << draw.randrange(8)
      return bytes(changed)


_ODD = [None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 1.5, -0.5, 1e308]
_ODD += [float("nan"), float("inf"), "", "x", "\ud800", "a\0b", "../../x", "/x"]
_ODD += [[], {}, [[]], [None], {"": None}, {"type": "x"}, ["[MASK]"], "a" * 999]


def damage_json(draw: random.Random, data: bytes) -> bytes:
  """Returns a JSON file with some of its values otherwise."""
  spec = json.loads(data)
  for _ in range(draw.choice([1, 1, 2, 5])):
    node, key = None, None
    inner: Any = spec
    for _ in range(draw.randrange(1, 8)):
      if not isinstance(inner, (dict, list)) or not inner:
        break
      node = inner
      key = draw.choice(list(inner) if isinstance(inner, dict) else [0, -1])
      if isinstance(inner, list):
        key = draw.randrange(len(inner))
      inner = inner[key]
    if node is None:
      spec = draw.choice(_ODD)
      break
    match draw.randrange(4):
      case 0:
        del node[key]
      case 1 if isinstance(node, dict):
        node[draw.choice(["x", "", key + "s"])] = node.pop(key)
      case _:
        node[key] = draw.choice(_ODD)
  return json.dumps(spec).encode()


# --- what is damaged, and how it is used ------------------------------------


def make_good(folder: pathlib.Path) -> None:
  """Writes the good files that the corrupt ones are made from."""
  import pyarrow
  import pyarrow.parquet
  from safetensors.numpy import save_file

  from flaxmlm import models, tokenizers
  from flaxmlm.interop import families, huggingface

  folder.mkdir(parents=True, exist_ok=True)
  records = [{"id": i, "text": t} for i, t in enumerate(TEXTS * 4)]
  (folder / "text.txt").write_text("\n\n".join(TEXTS * 4))
  lines = [json.dumps(r) for r in records]
  (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
  rows = ['{id},"{t}"'.format(id=r["id"], t=r["text"]) for r in records]
  (folder / "text.csv").write_text("id,text\n" + "\n".join(rows) + "\n")
  rows = [f"{r['id']}\t{' '.join(r['text'].split())}" for r in records]
  (folder / "text.tsv").write_text("id\ttext\n" + "\n".join(rows) + "\n")
  table = pyarrow.table({"id": range(12), "text": TEXTS * 4})
  for codec in ("snappy", "zstd", "none"):
    pyarrow.parquet.write_table(
      table, folder / f"{codec}.parquet", compression=codec
    )
  letters = [m + c for c in "abcdefghijklmno" for m in ("", "##")]
  vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, "the"]
  (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
  text = [t * 20 for t in TEXTS]
  for kind, size in (("unigram", 60), ("bpe", 80)):
    made = tokenizers.train(text, kind=kind, vocab_size=size)
    made.save(str(folder / kind))
    (folder / f"{kind}.model").write_bytes(
      (folder / kind / "tokenizer.model").read_bytes()
    )
  made = tokenizers.train(text, kind="wordpiece", vocab_size=130)
  made.save(str(folder / "wordpiece"))
  (folder / "wordpiece.json").write_bytes(
    (folder / "wordpiece" / "tokenizer.json").read_bytes()
  )
  from flaxmlm.tokenizers import exporting

  of_pieces = tokenizers.load(str(folder / "unigram"))
  (folder / "unigram.json").write_bytes(exporting.to_json(of_pieces))
  chars = sorted(tokenizers.hugging_face.byte_chars())
  ids = {c: i for i, c in enumerate([*chars, "th", "the", "an"])}
  bpe = folder / "bytes"
  bpe.mkdir()
  (bpe / "vocab.json").write_text(json.dumps(ids))
  (bpe / "merges.txt").write_text("#version: 0.2\nt h\nth e\na n\n")
  tokenizers.load(str(bpe)).save(str(folder / "saved"))
  (folder / "bytes.json").write_bytes(
    (folder / "saved" / "tokenizer.json").read_bytes()
  )
  shutil.rmtree(folder / "saved")

  import jax

  options = {"layers": 1, "width": 8, "heads": 2, "ffn": 8}
  from flaxmlm import config

  shape = config.defaults().model.to_dict() | options | {"max_positions": 16}
  model = models.build(shape, vocab_size=32, dtype="float32")
  params = model.init(jax.random.key(0), ("mlm",))
  hub = folder / "hub"
  hub.mkdir()
  written = families.write_config(
    shape, vocab_size=32, ids={"pad": 0, "cls": 2, "sep": 3}, heads=("mlm",)
  )
  huggingface.save(str(hub), params, written, shape)
  tensors = huggingface.to_tensors(params, shape, pad=0)
  parts = folder / "parts"
  parts.mkdir()
  names = list(tensors)
  where = {}
  for number, some in enumerate((names[::2], names[1::2])):
    file = f"model-{number}.safetensors"
    save_file({n: tensors[n] for n in some}, parts / file)
    where |= dict.fromkeys(some, file)
  (parts / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": where})
  )
  shutil.copy(hub / "config.json", parts / "config.json")


def use_source(path: pathlib.Path) -> str:
  """Reads a source both ways, and cleans what comes."""
  from flaxmlm import InputError, config
  from flaxmlm.data import cleaning, sources

  options = config.defaults().data.cleaning.to_dict()
  options |= {"html": True, "unwrap": True}
  bad = sources.BadRecords()
  unit = ("file", "paragraph", "line")[len(path.name) % 3]
  found = sources.read(
    [str(path)], document=unit, on_bad_record="skip", bad=bad
  )
  for document in found:
    cleaning.clean(document.text, options, Counter())
  if bad.count:
    try:
      list(sources.read([str(path)], document=unit))
    except InputError as error:
      assert str(path) in str(error), error
      return "skipped"
    raise AssertionError("skipped, but no error where that is asked for")
  return "read"


def use_tokenizer(path: pathlib.Path) -> str:
  """Loads a tokenizer, encodes and decodes."""
  from flaxmlm import tokenizers

  tokenizer = tokenizers.load(str(path))
  size = tokenizer.vocab.size
  for encoded in tokenizer.encode_batch([*TEXTS, "", "中" * 50]):
    ids = encoded.ids.tolist()
    assert len(ids) == len(encoded.flags) and all(0 <= i < size for i in ids)
    tokenizer.decode(ids)
  tokenizer.encode("a [MASK] b")
  tokenizer.tokens(range(min(size, 10)))
  return "read"


def use_folder(path: pathlib.Path) -> str:
  """Loads a Hugging Face folder as `train` does that begins with it."""
  from flaxmlm import config
  from flaxmlm.interop import huggingface

  folder = str(path if path.is_dir() else path.parent)
  c = config.load(None, [f"--config.model.init_from={folder}"])
  c.data.row_length = 8
  c = config.take_rest(c, {"model.init_from"}, "")
  huggingface.load(folder)
  return "read"


def make(folder: pathlib.Path, good: pathlib.Path, seed: int) -> Iterator:
  """Yields (kind, path, use) of corrupt inputs without end."""
  draw = random.Random(seed)
  packs = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": __import__("bz2").compress,
    ".xz": lzma.compress,
    ".zst": __import__("zstandard").ZstdCompressor().compress,
  }
  sources = ["text.txt", "text.jsonl", "text.csv", "text.tsv"]
  tables = ["snappy.parquet", "zstd.parquet", "none.parquet"]
  specs = ["wordpiece.json", "unigram.json", "bytes.json"]
  number = 0
  while True:
    number += 1
    place = folder / f"{seed}-{number}"
    place.mkdir(parents=True)
    match draw.randrange(20):
      case 0 | 1:
        name = draw.choice(sources)
        path = place / name
        path.write_bytes(damage(draw, (good / name).read_bytes()))
        yield path.suffix, path, use_source
      case 2 | 3 | 4 | 5:
        name, pack = draw.choice(sources + tables), draw.choice(list(packs))
        path = place / (name + pack)
        path.write_bytes(damage(draw, packs[pack]((good / name).read_bytes())))
        yield path.suffix, path, use_source
      case 6 | 7 | 8:
        name = draw.choice(tables)
        path = place / name
        path.write_bytes(damage(draw, (good / name).read_bytes()))
        yield path.suffix, path, use_source
      case 9 | 10:
        path = place / "vocab.txt"
        path.write_bytes(damage(draw, (good / "vocab.txt").read_bytes()))
        yield "vocab.txt", path, use_tokenizer
      case 11 | 12 | 13:
        name = draw.choice(specs)
        path = place / "tokenizer.json"
        how = draw.choice([damage, damage_json, damage_json])
        path.write_bytes(how(draw, (good / name).read_bytes()))
        yield "tokenizer.json", path, use_tokenizer
      case 14 | 15:
        name = draw.choice(["unigram.model", "bpe.model"])
        path = place / name
        path.write_bytes(damage(draw, (good / name).read_bytes()))
        yield ".model", path, use_tokenizer
      case 16:
        name = draw.choice(["bytes", "unigram", "wordpiece"])
        shutil.copytree(good / name, place / name)
        path = draw.choice(sorted((place / name).iterdir()))
        how = draw.choice([damage, damage_json])
        how = how if path.suffix == ".json" else damage
        path.write_bytes(how(draw, path.read_bytes()))
        yield "tokenizer folder", place / name, use_tokenizer
      case 17 | 18:
        name = draw.choice(["hub", "hub", "parts"])
        shutil.copytree(good / name, place / name)
        weights = sorted((place / name).glob("*.safetensors"))
        path = draw.choice(weights)
        path.write_bytes(_damage_tensors(draw, path.read_bytes()))
        yield "safetensors", place / name, use_folder
      case 19:
        shutil.copytree(good / "parts", place / "parts")
        path = draw.choice(sorted((place / "parts").glob("*.json")))
        how = draw.choice([damage, damage_json, damage_json])
        path.write_bytes(how(draw, path.read_bytes()))
        yield "config.json", place / "parts", use_folder


def _damage_tensors(draw: random.Random, data: bytes) -> bytes:
  """Returns a safetensors file whose header, mostly, is otherwise."""
  (size,) = struct.unpack("<Q", data[:8])
  match draw.randrange(4):
    case 0:
      return damage(draw, data)
    case 1:
      wild = draw.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])
      return struct.pack("<Q", wild) + data[8:]
    case _:
      head = damage_json(draw, data[8 : 8 + size])
      return struct.pack("<Q", len(head)) + head + data[8 + size :]


def bombs(folder: pathlib.Path) -> Iterator:
  """Yields (kind, path, use) of small files that are large inside."""
  import bz2

  import pyarrow
  import pyarrow.parquet
  import zstandard

  folder.mkdir(parents=True)
  zeros, lines = bytes(1 << 26), b"a b\n" * (1 << 24)
  packs = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".zst": zstandard.ZstdCompressor().compress,
  }
  for ending, pack in packs.items():
    for inside, block in (("zeros", zeros), ("lines", lines)):
      one = pack(block)
      for kind in (".txt", ".jsonl", ".csv"):
        if kind != ".txt" and inside == "lines":
          continue
        path = folder / f"{inside}{kind}{ending}"
        path.write_bytes(one * 40)  # 2.5 GB
        yield f"bomb {ending}", path, use_source
  path = folder / "bomb.parquet.gz"
  path.write_bytes(gzip.compress(zeros) * 40)
  yield "bomb .gz", path, use_source
  path = folder / "dictionary.parquet"
  # 500 MB of text, never here.
  numbers = pyarrow.array([0] * 60, pyarrow.int32())
  values = pyarrow.DictionaryArray.from_arrays(numbers, ["x" * (1 << 23)])
  pyarrow.parquet.write_table(
    pyarrow.table({"text": values}), path, store_schema=False
  )
  yield "bomb .parquet", path, use_source
  deep = {
    "arrays.jsonl": b"[" * 10**6,
    "objects.jsonl": b'{"a":' * 10**6,
    "parts.jsonl": b'{"text": [' + b"{}," * 15_000_000 + b"{}]}",
    "divs.txt": b"<div>" * 10**6,
    "marks.txt": b"a" + "\u0301\u0327".encode() * 500_000,
    "fields.csv": b"text," + b"a," * 5_000_000 + b"\n" + b"x," * 5_000_000,
    "quote.csv": b'text\n"' + b"a\n" * 5_000_000,
  }
  for name, data in deep.items():
    path = folder / name
    path.write_bytes(data)
    yield "nested", path, use_source
  spec = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel"}}
  spec["model"] |= {"vocab": {"a": 2**32 - 2, "[UNK]": 1}, "unk_token": "[UNK]"}
  for name, data in {
    "tokenizer.json": json.dumps(spec).encode(),
    "vocab.json": b'{"a": 4000000000}',
    "deep/tokenizer.json": b"[" * 10**6,
    "long/tokenizer.json": b"[" + b"{}," * 15_000_000 + b"{}]",
    "vocab.txt": b"\n" * (1 << 27),
  }.items():
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    yield "tokenizer", path, use_tokenizer
  for name in ("a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.txt.zip"):
    path = folder / name
    path.write_bytes(_archive(name))
    yield "archive", path, use_source


def _archive(name: str) -> bytes:
  """Returns an archive whose member would be written elsewhere."""
  import tarfile
  import zipfile

  file = io.BytesIO()
  if name.endswith(".zip"):
    with zipfile.ZipFile(file, "w") as archive:
      archive.writestr("../../escaped.txt", "out")
  else:
    mode = "w:gz" if name.endswith("gz") else "w"
    with tarfile.open(fileobj=file, mode=mode) as archive:
      member = tarfile.TarInfo("../../escaped.txt")
      member.size = 3
      archive.addfile(member, io.BytesIO(b"out"))
  return file.getvalue()


# --- the process ------------------------------------------------------------


def watch(folder: pathlib.Path, seen: list[str]) -> None:
  """Notes what is written outside of a folder, and code that is run."""
  root = os.path.realpath(folder)
  writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
  moves = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link"}
  moves |= {"os.symlink", "os.truncate", "os.chmod", "shutil.rmtree"}
  runs = {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec"}
  runs |= {"os.posix_spawn", "socket.connect", "ctypes.dlopen/file"}

  def is_outside(path: Any) -> bool:
    if not isinstance(path, (str, bytes)):
      return False
    path = os.path.realpath(os.fsdecode(path))
    return not path.startswith((root, "/dev/null", "/proc/", "/dev/shm"))

  def hook(event: str, args: tuple) -> None:
    if event == "open" and isinstance(args[2], int) and args[2] & writes:
      if is_outside(args[0]):
        seen.append(f"writes {args[0]}")
    elif event in moves and any(map(is_outside, args[:2])) or event in runs:
      seen.append(f"{event} {args[:2]}")
    elif event == "exec" and args[0].co_filename.startswith(root):
      seen.append(f"runs {args[0].co_filename}")

  sys.addaudithook(hook)


def judge(path: pathlib.Path, use: Use, seen: list[str]) -> str:
  """Returns what becomes of an input, in one word where it is good."""
  from flaxmlm import InputError

  def stop(*_: Any) -> None:
    raise Hang

  signal.signal(signal.SIGALRM, stop)
  signal.alarm(SECONDS)
  try:
    result = use(path)
  except InputError as error:
    folder = str(path if path.is_dir() else path.parent)
    named = folder in str(error) and "\n" not in str(error)
    result = "named" if named else f"doesn't name the file: {error}"
  except Hang:
    result = "hangs"
  except BaseException as error:
    import traceback

    place = traceback.extract_tb(error.__traceback__)[-1]
    result = f"{type(error).__name__}: {str(error)[:200]} at {place}"
  finally:
    signal.alarm(0)
  if seen:  # before what is used up here is removed
    result = "; ".join(seen)
    seen.clear()
  return result


def main() -> None:
  folder, count, seed = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:4])
  sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
  folder.mkdir(parents=True, exist_ok=True)
  os.environ["FLAXMLM_CACHE"] = str(folder / "cache")
  os.environ["TMPDIR"] = str(folder)
  make_good(folder / "good")
  good = (("unigram.model", use_tokenizer), ("unigram.json", use_tokenizer))
  for name, use in (*good, ("hub", use_folder), ("parts", use_folder)):
    assert use(folder / "good" / name) == "read", name
  seen: list[str] = []
  watch(folder, seen)
  every = make(folder / "made", folder / "good", seed)
  if count < 0:  # bombs alone
    every, count = bombs(folder / "bombs"), 10**9
  for number, (kind, path, use) in enumerate(every):
    if number == count:
      break
    print(json.dumps({"begins": str(path), "kind": kind}), flush=True)
    start = time.perf_counter()
    result = judge(path, use, seen)
    facts = {
      "kind": kind,
      "result": result,
      "seconds": time.perf_counter() - start,
      "rss": peak_memory(),
    }
    print(json.dumps(facts), flush=True)
    target = path if path.is_dir() else path.parent
    if result in ("named", "skipped", "read"):
      if "bombs" in path.parts:
        path.unlink()
      else:
        shutil.rmtree(target)
      seen.clear()


def peak_memory() -> int:
  """Returns the most bytes that this program had in memory.

  Not getrusage's: that is at least what the process had that started it.
  """
  with open("/proc/self/status", encoding="ascii") as file:
    [kib] = (line.split()[1] for line in file if line.startswith("VmHWM:"))
  return int(kib) << 10


if __name__ == "__main__":
  main()
