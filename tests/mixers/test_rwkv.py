"""RWKV's initial parameters, its rounding, and extreme decays."""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import mixer_equations
import numpy as np
import pytest

from rebased_jax import RWKV, RWKVConfig, Site, parameter_count

B, D = 2, 6


def mixer_of(width=D, layer=1, layers=2, **fields) -> RWKV:
  site = Site(width, layer, layers)
  return RWKVConfig(**fields).make(site, rngs=nnx.Rngs(0))


def draw(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gradient(loss, mixer):
  """Return the gradient of a loss of the mixer, and its second result."""
  return jax.device_get(_gradient(loss, *nnx.split(mixer)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradient(loss, graph, params):
  of = lambda params: loss(nnx.merge(graph, params))
  return jax.grad(of, has_aux=True)(params)


def _squares(mixer):
  y_BTD = mixer(draw(0, B, 50, D))
  return jnp.square(y_BTD).sum(), y_BTD


@pytest.mark.parametrize("decay", [-80.0, 40.0, 100.0])
def test_decays_at_the_ends(decay) -> None:
  """Without decay WKV is a running mean; with all decay, two tokens count."""
  mixer = mixer_of(wkv_dtype="float32")
  mixer.decay[...] = jnp.full(D, decay)
  x_BTD = draw(0, B, 50, D)
  params = mixer_equations.parameters(mixer)
  with np.errstate(over="ignore"):
    wanted_BTD = [
      mixer_equations.time_mix(RWKVConfig(), params, np.float64(x_TD))
      for x_TD in x_BTD
    ]

  grads, y_BTD = gradient(_squares, mixer)
  np.testing.assert_allclose(y_BTD, wanted_BTD, rtol=1e-5, atol=1e-6)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(grad).all(), path


@pytest.mark.parametrize("T", [1, 9])
def test_bfloat16_wkv_is_the_float32_one_rounded(T) -> None:
  """One WKV and its gradients, all on the grid of bfloat16."""
  full, rounded = mixer_of(wkv_dtype="float32"), mixer_of()
  x_BTD = draw(0, B, T, D)
  # σ(0) and W_o = 2: the output is WKV itself, as its cotangent is the loss's.
  for mixer in (full, rounded):
    mixer.r.kernel[...] = jnp.zeros((D, D))
    mixer.o.kernel[...] = 2 * jnp.eye(D)
  w_BTD = _bfloat16(draw(1, B, T, D))

  def loss(mixer):
    y_BTD = mixer(x_BTD)
    return (w_BTD * y_BTD).sum(), y_BTD

  wanted, y_BTD = gradient(loss, full)
  found, y_low_BTD = gradient(loss, rounded)
  np.testing.assert_array_equal(y_low_BTD, _bfloat16(y_BTD))
  for name in ("decay", "first"):
    np.testing.assert_array_equal(
      found[name][...], _bfloat16(wanted[name][...])
    )
  for name in "kv":
    x, y = (g[name]["kernel"][...] for g in (found, wanted))
    # Sums of B·T products, each rounded by at most 2⁻⁹ of itself.
    np.testing.assert_allclose(x, y, rtol=0, atol=2**-8 * np.abs(y).max())
    # A single token's WKV is its v, whose gradient is on the grid already.
    assert T == 1 or (x != y).any()


def _bfloat16(x):
  return np.asarray(x).astype(jnp.bfloat16).astype(np.float32)


def test_steps_with_rounding_equal_a_row_with_rounding() -> None:
  mixer = mixer_of()
  x_BTD = draw(0, B, 7, D)
  state, y_BTD = mixer.init_state(B), np.asarray(mixer(x_BTD))
  step = jax.jit(mixer.step)
  for t in range(7):
    y_BD, state = step(x_BTD[:, t], state)
    # Float32 sums that differ in the last bit may round to neighbours.
    np.testing.assert_allclose(y_BD, y_BTD[:, t], rtol=0, atol=2**-8)


@pytest.mark.parametrize("width", [1, 2, 6, 64, 128])
def test_the_parameter_count_is_4_d_squared_and_5_d(width) -> None:
  mixer = nnx.eval_shape(lambda: mixer_of(width))
  assert parameter_count(mixer) == 4 * width**2 + 5 * width


@pytest.mark.parametrize(("layer", "layers"), [(0, 1), (0, 2), (1, 2), (3, 6)])
def test_initial_values_depend_on_the_layer(layer, layers) -> None:
  params = mixer_equations.parameters(mixer_of(64, layer, layers))
  ratio = layer / (layers - 1) if layers > 1 else 0
  close = lambda name, i, wanted: np.testing.assert_allclose(
    params[name][i], wanted, rtol=1e-5, err_msg=f"{name} {i}"
  )
  for i in (0, 1, 17, 63):
    close("decay", i, -5 + 8 * (i / 63) ** (0.7 + 1.3 * ratio))
    close("first", i, math.log(0.3) + 0.5 * ((i + 1) % 3 - 1))
    mix = (i / 64) ** (1 - layer / layers)
    close("mix_k", i, mix)
    close("mix_v", i, mix + 0.3 * ratio)
    close("mix_r", i, (i / 64) ** (0.5 * (1 - layer / layers)))


def test_the_projections_of_each_initialization() -> None:
  published = mixer_equations.parameters(mixer_of(64))
  for name in "kvro":
    kernel = published[f"{name}/kernel"]
    assert np.abs(kernel).max() <= 1 / 8
    # U(±1/√D): 4096 draws have a deviation within 5 %.
    assert kernel.std() == pytest.approx((3 * 64) ** -0.5, rel=0.05)
  intended = mixer_equations.parameters(mixer_of(64, initialization="intended"))
  assert not any(intended[f"{name}/kernel"].any() for name in "kro")
  assert intended["v/kernel"].std() == pytest.approx(0.02, rel=0.05)
  x_BTD = draw(0, B, 5, 64)
  mixer = mixer_of(64, initialization="intended")
  grads, _ = gradient(lambda m: (m(x_BTD).sum(), None), mixer)
  assert np.abs(grads["o"]["kernel"][...]).min() > 0


@pytest.mark.parametrize(
  "fields",
  [
    {"initialization": "zeros"},
    {"wkv_dtype": "float16"},
    {"implementation": "tpu"},
  ],
  ids=lambda fields: next(iter(fields)),
)
def test_a_wrong_field_is_named(fields) -> None:
  ((name, value),) = fields.items()
  with pytest.raises(ValueError, match=rf"RWKVConfig\.{name}='{value}'"):
    RWKVConfig(**fields)
