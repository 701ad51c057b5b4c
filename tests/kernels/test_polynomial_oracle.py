"""The NumPy oracle's gradients, and the forward mode of "reference"."""

import functools

import jax
import numpy as np
from polynomial_cases import make_inputs
import polynomial_oracle as po
import pytest

import pallas_kernels as pk

INPUTS = dict(state=True, boundaries="random", final=True, seed=3)


def leaves(x: po.Inputs) -> list:
  """Return the arrays to differentiate with respect to: q, k, v, kv, kk."""
  return [np.array(y, np.float64) for y in (*x[:3], *x.state)]


def with_leaves(x: po.Inputs, arrays) -> po.Inputs:
  q, k, v, *state = arrays
  return x._replace(q_BTHF=q, k_BTHF=k, v_BTHP=v, state=tuple(state))


def loss(x: po.Inputs, coefficients) -> float:
  answer = po.oracle(x, coefficients)
  terms = [(answer.o, x.do_BTHP), *zip(answer.after, x.dafter, strict=True)]
  return sum(np.vdot(a, b) for a, b in terms)


def gradient(x: po.Inputs, coefficients) -> list:
  answer = po.oracle(x, coefficients)
  return [answer.dq, answer.dk, answer.dv, *answer.dstate]


# The rows of these seeds have 1 and 3 document boundaries.
@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("F", [3, 4])
@pytest.mark.parametrize("coefficients", [po.REBASED, po.BASED])
def test_oracle_gradients_equal_finite_differences(coefficients, F, seed):
  x = make_inputs(
    1, 6, 1, F, 2, coefficients=coefficients, **INPUTS | {"seed": seed}
  )
  arrays, step = leaves(x), 1e-5
  for i, grad in enumerate(gradient(x, coefficients)):
    for at in np.ndindex(grad.shape):
      sides = []
      for sign in (1, -1):
        moved = [y.copy() for y in arrays]
        moved[i][at] += sign * step
        sides.append(loss(with_leaves(x, moved), coefficients))
      slope = (sides[0] - sides[1]) / (2 * step)
      # Central differences: an error of step² times the third derivative.
      np.testing.assert_allclose(slope, grad[at], rtol=1e-5, atol=1e-6)


@functools.partial(jax.jit, static_argnums=(2,))
def forward_mode(x, tangents, coefficients):
  """Return the jvp of the outputs, and that of the gradients of outputs·do."""

  def outputs(q, k, v, kv, kk):
    return pk.polynomial_attention(
      q,
      k,
      v,
      coefficients=coefficients,
      segment_ids=x.ids_BT,
      initial_state=pk.State(kv, kk),
      return_state=True,
      implementation="reference",
    )

  arrays = (*x[:3], *x.state)
  _, pull = jax.vjp(outputs, *arrays)
  cotangent = (x.do_BTHP, pk.State(*x.dafter))

  def gradients(*arrays):
    return jax.vjp(outputs, *arrays)[1](cotangent)

  _, moved = jax.jvp(outputs, arrays, tangents)
  _, hessian = jax.jvp(gradients, arrays, tangents)
  return moved, hessian


def test_reference_has_forward_mode_and_second_derivatives():
  numbers, coefficients = po.BASED, pk.BASED
  x = make_inputs(2, 9, 2, 5, 3, coefficients=numbers, **INPUTS)
  rng, step = np.random.default_rng(0), 1e-5
  arrays = leaves(x)
  tangents = tuple(np.float32(rng.normal(size=y.shape)) for y in arrays)
  moved, hessian = forward_mode(x, tangents, coefficients)
  sides = [
    with_leaves(x, [y + s * t for y, t in zip(arrays, tangents, strict=True)])
    for s in (step, -step)
  ]
  above, below = (po.oracle(side, numbers) for side in sides)
  got = [moved[0], *moved[1], *hessian]
  pairs = zip(
    [above.o, *above.after, *gradient(sides[0], numbers)],
    [below.o, *below.after, *gradient(sides[1], numbers)],
    strict=True,
  )
  for a, (b, c) in zip(got, pairs, strict=True):
    want = (b - c) / (2 * step)
    # float32 sums of second-derivative terms that cancel in part.
    assert np.linalg.norm(a - want) <= 1e-4 * np.linalg.norm(want)
