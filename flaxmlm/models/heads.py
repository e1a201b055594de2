"""Prediction heads; each has a parameter tree of its own."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxmlm.models.layers import Dtype, dense, gelu, layer_norm


class MaskedLanguageModelHead(nn.Module):
  """BERT's MLM head: transform, GELU, LayerNorm, tied decoder and bias."""

  vocab_size: int
  eps: float
  stddev: float
  dtype: Dtype

  @nn.compact
  def __call__(
    self, hidden: Float[Array, "T D"], table: Float[Array, "V D"]
  ) -> Float[Array, "T V"]:
    """Returns logits; `table` is the word embedding, tied to the decoder."""
    width = hidden.shape[-1]
    x = gelu(dense(width, self.stddev, self.dtype, name="transform")(hidden))
    x = layer_norm(self.eps, self.dtype, name="norm")(x)
    bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,))
    return jnp.einsum("td,vd->tv", x, table.astype(x.dtype)) + bias.astype(
      x.dtype
    )
