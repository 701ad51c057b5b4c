"""One token of polynomial attention: the state is updated, then queried.

KV ← KV + features(k) vᵀ,  KK ← KK + k̃ k̃ᵀ
o  = (w ∘ features(q))ᵀ KV / (q̃ᵀ (W ∘ KK) q̃ + eps)
"""

from jax import Array
import jax.numpy as jnp

from pallas_kernels.polynomial import spec
from pallas_kernels.polynomial.passes import Kernel
from pallas_kernels.polynomial.spec import State


def step(
  state: State, q_BHF: Array, k_BHF: Array, v_BHP: Array, kernel: Kernel
) -> tuple[Array, State]:
  """o_BHP, in v's dtype, and the state with this token in it."""
  acc = state.kv_BHEP.dtype
  q_BH1F, k_BH1F, v_BH1P = (
    x[:, :, None].astype(acc) for x in (q_BHF, k_BHF, v_BHP)
  )
  num_BH1P, z_BH1 = spec.query_state(q_BH1F, state, kernel.coefficients)
  s_BH1 = (q_BH1F * k_BH1F).sum(axis=-1)
  sim_BH1 = spec.polynomial(s_BH1, kernel.coefficients)
  num_BH1P = num_BH1P + sim_BH1[..., None] * v_BH1P
  o_BH1P = num_BH1P / (z_BH1 + sim_BH1 + kernel.eps)[..., None]
  new = spec.key_state(k_BH1F, v_BH1P, kernel.coefficients)
  state = State(*map(jnp.add, state, new))
  return o_BH1P[:, :, 0].astype(v_BHP.dtype), state
