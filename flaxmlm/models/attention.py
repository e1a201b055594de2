"""Attention within documents, by what the machine has for it.

docs/attention.md says which backend is taken when.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from flaxmlm import InputError
from flaxmlm.models.layers import dropout, platform

# Below this, plain XLA is as fast on a TPU: scores are small.
SPLASH_MIN_LENGTH = 512
# Rows are whole blocks of so many tokens: a TPU's vector registers are so wide.
SPLASH_LANES = 128
# Tokens a grid step, at most; the kernel's own default of 128 has it wait for
# its grid rather than for its products.
SPLASH_BLOCK = 512
# cuDNN's fused attention: dtypes and the largest size of a head.
CUDNN_DTYPES = ("bfloat16", "float16")
CUDNN_MAX_HEAD = 128
# Blocks of local attention are never smaller, whatever the window: matrix
# products of fewer rows are slow everywhere.
MIN_BLOCK = 32
# A segment that no token has.
NOWHERE = -1


def attend(
  query: Float[Array, "B L H K"],
  key: Float[Array, "B L H K"],
  value: Float[Array, "B L H K"],
  segments: Int[Array, "B L"],
  *,
  backend: str = "auto",
  window: int | None = None,
  dropout_keys: Key[Array, " B"] | None = None,
  dropout_rate: float = 0.0,
  site: int | Int[Array, ""] = 0,
) -> Float[Array, "B L H K"]:
  """Scaled dot-product attention that stops at document borders.

  softmax(q k / sqrt(K)) v over the tokens of the same segment (Vaswani et al.,
  2017, section 3.2.1), softmax in float32. Weights across a border are exactly
  0, so nothing leaks. Padding (segment 0) attends to padding. With a window,
  tokens see only those that are at most so far away.

  Args:
    query: q.
    key: k.
    value: v.
    segments: See `Inputs`.
    backend: "auto", "xla", "splash" or "cudnn": the key `model.attention`.
    window: How far a token sees to each side; None: to the document's ends.
    dropout_keys: See `dropout`; so are the next two.
    dropout_rate: Share of the weights to drop.
    site: Number of the place within the model.

  Raises:
    InputError: The backend was asked for by name and can't do this here.
  """
  _, L, _, K = query.shape
  chosen = choose_backend(
    backend,
    platform=platform(),
    length=L,
    head_size=K,
    dtype=query.dtype.name,
    local=window is not None,
    drops=dropout_keys is not None and dropout_rate > 0,
  )
  if chosen == "splash":
    return splash(query, key, value, segments, window=window)
  if chosen == "cudnn":
    return cudnn(query, key, value, segments, window=window)
  return xla(
    query,
    key,
    value,
    segments,
    window=window,
    dropout_keys=dropout_keys,
    dropout_rate=dropout_rate,
    site=site,
  )


def choose_backend(
  wanted: str,
  *,
  platform: str,
  length: int,
  head_size: int,
  dtype: str,
  local: bool,
  drops: bool,
) -> str:
  """Returns the backend to take: the one that is wanted, or the best one.

  Raises:
    InputError: The backend that is wanted by name can't be taken.
  """
  obstacles = {
    "xla": None,
    "splash": _splash_obstacle(platform, length, drops),
    "cudnn": _cudnn_obstacle(platform, length, head_size, dtype, drops),
  }
  if wanted == "auto":
    if obstacles["splash"] is None:
      return "splash"
    # cuDNN has no window to both sides: it would do all the work of a global
    # layer under a mask.
    return "xla" if obstacles["cudnn"] or local else "cudnn"
  if obstacles[wanted] is not None:
    raise InputError(
      f"model.attention={wanted}: {obstacles[wanted]}; take auto or xla"
    )
  return wanted


def _splash_obstacle(platform: str, length: int, drops: bool) -> str | None:
  if platform != "tpu":
    return f"it runs on a TPU, and this is a {platform}"
  if length < SPLASH_MIN_LENGTH:
    return f"rows of {length} tokens are shorter than {SPLASH_MIN_LENGTH}"
  return _dropout_obstacle(drops)


def _cudnn_obstacle(
  platform: str, length: int, head_size: int, dtype: str, drops: bool
) -> str | None:
  if platform != "gpu":
    return f"it runs on NVIDIA's GPUs, and this is a {platform}"
  if dtype not in CUDNN_DTYPES:
    return f"it can't compute in {dtype}; set train.dtype=bfloat16"
  if length % 2:
    return f"it has no gradient for rows of an odd length ({length} tokens)"
  if head_size % 8 or head_size > CUDNN_MAX_HEAD:
    return (
      f"heads of {head_size} (model.width / model.heads) aren't a multiple of 8"
      f" up to {CUDNN_MAX_HEAD}"
    )
  return _dropout_obstacle(drops)


def _dropout_obstacle(drops: bool) -> str | None:
  if not drops:
    return None
  return "it has no dropout; set model.attention_dropout=0"


def xla(
  query: Float[Array, "B L H K"],
  key: Float[Array, "B L H K"],
  value: Float[Array, "B L H K"],
  segments: Int[Array, "B L"],
  *,
  window: int | None = None,
  dropout_keys: Key[Array, " B"] | None = None,
  dropout_rate: float = 0.0,
  site: int | Int[Array, ""] = 0,
) -> Float[Array, "B L H K"]:
  """`attend` in plain JAX, which runs everywhere.

  With a window, the row is cut into blocks as long as the window, and each sees
  itself, the block before and the block after: O(L · window) work. Rows of up
  to three blocks are one block.
  """
  B, L, H, K = query.shape
  size = L if window is None else max(window, MIN_BLOCK)
  if 3 * size >= L:
    size = L

  def own(x: Array, fill: int = 0) -> Array:
    """Cuts the row into blocks: [B L ...] -> [B n S ...]."""
    end = -L % size
    x = jnp.pad(x, _edges(x, 1, 0, end), constant_values=fill)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])

  def around(x: Array, fill: int = 0) -> Array:
    """The blocks that each block sees: [B L ...] -> [B n 3S ...]."""
    x = own(x, fill)
    n = x.shape[1]
    if n == 1:
      return x
    x = jnp.pad(x, _edges(x, 1, 1, 1), constant_values=fill)
    return jnp.concatenate([x[:, i : i + n] for i in range(3)], axis=2)

  scores = jnp.einsum(
    "bnlhk,bnmhk->bnhlm",
    own(query * jnp.asarray(K**-0.5, query.dtype)),
    around(key),
    preferred_element_type=jnp.float32,
  )
  seen = _same(own(segments, NOWHERE), around(segments, NOWHERE))
  if window is not None:
    place = jnp.arange(L)[None]
    seen &= _distance(own(place), around(place)) <= window
  scores = jnp.where(seen[:, :, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  weights = dropout(weights, dropout_keys, dropout_rate, site)
  mixed = jnp.einsum("bnhlm,bnmhk->bnlhk", weights, around(value))
  return mixed.reshape(B, -1, H, K)[:, :L]


def splash(
  query: Float[Array, "B L H K"],
  key: Float[Array, "B L H K"],
  value: Float[Array, "B L H K"],
  segments: Int[Array, "B L"],
  *,
  window: int | None = None,
  interpret: bool = False,
) -> Float[Array, "B L H K"]:
  """`attend` as a TPU kernel that never writes the scores to memory.

  Under a mesh each device runs it on its own rows and heads: the heads are
  split over the axis `tensor`, the rows over the others. `interpret` runs the
  kernel on any platform, slowly.
  """
  mesh = jax.sharding.get_abstract_mesh()
  free = [
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == AxisType.Auto
  ]

  def run(
    query: Array, key: Array, value: Array, segments: Array
  ) -> Float[Array, "B L H K"]:
    L, H, K = query.shape[1:]
    # The kernel wants whole blocks of 128; what is added sees itself only.
    end = -L % SPLASH_LANES
    length = L + end
    heads_first = [
      jnp.pad(x, _edges(x, 1, 0, end)).swapaxes(1, 2)
      for x in (query * jnp.asarray(K**-0.5, query.dtype), key, value)
    ]
    ids = jnp.pad(segments, _edges(segments, 1, 0, end), constant_values=-1)
    kernel = _splash_kernel(length, H, window, interpret)
    mixed = jax.vmap(kernel)(*heads_first, ids)
    return mixed.swapaxes(1, 2)[:, :L].astype(value.dtype)

  if not free:
    return run(query, key, value, segments)
  rows = tuple(name for name in free if name != "tensor")
  heads = "tensor" if "tensor" in free else None
  place = P(rows, None, heads, None)
  return jax.shard_map(
    run,
    in_specs=(place, place, place, P(rows, None)),
    out_specs=place,
    axis_names=set(free),
    check_vma=False,
  )(query, key, value, segments)


def _splash_kernel(
  length: int, heads: int, window: int | None, interpret: bool
) -> Callable[..., Array]:
  """Returns `(q, k, v, segments) -> mixed` of one row, [H L K] and [L]."""
  # Half a second to import, and only TPUs need it.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash_kernel,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
  )

  shape = (length, length)
  mask = (
    splash_mask.FullMask(shape)
    if window is None
    else splash_mask.LocalMask(shape, (window, window), 0)
  )
  block = math.gcd(length, SPLASH_BLOCK)
  layout = splash_kernel.QKVLayout.SEQ_MINOR
  kernel = splash_kernel.make_splash_mha(
    splash_mask.MultiHeadMask([mask] * heads),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
    block_sizes=splash_kernel.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      use_fused_bwd_kernel=True,
      q_layout=layout,
      k_layout=layout,
      v_layout=layout,
    ),
  )

  def run(query: Array, key: Array, value: Array, segments: Array) -> Array:
    ids = splash_kernel.SegmentIds(q=segments, kv=segments)
    return kernel(query, key, value, ids)

  return run


def cudnn(
  query: Float[Array, "B L H K"],
  key: Float[Array, "B L H K"],
  value: Float[Array, "B L H K"],
  segments: Int[Array, "B L"],
  *,
  window: int | None = None,
) -> Float[Array, "B L H K"]:
  """`attend` by cuDNN's fused kernel on a GPU.

  Who sees whom is a mask [B 1 L L], for cuDNN has no segments, and no window
  that looks ahead.
  """
  seen = _same(segments, segments)
  if window is not None:
    place = jnp.arange(query.shape[1])
    seen &= _distance(place, place) <= window
  return jax.nn.dot_product_attention(
    query, key, value, mask=seen[:, None], implementation="cudnn"
  )


def _same(
  a: Int[Array, "... L"], b: Int[Array, "... M"]
) -> Bool[Array, "... L M"]:
  return a[..., :, None] == b[..., None, :]


def _distance(
  a: Int[Array, "... L"], b: Int[Array, "... M"]
) -> Int[Array, "... L M"]:
  return jnp.abs(a[..., :, None] - b[..., None, :])


def _edges(
  x: Array, axis: int, before: int, after: int
) -> list[tuple[int, int]]:
  """Widths of a padding along one axis, for `jnp.pad`."""
  return [(before, after) if i == axis else (0, 0) for i in range(x.ndim)]
