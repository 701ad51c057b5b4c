"""The Hopper kernels on a GPU, against "xla" in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BASED, REBASED, polynomial_attention, zero_state
from pallas_kernels.polynomial import spec

pytestmark = pytest.mark.gpu
if jax.devices()[0].platform != "gpu":
  pytest.skip("no GPU", allow_module_level=True)

# Limit of ‖a − ref‖ / ‖ref‖: operands round to 2⁻⁹, or to 2⁻¹⁸ in float32.
_TOLERANCE = {"bfloat16": 5e-3, "float32": 2e-5}


def _inputs(B, T, H, P, F=16, seed=0, dtype="bfloat16"):
  keys = jax.random.split(jax.random.key(seed), 4)
  sizes = (F, F, P, P)
  make = lambda key, size: jax.random.normal(key, (B, T, H, size), dtype)
  return [make(key, size) for key, size in zip(keys, sizes, strict=True)]


def _states(B, H, P, coefficients, F):
  """Make a state that tokens could have left, and a cotangent of one."""
  # Enough tokens that Σ sim is not near 0 for any query.
  q, k, v, _ = _inputs(B, 70 if F == 16 else 300, H, P, F, seed=5)
  _, state = polynomial_attention(
    *(x.astype(jnp.float32) for x in (q, k, v)),
    coefficients=coefficients,
    return_state=True,
    implementation="xla",
  )
  cotangent = jax.tree.map(
    lambda x: 0.1 * jax.random.normal(jax.random.key(9), x.shape), state
  )
  return state, cotangent


def _all(implementation, q, k, v, do, state, dstate, coefficients):
  """Return o, the final state and every gradient."""

  def call(q, k, v, state):
    return polynomial_attention(
      q,
      k,
      v,
      coefficients=coefficients,
      initial_state=state,
      return_state=state is not None,
      implementation=implementation,
    )

  out, pull = jax.vjp(call, q, k, v, state)
  return out, pull(do if state is None else (do, dstate))


def _before_cancellation(q, k, v, do, coefficients):
  """Return ‖dq‖ and ‖dk‖ of the numerators alone, in float32.

  A token that sees only itself has o = v whatever q and k are. Its gradient is
  the difference of two equal terms, which may be large.
  """
  q, k, v, do = (x.astype(jnp.float32) for x in (q, k, v, do))
  mask_BTT = jnp.tril(jnp.ones((1, q.shape[1], q.shape[1]), bool))

  def call(q, k):
    sim_BHTT = spec.similarities(
      q, k, mask_BTT, coefficients.scaled(q.shape[-1] ** -0.5)
    )
    z_BHT = jax.lax.stop_gradient(sim_BHTT.sum(axis=-1)) + 1e-6
    return jnp.einsum("bhts,bshp->bthp", sim_BHTT / z_BHT[..., None], v)

  return [jnp.linalg.norm(x) for x in jax.vjp(call, q, k)[1](do)]


def _check(B, T, H, P, coefficients, states, F=16, dtype="bfloat16"):
  q, k, v, do = _inputs(B, T, H, P, F, dtype=dtype)
  state = dstate = None
  if states:
    state, dstate = _states(B, H, P, coefficients, F)
  run = lambda name: jax.jit(
    functools.partial(_all, name, coefficients=coefficients)
  )
  found = run("gpu")(q, k, v, do, state, dstate)
  wide = (x.astype(jnp.float32) for x in (q, k, v, do))
  expected = run("xla")(*wide, state, dstate)
  dq, dk = jax.jit(
    functools.partial(_before_cancellation, coefficients=coefficients)
  )(q, k, v, do)
  count = len(jax.tree.leaves(found))
  scales = [0.0] * (count - (5 if states else 3)) + [dq, dk]
  scales += [0.0] * (count - len(scales))
  pairs = zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), scales, strict=True
  )
  for a, b, scale in pairs:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(a).all()
    limit = _TOLERANCE[dtype] * max(np.linalg.norm(b), float(scale))
    assert np.linalg.norm(a - b) <= limit


@pytest.mark.parametrize("coefficients", [REBASED, BASED])
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize(
  "B, T, H, P",
  [(2, 256, 3, 64), (2, 104, 3, 48), (2, 17, 3, 5), (1, 4104, 2, 64)],
)
def test_values_and_gradients_equal_xla(B, T, H, P, coefficients, states):
  _check(B, T, H, P, coefficients, states)


@pytest.mark.parametrize(
  "B, T, H, P, F, coefficients, states",
  [
    (2, 256, 3, 64, 16, REBASED, True),
    (2, 104, 3, 48, 16, BASED, True),
    (1, 4104, 2, 80, 16, BASED, True),
    (1, 3001, 12, 12, 16, REBASED, False),
    (2, 17, 3, 5, 16, REBASED, False),
    (2, 200, 3, 64, 5, REBASED, False),
    (1, 1, 12, 64, 16, REBASED, False),
  ],
)
def test_float32_equals_xla(B, T, H, P, F, coefficients, states):
  _check(B, T, H, P, coefficients, states, F, "float32")


@pytest.mark.parametrize("T", [1, 64, 65, 3001])
def test_lengths_that_are_no_whole_chunks(T):
  _check(1, T, 12, 12, REBASED, False)


@pytest.mark.parametrize("F", [4, 5, 8])
def test_fewer_than_16_features(F):
  _check(2, 200, 3, 64, REBASED, False, F)


@pytest.mark.parametrize("coefficients", [REBASED, BASED])
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize(
  "B, T, H, P, F",
  [
    (2, 256, 3, 64, 32),
    (2, 200, 3, 12, 24),
    (1, 4104, 2, 80, 32),
    (2, 330, 3, 48, 64),
    (1, 2100, 2, 64, 48),
  ],
)
def test_more_than_16_features(B, T, H, P, F, coefficients, states):
  _check(B, T, H, P, coefficients, states, F)


@pytest.mark.parametrize("F", [24, 64])
@pytest.mark.parametrize("T", [1, 64, 1100])
def test_more_than_16_features_with_documents(T, F):
  """Compare float16 with "xla" in float32."""
  arrays = [x.astype(jnp.float16) for x in _inputs(2, T, 3, 48, F)]
  ids_BT = jnp.cumsum(jnp.arange(T) % 300 == 299)[None] + jnp.zeros(
    (2, 1), jnp.int32
  )

  def run(name, q, k, v, do):
    call = functools.partial(
      polynomial_attention,
      segment_ids=ids_BT,
      coefficients=BASED,
      implementation=name,
    )
    o, pull = jax.vjp(call, q, k, v)
    return o, *pull(do)

  found = jax.jit(functools.partial(run, "gpu"))(*arrays)
  wide = (x.astype(jnp.float32) for x in arrays)
  expected = jax.jit(functools.partial(run, "xla"))(*wide)
  q, k, v, do = arrays
  dq, dk = _before_cancellation(q, k, v, do, BASED)
  scales = 0.0, float(dq), float(dk), 0.0
  for a, b, scale in zip(found, expected, scales, strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(a).all()
    limit = 6e-4 * max(np.linalg.norm(b), scale)  # operands round to 2⁻¹²
    assert np.linalg.norm(a - b) <= limit


@pytest.mark.parametrize(
  "B, T, F", [(16, 1024, 32), (1, 8192, 32), (2, 700, 64)]
)
def test_repeats_with_more_than_16_features_are_bit_identical(B, T, F):
  _repeat(100, *_inputs(B, T, 4, 48, F))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("B, T", [(64, 1024), (2, 32768)])
def test_repeats_are_bit_identical(B, T, dtype):
  _repeat(200, *_inputs(B, T, 12, 64, dtype=dtype))


def _repeat(count, q, k, v, do):
  run = jax.jit(
    lambda *x: _all("gpu", *x, None, None, REBASED), donate_argnums=()
  )
  first = run(q, k, v, do)
  same = jax.jit(
    lambda a, b: jax.tree.reduce(
      jnp.logical_and, jax.tree.map(lambda x, y: (x == y).all(), a, b)
    )
  )
  for _ in range(count):
    assert same(first, run(q, k, v, do))


def test_vmap_equals_a_batch():
  q, k, v, _ = _inputs(6, 130, 3, 64)
  split = lambda x: x.reshape(3, 2, *x.shape[1:])
  call = functools.partial(polynomial_attention, implementation="gpu")
  found = jax.jit(jax.vmap(call))(*(split(x) for x in (q, k, v)))
  np.testing.assert_array_equal(found.reshape(6, 130, 3, 64), call(q, k, v))


def test_gpu_is_the_default_and_warns_where_it_cannot_run():
  q, k, v, _ = _inputs(1, 64, 2, 64)
  text = jax.jit(polynomial_attention).lower(q, k, v).as_text()
  assert "polynomial_forward" in text
  with pytest.warns(UserWarning, match="runs 'xla'.*eps = 0"):
    polynomial_attention(q, k, v, eps=0.0)
  wide = (x.astype(jnp.float32) for x in (q, k, v))
  with pytest.warns(UserWarning, match="runs 'xla'.*float32"):
    polynomial_attention(*wide)
  with pytest.raises(NotImplementedError, match="eps = 0"):
    polynomial_attention(q, k, v, eps=0.0, implementation="gpu")


def test_remat_and_scan_equal_plain_calls():
  q, k, v, _ = _inputs(2, 200, 3, 16)
  call = functools.partial(polynomial_attention, implementation="gpu")

  def layers(v):
    body = lambda x, _: (jax.checkpoint(call)(q, k, x), None)
    return jax.lax.scan(body, v, None, length=3)[0].astype(jnp.float32).sum()

  grads = jax.jit(jax.grad(layers))(v)
  by_hand = jax.grad(
    lambda v: call(q, k, call(q, k, call(q, k, v))).astype(jnp.float32).sum()
  )(v)
  np.testing.assert_array_equal(grads, by_hand)


def test_a_zero_state_equals_no_state():
  q, k, v, _ = _inputs(2, 200, 3, 64)
  call = functools.partial(polynomial_attention, implementation="gpu")
  zero = zero_state(2, 3, 16, 64)
  np.testing.assert_array_equal(
    call(q, k, v), call(q, k, v, initial_state=zero)
  )
