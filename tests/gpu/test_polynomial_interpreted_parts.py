"""The Hopper kernels with more than 16 features, interpreted on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
from polynomial_cases import errors, make_inputs, value_and_gradients
import polynomial_oracle as po
import pytest

from pallas_kernels import BASED, REBASED, State, devices, zero_state
from pallas_kernels.polynomial import operator as sharded
from pallas_kernels.polynomial.operator import Kernel

if not devices.has_mosaic_gpu():
  pytest.skip("the GPU kernels need jax ≥ 0.11", allow_module_level=True)

import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.polynomial.gpu import launch, passes, states

# Limits of ‖a − ref‖ / ‖ref‖: each operand rounds to 2⁻⁹ or 2⁻¹².
_TOLERANCE = {"bfloat16": 5e-3, "float16": 6e-4}
_COEFFICIENTS = {REBASED: po.REBASED, BASED: po.BASED}


def _check(T, F, P, coefficients, dtype, boundaries="none", states=False, B=1):
  """Compare o, the final state and every gradient with float64."""
  x = make_inputs(
    B,
    T,
    1,
    F,
    P,
    coefficients=_COEFFICIENTS[coefficients],
    boundaries=boundaries,
    state=states,
    final=states,
    dtype=dtype,
  )
  kernel = Kernel(coefficients.scaled(F**-0.5), 1e-6, by_shared=True)
  call = sharded.StaticArguments(passes, kernel, None, states)

  def attention(q, k, v, ids_BT, state):
    state = None if state is None else State(*state)
    return sharded.attend(call, q, k, v, ids_BT, state)

  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
    got = jax.block_until_ready(value_and_gradients(attention, x))
  found = errors(got, po.oracle(x, _COEFFICIENTS[coefficients]))
  assert {"o", "dq", "dk", "dv"} <= set(found)
  assert max(found.values()) <= _TOLERANCE[dtype], found


_slow = pytest.mark.slow


@pytest.mark.parametrize(
  "T, F, P, coefficients, dtype, boundaries, states",
  [
    (70, 32, 16, REBASED, "bfloat16", "none", False),
    pytest.param(1, 32, 64, BASED, "bfloat16", "none", False, marks=_slow),
    pytest.param(130, 32, 48, BASED, "bfloat16", "none", True, marks=_slow),
    pytest.param(200, 24, 80, BASED, "float16", "random", True, marks=_slow),
    pytest.param(130, 48, 16, REBASED, "bfloat16", "random", True, marks=_slow),
    pytest.param(130, 64, 12, BASED, "bfloat16", "random", True, marks=_slow),
  ],
)
def test_values_and_gradients_equal_float64(
  T, F, P, coefficients, dtype, boundaries, states
):
  _check(T, F, P, coefficients, dtype, boundaries, states)


@pytest.mark.slow
@pytest.mark.parametrize(
  "coefficients, boundaries, states",
  [(REBASED, "none", False), (BASED, "random", True)],
)
def test_slices_of_time_equal_float64(coefficients, boundaries, states):
  """18 chunks in two slices."""
  _check(1100, 32, 16, coefficients, "bfloat16", boundaries, states)


@pytest.mark.parametrize("cotangent", [False, True])
@pytest.mark.parametrize("coefficients", [REBASED, BASED])
@pytest.mark.parametrize(
  "F, P",
  [
    (16, 80),
    (17, 80),
    pytest.param(24, 12, marks=_slow),
    pytest.param(32, 64, marks=_slow),
    (64, 48),
  ],
)
def test_states_convert_to_terms_and_back(F, P, coefficients, cotangent):
  q = jnp.zeros((2, 64, 3, F), jnp.bfloat16)
  v = jnp.zeros((2, 64, 3, P), jnp.bfloat16)
  kernel = Kernel(coefficients.scaled(0.25), 1e-6)
  plan = launch.make_plan(q, v, None, kernel)
  rng = np.random.default_rng(0)
  state = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype),
    zero_state(2, 3, F, P, coefficients=coefficients),
  )

  @jax.jit
  def there_and_back(state):
    terms = [
      states.to_kernel(state, walks, plan, cotangent=cotangent)
      for walks in plan.launches
    ]
    count_BH = state.kk_BHGG[:, :, -1, -1]
    found = states.from_kernel(terms, count_BH, plan, cotangent=cotangent)
    return states.restore_lost(found, state, None, plan)

  for a, b in zip(there_and_back(state), state, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)  # halves are added in float32
