"""Inputs, values and times of a call, for tuning and for benchmarks.

Times are wall times of a run of calls that the device works off one after the
other, divided by their number; the median of several runs, after warm ones.
Nothing is timed here before its values are known: `relative` says how far they
are from a reference, ‖a − b‖ / ‖b‖.
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

# Of ‖a − b‖ / ‖b‖. bfloat16 operands give 3e-3 to 6e-3; the rest is for the
# first tokens that `settled` keeps.
TOLERANCE = 1e-2
RESULTS = ("o", "dq", "dk", "dv")
# Options of programs that are not timed: on a GPU XLA times its own kernels as
# it compiles, which takes long and wants the device to itself.
UNTIMED = {"xla_gpu_autotune_level": 0}
_RUN_SECONDS = 0.02  # of calls in a run, so that its two ends do not count


def normal(shapes: Sequence[tuple[int, ...]]) -> list[Array]:
  """bfloat16 arrays from N(0, 1), the same ones each time."""
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return [
    jax.random.normal(key, shape, jnp.bfloat16)
    for key, shape in zip(keys, shapes, strict=True)
  ]


def inputs(spec: ArgSpec) -> list[Array]:
  """q, k (B, T, H, F), v and the cotangent of o (B, T, H, P)."""
  q, k, v = spec.arrays()
  return normal([x.shape for x in (q, k, v, v)])


def operator(spec: ArgSpec, implementation: str | None) -> Callable:
  """(q, k, v) → o by one implementation."""
  return functools.partial(
    polynomial_attention,
    coefficients=spec.coefficients,
    implementation=implementation,
  )


def forward_and_backward(call: Callable) -> Callable:
  """(q, k, v, do) → o, dq, dk, dv."""

  def run(q, k, v, do):
    o, pull = jax.vjp(call, q, k, v)
    return o, *pull(do)

  return run


def settled(do: Array, tokens: int = 64) -> Array:
  """do with zeros for the first tokens, half a row's at most.

  For checks of gradients: a query of a short past may see Σ sim near 0, where
  the gradient is a difference of large equal terms that rounding rules. Rows of
  one head in a few hundred are enough to rule the norm of all.
  """
  T = do.shape[1]
  return do.at[:, : min(tokens, T // 2)].set(0)


def relative(found: Sequence[Array], expected: Sequence[Array]) -> list[float]:
  """‖a − b‖ / ‖b‖ of each pair, in float32; NaN where a has one."""
  norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32).ravel())
  return [
    float(norm(a.astype(jnp.float32) - b.astype(jnp.float32)) / norm(b))
    for a, b in zip(found, expected, strict=True)
  ]


def milliseconds(
  call: Callable[[], object], budget: float = 0.3, runs: int = 9
) -> float:
  """The median time of a call, in about `budget` seconds.

  A slow call runs fewer times, three at least after the warm one.
  """
  jax.block_until_ready(call())
  first = _seconds(call, 1)
  calls = max(1, min(100, int(_RUN_SECONDS / first)))
  runs = max(3, min(runs, int(budget / (calls * first))))
  return 1e3 * float(np.median([_seconds(call, calls) for _ in range(runs)]))


def _seconds(call: Callable[[], object], calls: int) -> float:
  start = time.perf_counter()
  for _ in range(calls):
    result = call()
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / calls
