"""The store: what goes in comes out, once, in the right split."""

import json
import os
import shutil
from collections import Counter

import numpy as np
import pytest

from flaxmlm import InputError
from flaxmlm.data import store

VOCAB = {"size": 1000, "pad": 7, "unk": 1, "cls": 2, "sep": 3, "mask": 4}


def make_shards(folder, documents, *, per_shard=7):
  """Writes (source, fingerprint, ids, flags) as shards; returns their paths."""
  paths = []
  for first in range(0, len(documents), per_shard):
    part = documents[first : first + per_shard]
    sources, fingerprints, ids, flags = zip(*part, strict=True)
    shard = store.Shard(
      np.concatenate(ids).astype(np.uint16),
      np.concatenate(flags).astype(np.uint8),
      np.array([len(i) for i in ids]),
      np.array([3 * len(i) for i in ids]),
      np.array(fingerprints, np.uint64),
      np.array(sources, np.uint16),
      Counter(read=len(part) + 1, too_short=1),
    )
    paths.append(os.path.join(folder, f"{first:06d}.npz"))
    store.save_shard(paths[-1], shard, "key")
  return paths


def make_documents(number, *, seed=0, sources=1, longest=60, values=2**63):
  """Returns random documents of word and sentence starts and no specials."""
  random = np.random.default_rng(seed)
  result = []
  for d in range(number):
    length = random.integers(1, longest)
    result.append(
      (
        d * sources // number,
        int(random.integers(0, values)) * (2**64 // values),
        random.integers(10, VOCAB["size"], length),
        random.integers(0, 4, length),
      )
    )
  return result


def make_store(
  folder,
  documents,
  *,
  fraction=0.2,
  validation_source=None,
  deduplicate=True,
):
  """Assembles a store of random documents and opens it."""
  os.makedirs(folder / "store" / "tokenizer")
  (folder / "store" / "tokenizer" / "vocab.txt").write_text("[PAD]\n")
  os.makedirs(folder / "shards")
  store.assemble(
    str(folder / "store"),
    make_shards(folder / "shards", documents),
    vocab=VOCAB,
    validation_fraction=fraction,
    validation_source=validation_source,
    deduplicate=deduplicate,
    facts={"spec": {}},
  )
  return store.open_store(str(folder / "store"))


def contents(split):
  """Returns (source, ids, flags) of a split's documents."""
  bounds = zip(split.offsets[:-1], split.offsets[1:], strict=True)
  return [
    (int(source), split.ids[a:b].tolist(), split.flags[a:b].tolist())
    for source, (a, b) in zip(split.sources, bounds, strict=True)
  ]


def plain(documents):
  return [(s, list(ids), list(flags)) for s, _, ids, flags in documents]


def test_documents_by_fingerprint_against_plain_python(tmp_path, monkeypatch):
  # Several ranges of fingerprints, and many copies in each.
  monkeypatch.setattr(store, "_FINGERPRINTS", 64)
  documents = make_documents(600, values=256)
  made = make_store(tmp_path, documents)
  seen = set()
  expected = {"train": [], "validation": []}
  for document in documents:
    if document[1] not in seen:
      split = "validation" if document[1] / 2**64 < 0.2 else "train"
      expected[split].append(document)
    seen.add(document[1])
  assert contents(made.train) == plain(expected["train"])
  assert contents(made.validation) == plain(expected["validation"])
  counted = made.manifest["documents"]
  assert counted["kept"] == len(seen)
  assert counted["dropped"]["duplicate"] == 600 - len(seen)
  assert counted["read"] == 600 + counted["dropped"]["too_short"]


def test_copies_stay_if_asked_and_in_one_split(tmp_path):
  documents = make_documents(100, values=16)
  made = make_store(tmp_path, documents, deduplicate=False)
  held_out = [d for d in documents if d[1] / 2**64 < 0.2]
  assert contents(made.validation) == plain(held_out)
  assert made.manifest["documents"]["kept"] == 100


def test_a_validation_source_takes_its_texts_out_of_training(tmp_path):
  documents = make_documents(300, sources=3, values=128)
  made = make_store(tmp_path, documents, validation_source=2)
  held_out = {d[1] for d in documents if d[0] == 2}
  training = {d[1]: d for d in reversed(documents) if d[0] < 2}
  left = [
    d
    for d in documents
    if d[0] < 2 and d[1] not in held_out and training[d[1]] is d
  ]
  assert contents(made.train) == plain(left)
  assert len(contents(made.validation)) == len(held_out)
  assert made.manifest["documents"]["dropped"]["in_validation"] == sum(
    d[0] < 2 and d[1] in held_out for d in documents
  )


def test_the_split_never_moves(tmp_path):
  documents = make_documents(200)
  small = make_store(tmp_path / "a", documents[:100])
  large = make_store(tmp_path / "b", documents[::-1])
  part = [ids for _, ids, _ in contents(small.validation)]
  whole = [ids for _, ids, _ in contents(large.validation)]
  assert all(ids in whole for ids in part)


def test_where_no_document_falls_into_validation_the_smallest_does(tmp_path):
  documents = make_documents(20)
  documents += [documents[7]]
  made = make_store(tmp_path / "some", documents, fraction=1e-9)
  smallest = min(documents, key=lambda d: d[1])
  assert contents(made.validation) == plain([smallest])
  assert made.manifest["smallest_held_out"]
  assert made.manifest["splits"]["train"]["documents"] == 19
  # Not if that leaves nothing to train on, nor if none is asked for.
  copies = make_store(tmp_path / "one", documents[:1] * 2, fraction=1e-9)
  assert len(copies.validation.ids) == 0
  none = make_store(tmp_path / "none", documents, fraction=0.0)
  assert len(none.validation.ids) == 0


def test_counts_are_the_training_unigrams(tmp_path):
  made = make_store(tmp_path, make_documents(50))
  expected = Counter(t for _, ids, _ in contents(made.train) for t in ids)
  assert {t: n for t, n in enumerate(made.counts.tolist()) if n} == expected


def test_large_vocabularies_keep_their_ids(tmp_path):
  ids = np.array([70_000, 5, 65_536], np.uint32)
  shard = store.Shard(
    ids,
    np.zeros(3, np.uint8),
    np.array([3]),
    np.array([9]),
    np.array([2**64 - 1], np.uint64),
    np.zeros(1, np.uint16),
    Counter(read=1),
  )
  path = str(tmp_path / "shard.npz")
  store.save_shard(path, shard, "key")
  os.makedirs(tmp_path / "store" / "tokenizer")
  store.assemble(
    str(tmp_path / "store"),
    [path],
    vocab=VOCAB | {"size": 100_000},
    validation_fraction=0.1,
    validation_source=None,
    deduplicate=True,
    facts={"spec": {}},
  )
  made = store.open_store(str(tmp_path / "store"))
  assert made.train.ids.tolist() == ids.tolist()
  assert len(made.validation.ids) == 0


def test_a_shard_of_other_text_or_cut_short_is_not_used(tmp_path):
  [path] = make_shards(tmp_path, make_documents(5))
  assert store.shard_size(path, "key")[0] == 5
  assert store.shard_size(path, "other key") is None
  with open(path, "r+b") as file:
    file.truncate(os.path.getsize(path) // 2)
  assert store.shard_size(path, "key") is None
  assert store.shard_size(str(tmp_path / "none"), "key") is None


@pytest.mark.parametrize("name", ["train/flags.bin", "tokenizer/vocab.txt"])
def test_a_flipped_bit_is_found(tmp_path, name):
  made = make_store(tmp_path, make_documents(50))
  store.verify(made)
  with open(os.path.join(made.folder, name), "r+b") as file:
    byte = file.read(1)[0]
    file.seek(0)
    file.write(bytes([byte ^ 1]))
  with pytest.raises(InputError, match=f"{name}.*sha256"):
    store.verify(made)


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda f: shutil.rmtree(f), "flaxmlm.prepare --out"),
    (lambda f: (f / "manifest.json").write_text("{"), "not the manifest"),
    (lambda f: os.truncate(f / "train" / "ids.bin", 10), "10 bytes, should"),
    (lambda f: os.remove(f / "counts.bin"), "counts.bin: missing"),
  ],
)
def test_a_damaged_store_is_refused(tmp_path, damage, message):
  make_store(tmp_path, make_documents(20))
  damage(tmp_path / "store")
  with pytest.raises(InputError, match=message):
    store.open_store(str(tmp_path / "store"))


def test_another_format_is_refused(tmp_path):
  make_store(tmp_path, make_documents(20))
  path = tmp_path / "store" / "manifest.json"
  manifest = json.loads(path.read_text())
  path.write_text(json.dumps(manifest | {"format": 99}))
  with pytest.raises(InputError, match="format 99, this version reads 1"):
    store.open_store(str(tmp_path / "store"))
