"""Spans of chunks, the form that "xla" takes on GPUs, on the CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BASED, REBASED, devices, polynomial_attention
from pallas_kernels.polynomial import operator, xla
from pallas_kernels.polynomial.operator import Kernel, StaticArguments
from pallas_kernels.polynomial.state import EXACT, zero_state

EPS = 1e-6
# A row of 75 tokens has three spans of two chunks in the first, one span of
# five chunks in the second, and one chunk in the third.
TWO_CHUNKS = xla.PlainPasses(
  chunk=13, span_bytes=15_000, products=EXACT._replace(time_last=True)
)
FIVE_CHUNKS = xla.PlainPasses(chunk=16, span_bytes=2**30, products=EXACT)


def _inputs(T, B=2, H=2, F=4, P=3):
  keys = jax.random.split(jax.random.key(T), 4)
  widths = (F, F, P, P)
  return [
    jax.random.normal(key, (B, T, H, width))  # in x64 mode: float64
    for key, width in zip(keys, widths, strict=True)
  ]


def _values_and_gradients(attend, arrays, segment_ids, state):
  """Return o, the last state and all gradients of a function of both."""
  q, k, v, do = arrays

  def loss(q, k, v, state):
    o, after = attend(q, k, v, segment_ids, state)
    total = jnp.vdot(o, do)
    if after is not None:
      total += sum(jnp.vdot(x, x) for x in after)
    return total, (o, after)

  wanted = (0, 1, 2) if state is None else (0, 1, 2, 3)
  return jax.jit(jax.value_and_grad(loss, wanted, has_aux=True))(q, k, v, state)


@pytest.mark.parametrize("T", [1, 13, 75])
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("passes", [TWO_CHUNKS, FIVE_CHUNKS])
def test_spans_equal_the_equations(T, has_documents, has_state, passes):
  with jax.enable_x64(True):
    arrays = _inputs(T)
    coefficients = BASED if has_state else REBASED
    ids = state = None
    if has_documents:
      starts = np.random.default_rng(T).random((2, T)) < 0.1
      ids = jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)
    q, k, v, _ = arrays
    named = functools.partial(
      polynomial_attention,
      coefficients=coefficients,
      eps=EPS,
      implementation="reference",
    )
    if has_state:
      _, state = named(k, q, v, return_state=True)

    def expected(q, k, v, ids, state):
      found = named(
        *(q, k, v),
        segment_ids=ids,
        initial_state=state,
        return_state=has_state,
      )
      return found if has_state else (found, None)

    kernel = Kernel(coefficients.scaled(4**-0.5), EPS)
    static = StaticArguments(passes, kernel, None, has_state)
    found = functools.partial(operator.attend, static)
    results = [
      _values_and_gradients(attend, arrays, ids, state)
      for attend in (found, expected)
    ]
  for a, b in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8 * np.abs(b).max())


def test_a_span_holds_as_many_chunks_as_its_bytes():
  def tiling(passes, B, T, H, F, P):
    return passes.tiling(B, T, zero_state(B, H, F, P))

  assert tiling(TWO_CHUNKS, 2, 75, 2, 4, 3) == (3, 2, 13)
  assert tiling(FIVE_CHUNKS, 2, 75, 2, 4, 3) == (1, 5, 15)
  assert tiling(xla.CHUNKS, 2, 75, 2, 4, 3) == (2, 1, 38)
  # Twice the rows leave half of the chunks to a span.
  assert tiling(xla.SPANS, 64, 1024, 12, 16, 64) == (1, 8, 128)
  assert tiling(xla.SPANS, 128, 1024, 12, 16, 64) == (2, 4, 128)
  assert tiling(xla.SPANS, 4096, 1024, 12, 16, 64) == (8, 1, 128)


@pytest.mark.parametrize("passes", [TWO_CHUNKS, FIVE_CHUNKS])
@pytest.mark.parametrize("token", [0, 20, 74])
def test_a_nan_reaches_no_earlier_token(passes, token):
  q, k, v, _ = _inputs(75)
  static = StaticArguments(passes, Kernel(REBASED, EPS), None, False)
  attend = jax.jit(functools.partial(operator.attend, static))
  for poisoned in range(3):
    arrays = [q, k, v]
    arrays[poisoned] = arrays[poisoned].at[:, token].set(jnp.nan)
    o, _ = attend(*arrays, None, None)
    assert jnp.isfinite(o[:, :token]).all()
    assert jnp.isnan(o[:, token]).any()


def test_programs_for_a_gpu_have_spans_and_others_chunks(monkeypatch):
  """Each platform gets its form where calls are expected on a GPU."""
  monkeypatch.setattr(devices, "platform", lambda: "gpu")
  shape = jax.ShapeDtypeStruct((2, 512, 2, 16), jnp.bfloat16)
  call = functools.partial(polynomial_attention, implementation="xla")
  traced = jax.jit(lambda *x: call(*x)).trace(shape, shape, shape)

  def text(platform):
    return traced.lower(lowering_platforms=(platform,)).as_text()

  assert "while" not in text("cuda")  # four chunks in one span
  assert "BF16_BF16_F32_X3" in text("cuda") or "num_primitive" in text("cuda")
  assert "while" in text("cpu")
  assert "num_primitive" not in text("cpu")


def test_the_gpu_form_runs_on_the_cpu_in_its_own_form(monkeypatch):
  """Arrays on the CPU of a machine with a GPU take chunks: equal bits."""
  q, k, v, do = _inputs(75)
  call = functools.partial(polynomial_attention, implementation="xla")

  def results():
    o, pull = jax.vjp(lambda *x: call(*x), q, k, v)
    return o, *pull(do)

  wanted = jax.jit(results)()
  monkeypatch.setattr(devices, "platform", lambda: "gpu")
  found = jax.jit(lambda: results())()
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_static_numbers_are_hashable():
  assert hash(xla.spans(in_parts=True)) == hash(xla.spans(in_parts=True))
  assert xla.spans(in_parts=False) == xla.SPANS
  assert dataclasses.replace(xla.SPANS, chunk=64) != xla.SPANS
