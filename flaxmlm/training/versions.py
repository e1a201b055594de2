"""What a run was computed with: this code, and the libraries under it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import pathlib

# What the numbers of a step, or the order of its rows, can hang on.
_LIBRARIES = (
  *("flax", "jax", "jaxlib", "libtpu", "numpy", "optax"),
  "orbax-checkpoint",
)
_CODE = (
  *("data/*.py", "models/*.py", "objectives/*.py"),
  *("training/optimizers.py", "training/sharding.py", "training/step.py"),
)


def find() -> dict[str, str]:
  """Returns the versions of the libraries that are installed, and of the code.

  The code's is a hash of the files that a step is computed by.
  """
  found = {}
  for name in _LIBRARIES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  root = pathlib.Path(__file__).parent.parent
  digest = hashlib.sha256()
  for path in sorted(path for form in _CODE for path in root.glob(form)):
    digest.update(f"{path.relative_to(root)}\n".encode())
    digest.update(path.read_bytes())
  return found | {"code": digest.hexdigest()[:16]}
