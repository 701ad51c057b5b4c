"""Mamba's scan in XLA, in chunks, and its derivative.

A chunk's states come from an associative scan over pairs (decay, drive),

    (a₁, b₁) then (a₂, b₂)  =  (a₂ ∘ a₁, a₂ ∘ b₁ + b₂)

and one state a chunk is kept. The backward computes each chunk's states again,
so that no array of all tokens' states is ever held. No term is divided and no
exponent is positive, so that any Δ ≥ 0 is safe.
"""

from typing import Any

import jax
from jax import Array
import jax.export
import jax.numpy as jnp

from pallas_kernels.compile_once import compiled_backward
from pallas_kernels.plain_derivatives import OwnDerivative
from pallas_kernels.sharding import vary_alike

# A chunk has C = TOKENS / B tokens, at least CHUNK and at most LONGEST. Longer
# chunks take more levels of the associative scan. With few rows they save steps
# that leave a device idle.
CHUNK = 32
LONGEST = 256
TOKENS = 1024


def chunk_tokens(rows: int) -> int:
  """Return the most tokens that are scanned at once, for so many rows."""
  # `jax.export` may leave the number of rows open.
  is_open = jax.export.is_symbolic_dim(rows)
  return CHUNK if is_open else min(max(TOKENS // rows, CHUNK), LONGEST)


def scan_chunks(
  chunk: int,
  x_BTI: Array,
  delta_BTI: Array,
  A_IN: Array,
  B_BTN: Array,
  C_BTN: Array,
  h_BIN: Array,
  starts_BT: Array | None,
) -> tuple[Array, Array]:
  """Return y and the last state, chunk by chunk.

  Args:
    chunk: the most tokens that are scanned at once.
    x_BTI: the input.
    delta_BTI: the steps Δ.
    A_IN: the rates.
    B_BTN: what writes into the states.
    C_BTN: what reads them.
    h_BIN: the state before the row.
    starts_BT: whether each token starts a document, and so forgets the one
      before; None: a row is one document.
  """
  T = x_BTI.shape[1]
  count = -(-T // chunk)
  # `jax.export` may leave the number of tokens open.
  size = chunk if jax.export.is_symbolic_dim(T) else -(-T // count)

  def chunks(x_BT):
    """Return (chunks, C, B, …); the padding has Δ = 0: no state changes."""
    x_TB = jnp.moveaxis(x_BT, 1, 0)
    pad = [(0, count * size - T)] + [(0, 0)] * (x_TB.ndim - 1)
    return jnp.pad(x_TB, pad).reshape(count, size, *x_TB.shape[1:])

  arrays = (x_BTI, delta_BTI, B_BTN, C_BTN, starts_BT)

  A_IN, h_BIN, arrays = vary_alike(A_IN, h_BIN, arrays)
  h_BIN, y = _over_chunks(A_IN, h_BIN, jax.tree.map(chunks, arrays))
  y_TBI = y.reshape(count * size, *y.shape[2:])[:T]
  return jnp.moveaxis(y_TBI, 0, 1), h_BIN


@OwnDerivative
def _over_chunks(A_IN: Array, h_BIN: Array, inputs: Any) -> tuple[Array, Array]:
  """Return h after the last chunk, and y of all chunks.

  Args:
    A_IN: decays.
    h_BIN: the state before the first chunk.
    inputs: x, Δ, B, C and starts of each chunk; starts may be None.
  """

  def body(h_BIN, chunk):
    return _one_chunk(A_IN, h_BIN, chunk)

  return jax.lax.scan(body, h_BIN, inputs)


def _over_chunks_forward(A_IN, h_BIN, inputs):
  def body(h_BIN, chunk):
    after_BIN, y_CBI = _one_chunk(A_IN, h_BIN, chunk)
    return after_BIN, (y_CBI, h_BIN)

  after_BIN, (y, before) = jax.lax.scan(body, h_BIN, inputs)
  return (after_BIN, y), (A_IN, before, inputs)


def _over_chunks_backward(kept, cotangents):
  A_IN, before, (*floats, starts) = kept
  dh_BIN, dy = cotangents

  def body(carry, chunk):
    dh_BIN, dA_IN = carry
    h_BIN, floats, starts_CB, dy_CBI = chunk
    run = lambda A_IN, h_BIN, floats: _one_chunk(
      A_IN, h_BIN, (*floats, starts_CB)
    )
    more_IN, dh_BIN, grads = jax.vjp(run, A_IN, h_BIN, floats)[1](
      (dh_BIN, dy_CBI)
    )
    return (dh_BIN, dA_IN + more_IN), grads

  zero_IN, _ = vary_alike(jnp.zeros_like(A_IN), A_IN)
  (dh_BIN, dA_IN), grads = jax.lax.scan(
    body, (dh_BIN, zero_IN), (before, floats, starts, dy), reverse=True
  )
  return dA_IN, dh_BIN, (*grads, None)


_over_chunks.defvjp(
  _over_chunks_forward, compiled_backward(_over_chunks_backward)
)


def _one_chunk(A_IN, h_BIN, chunk):
  """Return h after a chunk, from h before it, and y of the chunk."""
  x_CBI, delta_CBI, B_CBN, C_CBN, starts_CB = chunk
  decay_CBIN = jnp.exp(delta_CBI[..., None] * A_IN[None, None])
  drive_CBIN = (delta_CBI * x_CBI)[..., None] * B_CBN[:, :, None]
  h_CBIN = _states(decay_CBIN, drive_CBIN, h_BIN, starts_CB)
  return h_CBIN[-1], (h_CBIN * C_CBN[:, :, None]).sum(axis=-1)


def _states(decay_CBIN, drive_CBIN, h_BIN, starts_CB) -> Array:
  """Return h after each token of a chunk, from the state before the chunk."""
  if starts_CB is not None:
    h_BIN = jnp.where(starts_CB[0, :, None, None], 0, h_BIN)
  drive_CBIN = drive_CBIN.at[0].add(decay_CBIN[0] * h_BIN)
  return _recurrence(decay_CBIN, drive_CBIN, starts_CB)


@OwnDerivative
def _recurrence(a_CBIN: Array, b_CBIN: Array, starts_CB: Array | None) -> Array:
  """Return h_t = a_t ∘ h_{t−1} + b_t from h = 0.

  A token that starts a document forgets h_{t−1}, also where it is NaN.
  """
  return _scan(a_CBIN, b_CBIN, starts_CB)


def _forward(a_CBIN, b_CBIN, starts_CB):
  h_CBIN = _scan(a_CBIN, b_CBIN, starts_CB)
  return h_CBIN, (a_CBIN, h_CBIN, starts_CB)


def _backward(kept, dh_CBIN):
  """Return da and db: db_t = dh_t + a_{t+1} ∘ db_{t+1}, da_t = db_t ∘ h_{t−1}.

  The first is the same recurrence from the right.
  """
  a_CBIN, h_CBIN, starts_CB = kept
  later = lambda x: jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])
  after_CBIN, stops_CB = later(a_CBIN), None
  before_CBIN = jnp.concatenate([jnp.zeros_like(h_CBIN[:1]), h_CBIN[:-1]])
  if starts_CB is not None:
    stops_CB = later(starts_CB)
    after_CBIN = jnp.where(stops_CB[..., None, None], 0, after_CBIN)
    before_CBIN = jnp.where(starts_CB[..., None, None], 0, before_CBIN)
  db_CBIN = _scan(after_CBIN, dh_CBIN, stops_CB, reverse=True)
  return db_CBIN * before_CBIN, db_CBIN, None


_recurrence.defvjp(_forward, _backward)


def _scan(a_CBIN, b_CBIN, starts_CB, *, reverse: bool = False) -> Array:
  """Return `_recurrence` by an associative scan; from the right if reverse."""
  if starts_CB is None:

    def join(old, new):
      (a_old, b_old), (a_new, b_new) = old, new
      return a_new * a_old, a_new * b_old + b_new

    pairs = (a_CBIN, b_CBIN)
    return jax.lax.associative_scan(join, pairs, reverse=reverse)[1]

  def join_documents(old, new):
    (a_old, b_old, starts_old), (a_new, b_new, starts_new) = old, new
    keep = lambda x: jnp.where(starts_new, 0, x)
    return (
      a_new * keep(a_old),
      a_new * keep(b_old) + b_new,
      starts_old | starts_new,
    )

  triples = (a_CBIN, b_CBIN, starts_CB[..., None, None])
  return jax.lax.associative_scan(join_documents, triples, reverse=reverse)[1]
