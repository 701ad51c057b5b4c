"""Tests of ReBased: the switches of its kernel, norm, weights, errors."""

import dataclasses
from pathlib import Path

from flax import nnx
import jax
import jax.numpy as jnp
import mixer_equations
import numpy as np
import pytest

from pallas_kernels import REBASED, ShardAxes
from pallas_kernels.polynomial import PositionCall
from rebased_jax import (
  BasedConfig,
  ReBasedConfig,
  Site,
  parameter_count,
  presets,
)
from rebased_jax.mixers import polynomial

D, H, F = 8, 2, 4
SITE = Site(D)


def make(**fields):
  config = ReBasedConfig(heads=H, features=F, **fields)
  return config, config.make(SITE, rngs=nnx.Rngs(0))


@pytest.mark.quick
@pytest.mark.parametrize(
  ("name", "affine"),
  {
    "x2": set(),
    "norm": set(),
    "gamma": {"gamma"},  # no β that would never be used
    "gamma-beta": {"gamma", "beta"},
    "rebased": {"gamma", "beta"},
  }.items(),
)
def test_the_switches_choose_the_parameters(name, affine) -> None:
  config = dataclasses.replace(presets.VARIANTS[name], heads=H, features=F)
  mixer = config.make(SITE, rngs=nnx.Rngs(0))
  projections = {f"project/{x}/kernel" for x in "qkvo"}
  kernel = {f"{side}_affine/{p}" for side in ("query", "key") for p in affine}
  assert mixer_equations.parameters(mixer).keys() == projections | kernel
  based = BasedConfig(heads=H, features=F).make(SITE, rngs=nnx.Rngs(0))
  extra = 2 * H * F * len(affine)
  assert parameter_count(mixer) == parameter_count(based) + extra
  assert parameter_count(based) == 2 * D * H * F + 2 * D * H * (D // H)


def test_gamma_starts_at_one_and_beta_at_zero() -> None:
  params = mixer_equations.parameters(make()[1])
  for side in ("query", "key"):
    assert (params[f"{side}_affine/gamma"] == 1).all()
    assert (params[f"{side}_affine/beta"] == 0).all()
  # N(0, 0.02²); 64 draws have a deviation within 30 % but for 1 in 1000.
  assert params["project/q/kernel"].std() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("scope", ["joint", "head"])
def test_the_norm_of_each_scope(scope) -> None:
  config, mixer = make(norm_scope=scope)
  x_D = jax.random.normal(jax.random.key(1), (D,)) * 100
  params = mixer_equations.parameters(mixer)
  for side, project, call in (
    ("query", "q", mixer.query),
    ("key", "k", mixer.key),
  ):
    z = np.asarray(x_D, np.float64) @ params[f"project/{project}/kernel"]
    wanted = mixer_equations.kernel_map(config, params, side, z).reshape(H, F)
    found = np.asarray(call(x_D))
    # Float32 sums of 8 terms of size 1.
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    means = found.mean(axis=-1)
    assert found.mean() == pytest.approx(0, abs=1e-6)
    assert (np.abs(means) < 1e-6).all() == (scope == "head")


def test_the_scopes_differ() -> None:
  x_BTD = jax.random.normal(jax.random.key(1), (1, 6, D))
  (_, joint), (_, head) = make(), make(norm_scope="head")
  found = np.abs(joint.query(x_BTD) - head.query(x_BTD)).max()
  assert found > 0.01


@pytest.mark.quick
@pytest.mark.parametrize("name", presets.VARIANTS)
def test_the_weights_are_a_causal_average(name) -> None:
  config = dataclasses.replace(presets.VARIANTS[name], heads=H, features=F)
  mixer = config.make(SITE, rngs=nnx.Rngs(0))
  x_BTD = jax.random.normal(jax.random.key(1), (2, 6, D)) * 10
  A_BHTT = np.asarray(mixer.attention_matrix(x_BTD))
  assert A_BHTT.shape == (2, H, 6, 6)
  assert (A_BHTT >= 0).all()  # sim ≥ 0, of Based too
  assert not np.triu(A_BHTT, 1).any()
  np.testing.assert_allclose(A_BHTT.sum(axis=-1), 1, rtol=1e-5)  # float32 sum
  v_BTHP = mixer.value(x_BTD)
  o_BTHP = jnp.einsum("bhts,bshp->bthp", A_BHTT, v_BTHP)
  # The same sums of six terms in another order.
  np.testing.assert_allclose(
    mixer.output(o_BTHP), mixer(x_BTD), rtol=1e-4, atol=1e-6
  )


def test_a_joint_scale_of_the_kernel_changes_nothing() -> None:
  _, mixer = make(eps=0.0)
  x_BTD = jax.random.normal(jax.random.key(1), (2, 6, D))
  before = mixer(x_BTD)
  affine = mixer.query_affine
  affine.gamma[...] = 4 * affine.gamma[...]
  affine.beta[...] = 4 * affine.beta[...]
  # A power of two scales float32 exactly.
  np.testing.assert_array_equal(mixer(x_BTD), before)


@pytest.mark.quick
@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("heads", 0),
    ("heads", 2.0),
    ("features", -1),
    ("value_features", 0),
    ("eps", -1e-9),
    ("eps", float("nan")),
    ("norm_scope", "heads"),
  ],
)
def test_a_wrong_field_is_named(field, value) -> None:
  with pytest.raises(ValueError, match=rf"ReBasedConfig\.{field}="):
    ReBasedConfig(**{field: value})


def test_heads_that_do_not_divide_the_width_are_a_warning() -> None:
  make = lambda config, width: nnx.eval_shape(
    lambda: config.make(Site(width), rngs=nnx.Rngs(0))
  )
  words = (
    r"^ReBasedConfig.heads=3 does not divide the width 8: each head has "
    r"floor\(8 / 3\) = 2 values, 6 in all; set heads to a divisor, or "
  )
  with pytest.warns(UserWarning, match=words):
    make(ReBasedConfig(heads=3), 8)
  with pytest.warns(UserWarning, match="^BasedConfig.heads=12 does not divide"):
    make(BasedConfig(), 64)
  for quiet in (  # a warning would be an error here
    (ReBasedConfig(heads=3, value_features=2), 8),
    (ReBasedConfig(heads=4), 8),
    (presets.VARIANTS["rebased"], 64),
  ):
    make(*quiet)


@pytest.mark.parametrize("config", [ReBasedConfig(heads=12), BasedConfig()])
def test_more_heads_than_width_is_named(config) -> None:
  name = type(config).__name__
  with pytest.raises(ValueError, match=rf"{name}\.heads=12 at width 8"):
    config.make(SITE, rngs=nnx.Rngs(0))
  wide = dataclasses.replace(config, value_features=2)
  assert wide.make(SITE, rngs=nnx.Rngs(0)).shape.value_features == 2


def test_an_unknown_implementation_is_named() -> None:
  with pytest.raises(ValueError, match="implementation='fast'"):
    make(implementation="fast")


def test_the_reference_has_forward_and_second_derivatives() -> None:
  config = ReBasedConfig(heads=2, features=4, implementation="reference")
  mixer = config.make(Site(8), rngs=nnx.Rngs(0))
  fast = dataclasses.replace(config, implementation=None)
  same = fast.make(Site(8), rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  x, dx, w = rng.normal(size=(3, 1, 6, 8)).astype(np.float32)
  y, dy = jax.jit(lambda x, dx: jax.jvp(mixer, (x,), (dx,)))(x, dx)
  wanted, pull = jax.vjp(same, x)
  # float32 sums in another order; the outputs are about 0.01.
  np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-6)
  # Forward and reverse mode agree: w · (J dx) = (Jᵀ w) · dx.
  np.testing.assert_allclose((w * dy).sum(), (pull(w)[0] * dx).sum(), rtol=1e-3)
  # Along dx, the gradient of w · y changes as its second derivative says.
  slope = jax.grad(lambda x: (w * mixer(x)).sum())
  _, curvature = jax.jit(lambda x, dx: jax.jvp(slope, (x,), (dx,)))(x, dx)
  h = np.float32(1e-2)
  change = (slope(x + h * dx) - slope(x - h * dx)) / (2 * h)
  error = np.linalg.norm(curvature - change)
  assert error <= 0.02 * np.linalg.norm(change)  # of h² and float32


def test_the_mixer_takes_the_cheaper_way(monkeypatch) -> None:
  """Trace a call only: each way leaves its name."""
  taken = []
  for name in ("polynomial_attention", "polynomial_attention_at"):
    run = getattr(polynomial, name)

    def note(*args, name=name, run=run, **options):
      taken.append(name.removeprefix("polynomial_attention"))
      return run(*args, **options)

    monkeypatch.setattr(polynomial, name, note)
  calls = []

  def decide(call, form):
    calls.append((call, form))
    return len(calls) == 1

  monkeypatch.setattr(polynomial, "is_cheaper_alone", decide)
  _, mixer = make()
  x_BTD, positions_BM = jnp.zeros((4, 12, D)), np.zeros((4, 3), np.int32)

  def run(axes=None):
    jax.eval_shape(
      lambda: mixer(x_BTD, query_positions=positions_BM, axes=axes)
    )

  run()
  mesh = jax.make_mesh(
    (2, 2), ("data", "time"), (jax.sharding.AxisType.Auto,) * 2
  )
  with jax.set_mesh(mesh):
    run(ShardAxes(batch="data"))
    run(ShardAxes(time="time"))  # no row is whole on a device
  assert taken == ["_at", "", ""]
  assert [call.rows for call, _ in calls] == [4, 2]
  assert calls[0][0] == PositionCall(4, 12, 3, D, H, F, D // H, REBASED, 4)


def test_a_named_implementation_takes_the_linear_operator(monkeypatch) -> None:
  """Also for few positions, whose rows are otherwise computed alone."""

  def refuse(*args, **options):
    raise AssertionError("the rows of the positions were computed alone")

  monkeypatch.setattr(polynomial, "polynomial_attention_at", refuse)
  positions_BM = np.zeros((1, 2), np.int32)

  def call(implementation):
    _, mixer = make(implementation=implementation)
    return mixer(jnp.zeros((1, 12, D)), query_positions=positions_BM)

  assert jax.eval_shape(lambda: call("xla")).shape == (1, 2, D)
  with pytest.raises(AssertionError, match="alone"):
    jax.eval_shape(lambda: call(None))


def test_the_page_computes_the_mixer_by_hand():
  page = (Path(__file__).parents[2] / "docs" / "mixers.md").read_text()
  _, _, section = page.partition("The same by hand, in NumPy:")
  block = section.split("```python\n")[1].split("```")[0]
  assert "assert_allclose(y_TD, mixer(" in block
  exec(block, {})
