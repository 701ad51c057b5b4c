"""Inputs of the two recurrences, and their values and gradients."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import WKVState, selective_scan, wkv
from pallas_kernels.numerics import sum_dtype

SCAN_NAMES = ("x", "delta", "A", "B", "C", "initial_state")
WKV_NAMES = ("k", "v", "w", "u", "initial_state")


def scan_inputs(
  rows: int, T: int, I: int, N: int, dtype: str, low: float, high: float
) -> dict[str, Any]:
  """Return x, Δ log-uniform in [low, high], A = −1 … −N, B, C and h."""
  rng = np.random.default_rng(T)
  normal = lambda *shape: rng.normal(size=shape)
  delta = np.exp(rng.uniform(np.log(low), np.log(high), (rows, T, I)))
  arrays = dict(
    x=normal(rows, T, I),
    delta=delta,
    A=-np.tile(np.arange(1.0, N + 1), (I, 1)),
    B=normal(rows, T, N),
    C=normal(rows, T, N),
    initial_state=normal(rows, I, N),
  )
  return {
    name: np.float32(x).astype(jnp.dtype(dtype)) for name, x in arrays.items()
  }


def wkv_inputs(
  rows: int, T: int, D: int, dtype: str, k_scale: float
) -> dict[str, Any]:
  """Return k of this size, v, w from −e⁻⁹ to −e³, u and a state."""
  rng = np.random.default_rng(T)
  normal = lambda *shape: np.float32(rng.normal(size=shape))
  state = normal(rows, D), np.abs(normal(rows, D)) + 0.5, normal(rows, D)
  return dict(
    k=(k_scale * normal(rows, T, D)).astype(jnp.dtype(dtype)),
    v=normal(rows, T, D).astype(jnp.dtype(dtype)),
    w=-np.exp(np.linspace(-9, 3, D, dtype=np.float32)),
    u=normal(D),
    initial_state=WKVState(*map(np.float32, state)),
  )


def documents(rows: int, T: int, chance: float) -> np.ndarray:
  """Return segment ids whose documents end at random, with this chance."""
  rng = np.random.default_rng(T)
  return np.cumsum(rng.random((rows, T)) < chance, axis=1).astype(np.int32)


def answer(
  operator: Callable,
  inputs: dict[str, Any],
  ids: Any,
  implementation: str | None,
) -> dict[str, Any]:
  """Return an operator's results, and the gradients of a weighted sum."""
  weights = np.random.default_rng(1).normal(size=3).astype(np.float32)
  arrays = jax.tree.map(jnp.asarray, inputs)
  found = _with_gradients(operator, implementation, arrays, ids, weights)
  return jax.tree.map(lambda x: np.asarray(x, np.float64), found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _with_gradients(operator, implementation, inputs, ids, weights):
  def loss(inputs):
    y, state = operator(
      **inputs, segment_ids=ids, implementation=implementation
    )
    if operator is wkv:
      scale = jnp.exp(state.maximum)
      state = state.numerator * scale, state.denominator * scale
    state = jax.tree.map(lambda x: x.astype(sum_dtype(x.dtype)), state)
    wide = jax.tree.leaves(state)[0].dtype
    wave = jnp.cos(jnp.arange(y.size, dtype=wide)).reshape(y.shape)
    sums = [(wave * y.astype(wide)).sum()]
    sums += [x.sum() for x in jax.tree.leaves(state)]
    pairs = zip(weights.astype(wide)[: len(sums)], sums, strict=True)
    return sum(w * x for w, x in pairs), (y, state)

  grads, results = jax.grad(loss, has_aux=True)(inputs)
  return dict(results=results, grads=grads)


def exact(
  operator: Callable, inputs: dict[str, Any], ids: Any
) -> dict[str, Any]:
  """Return `answer` by XLA in float64, on the same inputs."""
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
    return answer(operator, wide, ids, "xla")


def assert_near(found: Any, wanted: Any, limit: float) -> None:
  """Compare each array by ‖a − b‖ / ‖b‖."""
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(found),
    jax.tree.leaves(wanted),
    strict=True,
  )
  for (path, a), b in pairs:
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert error <= limit, (jax.tree_util.keystr(path), error)


SCAN, WKV = selective_scan, wkv
