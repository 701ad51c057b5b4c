"""One token of polynomial attention, as generation takes it.

The token is scored as it stands, and the tokens before it through the state.
Then the state takes the token up. With the notation of `state.py`,

    o  = ((w ∘ φ(q))ᵀ KV + sim(q, k) v) / (q̃ᵀ (W ∘ KK) q̃ + sim(q, k) + eps)
    KV ← KV + φ(k) vᵀ,   KK ← KK + k̃ k̃ᵀ
"""

from jax import Array
import jax.numpy as jnp

from pallas_kernels.polynomial import spec, state as state_lib
from pallas_kernels.polynomial.operator import Kernel
from pallas_kernels.polynomial.state import State


def step(
  state: State, q_BHF: Array, k_BHF: Array, v_BHP: Array, kernel: Kernel
) -> tuple[Array, State]:
  """Return o_BHP, in the dtype of v, and the state with this token in it."""
  acc = state.kv_BHEP.dtype
  q_BH1F, k_BH1F, v_BH1P = (
    x[:, :, None].astype(acc) for x in (q_BHF, k_BHF, v_BHP)
  )
  num_BH1P, z_BH1 = state_lib.query_state(q_BH1F, state, kernel.coefficients)
  # Not through the state: sim of the token itself is then rounded alike in the
  # numerator and in the denominator, however near 0 it is.
  product_BH1 = (q_BH1F * k_BH1F).sum(axis=-1)
  sim_BH1 = spec.similarity(product_BH1, kernel.coefficients)
  num_BH1P = num_BH1P + sim_BH1[..., None] * v_BH1P
  o_BH1P = num_BH1P / (z_BH1 + sim_BH1 + kernel.eps)[..., None]
  new = state_lib.key_state(k_BH1F, v_BH1P, kernel.coefficients)
  state = State(*map(jnp.add, state, new))
  return o_BH1P[:, :, 0].astype(v_BHP.dtype), state
