"""Mamba's sizes, initial parameters and memory."""

from flax import nnx
import jax
import jax.numpy as jnp
import mixer_equations
import numpy as np
import pytest

from pallas_kernels import implementations
from rebased_jax import MambaConfig, Site, mixer_configs, parameter_count

B = 2


def make(width: int = 64, layers: int = 2, **fields):
  site = Site(width, layers=layers)
  return MambaConfig(**fields).make(site, rngs=nnx.Rngs(0))


def test_one_token_runs_without_the_kernels() -> None:
  """The kernels walk chunks, and a CPU has none of them."""
  x_BD = jax.random.normal(jax.random.key(1), (B, 64))
  found, wanted = (
    mixer.step(x_BD, mixer.init_state(B))[0]
    for mixer in (make(implementation=name) for name in ("gpu", None))
  )
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("width", [8, 40, 64, 128])
def test_the_parameter_count(width) -> None:
  rank = -(-width // 16)
  wanted = (
    4 * width**2  # into channels and gate
    + 10 * width  # four taps and a bias
    + 2 * width * (rank + 32)
    + rank * 2 * width
    + 2 * width
    + 32 * width  # A_log
    + 2 * width  # D
    + 2 * width**2
  )
  assert parameter_count(nnx.eval_shape(lambda: make(width))) == wanted


@pytest.mark.parametrize("initialization", ["published", "intended"])
def test_the_initial_values(initialization) -> None:
  width = 256
  params = mixer_equations.parameters(
    make(width, initialization=initialization, layers=8)
  )
  deviation = lambda name: params[f"{name}/kernel"].std()
  # The fewest draws, 512 · 256: a deviation within 1 % but for 1 in 10⁵.
  for name in ("in_proj", "gate_proj", "x_proj"):
    assert deviation(name) == pytest.approx(0.02, rel=0.02)
  assert deviation("out_proj") == pytest.approx(0.02 / 4, rel=0.02)
  # K = 4: uniform within ±½.
  for name in ("conv/kernel", "conv/bias"):
    assert 0.48 < np.abs(params[name]).max() <= 0.5
  np.testing.assert_allclose(
    np.exp(params["A_log"]), np.tile(np.arange(1.0, 17), (512, 1)), rtol=1e-6
  )
  assert (params["D"] == 1).all()
  delta = np.log1p(np.exp(params["dt_proj/bias"]))
  weights = np.abs(params["dt_proj/kernel"])
  if initialization == "published":
    assert (params["dt_proj/bias"] == 0).all()
    assert deviation("dt_proj") == pytest.approx(0.02, rel=0.04)
    return
  assert 0.24 < weights.max() <= 0.25  # R = 16
  assert delta.min() > 1e-3 * 0.999 and delta.max() < 0.1 * 1.001
  # log-uniform: 512 draws' mean has a deviation of 1.33 / √512 = 0.06.
  assert np.log(delta).mean() == pytest.approx(np.log(1e-2), abs=0.24)


def test_a_training_step_never_holds_all_states() -> None:
  """Temporary memory grows with T far slower than (B, T, I, N) float32."""
  width, state, lengths = 64, 128, (512, 2048)
  graph, params = nnx.split(nnx.eval_shape(lambda: make(width, state=state)))

  def temporary(length: int) -> int:
    x_BTD = jax.ShapeDtypeStruct((B, length, width), jnp.float32)
    loss = lambda params, x: jnp.square(nnx.merge(graph, params)(x)).sum()
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    memory = step.lower(params, x_BTD).compile().memory_analysis()
    return memory.temp_size_in_bytes

  growth = temporary(lengths[1]) - temporary(lengths[0])
  all_states = B * (lengths[1] - lengths[0]) * 2 * width * state * 4
  # What must grow is some (B, T, I) and (B, T, N) arrays, and one state a
  # chunk (measured: 0.18); a single array of all states would be 1.
  assert 0 < growth < 0.25 * all_states


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("state", 0),
    ("taps", 0),
    ("expand", 1.5),
    ("initialization", "fixed"),
    ("implementation", "tpu"),
  ],
)
def test_a_wrong_field_is_named(field, value) -> None:
  with pytest.raises(ValueError, match=rf"MambaConfig\.{field}="):
    MambaConfig(**{field: value})


def test_the_config_knows_the_implementations_of_the_operators() -> None:
  assert mixer_configs.RECURRENCES == implementations.RECURRENCES
