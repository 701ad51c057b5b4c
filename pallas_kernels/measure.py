"""Inputs, errors and times of the attention operator, for benchmarks.

A time is the wall time of a run of calls that the device executes one after the
other, divided by their number. It is the median of several runs after a warm
one. Benchmarks check values before they time: `relative` gives the distance
from a reference, ‖a − b‖ / ‖b‖.
"""

from collections.abc import Callable, Sequence
import functools
import time

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from pallas_kernels.polynomial.api import polynomial_attention
from pallas_kernels.polynomial.arg_specs import ArgSpec

# The largest ‖a − b‖ / ‖b‖ of a correct result. bfloat16 operands give 3e-3 to
# 6e-3; the rest is for early tokens whose cotangent `settled` keeps.
TOLERANCE = 1e-2
# Names of what `forward_and_backward` returns.
RESULTS = ("o", "dq", "dk", "dv")
# Compiler options of programs that are not timed. Without them XLA times its
# GPU kernels while it compiles, which is slow and disturbs other timings.
UNTIMED = {"xla_gpu_autotune_level": 0}
# The length of a run: long enough that starting and waiting do not count.
_RUN_SECONDS = 0.02


def normal(shapes: Sequence[tuple[int, ...]]) -> list[Array]:
  """Return bfloat16 arrays from N(0, 1), the same in every call."""
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return [
    jax.random.normal(key, shape, jnp.bfloat16)
    for key, shape in zip(keys, shapes, strict=True)
  ]


def inputs(spec: ArgSpec) -> list[Array]:
  """Return bfloat16 q, k (B, T, H, F), v and o's cotangent (B, T, H, P)."""
  q, k, v = spec.arrays()
  return normal([x.shape for x in (q, k, v, v)])


def operator(spec: ArgSpec, implementation: str | None) -> Callable:
  """Return the function (q, k, v) → o of one implementation.

  Args:
    spec: gives the coefficients.
    implementation: as in `polynomial_attention`.
  """
  return functools.partial(
    polynomial_attention,
    coefficients=spec.coefficients,
    implementation=implementation,
  )


def forward_and_backward(call: Callable) -> Callable:
  """Return the function (q, k, v, do) → (o, dq, dk, dv) of an operator."""

  def run(q, k, v, do):
    o, pull = jax.vjp(call, q, k, v)
    return o, *pull(do)

  return run


def settled(do: Array, tokens: int = 64) -> Array:
  """Return the cotangent with zeros at the first tokens, for checks.

  A query with a short past may have Σ sim near 0. Its gradient is then a
  difference of large terms that are nearly equal, which rounding decides. A few
  such rows in a few hundred dominate the norm of the whole gradient.

  Args:
    do: the cotangent of o, (B, T, H, P).
    tokens: how many tokens of a row are zeroed, at most half of the row.
  """
  T = do.shape[1]
  return do.at[:, : min(tokens, T // 2)].set(0)


def relative(found: Sequence[Array], expected: Sequence[Array]) -> list[float]:
  """Return ‖a − b‖ / ‖b‖ of each pair, in float32; NaN if a has a NaN."""

  def norm(x: Array) -> Array:
    return jnp.linalg.norm(x.astype(jnp.float32).ravel())

  return [
    float(norm(a.astype(jnp.float32) - b.astype(jnp.float32)) / norm(b))
    for a, b in zip(found, expected, strict=True)
  ]


def milliseconds(
  call: Callable[[], object], budget: float = 0.3, runs: int = 9
) -> float:
  """Return the median time of a call in milliseconds.

  Args:
    call: returns arrays.
    budget: seconds that the measurement may take, about.
    runs: the most runs. A slow call has fewer, but at least three after the
      warm one.
  """
  jax.block_until_ready(call())
  first = _seconds(call, 1)
  calls = max(1, min(100, int(_RUN_SECONDS / first)))
  runs = max(3, min(runs, int(budget / (calls * first))))
  return 1e3 * float(np.median([_seconds(call, calls) for _ in range(runs)]))


def _seconds(call: Callable[[], object], calls: int) -> float:
  """Return the wall time of a call in a run of `calls` of them, in seconds."""
  start = time.perf_counter()
  for _ in range(calls):
    result = call()
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / calls
