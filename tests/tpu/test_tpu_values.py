"""Values of the TPU kernels, interpreted, against the float64 oracle.

Pallas's TPU interpret mode fills memory with NaN and watches for races. It
splits the parallel axes of the grid over two cores, as a v5p has them; on jax
0.10 it uses one core. Blocks have 32 tokens here, where the compiled kernels
have thousands.
"""

import functools
import itertools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
from polynomial_cases import (
  COEFFICIENTS,
  Cell,
  attention,
  errors,
  lone_error,
  make_inputs,
  value_and_gradients,
)
from polynomial_documents import (
  assert_bit_identical,
  assert_others_identical,
  assert_spoilt,
  spoil,
)
import polynomial_oracle as po
import pytest

import pallas_kernels as pk
from pallas_kernels import devices
from pallas_kernels.polynomial.tpu import sizes

ONE_CORE = pltpu.InterpretParams(detect_races=True)
TWO_CORES = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
# jax 0.10 compiles again at each call if it interprets two cores.
_NEWER_JAX = hasattr(pltpu.InterpretParams, "on_race")
PARAMS = TWO_CORES if _NEWER_JAX else ONE_CORE
_RACE = "RACE DETECTED"
SIZES = sizes.Sizes(chunk=16, span=16, block=32)
CELLS = [
  Cell(70, 16, 64, "rebased", "random", False, "none", "bfloat16", False),
  Cell(70, 16, 5, "based", "clustered", True, "random", "bfloat16", True),
  Cell(33, 8, 1, "based", "random", True, "own", "float32", True),
  Cell(40, 32, 42, "rebased", "clustered", True, "random", "float32", True),
  Cell(1, 8, 128, "rebased", "random", True, "none", "float32", True),
]


@pytest.fixture(autouse=True)
def a_tpu(monkeypatch, capsys):
  """Make calls take this machine for a TPU, and interpret the kernels."""
  monkeypatch.setitem(devices.KERNEL_PLATFORMS, "tpu", ("tpu", "cpu"))
  monkeypatch.setattr(sizes, "sizes_for", lambda *_: SIZES)
  with pltpu.force_tpu_interpret_mode(PARAMS):
    yield
  # jax 0.10 prints a race; jax 0.12 raises.
  assert _RACE not in capsys.readouterr().out


def test_interpreter_finds_a_race(capsys):
  """Two cores write the same block."""

  def body(x_ref, o_ref):
    o_ref[...] = x_ref[...]

  try:
    with pltpu.force_tpu_interpret_mode(TWO_CORES):
      kernel = pl.pallas_call(
        body,
        grid=(4,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
      )
      jax.block_until_ready(kernel(jnp.ones((32, 128))))
    found = capsys.readouterr().out
  except jax.errors.JaxRuntimeError as error:
    found = str(error)
  assert _RACE in found


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def answer(x, coefficients, final=True, axes=None):
  call = attention(
    coefficients, implementation="tpu", return_state=final, axes=axes
  )
  return value_and_gradients(call, x)


def tolerance(name: str, dtype: str, keys: str) -> float:
  if dtype == "float32":
    # As for "xla": see test_polynomial_values.py.
    return 1e-5 if name in ("o", "dv", "kv", "kk") else 5e-5
  # bfloat16 rounds to 2⁻⁹ of an element: sim, the features, the states and da
  # on the way, and the outputs. Rows of clustered keys are alike, so that their
  # roundings do not average out.
  return 5e-3 if keys == "random" else 2e-2


def check(cell: Cell) -> None:
  numbers = getattr(po, cell.coefficients.upper())
  named = cell._asdict() | {"coefficients": numbers}
  x = make_inputs(1, H=2, **named)
  got = answer(x, COEFFICIENTS[cell.coefficients], cell.final)
  found = errors(got, po.oracle(x, numbers))
  least = lone_error(x) if cell.boundaries == "own" or cell.T == 1 else 0
  for name, error in found.items():
    allowed = max(tolerance(name, cell.dtype, cell.keys), least)
    assert error <= allowed, (name, found, cell)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_equals_oracle(cell):
  check(cell)


@pytest.mark.parametrize(
  "cell",
  [
    Cell(40, 8, 5, "based", "random", True, "random", "float32", True),
    Cell(40, 8, 1, "rebased", "random", False, "none", "float32", True),
  ],
  ids=str,
)
def test_values_padded_to_tiles(cell, monkeypatch):
  """As where VMEM does not hold the heads whose values are whole tiles."""
  monkeypatch.setattr(sizes, "VMEM_LIMIT", 0)
  jax.clear_caches()
  check(cell)
  jax.clear_caches()


def test_tiny_eps_where_all_similarities_are_0():
  """A float32 holds r = 1 / eps, but not r²."""
  q = np.random.default_rng(0).normal(size=(1, 20, 1, 8)).astype(np.float32)
  q[:, ::3] = 0

  def grads(name):
    def loss(q, k, v):
      o = pk.polynomial_attention(q, k, v, eps=1e-25, implementation=name)
      return jnp.square(o).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))(q, q, q + 1)

  for got, want in zip(grads("tpu"), grads("xla"), strict=True):
    # float32 sums in another order, some of them of terms that cancel.
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-5 * abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("F", [8, 16, 32, 64])
@pytest.mark.parametrize("T", [1, 31, 32, 33, 100])
def test_equals_oracle_on_the_grid(T, F, dtype):
  names = ("rebased", "based"), ("random", "clustered"), (False, True)
  boundaries = itertools.cycle(["none", "random", "chunk", "own"])
  widths = itertools.cycle([1, 5, 64, 12, 128])
  for coefficients, keys, state in itertools.product(*names):
    for final in (False, True):
      P, where = next(widths), next(boundaries)
      cell = Cell(T, F, P, coefficients, keys, state, where, dtype, final)
      check(cell)
  jax.clear_caches()


@pytest.mark.parametrize(
  "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def test_documents_are_isolated(dtype):
  """Each document is spoilt in turn; the others stay bit-identical."""
  boundaries = (0, 11, 30, 48, 70)  # blocks have 32 tokens, chunks 16
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
  ids_T = np.searchsorted(boundaries[1:], np.arange(70), side="right") % 2
  x = x._replace(ids_BT=ids_T[None].astype(np.int32))
  clean = answer(x, pk.BASED)
  assert np.isfinite(np.asarray(clean.dk, np.float32)).all()
  for start, stop in itertools.pairwise(boundaries):
    document, token = slice(start, stop), start + 4
    for field in ("q_BTHF", "k_BTHF", "v_BTHP", "do_BTHP"):
      how = "inf" if field == "v_BTHP" else "nan"
      got = answer(spoil(x, field, token, how), pk.BASED)
      assert_others_identical(got, clean, document, ("o", "dq", "dk", "dv"))
      if stop != 70:
        assert_bit_identical(got.after, clean.after)
      if start != 0:
        assert_bit_identical(got.dstate, clean.dstate)
      assert_spoilt(got, field, document, token)


def test_vmap_equals_one_call_for_each():
  """Over q's last axis and v's first; k is not mapped."""
  x = make_inputs(1, 40, 1, 8, 3)
  q = np.stack([x.q_BTHF, 2 * x.q_BTHF + 1], axis=-1)
  v = np.stack([x.v_BTHP, -x.v_BTHP[:, ::-1]])

  def loss(q, k, v):
    o = pk.polynomial_attention(q, k, v, implementation="tpu")
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
def test_mesh_gives_the_answer_of_one_device(documents):
  """Batch, heads and time are each split in two."""
  boundaries = "random" if documents else "none"
  x = make_inputs(
    2,
    80,
    2,
    8,
    3,
    coefficients=po.BASED,
    state=True,
    boundaries=boundaries,
    final=True,
  )
  names = ("data", "model", "sequence")
  mesh = jax.make_mesh((2, 2, 2), names, axis_types=(AxisType.Auto,) * 3)
  # Eight devices of two cores each would wait for each other's threads.
  one_core = pltpu.force_tpu_interpret_mode(ONE_CORE)
  with one_core, jax.set_mesh(mesh):
    got = answer(x, pk.BASED, True, pk.ShardAxes(*names))
  found = errors(got, po.oracle(x, po.BASED))
  for name, error in found.items():
    assert error <= tolerance(name, "float32", "random"), (name, found)
