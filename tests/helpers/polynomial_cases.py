"""Cases of polynomial attention: their inputs, and how answers are compared."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from polynomial_oracle import REBASED, Answer, Inputs, state_of

import pallas_kernels as pk

CHUNK = 64  # the longest chunk of "xla"
COEFFICIENTS = {"rebased": pk.REBASED, "based": pk.BASED}


class Cell(NamedTuple):
  """One case: sizes, coefficients and what the call takes and returns.

  `boundaries` is that of `make_ids`; `keys` that of `make_inputs`; `state` says
  whether there is an initial state, `final` whether the state is returned.
  """

  T: int
  F: int
  P: int
  coefficients: str
  keys: str
  state: bool
  boundaries: str
  dtype: str
  final: bool

  def __str__(self):
    return "-".join(map(str, self))


def make_inputs(
  B: int,
  T: int,
  H: int,
  F: int,
  P: int,
  *,
  coefficients=REBASED,
  keys: str = "random",
  state: bool = False,
  boundaries: str = "none",
  final: bool = False,
  dtype="float32",
  seed: int = 0,
) -> Inputs:
  """Make reproducible inputs, rounded to the dtype.

  States are those of real tokens. Clustered `keys` lie near one of three long
  centres, so that similarities are large and rows of scores are alike.
  """
  rng = np.random.default_rng([seed, T, F, P])
  q, k = (_make_keys(rng, (B, T, H, F), keys) for _ in "qk")
  v, do = rng.normal(size=(2, B, T, H, P))
  acc = np.float64 if dtype == "float64" else np.float32
  before = dafter = None
  if state:
    past = _make_keys(rng, (B, 5, H, F), keys), rng.normal(size=(B, 5, H, P))
    before = tuple(map(acc, state_of(*past, coefficients)))
  if final:
    shapes = (x.shape for x in state_of(k, v, coefficients))
    dafter = tuple(acc(rng.normal(size=s) / 8) for s in shapes)
  q, k, v, do = (x.astype(jnp.dtype(dtype)) for x in (q, k, v, do))
  ids_BT = make_ids(rng, B, T, boundaries)
  return Inputs(q, k, v, ids_BT, before, do, dafter)


def make_ids(rng, B: int, T: int, boundaries: str) -> np.ndarray | None:
  """Make segment ids 0 and 1 in turn, so that most come back later in a row.

  Documents start nowhere ("none"), at about three random places of a row
  ("random"), at each chunk ("chunk") or at each token ("own").
  """
  if boundaries == "none":
    return None
  chunk = -(-T // -(-T // CHUNK))
  start_BT = {
    "random": rng.random((B, T)) < 3 / T,
    "chunk": np.broadcast_to(np.arange(T) % chunk == 0, (B, T)),
    "own": np.ones((B, T), bool),
  }[boundaries]
  return np.cumsum(start_BT, axis=1, dtype=np.int32) % 2


def _make_keys(rng, shape, keys: str) -> np.ndarray:
  if keys == "random":
    return rng.normal(size=shape)
  centres = 2 * np.random.default_rng(7).normal(size=(3, shape[-1]))
  return centres[rng.integers(3, size=shape[:-1])] + 0.1 * rng.normal(
    size=shape
  )


def attention(
  coefficients=pk.REBASED, *, implementation="xla", return_state=True, axes=None
):
  """Return (q, k, v, ids, state) → (o, state) for `value_and_gradients`.

  The state is a pair of arrays, or None; None is returned without
  `return_state`.
  """

  def call(q, k, v, ids, state):
    result = pk.polynomial_attention(
      q,
      k,
      v,
      coefficients=coefficients,
      segment_ids=ids,
      initial_state=None if state is None else pk.State(*state),
      return_state=return_state,
      axes=axes,
      implementation=implementation,
    )
    return result if return_state else (result, None)

  return call


def value_and_gradients(attention, x: Inputs) -> Answer:
  """Run (o, state) = attention(q, k, v, ids, state) and its vjp."""

  def f(q, k, v, state):
    return attention(q, k, v, x.ids_BT, state)

  (o, after), vjp = jax.vjp(f, *x[:3], x.state)
  zeros = jax.tree.map(jnp.zeros_like, after)
  dafter = zeros if x.dafter is None else type(after)(*x.dafter)
  dq, dk, dv, dstate = vjp((x.do_BTHP, dafter))
  return Answer(o, after, dq, dk, dv, dstate, {})


def errors(got: Answer, want: Answer) -> dict[str, float]:
  """Return the relative error of each output, in norm.

  It is relative to the norm of the answer, or to that of its terms before they
  cancel (`Answer.raw`) if that is larger.
  """
  pairs = {
    name: (getattr(got, name), getattr(want, name))
    for name in ("o", "dq", "dk", "dv")
  }
  for name in ("after", "dstate"):
    if getattr(got, name) is not None:
      both = getattr(got, name), getattr(want, name)
      prefix = name.removesuffix("state").removesuffix("after")
      for i, leaf in enumerate(("kv", "kk")):
        pairs[prefix + leaf] = both[0][i], both[1][i]
  found = {}
  for name, (a, b) in pairs.items():
    a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
    assert a.shape == b.shape, (name, a.shape, b.shape)
    norm = max(np.linalg.norm(b), want.raw.get(name, 0), 1e-30)
    found[name] = np.linalg.norm(a - b) / norm
  return found


def lone_error(x: Inputs) -> float:
  """Bound the relative error of float32 where a token sees itself alone.

  Its output is v · sim / (sim + eps). sim has more than twice the relative
  error of q·k, which is F roundings of |q||k|: large beside a q·k near 0.
  """
  q, k = (np.asarray(y).astype(np.float64) for y in x[:2])
  size = np.linalg.norm(q, axis=-1) * np.linalg.norm(k, axis=-1)
  worst = (size / np.abs((q * k).sum(axis=-1))).max()
  return min(2 * 2.0**-24 * q.shape[-1] ** 0.5 * worst, 1e-3)


def assert_close(a, b, tolerance=1e-5) -> None:
  """Assert ‖a − b‖ ≤ tolerance ‖b‖ for each leaf of two trees.

  The default is for float32 sums in another order.
  """
  leaves = jax.tree.leaves(a), jax.tree.leaves(b)
  chex.assert_trees_all_equal_shapes(*leaves)
  for x, y in zip(*leaves, strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)
