"""Prediction heads; each has a parameter tree of its own."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flaxmlm.models.layers import ACTIVATIONS, Dtype, dense, layer_norm
from flaxmlm.models.vocabulary import score


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


class PairHead(nn.Module):
  """Classes of a pair, by a linear layer on one vector a row.

  Devlin et al., 2018, section 3.1, Task 2.
  """

  classes: int
  stddev: float
  dtype: Dtype

  @nn.compact
  def __call__(self, pooled: Float[Array, "B D"]) -> Float[Array, "B C"]:
    """Returns logits."""
    return dense(self.classes, self.stddev, self.dtype, name="dense")(pooled)


class DiscriminatorHead(nn.Module):
  """ELECTRA's: one number a token, above 0 where it seems a replaced one.

  google-research/electra, `_get_discriminator_output`.
  """

  stddev: float
  dtype: Dtype
  activation: str

  @nn.compact
  def __call__(self, hidden: Float[Array, "T D"]) -> Float[Array, " T"]:
    """Returns the logit of each token."""
    width = hidden.shape[-1]
    x = dense(width, self.stddev, self.dtype, name="dense")(hidden)
    x = ACTIVATIONS[self.activation](x)
    return dense(1, self.stddev, self.dtype, name="prediction")(x)[:, 0]


class SpanBoundaryHead(nn.Module):
  """SpanBERT's: a token of a span from the two tokens that stand around it.

  Joshi et al., 2019, section 3.2: two layers with GELU and LayerNorm, positions
  within the span of width 200, the decoder tied to the embeddings. A token
  farther into its span than `LONGEST` has the last position.
  """

  vocab_size: int
  eps: float
  stddev: float
  dtype: Dtype

  LONGEST = 32
  POSITION_WIDTH = 200

  @nn.compact
  def __call__(
    self,
    left: Float[Array, "T D"],
    right: Float[Array, "T D"],
    places: Int[Array, " T"],
    table: Float[Array, "V E"],
  ) -> Float[Array, "T V"]:
    """Returns logits; `places` are counted from 0 within the span."""
    init = nn.initializers.truncated_normal(self.stddev)
    positions = nn.Embed(
      self.LONGEST, self.POSITION_WIDTH, embedding_init=init, name="position"
    )(jnp.minimum(places, self.LONGEST - 1))
    x = jnp.concatenate([left, right, positions.astype(left.dtype)], axis=-1)
    for number, width in enumerate((left.shape[-1], table.shape[1])):
      linear = dense(width, self.stddev, self.dtype, name=f"dense_{number}")
      norm = layer_norm(self.eps, self.dtype, name=f"norm_{number}")
      x = norm(ACTIVATIONS["gelu"](linear(x)))
    bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,))
    return score(x, table, bias)


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
    return score(x, table, bias)
