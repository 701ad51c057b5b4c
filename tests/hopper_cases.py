"""What tests of the Hopper kernels over rows share."""

from collections.abc import Callable

import jax
import pytest

from pallas_kernels import _compat


def on_the_card(test: Callable) -> Callable:
  """A test that runs where there is a Hopper GPU."""
  alone = pytest.mark.skipif(not _compat.is_hopper(), reason="no Hopper GPU")
  return pytest.mark.gpu(alone(test))


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
