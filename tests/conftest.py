"""Eight emulated CPU devices, and where the real data is."""

import os
import pathlib

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
# What one test compiled, another and its subprocesses needn't.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "compiled"),
)

import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
  """Folder of real texts (FLAXMLM_DATA); the test is skipped without it."""
  path = pathlib.Path(
    os.environ.get("FLAXMLM_DATA", ROOT.parent / "shared" / "data")
  )
  if not path.is_dir():
    pytest.skip(f"no real data at {path}; set FLAXMLM_DATA")
  return path
