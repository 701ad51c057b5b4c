"""Kernels are chosen by the platform that a program is lowered for."""

import functools

import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import devices
from pallas_kernels.by_platform import (
  Kernels,
  by_platform,
  differentiable_by_platform,
  forward_by_platform,
)

PLATFORMS = ("cpu", "cuda", "tpu")
ON_CUDA = Kernels("gpu", ("cuda",), "a Hopper GPU")
GPU, TPU = "mosaic_gpu", "tpu_custom_call"  # in lowered programs


def _lowered(function, *arrays, platforms) -> str:
  traced = jax.jit(function).trace(*arrays)
  return traced.lower(lowering_platforms=platforms).as_text()


def _kernels_in(text: str) -> set[str]:
  return {name for name in (GPU, TPU) if name in text}


def _qkv(dtype="bfloat16"):
  rng = np.random.default_rng(0)
  shapes = (1, 3, 1, 16), (1, 3, 1, 16), (1, 3, 1, 8)
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _gradients(q, k, v, **options):
  """Return the output and the gradients of a call that takes every pass."""

  def loss(q, k, v):
    o = pk.polynomial_attention(q, k, v, **options)
    return jnp.square(o.astype(jnp.float32)).sum(), o

  return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)


def _same(found, wanted) -> None:
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.fixture
def known_tpu(monkeypatch):
  """Know of a TPU that is not attached; calls are expected on the CPU."""
  monkeypatch.setattr(devices, "_tpu_kind", lambda: "TPU v5e")


def _choose(x):
  return by_platform(ON_CUDA, lambda x: x + 1.0, lambda x: x - 1.0, x)


def test_the_form_follows_the_platform() -> None:
  x = jnp.ones(3)
  for platform, used, unused in (
    ("cuda", "add", "subtract"),
    ("cpu", "subtract", "add"),
    ("rocm", "subtract", "add"),
    ("tpu", "subtract", "add"),
  ):
    text = _lowered(_choose, x, platforms=(platform,))
    assert f"stablehlo.{used}" in text and f"stablehlo.{unused}" not in text
    assert "case" not in text
  for run in (_choose, jax.jit(_choose), jax.vmap(_choose)):
    np.testing.assert_array_equal(run(x), 0)
  with jax.disable_jit():
    np.testing.assert_array_equal(_choose(x), 0)
  both = _lowered(_choose, x, platforms=PLATFORMS)
  assert "stablehlo.add" in both and "stablehlo.subtract" in both


def test_what_kernels_keep_is_not_readable_elsewhere() -> None:
  kernel = lambda x: (x, (x, jnp.zeros(2, jnp.int32)))
  found = forward_by_platform(ON_CUDA, kernel, lambda x: -x, jnp.ones(2))
  y, (kept, whole) = found
  np.testing.assert_array_equal(y, -1)
  assert np.isnan(kept).all() and whole.dtype == jnp.int32


def _sine(x, y):
  return jnp.sin(x) * y


def _cosine(x, y):
  return jnp.cos(x) * y


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_either_form_has_its_derivative(platform) -> None:
  """A program for the CPU takes the kernel, or the other function."""
  kernels = Kernels("sine", (platform,), "a sine")
  call = functools.partial(differentiable_by_platform, kernels, _sine, _cosine)
  wanted_call = _sine if platform == "cpu" else _cosine
  x, y = jnp.linspace(0.0, 1.0, 6).reshape(2, 3), jnp.arange(3.0)

  def both(call):
    def run(x, y):
      result, pull = jax.vjp(call, x, y)
      return result, pull(jnp.ones_like(result))

    return jax.vmap(run, (0, None))

  wanted = both(wanted_call)(x, y)
  for run in (both(call), jax.jit(both(call))):
    for a, b in zip(
      jax.tree.leaves(run(x, y)), jax.tree.leaves(wanted), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_two_forms_agree() -> None:
  with pytest.raises(TypeError, match="'gpu'.*expected equal forms"):
    by_platform(ON_CUDA, lambda x: x, lambda x: x[:1], jnp.ones(2))


def test_kernels_have_first_derivatives_only() -> None:
  with pytest.raises(NotImplementedError, match="forward mode.*'gpu'"):
    jax.jvp(_choose, (jnp.ones(2),), (jnp.ones(2),))


def test_an_unknown_device_gets_the_portable_form() -> None:
  for platform in PLATFORMS:
    text = _lowered(_gradients, *_qkv(), platforms=(platform,))
    assert not _kernels_in(text)


def test_a_named_implementation_lowers_for_its_platform_only() -> None:
  run = functools.partial(_gradients, implementation="tpu")
  assert _kernels_in(_lowered(run, *_qkv(), platforms=("tpu",))) == {TPU}
  refused = pytest.raises(
    NotImplementedError, match="'tpu' needs a TPU; .* lowered for cpu: pass"
  )
  with refused:
    jax.jit(run)(*_qkv())
  with refused:
    _lowered(run, *_qkv(), platforms=("tpu", "cpu"))


def test_the_hopper_kernels_lower_where_they_are_named() -> None:
  run = functools.partial(pk.polynomial_attention, implementation="gpu")
  if not devices.has_mosaic_gpu():
    with pytest.raises(NotImplementedError, match=r"needs jax ≥ 0\.11.*'xla'"):
      jax.eval_shape(run, *_qkv())
    return
  assert _kernels_in(_lowered(run, *_qkv(), platforms=("cuda",))) == {GPU}
  with pytest.raises(NotImplementedError, match="Hopper.*lowered for cpu"):
    run(*_qkv())


def test_one_program_for_several_platforms(known_tpu) -> None:
  """It has the kernels of the known device, and XLA's form for the CPU."""
  arrays = _qkv()
  run = jax.jit(lambda *arrays: _gradients(*arrays))
  artefact = export.export(run, platforms=PLATFORMS)(*arrays)
  assert artefact.platforms == PLATFORMS
  assert _kernels_in(artefact.mlir_module()) == {TPU}
  wanted = jax.jit(functools.partial(_gradients, implementation="xla"))(*arrays)
  _same(artefact.call(*arrays), wanted)
  # Arrays that lie on the CPU run there, whatever other device is known.
  cpu = jax.devices("cpu")[1]
  found = run(*jax.device_put(arrays, cpu))
  assert {x.device for x in jax.tree.leaves(found)} == {cpu}
  _same(found, wanted)


def test_the_default_device_is_where_calls_are_expected() -> None:
  cpu = jax.devices("cpu")[1]
  assert devices.platform() == jax.devices()[0].platform
  for device in (cpu, "cpu"):
    with jax.default_device(device):
      assert devices.platform() == "cpu"


def test_mapped_runs_with_states(known_tpu) -> None:
  """The backward cannot read what the kernels keep: XLA runs again."""
  arrays = [jnp.stack([x, x * 2]) for x in _qkv("float32")]
  state = jax.tree.map(lambda x: x + 1, pk.zero_state(1, 1, 16, 8))

  def loss(state, q, k, v, implementation):
    o, after = pk.polynomial_attention(
      q,
      k,
      v,
      initial_state=state,
      return_state=True,
      implementation=implementation,
    )
    return o.sum() + sum(x.sum() for x in after)

  def run(implementation):
    call = functools.partial(loss, implementation=implementation)
    each = jax.vmap(jax.grad(call, argnums=(0, 1, 2, 3)), (None, 0, 0, 0))
    return jax.jit(each)(state, *arrays)

  _same(run(None), run("xla"))


@pytest.mark.parametrize(
  "operator", ["gelu", "add_layer_norm", "gated_conv", "cross_entropy"]
)
def test_operators_beside_it(hopper, operator) -> None:
  """The same: kernels on CUDA, XLA's values and gradients on the CPU."""
  rng = np.random.default_rng(0)

  def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)

  x, y = (normal(1, 8, 128, dtype=jnp.bfloat16) for _ in range(2))
  wide, a, b, c = normal(1, 8, 128), normal(128), normal(128), normal(128)
  targets = jnp.arange(8, dtype=jnp.int32)[None]
  calls = {
    "gelu": (pk.gelu, x, a),
    "add_layer_norm": (
      lambda x, y, a, b, c: pk.add_layer_norm(x, y, a, b, y_bias=c),
      *(wide, y, a, b, c),
    ),
    "gated_conv": (pk.gated_conv, x, y, normal(3, 128), a, b),
    "cross_entropy": (
      lambda x, E: pk.cross_entropy(x, E, targets, parts=2)[0],
      *(x, normal(1024, 128)),
    ),
  }
  call, *arrays = calls[operator]

  def both(*arrays):
    outputs, pull = jax.vjp(call, *arrays)
    return outputs, pull(jax.tree.map(jnp.ones_like, outputs))

  assert _kernels_in(_lowered(both, *arrays, platforms=("cuda",))) == {GPU}
  assert not _kernels_in(_lowered(both, *arrays, platforms=("cpu",)))
  found = jax.jit(both)(*arrays)
  with pytest.MonkeyPatch.context() as plain:
    plain.setattr(devices, "is_hopper", lambda: False)
    wanted = jax.jit(lambda *arrays: both(*arrays))(*arrays)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    a, b = np.float64(a), np.float64(b)
    # The kernels' forms sum biases in float32; bfloat16 rounds to 2⁻⁹.
    assert np.linalg.norm(a - b) <= 8e-3 * np.linalg.norm(b)
