"""Polynomial attention in float64 NumPy, with gradients derived by hand.

It is written from the equations alone and shares no code with the package.

    sim_ts = c0 + c1 (scale q_t·k_s) + c2 (scale q_t·k_s)²
    o_t    = Σ_s sim_ts v_s / (Σ_s sim_ts + eps)

The sums are over the s ≤ t of t's document, a run of one segment id. A state
(kv, kk) is (Σ_s φ(k_s) v_sᵀ, Σ_s k̃_s k̃_sᵀ).
"""

import itertools
from typing import NamedTuple

import numpy as np

REBASED = (0.0, 0.0, 1.0)
BASED = (1.0, 1.0, 0.5)


class Inputs(NamedTuple):
  """The inputs of a call and its cotangents, of any float dtype.

  `state` is (kv_BHEP, kk_BHGG) of token 0's document, and `dafter` the
  cotangent of the final state. An optional field is None where a call has none.
  """

  q_BTHF: np.ndarray
  k_BTHF: np.ndarray
  v_BTHP: np.ndarray
  ids_BT: np.ndarray | None
  state: tuple | None
  do_BTHP: np.ndarray
  dafter: tuple | None


class Answer(NamedTuple):
  """The output, the final state and the gradients of a call.

  `raw` has, for the name of a gradient, the norm of its terms before they
  cancel.
  """

  o: np.ndarray
  after: tuple
  dq: np.ndarray
  dk: np.ndarray
  dv: np.ndarray
  dstate: tuple | None
  raw: dict


class _Table(NamedTuple):
  """The features as products x̃_i x̃_j.

  `c` are the coefficients of sim as a polynomial in q·k, `i_E` and `j_E` the
  indices, `w_E` the weights in sim, and `w_GG` those of k̃ k̃ᵀ in Σ sim.
  """

  c: tuple
  i_E: np.ndarray
  j_E: np.ndarray
  w_E: np.ndarray
  w_GG: np.ndarray


def runs(ids_BT, B: int, T: int) -> np.ndarray:
  """Number the documents of each row, from 0."""
  runs_BT = np.zeros((B, T), int)
  if ids_BT is not None:
    for b, t in itertools.product(range(B), range(1, T)):
      runs_BT[b, t] = runs_BT[b, t - 1] + (ids_BT[b, t] != ids_BT[b, t - 1])
  return runs_BT


def table(F: int, coefficients, scale: float | None = None) -> _Table:
  """List x_i x_{i+r mod F} for r = 0 … F//2, then x, then 1, where c ≠ 0."""
  c0, c1, c2 = coefficients
  scale = F**-0.5 if scale is None else scale
  c1, c2 = c1 * scale, c2 * scale**2
  affine = c0 != 0 or c1 != 0
  entries = []  # (i, j, weight); index F is the 1 of x̃
  for r, i in itertools.product(range(F // 2 + 1), range(F)):
    once = r == 0 or 2 * r == F
    entries.append((i, (i + r) % F, c2 if once else 2 * c2))
  entries += [(i, F, c1) for i in range(F)] + [(F, F, c0)]
  i, j, w = zip(*(entry for entry in entries if entry[2] != 0), strict=True)
  w_GG = np.full((F + affine, F + affine), c2)
  if affine:
    w_GG[F], w_GG[:, F], w_GG[F, F] = c1 / 2, c1 / 2, c0
  return _Table((c0, c1, c2), np.array(i), np.array(j), np.array(w), w_GG)


def features(x: np.ndarray, tab: _Table) -> np.ndarray:
  x1 = _with_one(x, x.shape[-1] + 1)
  return x1[..., tab.i_E] * x1[..., tab.j_E]


def state_of(k_BTHF, v_BTHP, coefficients, scale=None) -> tuple:
  """Return the state (kv, kk) of all of these tokens."""
  tab = table(k_BTHF.shape[-1], coefficients, scale)
  k1_BTHG = _with_one(k_BTHF, tab.w_GG.shape[0])
  kv = np.einsum("bthe,bthp->bhep", features(k_BTHF, tab), v_BTHP)
  return kv, np.einsum("bthg,bthj->bhgj", k1_BTHG, k1_BTHG)


def oracle(x: Inputs, coefficients, *, scale=None, eps=1e-6) -> Answer:
  """Compute the values, and the gradients of Σ o·do + Σ after·dafter."""
  x = _float64(x)
  B, T, _, F = x.q_BTHF.shape
  tab = table(F, coefficients, scale)
  runs_BT = runs(x.ids_BT, B, T)
  first_B1T = (runs_BT == 0)[:, None].astype(float)
  last_B1T1 = (runs_BT == runs_BT[:, -1:])[:, None, :, None].astype(float)
  joined = (runs_BT[:, -1] == 0).astype(float)[:, None, None, None]
  q, k, v, do = (np.moveaxis(y, 2, 1) for y in (*x[:3], x.do_BTHP))

  sim, slope = _scores(q, k, runs_BT, tab)
  num, z, terms = sim @ v, sim.sum(-1), np.abs(sim) @ np.abs(v)
  if x.state is not None:
    past_num, past_z, past_terms = _query_state(q, x.state, tab)
    num = num + first_B1T[..., None] * past_num
    terms = terms + first_B1T[..., None] * past_terms
    z = z + first_B1T * past_z
  r = 1 / (z + eps)
  o = num * r[..., None]
  g, dz = do * r[..., None], -r * (do * o).sum(-1)

  # The terms of the numerator and of the denominator, stacked. They cancel
  # where the values that a query sees are alike.
  da = np.stack([slope * (g @ v.swapaxes(-1, -2)), slope * dz[..., None]])
  dq, dk = da @ k, da.swapaxes(-1, -2) @ q
  dv = sim.swapaxes(-1, -2) @ g
  dstate, raw = None, {}
  if x.state is not None:
    dq = dq + first_B1T[..., None] * _through_state(q, x.state, g, dz, tab)
    before_sum = r**2 * (np.abs(do) * terms).sum(-1)
    dstate = _d_state(q, g, dz, first_B1T, tab)
    raw["dkk"] = np.linalg.norm(_d_state(q, g, before_sum, first_B1T, tab)[1])
  if x.dafter is not None:
    past_dk, past_dv = _through_keys(k, v, x.dafter, tab)
    dk, dv = dk + last_B1T1 * past_dk, dv + last_B1T1 * past_dv
    if dstate is not None:
      pairs = zip(dstate, x.dafter, strict=True)
      dstate = tuple(d + joined * d_after for d, d_after in pairs)
  raw["dq"], raw["dk"] = (max(map(np.linalg.norm, d)) for d in (dq, dk))
  after = _after(k, v, last_B1T1, joined, x.state, tab)
  time_first = (np.moveaxis(y, 1, 2) for y in (o, dq.sum(0), dk.sum(0), dv))
  o, dq, dk, dv = time_first
  return Answer(o, after, dq, dk, dv, dstate, raw)


def _scores(q, k, runs_BT, tab) -> tuple:
  """Return sim_ts and its derivative with respect to q_t·k_s."""
  T = q.shape[-2]
  seen_BTT = (runs_BT[:, :, None] == runs_BT[:, None]) & np.tri(T, dtype=bool)
  a, (c0, c1, c2) = q @ k.swapaxes(-1, -2), tab.c
  sim = np.where(seen_BTT[:, None], c0 + c1 * a + c2 * a**2, 0)
  return sim, np.where(seen_BTT[:, None], c1 + 2 * c2 * a, 0)


def _query_state(q, state, tab) -> tuple:
  """Return what a state adds to numerator and denominator.

  The third result is the sum of the numerator's terms without their signs.
  """
  kv, kk = state
  phi_w, q1 = features(q, tab) * tab.w_E, _with_one(q, tab.w_GG.shape[0])
  z = np.einsum("bhtg,bhgj,bhtj->bht", q1, tab.w_GG * kk, q1)
  return phi_w @ kv, z, np.abs(phi_w) @ np.abs(kv)


def _float64(x: Inputs) -> Inputs:
  def wide(y):
    return None if y is None else np.asarray(y).astype(np.float64)

  def pair(state):
    return None if state is None else tuple(map(wide, state))

  ids = None if x.ids_BT is None else np.asarray(x.ids_BT)
  return Inputs(
    *map(wide, x[:3]), ids, pair(x.state), wide(x.do_BTHP), pair(x.dafter)
  )


def _with_one(x: np.ndarray, G: int) -> np.ndarray:
  """Return x̃ of width G: x itself, or x and a 1."""
  if x.shape[-1] == G:
    return x
  return np.concatenate([x, np.ones_like(x[..., :1])], axis=-1)


def _jacobian_t(x: np.ndarray, d_E: np.ndarray, tab: _Table) -> np.ndarray:
  """Return J(x)ᵀ d, the cotangent of x from that of its features."""
  x1 = _with_one(x, x.shape[-1] + 1)
  dx1 = np.zeros_like(x1)
  for e, (i, j) in enumerate(zip(tab.i_E, tab.j_E, strict=True)):
    dx1[..., i] += d_E[..., e] * x1[..., j]
    dx1[..., j] += d_E[..., e] * x1[..., i]
  return dx1[..., :-1]


def _through_state(q, state, g, dz, tab) -> np.ndarray:
  """Return dq through the initial state, by numerator and by denominator."""
  kv, kk = state
  F, q1 = q.shape[-1], _with_one(q, tab.w_GG.shape[0])
  d_E = np.einsum("bhep,bhtp->bhte", kv, g) * tab.w_E
  wkk = tab.w_GG * kk
  d_z = dz[..., None] * (q1 @ (wkk + wkk.swapaxes(-1, -2)))
  return np.stack([_jacobian_t(q, d_E, tab), d_z[..., :F]])


def _d_state(q, g, dz, first_B1T, tab) -> tuple:
  """Return the cotangent of the initial (kv, kk)."""
  phi = features(q, tab) * tab.w_E * first_B1T[..., None]
  q1 = _with_one(q, tab.w_GG.shape[0])
  dkk = np.einsum("bht,bhtg,bhtj->bhgj", first_B1T * dz, q1, q1)
  return phi.swapaxes(-1, -2) @ g, tab.w_GG * dkk


def _after(k, v, keep, joined, state, tab) -> tuple:
  """Return the state after the last token."""
  k1 = _with_one(k, tab.w_GG.shape[0])
  kv = (keep * features(k, tab)).swapaxes(-1, -2) @ v
  kk = (keep * k1).swapaxes(-1, -2) @ k1
  if state is None:
    return kv, kk
  return kv + joined * state[0], kk + joined * state[1]


def _through_keys(k, v, dafter, tab) -> tuple:
  """Return dk, stacked as dq is, and dv through the final state."""
  dkv, dkk = dafter
  F, k1 = k.shape[-1], _with_one(k, tab.w_GG.shape[0])
  d_E = np.einsum("bhep,bhtp->bhte", dkv, v)
  d_k = k1 @ (dkk + dkk.swapaxes(-1, -2))
  dk = np.stack([_jacobian_t(k, d_E, tab), d_k[..., :F]])
  return dk, features(k, tab) @ dkv
