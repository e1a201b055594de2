"""Prediction heads; each has a parameter tree of its own."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxmlm.models.layers import ACTIVATIONS, Dtype, dense, layer_norm


class Pooler(nn.Module):
  """BERT's pooler: a linear layer and tanh on the first token.

  Devlin et al., 2018, section 3.1, Task 2: what next-sentence prediction and
  classification of a text look at.
  """

  stddev: float
  dtype: Dtype

  @nn.compact
  def __call__(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B D"]:
    """Returns one vector a row."""
    linear = dense(hidden.shape[-1], self.stddev, self.dtype, name="dense")
    return jnp.tanh(linear(hidden[:, 0]))


class MaskedLanguageModelHead(nn.Module):
  """BERT's MLM head: transform, activation, LayerNorm, decoder and bias.

  The transform is as wide as the embeddings (ALBERT's and ELECTRA's are
  narrower than the hidden states), which the decoder is tied to, unless it is a
  matrix of its own.
  """

  vocab_size: int
  eps: float
  stddev: float
  dtype: Dtype
  activation: str = "gelu"
  transform_bias: bool = True
  norm_bias: bool = True
  tied: bool = True

  @nn.compact
  def __call__(
    self, hidden: Float[Array, "T D"], table: Float[Array, "V E"]
  ) -> Float[Array, "T V"]:
    """Returns logits; `table` is the word embedding, tied to the decoder."""
    transform = dense(
      table.shape[1],
      self.stddev,
      self.dtype,
      use_bias=self.transform_bias,
      name="transform",
    )
    x = ACTIVATIONS[self.activation](transform(hidden))
    x = layer_norm(self.eps, self.dtype, use_bias=self.norm_bias, name="norm")(
      x
    )
    bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,))
    if not self.tied:
      init = nn.initializers.truncated_normal(self.stddev)
      table = self.param("decoder", init, table.shape)
    return jnp.einsum("td,vd->tv", x, table.astype(x.dtype)) + bias.astype(
      x.dtype
    )
