"""Tests against the official models' logits, loss and gradients."""

import contextlib
import dataclasses

from flax import nnx
import golden_map
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rebased_jax import LM, MixerConfig, ModelConfig, RWKVConfig, presets

_WORDS = "backbone.embeddings.word_embeddings.weight"
# Of ‖ours − theirs‖ / ‖theirs‖, the Frobenius norm over each whole array.
# The same formulas in another order: roundings of 1e-16 in float64, of 6e-8 in
# float32. Measured, at most 2e-15 and 6e-7; the rest is room for other orders.
_TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def _difference(ours, theirs: np.ndarray) -> float:
  ours = np.asarray(ours, np.float64)
  assert ours.shape == theirs.shape
  return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@contextlib.contextmanager
def _float64():
  # Flax's LayerNorm mixes float64 with float32, which strict promotion forbids.
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    yield


def _loss(graph, params, tokens_BT, labels_BT):
  logits_BTV = nnx.merge(graph, params)(tokens_BT)
  kept_BT = labels_BT >= 0
  log_p_BTV = jax.nn.log_softmax(logits_BTV)
  picked_BT1 = jnp.take_along_axis(
    log_p_BTV, jnp.where(kept_BT, labels_BT, 0)[..., None], axis=-1
  )
  total = jnp.where(kept_BT, picked_BT1[..., 0], 0).sum()
  return -total / kept_BT.sum().astype(total.dtype), logits_BTV


def _mqar(system: presets.System, dtype: str, golden) -> ModelConfig:
  """Return the model of a system at the sizes of a golden file."""
  vocab_size, width = golden["param/" + _WORDS].shape
  config = presets.mqar(
    system,
    width=width,
    length=golden["tokens"].shape[1],
    vocab_size=vocab_size,
  )
  return dataclasses.replace(config, dtype=dtype)


def _without_rounding(mixer: MixerConfig) -> MixerConfig:
  """Return the mixer with WKV in the compute dtype, as in the golden files."""
  if isinstance(mixer, RWKVConfig):
    return dataclasses.replace(mixer, wkv_dtype="float32")
  return mixer


def _check(name: str, system: presets.System, dtype: str) -> None:
  """Compare logits, loss and all gradients with the golden file's."""
  golden = golden_map.read(name)
  config = _mqar(system, dtype, golden)
  arrays = golden_map.ours(golden, "param", config)
  with _float64() if dtype == "float64" else contextlib.nullcontext():
    model = LM(config, rngs=nnx.Rngs(0))
    graph, params = golden_map.load(model, arrays, dtype)
    tokens_BT, labels_BT = (
      jnp.asarray(golden[x], jnp.int32) for x in ("tokens", "labels")
    )
    # Most of the time is the compiler's: this halves it.
    compiled = jax.jit(
      jax.value_and_grad(_loss, argnums=1, has_aux=True),
      static_argnums=0,
      compiler_options={"xla_backend_optimization_level": 0},
    )
    (loss, logits_BTV), grads = compiled(graph, params, tokens_BT, labels_BT)
  assert logits_BTV.dtype == loss.dtype == dtype
  found = {"logits": logits_BTV, "loss": loss, **golden_map.flat(grads)}
  wanted = golden_map.ours(golden, "grad", config)
  wanted |= {"logits": golden["logits"], "loss": golden["loss"]}
  assert found.keys() == wanted.keys()
  errors = {path: _difference(found[path], wanted[path]) for path in wanted}
  assert max(errors.values()) <= _TOLERANCE[dtype], errors


@pytest.mark.parametrize(
  ("dtype", "implementation"),
  [
    ("float64", None),
    ("float32", None),
    pytest.param("float64", "reference", marks=pytest.mark.slow),
    pytest.param("float32", "reference", marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize("name", golden_map.KERNELS)
def test_logits_loss_and_every_gradient(name, dtype, implementation) -> None:
  mixer = dataclasses.replace(
    presets.VARIANTS[golden_map.KERNELS[name]], implementation=implementation
  )
  assert (mixer.heads, mixer.features, mixer.eps) == (12, 16, 1e-12)
  _check(name, presets.hybrid(mixer), dtype)


def _cases():
  for name in golden_map.SYSTEMS:
    quick = name in ("attention", "conv_attention")
    yield name, "float64"
    yield pytest.param(name, "float32", marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "dtype"), list(_cases()))
def test_the_other_systems(name, dtype) -> None:
  """Compare Table 4's systems.

  The official mask of attention adds −10,000, and e^−10,000 is 0 in every
  dtype.
  """
  system = presets.SYSTEMS[golden_map.SYSTEMS[name]]
  first, second = map(_without_rounding, (system.first, system.second))
  _check(name, system._replace(first=first, second=second), dtype)
