"""Eight emulated CPU devices, the real data, and what several files use."""

import json
import os
import pathlib
import subprocess
import sys

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
