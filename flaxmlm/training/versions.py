"""What a run was computed with: this code, and the libraries under it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import pathlib

from flaxmlm import InputError

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


def adds_up() -> bool:
  """Whether JAX adds up rightly here, by the case that is known to go wrong.

  jaxlib 0.10.2 doesn't on CPUs: sums of squares of products of 32,769 rows with
  a matrix come out too small (jax-ml/jax issue 39103).
  """
  import jax
  import jax.numpy as jnp

  @jax.jit
  def squares(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(rows)

  numbers = jnp.arange(32_769, dtype=jnp.float32)
  rows = jnp.stack([numbers, 0 * numbers, 0 * numbers], axis=1)
  return float(squares(rows, jnp.eye(3))[-1]) == 2.0**30


def check_sums() -> None:
  """Raises InputError on a CPU where JAX doesn't add up rightly."""
  import jax

  if jax.default_backend() == "cpu" and not adds_up():
    raise InputError(WRONG_SUMS.format(find()["jaxlib"]))


WRONG_SUMS = (
  "jaxlib {} computes wrong sums on this CPU (jax-ml/jax issue 39103); take"
  " another version (pip install 'jax!=0.10.2'), or set"
  " XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=-reduce"
)
