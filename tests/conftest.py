"""Eight emulated CPU devices, the real data, and what several files use."""

import contextlib
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
from http import HTTPStatus

# Most of the time goes into compiling: unoptimised, it takes less than half.
# What XLA_FLAGS says comes after, and counts.
FLAGS = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
os.environ["XLA_FLAGS"] = f"{FLAGS} --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
# What one test compiled, another and its subprocesses needn't.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "compiled"),
)

# And what one has checked of a store; never in the home of who runs them.
os.environ.setdefault(
  "FLAXMLM_CACHE",
  str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "flaxmlm"),
)

import numpy as np  # noqa: E402
import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent


def environment() -> dict[str, str]:
  """One CPU device, as people have it."""
  return os.environ | {"XLA_FLAGS": FLAGS}


def program(name: str, *args: str, code: int = 0, **kwargs) -> str:
  """Runs a program; returns what it printed."""
  done = subprocess.run(
    [sys.executable, "-m", f"flaxmlm.{name}", *args],
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
    timeout=300,
    **kwargs,
  )
  assert done.returncode == code, done.stdout + done.stderr
  return done.stdout if code == 0 else done.stderr


def lines(path: pathlib.Path) -> list[dict]:
  """Returns the objects of a file of JSON lines."""
  return [json.loads(line) for line in path.read_text().splitlines()]


def random_params(options, *, vocab_size: int, seed: int = 0):
  """Parameters of a model, biases and norms random too."""
  # Not above: what is imported before the tests isn't type-checked in them.
  import jax

  from flaxmlm import models

  model = models.build(options, vocab_size=vocab_size, dtype="float32")
  random = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: x + random.normal(0, 0.2, x.shape).astype(np.float32),
    model.init(jax.random.key(seed)),
  )


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
  """Folder of real texts (FLAXMLM_DATA); the test is skipped without it."""
  path = pathlib.Path(
    os.environ.get("FLAXMLM_DATA", ROOT.parent / "shared" / "data")
  )
  if not path.is_dir():
    pytest.skip(f"no real data at {path}; set FLAXMLM_DATA")
  return path


@pytest.fixture(scope="session")
def bucket():
  """A bucket of a server in this process that speaks GCS's API.

  The test is skipped where the extra gcs or the server isn't installed.
  """
  if importlib.util.find_spec("gcsfs") is None:
    pytest.skip("no gcsfs; the extra gcs has it")
  emulator = pytest.importorskip(
    "gcp_storage_emulator.server", reason="no gcp-storage-emulator"
  )
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  address = f"http://127.0.0.1:{port}"
  keys = {
    "STORAGE_EMULATOR_HOST": address,  # gcsfs reads it
    "TENSORSTORE_GCS_HTTP_URL": address,
    "FSSPEC_GS_TOKEN": "anon",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    # Else gcsfs asks Google's gRPC service, for a minute, what kind of bucket
    # it is. Read when gcsfs is imported, which is at the first use.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
  }
  with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
    for name, value in keys.items():
      patch.setenv(name, value)
    _heed_generations(patch)
    server = emulator.create_server(
      "127.0.0.1", port, in_memory=True, default_bucket="bucket"
    )
    server.start()
    stack.callback(server.stop)
    yield "gs://bucket"


def _heed_generations(patch: pytest.MonkeyPatch) -> None:
  """Makes the server refuse as GCS does what `ifGenerationMatch` forbids."""
  from gcp_storage_emulator import server
  from gcp_storage_emulator.exceptions import NotFound
  from gcp_storage_emulator.handlers import objects

  lock = threading.Lock()

  def heeding(handle, find):
    def checked(request, response, storage, *args, **kwargs):
      wanted = request.query.get("ifGenerationMatch")
      if wanted is None:
        return handle(request, response, storage, *args, **kwargs)
      with lock:
        try:
          found = storage.get_file_obj(
            request.params["bucket_name"], find(request)
          )["generation"]
        except NotFound:
          found = "0"
        if found != wanted[0]:
          _ = request.data  # it has to be read before an answer
          response.status = HTTPStatus.PRECONDITION_FAILED
          return None
        return handle(request, response, storage, *args, **kwargs)

    return checked

  for name, find in (
    ("_media_upload", lambda request: request.query["name"][0]),
    ("_multipart_upload", lambda request: request.data["meta"]["name"]),
  ):
    patch.setattr(objects, name, heeding(getattr(objects, name), find))
  delete = heeding(objects.delete, lambda request: request.params["object_id"])
  for _, handlers in server.HANDLERS:
    if handlers.get("DELETE") is objects.delete:
      patch.setitem(handlers, "DELETE", delete)
