"""Inputs for the tests of polynomial attention, and how answers compare."""

import jax
import jax.numpy as jnp
import numpy as np
from polynomial_oracle import REBASED, Answer, Inputs, state_of

CHUNK = 64  # the longest chunk of the chunked implementation


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
  borders: str = "none",
  final: bool = False,
  dtype="float32",
  seed: int = 0,
) -> Inputs:
  """Reproducible inputs, rounded to the dtype; states of real tokens."""
  rng = np.random.default_rng([seed, T, F, P])
  q, k = (_keys(rng, (B, T, H, F), keys) for _ in "qk")
  v, do = rng.normal(size=(2, B, T, H, P))
  acc = np.float64 if dtype == "float64" else np.float32
  before = dafter = None
  if state:
    past = _keys(rng, (B, 5, H, F), keys), rng.normal(size=(B, 5, H, P))
    before = tuple(map(acc, state_of(*past, coefficients)))
  if final:
    shapes = (x.shape for x in state_of(k, v, coefficients))
    dafter = tuple(acc(rng.normal(size=s) / 8) for s in shapes)
  q, k, v, do = (x.astype(jnp.dtype(dtype)) for x in (q, k, v, do))
  ids_BT = make_ids(rng, B, T, borders)
  return Inputs(q, k, v, ids_BT, before, do, dafter)


def make_ids(rng, B: int, T: int, borders: str) -> np.ndarray | None:
  """Ids that alternate, so that most come back in a later document."""
  if borders == "none":
    return None
  chunk = -(-T // -(-T // CHUNK))
  border_BT = {
    "random": rng.random((B, T)) < 3 / T,
    "chunk": np.broadcast_to(np.arange(T) % chunk == 0, (B, T)),
    "own": np.ones((B, T), bool),
  }[borders]
  return np.cumsum(border_BT, axis=1, dtype=np.int32) % 2


def _keys(rng, shape, keys: str) -> np.ndarray:
  """Normal, or near one of three long centres: s is large, rows alike."""
  if keys == "random":
    return rng.normal(size=shape)
  centres = 2 * np.random.default_rng(7).normal(size=(3, shape[-1]))
  return centres[rng.integers(3, size=shape[:-1])] + 0.1 * rng.normal(
    size=shape
  )


def value_and_gradients(attention, x: Inputs) -> Answer:
  """(o, state) = attention(q, k, v, ids, state) and its vjp, as an Answer."""
  f = lambda q, k, v, state: attention(q, k, v, x.ids_BT, state)
  (o, after), vjp = jax.vjp(f, *x[:3], x.state)
  zeros = jax.tree.map(jnp.zeros_like, after)
  dafter = zeros if x.dafter is None else type(after)(*x.dafter)
  dq, dk, dv, dstate = vjp((x.do_BTHP, dafter))
  return Answer(o, after, dq, dk, dv, dstate, {})


def errors(got: Answer, want: Answer) -> dict:
  """Per output: the error's norm, relative to the larger of the answer's norm
  and its norm before cancellation."""
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
