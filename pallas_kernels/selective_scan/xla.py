"""The scan of Mamba (arXiv 2312.00752), in chunks.

    h_t = exp(Δ_t A) ∘ h_{t−1} + (Δ_t ∘ x_t) B_tᵀ,   y_t = h_t C_t

A chunk's states come from an associative scan over (decay, drive) pairs,

    (a₁, b₁) then (a₂, b₂)  =  (a₂ ∘ a₁, a₂ ∘ b₁ + b₂)

and one state a chunk is kept. The backward computes each chunk again, so that
no array of all tokens' states is ever held. Nothing is divided and no exponent
is positive: any Δ ≥ 0 is safe.
"""

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import document_runs
from pallas_kernels.sharding import vary_alike

# C, the tokens that are scanned at once. Larger ones take more levels of the
# scan; with few rows they save steps that leave a device idle.
CHUNK, LONGEST, TOKENS = 32, 256, 1024


def selective_scan(
  x_BTI: Array,
  delta_BTI: Array,
  A_IN: Array,
  B_BTN: Array,
  C_BTN: Array,
  h_BIN: Array,
  *,
  segment_ids: Array | None = None,
  chunk: int | None = None,
) -> tuple[Array, Array]:
  """y_BTI, and h_BIN after the last token; all of one dtype.

  Args:
    x_BTI: the input.
    delta_BTI: Δ ≥ 0, the step of each channel.
    A_IN: ≤ 0.
    B_BTN: what writes into the states.
    C_BTN: what reads them.
    h_BIN: the state before the first token, of its document.
    segment_ids: integers (B, T); a document is a run of one id.
    chunk: tokens of a row that are scanned at once, at most; None: by the
      number of rows, so that the states held stay as many.
  """
  B, T, _ = x_BTI.shape
  if chunk is None:
    chunk = min(max(TOKENS // B, CHUNK), LONGEST)
  count = -(-T // chunk)
  size = -(-T // count)

  def chunks(x_BT):
    """(chunks, C, B, …); the tail has Δ = 0, which changes no state."""
    x_TB = jnp.moveaxis(x_BT, 1, 0)
    pad = [(0, count * size - T)] + [(0, 0)] * (x_TB.ndim - 1)
    return jnp.pad(x_TB, pad).reshape(count, size, *x_TB.shape[1:])

  starts_BT = None
  if segment_ids is not None:
    # Whether a token starts a document, and so forgets the one before.
    starts_BT = jnp.diff(document_runs(segment_ids), axis=1, prepend=0) != 0
  arrays = (x_BTI, delta_BTI, B_BTN, C_BTN, starts_BT)

  @jax.checkpoint
  def body(h_BIN, inputs):
    x_CBI, delta_CBI, B_CBN, C_CBN, starts_CB = inputs
    decay_CBIN = jnp.exp(delta_CBI[..., None] * A_IN[None, None])
    drive_CBIN = (delta_CBI * x_CBI)[..., None] * B_CBN[:, :, None]
    h_CBIN = _states(decay_CBIN, drive_CBIN, h_BIN, starts_CB)
    return h_CBIN[-1], (h_CBIN * C_CBN[:, :, None]).sum(axis=-1)

  A_IN, h_BIN, arrays = vary_alike(A_IN, h_BIN, arrays)
  h_BIN, y = jax.lax.scan(body, h_BIN, jax.tree.map(chunks, arrays))
  y_TBI = y.reshape(count * size, *y.shape[2:])[:T]
  return jnp.moveaxis(y_TBI, 0, 1), h_BIN


def _states(decay_CBIN, drive_CBIN, h_BIN, starts_CB) -> Array:
  """h after each token of a chunk, from the state before it."""
  if starts_CB is not None:
    h_BIN = jnp.where(starts_CB[0, :, None, None], 0, h_BIN)
  drive_CBIN = drive_CBIN.at[0].add(decay_CBIN[0] * h_BIN)
  return recurrence(decay_CBIN, drive_CBIN, starts_CB)


@jax.custom_vjp
def recurrence(a_CBIN: Array, b_CBIN: Array, starts_CB: Array | None) -> Array:
  """h_t = a_t ∘ h_{t−1} + b_t from h = 0; a start forgets h_{t−1}, NaN too."""
  return _scan(a_CBIN, b_CBIN, starts_CB)


def _scan(a_CBIN, b_CBIN, starts_CB, *, reverse: bool = False) -> Array:
  if starts_CB is None:
    join = lambda old, new: (new[0] * old[0], new[0] * old[1] + new[1])
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


def _forward(a_CBIN, b_CBIN, starts_CB):
  h_CBIN = _scan(a_CBIN, b_CBIN, starts_CB)
  return h_CBIN, (a_CBIN, h_CBIN, starts_CB)


def _backward(kept, dh_CBIN):
  """db_t = dh_t + a_{t+1} ∘ db_{t+1} and da_t = db_t ∘ h_{t−1}."""
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


recurrence.defvjp(_forward, _backward)
