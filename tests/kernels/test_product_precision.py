"""Products of float32 arrays keep float32's bits on every device.

A TPU rounds the operands of a product to bfloat16, and a GPU to tf32, unless
the program asks for the highest precision.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.polynomial.tpu import products
from pallas_kernels.polynomial.tpu.call import Call

B, T, H, F, P = 1, 70, 2, 4, 3


def shape(*sizes, dtype="float32"):
  return jax.ShapeDtypeStruct(sizes, dtype)


QKV = [shape(B, T, H, n) for n in (F, F, P)]
STATE = jax.eval_shape(lambda: pk.zero_state(B, H, F, P))


def attention(q, k, v, state):
  return pk.polynomial_attention(
    q, k, v, initial_state=state, return_state=True
  )


def reference(q, k, v, state):
  return pk.polynomial_attention(
    q, k, v, initial_state=state, implementation="reference"
  )


def step(q, k, v, state):
  return pk.polynomial_attention_step(state, q[:, 0], k[:, 0], v[:, 0])


def at(q, k, v, state):
  del state
  positions = jnp.zeros((B, T), jnp.int32)
  return pk.polynomial_attention_at(q, k, v, positions)


def weights(q, k, v, state):
  del v, state
  return pk.polynomial_attention_weights(q, k)


@pytest.mark.parametrize("call", [attention, reference, step, at, weights])
def test_float32_products_have_the_highest_precision(call):
  def with_gradients(*arrays):
    outputs, pull = jax.vjp(call, *arrays)
    return outputs, pull(outputs)

  for function in (call, with_gradients):
    text = jax.jit(function).lower(*QKV, STATE).as_text()
    found = re.findall(r"stablehlo\.dot_general.*", text)
    assert found
    for product in found:
      assert "precision = [HIGHEST, HIGHEST]" in product, product


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_products_of_a_loss_have_the_precision_asked_for(parts, gradient):
  def loss(x, embedding):
    targets = jnp.zeros((B, T), jnp.int32)
    return pk.cross_entropy(
      x, embedding, targets, parts=parts, precision="highest"
    )[0]

  run = jax.grad(loss, argnums=(0, 1)) if gradient else loss
  text = jax.jit(run).lower(shape(B, T, F), shape(9, F)).as_text()
  found = re.findall(r"stablehlo\.dot_general.*", text)
  assert len(found) == (3 if gradient else 1)
  for product in found:
    assert "precision = [HIGHEST, HIGHEST]" in product, product


@pytest.mark.parametrize("over", ["left", "right"])
def test_exact_sums_of_a_tpu_keep_all_bits_of_float32(over):
  """One operand is split into three bfloat16 numbers of 8 bits each."""
  call = Call(
    **dict.fromkeys(("B", "T", "H", "F", "P", "heads"), 1),
    **dict.fromkeys(("chunk", "span", "block"), 16),
    dtype="bfloat16",
    **dict(c1=0.0, c0=0.0, eps=0.0, affine=False, documents=False),
  )
  rng = np.random.default_rng(0)
  a = rng.normal(size=(8, 16)).astype(np.float32)
  b = rng.normal(size=(16, 16)).astype(jnp.bfloat16)
  b_left, dot = (
    (b, products.dot_exact_left)
    if over == "left"
    else (b.T, products.dot_exact_right)
  )
  found = np.float64(dot(jnp.asarray(a), jnp.asarray(b_left), call))
  wanted = np.float64(a) @ np.float64(b)
  # Float32 sums of 48 products. Without the third part it would be 2⁻¹⁶.
  assert np.abs(found - wanted).max() <= 2**-20 * np.abs(wanted).max()
