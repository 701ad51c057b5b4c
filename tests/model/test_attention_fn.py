"""Tests of the operator inside Flax's attention layers."""

import functools

from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BASED, polynomial_attention
from rebased_jax import polynomial_attention_fn

B, T, D, H = 2, 5, 8, 2
X_BTD = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


def layer(**options) -> nnx.MultiHeadAttention:
  given = dict(attention_fn=polynomial_attention_fn, decode=False, **options)
  return nnx.MultiHeadAttention(H, D, **given, rngs=nnx.Rngs(0))


def test_a_layer_of_flax_computes_the_operator() -> None:
  based = functools.partial(polynomial_attention_fn, coefficients=BASED)
  mha = layer(dropout_rate=0.1, deterministic=True)
  mha.attention_fn = based
  found_BTD = mha(X_BTD)
  q, k, v = (p(X_BTD) for p in (mha.query, mha.key, mha.value))
  o_BTHF = polynomial_attention(q, k, v, coefficients=BASED)
  wanted_BTD = mha.out(o_BTHF)
  np.testing.assert_array_equal(found_BTD, wanted_BTD)
  with pytest.raises(
    NotImplementedError, match="with dropout_rate=0.1: it has no"
  ):
    mha(X_BTD, deterministic=False)
  with pytest.raises(
    NotImplementedError, match=r"with mask of shape \(.*\): it is causal"
  ):
    mha(X_BTD, mask=nnx.make_causal_mask(jnp.ones((B, T))))
  with pytest.raises(NotImplementedError, match="with module: .* sow_weights"):
    mha(X_BTD, sow_weights=True)
  with pytest.raises(ValueError, match=r"query has shape \(2, 1, 5, 2, 4\)"):
    mha(X_BTD[:, None])


def test_a_layer_of_linen_takes_it_too() -> None:
  mha = linen.MultiHeadDotProductAttention(
    H, attention_fn=polynomial_attention_fn, dtype=jnp.bfloat16
  )
  out = jax.eval_shape(mha.init_with_output, jax.random.key(0), X_BTD)[0]
  assert (out.shape, out.dtype) == ((B, T, D), jnp.bfloat16)


def test_the_dtype_is_that_of_flax() -> None:
  call = polynomial_attention_fn
  shape = B, T, H, 4
  wide, narrow = jnp.zeros(shape), jnp.zeros(shape, jnp.bfloat16)
  with jax.numpy_dtype_promotion("standard"):
    assert jax.eval_shape(call, narrow, narrow, wide).dtype == jnp.float32
  with_dtype = functools.partial(call, dtype="bfloat16")
  assert jax.eval_shape(with_dtype, wide, wide, wide).dtype == jnp.bfloat16
  with pytest.raises(
    NotImplementedError, match="with bias of shape .* it has no scores"
  ):
    call(wide, wide, wide, wide)
