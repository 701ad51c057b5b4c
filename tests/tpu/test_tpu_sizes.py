"""Which calls run the TPU kernels, and with which sizes."""

import functools
import itertools
import json
from pathlib import Path
import re

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from pallas_kernels import devices
from pallas_kernels.polynomial import arg_specs
from pallas_kernels.polynomial.operator import Kernel
from pallas_kernels.polynomial.tpu import sizes


@pytest.mark.parametrize(
  "change, word",
  [
    (dict(F=24), "F=24"),
    (dict(P=129), "P=129"),
    (dict(dtype="float16"), "float16"),
    (dict(coefficients=pk.Coefficients(1.0, 1.0, 0.0)), "c2"),
  ],
)
def test_unsupported_call_names_the_reason(change, word):
  call = dict(F=16, P=4, dtype="bfloat16", coefficients=pk.REBASED) | change
  q = jnp.ones((1, 4, 1, call["F"]), call["dtype"])
  v = jnp.ones((1, 4, 1, call["P"]), call["dtype"])
  run = functools.partial(
    pk.polynomial_attention, q, q, v, coefficients=call["coefficients"]
  )
  with pytest.raises(NotImplementedError, match=f"{word}.*'xla' does"):
    run(implementation="tpu")


def test_tpu_runs_the_kernels_by_default(monkeypatch):
  with pytest.raises(NotImplementedError, match="needs a TPU"):
    devices.check_tpu()
  monkeypatch.setattr(devices, "_device", lambda: ("tpu", "TPU v5e"))
  assert pk.which_implementation()[0] == "tpu"
  assert pk.which_implementation("tpu")[0] == "tpu"
  q = jnp.ones((1, 4, 1, 24))
  with pytest.warns(UserWarning, match="runs 'xla'.*F=24"):
    pk.polynomial_attention(q, q, q)


def test_other_tpu_runs_xla_with_a_warning(monkeypatch):
  monkeypatch.setattr(devices, "_device", lambda: ("tpu", "TPU v4"))
  assert pk.which_implementation()[0] == "xla"
  q = jnp.ones((1, 4, 1, 8))
  with pytest.warns(UserWarning, match="runs 'xla'.*a TPU v4"):
    pk.polynomial_attention(q, q, q)
  with pytest.raises(NotImplementedError, match="a TPU v4"):
    pk.polynomial_attention(q, q, q, implementation="tpu")


@pytest.mark.parametrize("kernel", ["forward", "backward_keys"])
@pytest.mark.parametrize("F", [8, 16, 32, 64])
@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e"])
def test_sizes_fit_every_length(generation, F, kernel, monkeypatch):
  monkeypatch.setattr(devices, "tpu_generation", lambda: generation)
  for T in (1, 127, 128, 129, 500, 1024, 2049, 4096, 5000, 65536, 100001):
    chunk, span, block = sizes.sizes_for(kernel, F, T)
    assert chunk % 128 == span % chunk == block % span == 0
    work = -(-T // block) * block
    assert work <= max(1.25 * T + chunk, 256) + span, (T, chunk, span, block)
    assert work - T < block


def vmem_call(H: int, T: int, F: int, P: int, dtype):
  kernel = Kernel(pk.BASED.scaled(F**-0.5), 1e-6)
  q, v = (jax.ShapeDtypeStruct((2, T, H, X), dtype) for X in (F, P))
  return sizes.make_call("backward_keys", q, v, kernel, documents=False)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("F", [8, 16, 32, 64])
def test_vmem_holds_every_shape(F, dtype):
  for H, P in itertools.product((1, 2, 7, 12, 25, 64), range(1, 129)):
    call = vmem_call(H, 9000, F, P, dtype)
    assert call.vmem_bytes <= sizes.VMEM_LIMIT, call
    assert call.heads * call.P % 8 == 0 or call.heads == H, call


@pytest.mark.parametrize("spec", arg_specs.SPECS, ids=lambda spec: spec.name)
def test_values_of_named_shapes_are_not_padded(spec):
  call = vmem_call(spec.H, spec.T, spec.F, spec.P, jnp.bfloat16)
  assert call.P == spec.P
  assert call.block == sizes.sizes_for("backward_keys", spec.F, spec.T).block


# The figures of the compiler's schedule, which chose the sizes.

_ROOT = Path(__file__).parents[2]
_KERNELS = ("forward", "backward_queries", "backward_keys")


@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e"])
def test_sizes_results_and_page_agree(generation):
  path = _ROOT / "benchmarks" / "results" / "tpu_schedule.json"
  figures = json.loads(path.read_text())["figures"]
  for name, F in itertools.product(_KERNELS, sizes.WIDTHS):
    result = figures[f"{generation}-F{F}"][name]
    chosen = sizes.best_sizes(generation, name, F)
    assert chosen._asdict() == {key: result[key] for key in chosen._fields}

  def count(name: str, F: int) -> float:
    return figures[f"{generation}-F{F}"][name]["bundles_per_token_head"]

  def together(F: int) -> float:
    return sum(count(name, F) for name in _KERNELS)

  page = (_ROOT / "docs" / "tpu.md").read_text()
  row = re.search(rf"^\| {generation} \|(.*)\|$", page, re.M)[1].split("|")
  forward, goal, queries, keys, both, both_goal = (float(x) for x in row)
  # The page rounds to two places, and below to one.
  found = [count(name, 16) for name in _KERNELS] + [together(16)]
  assert [forward, queries, keys, both] == pytest.approx(found, abs=0.0051)
  assert forward <= goal and both <= both_goal
  at = ["v5e", "v5p", "v6e"].index(generation)
  for F in (8, 32, 64):
    others = re.search(rf"F = {F}: ([\d., ]+\d)", page)[1].split(", ")
    assert float(others[at]) == pytest.approx(together(F), abs=0.051)
