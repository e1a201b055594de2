"""Text from a bucket, and stores made there: the same as from files here."""

import bz2
import gzip
import json
import lzma
import os
import pathlib
import socket
import subprocess
import sys
from http import HTTPStatus

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from conftest import ROOT
from test_prepare import files_of, make_config, make_tokenizer, write_text

from flaxmlm import InputError, prepare
from flaxmlm import config as config_lib
from flaxmlm.data import sources
from flaxmlm.preparing import documents, shards
from flaxmlm.storage import files, lease

ARCHIVES = {
  ".gz": gzip.compress,
  ".bz2": bz2.compress,
  ".xz": lzma.compress,
  ".zst": zstandard.compress,
}
DIRECT = ["--runner=DirectRunner"]


@pytest.fixture(scope="module")
def texts(bucket, tmp_path_factory) -> tuple[pathlib.Path, str]:
  """A tree of texts of all kinds, with copies, here and in a bucket."""
  folder = tmp_path_factory.mktemp("texts")
  (folder / "deep" / "er").mkdir(parents=True)
  (folder / ".hidden").mkdir()
  for number in range(12):
    write_text(folder / "deep" / f"{number}.txt", 30, seed=number % 9)
  lines = write_text(folder / "deep" / "er" / "more.txt", 200, seed=3)
  for number, (ending, compress) in enumerate(ARCHIVES.items()):
    records = [{"text": line} for line in lines[number * 9 :]]
    data = "\n".join(map(json.dumps, records)).encode()
    (folder / f"records.jsonl{ending}").write_bytes(compress(data))
  pyarrow.parquet.write_table(
    pyarrow.table({"text": lines[:90]}), folder / "rows.parquet"
  )
  for name in (".hidden/a.txt", "deep/.b.txt", "[1].txt", "notes.pdf"):
    (folder / name).write_text("a text that nobody asked for, or one did")
  url = f"{bucket}/{folder.name}"
  for path in folder.rglob("*"):
    if path.is_file():
      files.copy_there(str(path), f"{url}/{path.relative_to(folder)}")
  return folder, url


@pytest.fixture
def small(monkeypatch, tmp_path):
  """Many parts of several shards each; a cache of this test alone."""
  monkeypatch.setattr(shards, "SHARD_CHARS", 2000)
  monkeypatch.setattr(documents, "PART_BYTES", 8000)
  monkeypatch.setenv("FLAXMLM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
  "pattern",
  ["", "/", "/deep", "/deep/*", "/**/*.txt", "/**", "/*/1*.txt", "/de?p/er"]
  + ["/.hidden", "/.hidden/*.txt", "/[1].txt", "/records.jsonl.gz", "/rec*"]
  + ["/[dr]*/**", "/deep/1", "/notes.pdf", "/*.pdf"],
)
def test_a_pattern_means_the_same_files_as_here(texts, pattern):
  folder, url = texts

  def found(root: str) -> tuple[list[str], set[str]] | str:
    try:
      known, unknown = sources.find(f"{root}{pattern}")
    except InputError as error:
      return str(error).replace(root, "")
    return (
      [path.removeprefix(root) for path in known],
      {path.removeprefix(root) for path in unknown},
    )

  assert found(url) == found(str(folder))


def test_a_file_that_goes_away_is_no_bad_record(bucket, tmp_path):
  url = f"{bucket}/{tmp_path.name}"
  for name in ("1.jsonl.gz", "2.parquet"):
    files.write(f"{url}/{name}", b"text")
    read = sources.read([f"{url}/{name}"], on_bad_record="skip")
    files.remove_folder(url)
    with pytest.raises(InputError, match=f"{name}: not there"):
      list(read)


@pytest.fixture
def refusing(bucket, monkeypatch):
  """Nothing may be read from the bucket."""
  from gcp_storage_emulator import server
  from gcp_storage_emulator.handlers import objects

  def refuse(request, response, storage):
    response.status = HTTPStatus.FORBIDDEN

  for _, handlers in server.HANDLERS:
    if handlers.get("GET") is objects.download:
      monkeypatch.setitem(handlers, "GET", refuse)


@pytest.mark.parametrize("name", ["1.jsonl.gz", "2.parquet", "3.txt", "4.zst"])
def test_what_is_refused_is_no_bad_record(bucket, tmp_path, refusing, name):
  name = name.replace("4.", "4.csv.")
  url = f"{bucket}/{tmp_path.name}/{name}"
  files.write(url, b"text" * 100)
  read = sources.read([url], on_bad_record="skip")
  with pytest.raises(files.BucketError, match="Forbidden"):
    list(read)


@pytest.mark.parametrize("name", ["a[1]", "a?", "*", "[", "a[!b]", "**"])
def test_a_name_with_signs_of_globs_is_a_name(bucket, tmp_path, name):
  url = f"{bucket}/{tmp_path.name}"
  others = {
    f"{url}/{other}/[x]/{file}" for other in ("a1", "ab") for file in "12"
  }
  own = {f"{url}/{name}/{file}" for file in ("[1]", "1", "deep/*")}
  for path in own | others:
    files.write(path, path.encode())
  assert dict(files.read_many(sorted(own | {f"{url}/a*"}))) == {
    path: path.encode() for path in own
  }
  assert set(files.list_tree(f"{url}/{name}")) == own
  files.move_folder(f"{url}/{name}", f"{url}/{name}.broken")
  moved = {path.replace(f"/{name}/", f"/{name}.broken/") for path in own}
  found = files.list_tree(url)
  assert set(found) == moved | others
  files.remove_folder(f"{url}/{name}.broken")
  files.remove_folder(f"{url}/{name}")
  assert set(files.list_tree(url)) == others


def test_a_bucket_that_refuses_is_one_line(bucket, refusing, capsys):
  with pytest.raises(SystemExit, match="^1$"):
    config_lib.run(lambda: files.read(f"{bucket}/any"))
  said = capsys.readouterr().err
  assert said.startswith(f"error: {bucket}/any: Forbidden")
  assert said.count("\n") == 1


def test_buckets_that_are_not_there(bucket):
  with pytest.raises(InputError, match="gs://no-such-bucket/texts"):
    sources.find("gs://no-such-bucket/texts/*.txt")
  with pytest.raises(InputError, match="those of gs:// alone can be read"):
    sources.find("s4://bucket/texts")


@pytest.mark.slow
def test_a_bucket_that_does_not_answer_is_not_waited_for(bucket, monkeypatch):
  monkeypatch.setattr(files, "_SILENCE_SECONDS", 0.2)
  with socket.create_server(("127.0.0.1", 0)) as silent:
    address = f"http://127.0.0.1:{silent.getsockname()[1]}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    files.bucket_system.cache_clear()
    with pytest.raises(InputError, match="bucket/texts: it doesn't answer"):
      sources.find(f"{bucket}/texts")
  files.bucket_system.cache_clear()


def config(root, **values):
  specs = ("deep", "records.jsonl.*", "rows.parquet")
  names = tuple(f"{root}/{spec}" for spec in specs)
  return make_config("", data__source=names, **values)


@pytest.mark.parametrize(
  "way",
  [
    "pool",
    pytest.param("beam", marks=pytest.mark.slow),
    pytest.param("beam, no copies are sought", marks=pytest.mark.slow),
  ],
)
def test_the_same_store(texts, tmp_path, small, way, monkeypatch):
  beam = None
  values = {}
  if way != "pool":
    pytest.importorskip("apache_beam", reason="pip install -e '.[beam]'")
    beam = DIRECT
  if "," in way:
    from flaxmlm.preparing import beam as preparing

    values["data.cleaning.deduplicate"] = False
    values["tokenizer.path"] = str(make_tokenizer(tmp_path))
    monkeypatch.setattr(preparing, "_decide", None)  # there is no second job
  folder, url = texts
  prepare.prepare_store(
    config(folder, **values), str(tmp_path / "here"), progress=False
  )
  out = f"{url}-{way.split(',')[0]}-{len(values)}"
  c = config(url, **values)
  made = prepare.prepare_store(c, out, progress=False, beam=beam)
  pull(out, tmp_path / "there")
  assert files_of(tmp_path / "there") == files_of(tmp_path / "here")
  assert made.folder.startswith(str(tmp_path / "cache"))
  assert not files.list_names(f"{out}.partial") and not files_of(
    tmp_path / "cache" / "making"
  )
  # Another machine copies it; nobody makes it again.
  monkeypatch.setenv("FLAXMLM_CACHE", str(tmp_path / "elsewhere"))
  monkeypatch.setattr(prepare, "train_tokenizer", None)
  again = prepare.prepare_store(c, out, progress=False, beam=beam)
  assert again.hash == made.hash
  c.data.cleaning.min_chars += 1
  with pytest.raises(InputError, match=f"{out}: holds the store of another"):
    prepare.prepare_store(c, out, progress=False, beam=beam)


def test_a_tokenizer_of_a_bucket_is_named_by_its_folder(
  bucket, tmp_path, monkeypatch
):
  monkeypatch.setenv("FLAXMLM_CACHE", str(tmp_path / "cache"))
  url, path = f"{bucket}/{tmp_path.name}", make_tokenizer(tmp_path)
  files.copy_there(str(path), f"{url}/vocab.txt")

  def load(where):
    c = make_config("unread.txt", tokenizer__path=str(where))
    return prepare.load_tokenizer(c)

  assert load(url).fingerprint == load(path).fingerprint
  for name in ("vocab.txt", "nothing"):
    with pytest.raises(InputError, match=f"{url}/{name}: .* name the folder"):
      load(f"{url}/{name}")


def pull(url, folder):
  files.copy_here(files.list_tree(url), url, str(folder))


@pytest.mark.slow
def test_what_was_made_before_a_failure_is_not_made_again(
  texts, tmp_path, small, monkeypatch
):
  pytest.importorskip("apache_beam", reason="pip install -e '.[beam]'")
  folder, url = texts
  prepare.prepare_store(config(folder), str(tmp_path / "here"), progress=False)
  out = f"{url}-again"
  tokenize_shard = shards.tokenize_shard
  with monkeypatch.context() as patch:

    def fail(found, *rest):
      if found[0].where.endswith("more.txt:1"):
        raise RuntimeError("too long\nfor this tokenizer")
      return tokenize_shard(found, *rest)

    patch.setattr(shards, "tokenize_shard", fail)
    with pytest.raises(InputError, match=r"for this tokenizer \(at gs://"):
      prepare.prepare_store(config(url), out, progress=False, beam=DIRECT)
  made = {p for p in files.list_tree(f"{out}.partial") if p.endswith("npz")}
  assert made
  # On another machine.
  monkeypatch.setenv("FLAXMLM_CACHE", str(tmp_path / "elsewhere"))
  again = []
  monkeypatch.setattr(
    shards,
    "tokenize_shard",
    lambda found, *rest: (
      again.append(found[0].where),
      tokenize_shard(found, *rest),
    )[1],
  )
  prepare.prepare_store(config(url), out, progress=False, beam=DIRECT)
  pull(out, tmp_path / "there")
  assert files_of(tmp_path / "there") == files_of(tmp_path / "here")
  total = len(files_of(tmp_path / "here"))
  assert again and total and len(set(again)) == len(again)
  assert any(where.endswith("more.txt:1") for where in again)


def test_an_older_job_writes_nothing_once_its_folder_is_gone(
  texts, tmp_path, small
):
  pytest.importorskip("apache_beam", reason="pip install -e '.[beam]'")
  from flaxmlm.preparing import beam

  _, url = texts
  folder = f"{url}-old.partial"
  recipe = shards.Recipe(f"{folder}/shards/x", str(tmp_path), "none", {})
  job = beam.Job(f"{folder}/jobs/x", documents.reading(config(url)), recipe)
  beam._make_part((0, 0, [f"{url}/rows.parquet"]), job)
  assert not files.list_tree(folder)


def test_a_source_that_holds_the_store_is_refused(texts, small):
  _, url = texts
  with pytest.raises(InputError, match="would be read as text"):
    prepare.prepare_store(
      make_config(url), f"{url}/store", progress=False, beam=DIRECT
    )


def test_two_machines_that_make_one_store_are_kept_apart(
  texts, tmp_path, small, monkeypatch
):
  folder, url = texts
  out = f"{url}-two"
  monkeypatch.setattr(lease, "RENEWED_EVERY", 0.1)
  monkeypatch.setattr(lease, "_LOOK_EVERY", 0.5)
  with (
    lease.hold(f"{out}.partial", str(tmp_path / "memo")),
    pytest.raises(InputError, match=r"-two\.partial: process .* lives"),
  ):
    prepare.prepare_store(config(folder), out, progress=False)
  prepare.prepare_store(config(folder), out, progress=False)
  assert not files.list_names(f"{out}.partial")


def test_a_folder_with_something_else_is_left(texts, small):
  folder, url = texts
  with pytest.raises(InputError, match="exists and isn't a store"):
    prepare.prepare_store(config(folder), f"{url}/deep", progress=False)


@pytest.mark.slow
def test_the_program_with_workers_that_share_nothing_else(texts, tmp_path):
  pytest.importorskip("apache_beam", reason="pip install -e '.[beam]'")
  folder, url = texts

  def run(root, out, *more):
    done = subprocess.run(
      [sys.executable, "-m", "flaxmlm.prepare"]
      + [f"--config.data.source=('{root}/deep', '{root}/rows.parquet')"]
      + ["--config.data.document=line", "--config.tokenizer.vocab_size=300"]
      + ["--config.tokenizer.kind=bpe", f"--out={out}", *more],
      cwd=ROOT,
      env=os.environ | {"FLAXMLM_CACHE": str(tmp_path / "cache")},
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

  run(folder, tmp_path / "here")
  said = run(
    url,
    f"{url}-program/",
    "--runner=DirectRunner",
    "--",
    "--direct_num_workers=2",
    "--direct_running_mode=multi_processing",
  )
  pull(f"{url}-program", tmp_path / "there")
  assert files_of(tmp_path / "there") == files_of(tmp_path / "here")
  assert f"--config.data.store={url}-program --workdir" in said
  assert "nothing to do" in run(url, f"{url}-program")
