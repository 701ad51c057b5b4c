"""The TPU kernels in Pallas's TPU interpret mode, against the float64 oracle.

The interpreter fills memory with NaN, and watches for races. Blocks are small
here: 32 tokens, where the compiled kernels have thousands.
"""

import functools
import itertools

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
from polynomial_cases import errors, make_inputs, value_and_gradients
import polynomial_oracle as po
import pytest
from test_polynomial_documents import (
  check_others_same,
  check_spoilt,
  same_bits,
  spoil,
)
from test_polynomial_values import COEFFICIENTS, Cell, lone_error

import pallas_kernels as pk
from pallas_kernels import _compat
from pallas_kernels.polynomial import tpu_sizes

SIZES = (16, 16, 32)  # tokens of a chunk, a span and a block
_UNPATCHED = _compat.tpu_generation
_SIZES = tpu_sizes.sizes
CELLS = [
  Cell(70, 16, 64, "rebased", "random", False, "none", "bfloat16", False),
  Cell(70, 16, 5, "based", "clustered", True, "random", "bfloat16", True),
  Cell(33, 8, 1, "based", "random", True, "own", "float32", True),
  Cell(40, 32, 42, "rebased", "clustered", True, "random", "float32", True),
  Cell(1, 8, 128, "rebased", "random", True, "none", "float32", True),
]


@pytest.fixture(autouse=True)
def a_tpu(monkeypatch):
  """Calls take this machine for a TPU, and interpret the kernels."""
  monkeypatch.setattr(_compat, "tpu_generation", lambda: "v5e")
  monkeypatch.setattr(tpu_sizes, "sizes", lambda *_: SIZES)
  params = pltpu.InterpretParams(detect_races=True)
  with pltpu.force_tpu_interpret_mode(params):
    yield


def attention(coefficients=pk.REBASED, axes=None, final=True):
  def f(q, k, v, ids, state):
    out = pk.polynomial_attention(
      q,
      k,
      v,
      coefficients=coefficients,
      segment_ids=ids,
      initial_state=None if state is None else pk.State(*state),
      return_state=final,
      axes=axes,
      implementation="tpu",
    )
    return out if final else (out, None)

  return f


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def answer(x, coefficients, final=True, axes=None):
  return value_and_gradients(attention(coefficients, axes, final), x)


def tolerance(name: str, dtype: str, keys: str) -> float:
  if dtype == "float32":
    # As for "xla", test_polynomial_values.py.
    return 1e-5 if name in ("o", "dv", "kv", "kk") else 5e-5
  # bfloat16 rounds at 2⁻⁹ of an element: sim, the features, the states and da
  # on the way, the outputs at last. Rows of clustered keys are alike, so their
  # roundings do not average out.
  return 5e-3 if keys == "random" else 2e-2


def check(cell: Cell) -> None:
  numbers = getattr(po, cell.coefficients.upper())
  named = cell._asdict() | {"coefficients": numbers}
  x = make_inputs(1, H=2, **named)
  got = answer(x, COEFFICIENTS[cell.coefficients], cell.final)
  found = errors(got, po.oracle(x, numbers))
  least = lone_error(x) if cell.borders == "own" or cell.T == 1 else 0
  for name, error in found.items():
    allowed = max(tolerance(name, cell.dtype, cell.keys), least)
    assert error <= allowed, (name, found, cell)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_equals_oracle(cell):
  check(cell)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("F", [8, 16, 32, 64])
@pytest.mark.parametrize("T", [1, 31, 32, 33, 100])
def test_equals_oracle_on_the_grid(T, F, dtype):
  names = ("rebased", "based"), ("random", "clustered"), (False, True)
  borders = itertools.cycle(["none", "random", "chunk", "own"])
  widths = itertools.cycle([1, 5, 64, 12, 128])
  for coefficients, keys, state in itertools.product(*names):
    for final in (False, True):
      P, border = next(widths), next(borders)
      cell = Cell(T, F, P, coefficients, keys, state, border, dtype, final)
      check(cell)
  jax.clear_caches()


@pytest.mark.parametrize(
  "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def test_documents_are_isolated(dtype):
  """Documents spoilt in turn; the others' bits do not change."""
  edges = (0, 11, 30, 48, 70)  # of blocks of 32, chunks of 16
  x = make_inputs(
    1,
    70,
    1,
    8,
    3,
    coefficients=po.BASED,
    state=True,
    final=True,
    dtype=dtype,
  )
  ids_T = np.searchsorted(edges[1:], np.arange(70), side="right") % 2
  x = x._replace(ids_BT=ids_T[None].astype(np.int32))
  clean = answer(x, pk.BASED)
  assert np.isfinite(np.asarray(clean.dk, np.float32)).all()
  for start, stop in itertools.pairwise(edges):
    rows, token = slice(start, stop), start + 4
    for field in ("q_BTHF", "k_BTHF", "v_BTHP", "do_BTHP"):
      how = "inf" if field == "v_BTHP" else "nan"
      got = answer(spoil(x, field, token, how), pk.BASED)
      check_others_same(got, clean, rows, ("o", "dq", "dk", "dv"))
      if stop != 70:
        jax.tree.map(same_bits, got.after, clean.after)
      if start != 0:
        jax.tree.map(same_bits, got.dstate, clean.dstate)
      check_spoilt(got, field, rows, token)


def test_vmap():
  """Over q's last axis and v's first, k not mapped: as one call for each."""
  x = make_inputs(1, 40, 1, 8, 3)
  q = np.stack([x.q_BTHF, 2 * x.q_BTHF + 1], axis=-1)
  v = np.stack([x.v_BTHP, -x.v_BTHP[:, ::-1]])

  def loss(q, k, v):
    o, _ = attention(final=False)(q, k, v, None, None)
    return jnp.vdot(o, x.do_BTHP, precision="highest")

  grad = jax.grad(loss, argnums=(0, 1, 2))
  dq, dk, dv = jax.jit(jax.vmap(grad, in_axes=(-1, None, 0)))(q, x.k_BTHF, v)
  for i in range(2):
    each = x._replace(q_BTHF=q[..., i], v_BTHP=v[i])
    want = po.oracle(each, po.REBASED)
    got = want._replace(dq=dq[i], dk=dk[i], dv=dv[i])
    assert max(errors(got, want).values()) <= 5e-5


@pytest.mark.parametrize(
  "documents", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_over_a_mesh(documents):
  """Batch, heads and time each split in two."""
  borders = "random" if documents else "none"
  x = make_inputs(
    2,
    80,
    2,
    8,
    3,
    coefficients=po.BASED,
    state=True,
    borders=borders,
    final=True,
  )
  names = ("data", "model", "sequence")
  mesh = jax.make_mesh((2, 2, 2), names, axis_types=(AxisType.Auto,) * 3)
  with jax.set_mesh(mesh):
    got = answer(x, pk.BASED, True, pk.ShardAxes(*names))
  found = errors(got, po.oracle(x, po.BASED))
  for name, error in found.items():
    assert error <= tolerance(name, "float32", "random"), (name, found)


@pytest.mark.parametrize(
  "change, word",
  [
    (dict(F=24), "F=24"),
    (dict(P=129), "P=129"),
    (dict(dtype="float16"), "float16"),
    (dict(coefficients=pk.Coefficients(1.0, 1.0, 0.0)), "c2"),
  ],
)
def test_what_it_cannot_do_is_named(change, word):
  call = dict(F=16, P=4, dtype="bfloat16", coefficients=pk.REBASED) | change
  q = jnp.ones((1, 4, 1, call["F"]), call["dtype"])
  v = jnp.ones((1, 4, 1, call["P"]), call["dtype"])
  run = functools.partial(
    pk.polynomial_attention, q, q, v, coefficients=call["coefficients"]
  )
  with pytest.raises(NotImplementedError, match=f"{word}.*'xla' does"):
    run(implementation="tpu")


def test_it_is_chosen_on_a_tpu(monkeypatch):
  with pytest.raises(NotImplementedError, match="needs a TPU"):
    _UNPATCHED()
  monkeypatch.setattr(_compat, "platform", lambda: "tpu")
  assert pk.which_implementation()[0] == "tpu"
  assert pk.which_implementation("tpu")[0] == "tpu"
  q = jnp.ones((1, 4, 1, 24))
  with pytest.warns(UserWarning, match="runs 'xla'.*F=24"):
    pk.polynomial_attention(q, q, q)


@pytest.mark.parametrize("kernel", ["forward", "backward_keys"])
@pytest.mark.parametrize("F", [8, 16, 32, 64])
@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e"])
def test_sizes_fit_every_length(generation, F, kernel, monkeypatch):
  monkeypatch.setattr(_compat, "tpu_generation", lambda: generation)
  for T in (1, 127, 128, 129, 500, 1024, 2049, 4096, 5000, 65536, 100001):
    chunk, span, block = _SIZES(kernel, F, T)
    assert chunk % 128 == span % chunk == block % span == 0
    work = -(-T // block) * block
    assert work <= max(1.25 * T + chunk, 256) + span, (T, chunk, span, block)
    assert work - T < block
