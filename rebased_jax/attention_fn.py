"""The attention operator as an `attention_fn` of Flax's attention layers.

    layer = nnx.MultiHeadAttention(
      num_heads=4,
      in_features=64,
      decode=False,
      attention_fn=polynomial_attention_fn,
      rngs=rngs,
    )

`functools.partial(polynomial_attention_fn, coefficients=BASED)` has the
similarity of Based. With `normalize_qk=True` the layer normalises queries and
keys, as ReBased does. For decoding, packed documents and meshes take the mixer
`ReBased` instead.
"""

from flax import nnx
from jax import Array
import jax.numpy as jnp

from pallas_kernels import REBASED, Coefficients, polynomial_attention
from rebased_jax.config_checks import DType, Precision


def polynomial_attention_fn(
  query: Array,
  key: Array,
  value: Array,
  bias: Array | None = None,
  mask: Array | None = None,
  broadcast_dropout: bool = True,
  dropout_rng: Array | None = None,
  dropout_rate: float = 0.0,
  deterministic: bool = False,
  dtype: DType | None = None,
  precision: Precision | None = None,
  module: nnx.Module | None = None,
  is_causal: bool = True,
  *,
  coefficients: Coefficients = REBASED,
  scale: float | None = None,
  eps: float = 1e-6,
  implementation: str | None = None,
) -> Array:
  """Return causal polynomial attention, called as `nnx.dot_product_attention`.

  It is linear in T, and always causal. What the operator cannot do is refused.

  Args:
    query: (B, T, H, F).
    key: (B, T, H, F).
    value: (B, T, H, P).
    bias: must be None: there is no matrix of weights to add it to.
    mask: must be None, for the same reason.
    broadcast_dropout: without meaning, because weights are not dropped.
    dropout_rng: without meaning.
    dropout_rate: must be 0, unless `deterministic`.
    deterministic: whether nothing is dropped.
    dtype: query, key and value are cast to it. None: to the widest of theirs.
    precision: without meaning: float32 products have the highest precision.
    module: must be None: there are no weights to sow.
    is_causal: without meaning: attention is causal either way.
    coefficients: of the similarity, as `polynomial_attention` takes them.
    scale: of q·k. None: F^(−1/2).
    eps: added to the denominator.
    implementation: as `polynomial_attention` takes it.

  Returns:
    (B, T, H, P), in the dtype of the cast arguments.

  Raises:
    NotImplementedError: there is a bias, a mask, dropout or a module.
    ValueError: an array has a wrong shape, or the lengths differ.
  """
  del broadcast_dropout, dropout_rng, precision, is_causal
  _refuse(
    bias=(bias, "it has no scores to add a bias to"),
    mask=(
      mask,
      "it is causal by itself, and knows no other mask; for padding at the end "
      "of a row none is needed, for packed documents take the mixer ReBased "
      "with segment_ids, for decoding its prefill and step",
    ),
    module=(module, "it has no weights to sow; leave sow_weights=False"),
    dropout_rate=(
      None if deterministic or dropout_rate == 0 else dropout_rate,
      "it has no weights to drop; set dropout_rate=0, and drop the output",
    ),
  )
  for name, x in (("query", query), ("key", key), ("value", value)):
    if jnp.ndim(x) != 4:
      raise ValueError(
        f"polynomial_attention_fn: {name} has shape {jnp.shape(x)}: expected "
        "(B, T, heads, features), of inputs (B, T, D)"
      )
  if dtype is None:
    dtype = jnp.result_type(query, key, value)
  return polynomial_attention(
    query.astype(dtype),
    key.astype(dtype),
    value.astype(dtype),
    coefficients=coefficients,
    scale=scale,
    eps=eps,
    implementation=implementation,
  )


def _refuse(**arguments: tuple[object, str]) -> None:
  """Refuse each argument that is not None, with the reason beside it."""
  for name, (value, reason) in arguments.items():
    if value is not None:
      shape = getattr(value, "shape", None)
      shown = f"={value!r}" if isinstance(value, float) else ""
      shown = shown if shape is None else f" of shape {shape}"
      raise NotImplementedError(
        f"polynomial_attention_fn with {name}{shown}: {reason}"
      )
