"""A jax that cannot import the kernels: XLA runs, and the reason is given."""

import re
import sys
import types
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


@pytest.mark.parametrize(
  ("platform", "capability", "dtype", "width", "reason"),
  [
    ("gpu", "9.0", "bfloat16", 256, None),
    ("gpu", "9.0", "float16", 264, "multiple of 8, at most 256 .* it is 264"),
    ("gpu", "8.0", "bfloat16", 128, None),
    ("gpu", "8.0", "bfloat16", 136, "multiple of 8, at most 128 .* it is 136"),
    ("gpu", "10.0", "bfloat16", 256, None),
    ("gpu", "9.0", "bfloat16", 12, "multiple of 8"),
    ("gpu", "9.0", "float32", 64, "bfloat16 or float16, not float32"),
    ("gpu", "7.5", "bfloat16", 64, "8.0 or above; a kind has 7.5"),
    ("gpu", "gfx942", "bfloat16", 64, "an NVIDIA GPU .* has gfx942"),
    ("gpu", None, "bfloat16", 64, "an NVIDIA GPU .* has unknown"),
    ("tpu", "9.0", "bfloat16", 64, "a GPU; this process runs on tpu"),
  ],
)
def test_what_cudnn_can_do(
  monkeypatch, platform, capability, dtype, width, reason
) -> None:
  device = types.SimpleNamespace(platform=platform, device_kind="a kind")
  if capability is not None:
    device.compute_capability = capability

  def attached(name=platform):
    if name != platform:
      raise RuntimeError(f"no {name}")
    return [device]

  monkeypatch.setattr(jax, "devices", attached)
  found = devices.why_not_cudnn(dtype, width)
  assert found is None if reason is None else re.search(reason, found)


def test_names_of_operators_are_functions() -> None:
  """A package of the same name does not hide its operator."""
  import pallas_kernels
  import pallas_kernels.gelu.xla

  for name in pallas_kernels.__all__:
    assert hasattr(pallas_kernels, name)
  for name in ("cross_entropy", "gated_conv", "gelu", "layer_norm", "wkv"):
    assert callable(getattr(pallas_kernels, name))
