"""Shared checks of the Hopper kernels over rows."""

from collections.abc import Callable

import jax
import numpy as np
import pytest

from pallas_kernels import devices


def on_the_card(test: Callable) -> Callable:
  """A test that runs where there is a Hopper GPU."""
  alone = pytest.mark.skipif(not devices.is_hopper(), reason="no Hopper GPU")
  return pytest.mark.gpu(alone(test))


def same_bits(call: Callable, *inputs) -> tuple:
  """Return a call's arrays, after a second call gave bit-identical ones."""
  found, again = (jax.device_get(call(*inputs)) for _ in range(2))
  for a, b in zip(found, again, strict=True):
    np.testing.assert_array_equal(a, b)
  return found


def assert_gradients_near(found, wanted, limit: float) -> None:
  """Each by its norm, of trees of the same shape."""
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    a, b = np.float64(a), np.float64(b)
    assert np.linalg.norm(a - b) <= limit * np.linalg.norm(b)


def assert_lowers(
  call: Callable, *inputs, kernel: str, programs: int = 2
) -> None:
  """To Mosaic GPU: so many programs at least, `kernel` among them.

  Where jax has 64 bits too.
  """
  for wide in (False, True):
    with jax.enable_x64(wide):
      traced = jax.jit(call).trace(*inputs)
      text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert kernel in text and text.count("mosaic_gpu_v2") >= programs
