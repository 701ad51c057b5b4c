"""The timer of benchmarks."""

import jax.numpy as jnp

from pallas_kernels import measure


def test_milliseconds_runs_the_call_many_times():
  calls = []
  ms = measure.milliseconds(lambda: calls.append(1) or jnp.zeros(()))
  assert 0 < ms < 1000 and len(calls) > 5
