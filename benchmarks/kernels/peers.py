"""Define what `run.py` times for a shape: the operator and its peers."""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import measure
from pallas_kernels.polynomial.arg_specs import ArgSpec

Sizes = tuple[int, int, int, int]
PEERS = ("gpu", "xla", "cudnn", "quadratic")
_QUADRATIC_BYTES = 24 << 30  # the most memory that a quadratic call may need
_QUADRATIC_LONGEST = 4096  # the largest T of the quadratic form


@dataclasses.dataclass(frozen=True)
class Peer:
  """One call (q, k, v) → o, and the shapes that it is timed at.

  Attributes:
    call: the function.
    qk: the shape of q and of k.
    v: the shape of v.
    checked: whether it computes the same function as the operator.
    note: what a reader of its times must know; "" if nothing.
  """

  call: Callable
  qk: Sizes
  v: Sizes
  checked: bool = True
  note: str = ""

  def shapes(self) -> list[Sizes]:
    """Return the shapes of q, k, v and do."""
    return [self.qk, self.qk, self.v, self.v]


def peer(name: str, spec: ArgSpec) -> Peer | str:
  """Return the peer of this name, or the reason why it is not timed."""
  qk = (spec.B, spec.T, spec.H, spec.F)
  v = (spec.B, spec.T, spec.H, spec.P)
  if name in ("gpu", "xla"):
    return Peer(measure.operator(spec, name), qk, v)
  if name == "cudnn":
    heads = max(1, round(spec.H * spec.P / 64))
    wide = (spec.B, spec.T, heads, 64)
    note = f"softmax, {heads} heads of 64, the model width of H · P"
    return Peer(_softmax, wide, wide, False, note)
  if spec.T > _QUADRATIC_LONGEST:
    return f"T > {_QUADRATIC_LONGEST}"
  # Scores, similarities, their gradients and XLA's temporaries: six float32
  # arrays of shape (H, T, T) for each row.
  row = 24 * spec.H * spec.T**2
  rows = min(spec.B, _QUADRATIC_BYTES // row)
  if rows == 0:
    return f"a row alone needs {row / 2**30:.0f} GiB"
  note = f"{rows} of {spec.B} rows" if rows < spec.B else ""
  call = _quadratic(spec)
  return Peer(call, (rows, *qk[1:]), (rows, *v[1:]), True, note)


def _softmax(q, k, v):
  """Compute causal softmax attention with cuDNN."""
  return jax.nn.dot_product_attention(
    q, k, v, is_causal=True, implementation="cudnn"
  )


def _quadratic(spec: ArgSpec) -> Callable:
  """Return the quadratic form for XLA: bfloat16 products, float32 sums."""
  c = spec.coefficients.scaled(spec.F**-0.5)

  def call(q, k, v):
    wide = {"preferred_element_type": jnp.float32}
    a_BHTS = jnp.einsum("bthf,bshf->bhts", q, k, **wide)
    sim_BHTS = c.c2 * a_BHTS * a_BHTS + c.c1 * a_BHTS + c.c0
    seen_TS = jnp.tril(jnp.ones(a_BHTS.shape[-2:], bool))
    sim_BHTS = jnp.where(seen_TS, sim_BHTS, 0.0)
    z_BTH1 = jnp.moveaxis(sim_BHTS.sum(-1), 1, 2)[..., None] + 1e-6
    o = jnp.einsum("bhts,bshp->bthp", sim_BHTS.astype(v.dtype), v, **wide)
    return (o / z_BTH1).astype(v.dtype)

  return call
