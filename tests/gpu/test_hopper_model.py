"""A language model over a mesh runs the Hopper kernels on every device."""

import contextlib
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import model_cases
import numpy as np
import pytest

from pallas_kernels import devices
from rebased_jax import BaseConvConfig, BasedConfig, ModelConfig
from train.devices.mesh import MeshConfig, make_mesh, shard_axes

B, T, D, HIDDEN, HEADS = 2, 8, 128, 256, 2
# Its Σ sim is never near 0, where bfloat16 gradients would be too rough.
_MIXER = BasedConfig(heads=HEADS, features=4, implementation="xla")


def _config(first=_MIXER) -> ModelConfig:
  return ModelConfig(
    first=first,
    second=_MIXER,
    vocab_size=64,
    width=D,
    mlp_width=HIDDEN,
    dtype="bfloat16",
  )


def _run(config, mesh, positions_BQ=None):
  """Return the loss and its gradients, from a separately compiled program."""
  graph, params = model_cases.make(config)
  axes = None if mesh is None else shard_axes(mesh, HEADS)
  tokens_BT = np.arange(B * T).reshape(B, T) % config.vocab_size

  def loss(params):
    logits = nnx.merge(graph, params)(
      tokens_BT, positions_to_predict=positions_BQ, axes=axes
    )
    return jnp.square(logits.astype(jnp.float32)).mean()

  run = jax.jit(jax.value_and_grad(loss))
  with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
    return jax.device_get(run(params))


@pytest.fixture
def shapes(interpreted, monkeypatch) -> dict[str, set]:
  """Record the shapes of each kernel's first argument, by the kernel's name."""
  from pallas_kernels.gated_conv import gpu as gated_conv
  from pallas_kernels.gelu import gpu as gelu
  from pallas_kernels.layer_norm import gpu as add_norm

  seen = {}

  def spy(name, module, function):
    call = getattr(module, function)

    @functools.wraps(call)
    def seeing(x, *args, **kwargs):
      seen.setdefault(name, set()).add(x.shape)
      return call(x, *args, **kwargs)

    monkeypatch.setattr(module, function, seeing)

  for function in ("forward", "backward"):
    spy("gelu", gelu, function)
    spy("add_norm", add_norm, function)
  spy("conv", gated_conv, "backward")
  return seen


def _assert_near(found, wanted) -> None:
  error = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))
  errors = jax.tree.map(error, found, wanted)
  paths = jax.tree.flatten_with_path(errors)[0]
  # Gradients of q and k in two bfloat16 runs are up to 8e-2 apart. Terms that a
  # device lacks or counts twice would give 0.5 or more.
  assert not {jax.tree_util.keystr(k): e for k, e in paths if e > 0.15}


def test_tensor_and_context_mesh_equals_one_device(shapes, monkeypatch) -> None:
  mesh = make_mesh(MeshConfig(tensor=2, context=2), jax.devices()[:4])
  positions_BQ = np.tile(np.array([1, 5, 6]), (B, 1))
  found = _run(_config(), mesh, positions_BQ)
  rows = B * T // 2
  assert shapes == {
    "gelu": {(rows, HIDDEN // 2)},
    # The last norms see the chosen positions, whose time is not split.
    "add_norm": {(rows, D), (B * 3, D)},
  }
  monkeypatch.setattr(devices, "is_hopper", lambda: False)
  _assert_near(found, _run(_config(), None, positions_BQ))


def test_fsdp_mesh_equals_one_device(shapes, monkeypatch) -> None:
  config = _config(BaseConvConfig())
  mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
  found = _run(config, mesh)
  rows = B // 2 * T
  assert shapes == {
    "gelu": {(rows, HIDDEN)},
    "add_norm": {(rows, D)},
    "conv": {(B // 2, T, D)},
  }
  monkeypatch.setattr(devices, "is_hopper", lambda: False)
  _assert_near(found, _run(config, None))
