"""A jax that cannot import the kernels: XLA runs, and the reason is given."""

import sys
import warnings

import jax
import numpy as np
import pytest

from pallas_kernels import devices, gelu


@pytest.fixture
def broken(monkeypatch):
  """As on a Hopper GPU whose jax has moved what the kernels import."""
  monkeypatch.setattr(devices, "is_hopper", lambda: True)
  # An entry of None makes Python's import fail.
  monkeypatch.setitem(sys.modules, "pallas_kernels.gelu.gpu", None)
  devices.can_import_kernels.cache_clear()
  yield
  devices.can_import_kernels.cache_clear()


def test_xla_runs_with_one_warning(broken) -> None:
  x, bias = np.ones((2, 3, 128), np.float16), np.ones(128, np.float32)
  with pytest.warns(UserWarning, match=f"XLA runs.*jax {jax.__version__}"):
    jaxpr = jax.make_jaxpr(gelu)(x, bias)
  assert "pallas" not in str(jaxpr) and "erf" in str(jaxpr)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    jax.make_jaxpr(lambda *x: gelu(*x))(x, bias)


@pytest.mark.parametrize("error", [ImportError, AttributeError, TypeError])
def test_a_failed_import_says_why(error) -> None:
  message = f"implementation='tpu'.*jax {jax.__version__}.*gone.*'xla'"
  with (
    pytest.raises(NotImplementedError, match=message),
    devices.kernel_imports("tpu"),
  ):
    raise error("gone")


def test_names_of_operators_are_functions() -> None:
  """A package of the same name does not hide its operator."""
  import pallas_kernels
  import pallas_kernels.gelu.xla

  for name in pallas_kernels.__all__:
    assert hasattr(pallas_kernels, name)
  for name in ("cross_entropy", "gated_conv", "gelu", "layer_norm", "wkv"):
    assert callable(getattr(pallas_kernels, name))
