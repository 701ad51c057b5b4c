"""Wrong arguments: every error names the argument, before any computation.

Shapes stand in for arrays, so that a computation could not run at all.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk


def array(*shape, dtype="float32"):
  return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def integers(*shape):
  return array(*shape, dtype="int32")


B, T, D, V, K, N = 2, 6, 8, 11, 3, 4
X, ROW = array(B, T, D), array(D)
AXES = pk.ShardAxes(batch="data")
STATE = pk.WKVState(array(B, D), array(B, D), array(B, D))

LAYER_NORM = dict(x=X, scale=ROW, bias=ROW)
ADD_LAYER_NORM = dict(x=X, y=X, scale=ROW, bias=ROW)
GELU = dict(x=X, bias=ROW)
CONV = dict(x=X, taps=array(K, D), bias=ROW)
GATED_CONV = dict(u=X, z=X, taps=array(K, D), bias=ROW)
CROSS_ENTROPY = dict(
  x=X,
  embedding=array(V, D),
  targets=integers(B, T),
  weights=array(B, T),
)
SCAN = dict(x=X, delta=X, A=array(D, N), B=array(B, T, N), C=array(B, T, N))
WKV = dict(k=X, v=X, w=ROW, u=ROW)
WKV_STEP = dict(k=array(B, D), v=array(B, D), w=ROW, u=ROW, state=STATE)

CASES = [
  (pk.layer_norm, LAYER_NORM, "x", r"\(…, D\)", dict(x=array())),
  (pk.layer_norm, LAYER_NORM, "x", "int32", dict(x=integers(B, T, D))),
  (pk.layer_norm, LAYER_NORM, "scale", r"\(8,\)", dict(scale=array(D + 1))),
  (pk.layer_norm, LAYER_NORM, "bias", r"\(8,\)", dict(bias=array(1))),
  (pk.layer_norm, LAYER_NORM, "bias", r"\(8,\)", dict(bias=array(T, D))),
  (pk.layer_norm, LAYER_NORM, "eps", "≥ 0", dict(eps=-1.0)),
  (pk.layer_norm, LAYER_NORM, "eps", "Python number", dict(eps=array())),
  (pk.layer_norm, LAYER_NORM, "eps", "nan", dict(eps=float("nan"))),
  (pk.add_layer_norm, ADD_LAYER_NORM, "y", "shape", dict(y=array(B, D))),
  (pk.add_layer_norm, ADD_LAYER_NORM, "scale", "shape", dict(scale=X)),
  (pk.add_layer_norm, ADD_LAYER_NORM, "y_bias", "shape", dict(y_bias=X)),
  (
    pk.add_layer_norm,
    ADD_LAYER_NORM,
    "x",
    r"\(B, T, D\)",
    dict(x=array(T, D), axes=AXES),
  ),
  (pk.gelu, GELU, "x", r"\(…, D\)", dict(x=array())),
  (pk.gelu, GELU, "x", r"\(B, T, D\)", dict(x=array(T, D), axes=AXES)),
  (pk.gelu, GELU, "bias", r"\(8,\)", dict(bias=array(T, D))),
  (pk.gelu, GELU, "bias", "int32", dict(bias=integers(D))),
  (pk.gelu, GELU, "axes", "no mesh", dict(axes=AXES)),
  (pk.causal_conv, CONV, "x", r"\(B, T, D\)", dict(x=array(T, D))),
  (pk.causal_conv, CONV, "taps", r"\(K, 8\)", dict(taps=array(K, 1))),
  (pk.causal_conv, CONV, "taps", "size 0", dict(taps=array(0, D))),
  (pk.causal_conv, CONV, "bias", "shape", dict(bias=array(1))),
  (
    pk.causal_conv,
    CONV,
    "initial_state",
    r"\(2, 2, 8\)",
    dict(initial_state=array(B, K, D)),
  ),
  (
    pk.causal_conv,
    CONV,
    "initial_state",
    "float16",
    dict(initial_state=array(B, K - 1, D, dtype="float16")),
  ),
  (pk.causal_conv, CONV, "segment_ids", "shape", dict(segment_ids=integers(T))),
  (
    pk.causal_conv,
    CONV,
    "segment_ids",
    "float32",
    dict(segment_ids=array(B, T)),
  ),
  (pk.gated_conv, GATED_CONV, "u", "shape", dict(u=array(D))),
  (pk.gated_conv, GATED_CONV, "z", "shape", dict(z=array(B, 1, D))),
  (
    pk.gated_conv,
    GATED_CONV,
    "z",
    "bfloat16",
    dict(z=array(B, T, D, dtype="bfloat16")),
  ),
  (pk.gated_conv, GATED_CONV, "z_bias", "shape", dict(z_bias=array(1))),
  (pk.cross_entropy, CROSS_ENTROPY, "x", "shape", dict(x=array(B, D))),
  (
    pk.cross_entropy,
    CROSS_ENTROPY,
    "embedding",
    r"\(V, 8\)",
    dict(embedding=array(D, V)),
  ),
  (
    pk.cross_entropy,
    CROSS_ENTROPY,
    "targets",
    r"\(2, 6\)",
    dict(targets=integers(B)),
  ),
  (
    pk.cross_entropy,
    CROSS_ENTROPY,
    "targets",
    "expected integers",
    dict(targets=array(B, T)),
  ),
  (
    pk.cross_entropy,
    CROSS_ENTROPY,
    "weights",
    "int32",
    dict(weights=integers(B, T)),
  ),
  (pk.cross_entropy, CROSS_ENTROPY, "parts", "≥ 1", dict(parts=0)),
  (pk.cross_entropy, CROSS_ENTROPY, "parts", "≥ 1", dict(parts=2.0)),
  (pk.cross_entropy, CROSS_ENTROPY, "parts", "divisor", dict(parts=4)),
  (
    pk.cross_entropy,
    CROSS_ENTROPY,
    "axes",
    "no mesh",
    dict(parts=2, axes=AXES),
  ),
  (pk.selective_scan, SCAN, "x", "size 0", dict(x=array(B, 0, D))),
  (pk.selective_scan, SCAN, "delta", "shape", dict(delta=array(B, T, 1))),
  (pk.selective_scan, SCAN, "A", r"\(8, N\)", dict(A=array(N, D))),
  (pk.selective_scan, SCAN, "B", r"\(2, 6, 4\)", dict(B=array(B, T, D))),
  (
    pk.selective_scan,
    SCAN,
    "C",
    "float16",
    dict(C=array(B, T, N, dtype="float16")),
  ),
  (
    pk.selective_scan,
    SCAN,
    "initial_state",
    r"\(2, 8, 4\)",
    dict(initial_state=array(B, N, D)),
  ),
  (
    pk.selective_scan,
    SCAN,
    "segment_ids",
    "shape",
    dict(segment_ids=integers(B, 1)),
  ),
  (pk.selective_scan, SCAN, "chunk", "≥ 1", dict(chunk=0)),
  (
    pk.selective_scan,
    SCAN,
    "implementation",
    "gpu",
    dict(implementation="tpu"),
  ),
  (pk.wkv, WKV, "k", "size 0", dict(k=array(B, 0, D))),
  (pk.wkv, WKV, "v", "float16", dict(v=array(B, T, D, dtype="float16"))),
  (pk.wkv, WKV, "w", "bfloat16", dict(w=array(D, dtype="bfloat16"))),
  (pk.wkv, WKV, "u", "shape", dict(u=array(1))),
  (
    pk.wkv,
    WKV,
    "initial_state",
    "expected a WKVState",
    dict(initial_state=(X, X, X)),
  ),
  (
    pk.wkv,
    WKV,
    r"initial_state\.denominator",
    "shape",
    dict(initial_state=STATE._replace(denominator=ROW)),
  ),
  (pk.wkv, WKV, "segment_ids", "float32", dict(segment_ids=array(B, T))),
  (pk.wkv, WKV, "implementation", "gpu", dict(implementation="tpu")),
  (pk.wkv_step, WKV_STEP, "k", r"\(B, D\)", dict(k=X)),
  (pk.wkv_step, WKV_STEP, "v", "shape", dict(v=array(B, 1))),
  (pk.wkv_step, WKV_STEP, "state", "WKVState", dict(state=None)),
]


@pytest.mark.parametrize(
  "operator, good, name, part, bad",
  CASES,
  ids=[f"{case[0].__name__}-{case[2]}-{n}" for n, case in enumerate(CASES)],
)
def test_the_message_starts_with_the_argument(operator, good, name, part, bad):
  call = lambda arrays: operator(**arrays)
  with pytest.raises(ValueError, match=rf"^{name}\b.*({part})"):
    operator(**good | bad)
  # The same call with the right argument is traced without an error.
  options = {k: v for k, v in bad.items() if k in good}
  if options:
    jax.eval_shape(call, good)


# The same of all operators. Each comes with arguments that it takes.

F, H, M, P = 3, 2, 2, 5
QUERIES, VALUES = array(B, T, H, F), array(B, T, H, P)
POLYNOMIAL = dict(q=QUERIES, k=QUERIES, v=VALUES, segment_ids=integers(B, T))
POLYNOMIAL_STATE = jax.eval_shape(lambda: pk.zero_state(B, H, F, P))
STEP_INPUTS = dict(q=array(B, H, F), k=array(B, H, F), v=array(B, H, P))
OPERATORS = {
  pk.layer_norm: LAYER_NORM,
  pk.add_layer_norm: ADD_LAYER_NORM | dict(y_bias=ROW),
  pk.gelu: GELU,
  pk.causal_conv: CONV
  | dict(initial_state=array(B, K - 1, D), segment_ids=integers(B, T)),
  pk.gated_conv: GATED_CONV | dict(z_bias=ROW, segment_ids=integers(B, T)),
  pk.cross_entropy: CROSS_ENTROPY,
  pk.selective_scan: SCAN
  | dict(initial_state=array(B, D, N), segment_ids=integers(B, T)),
  pk.wkv: WKV | dict(segment_ids=integers(B, T)),
  pk.wkv_step: WKV_STEP,
  pk.polynomial_attention: POLYNOMIAL | dict(initial_state=POLYNOMIAL_STATE),
  pk.polynomial_attention_step: STEP_INPUTS | dict(state=POLYNOMIAL_STATE),
  pk.polynomial_attention_at: POLYNOMIAL
  | dict(q=array(B, M, H, F), positions=integers(B, M)),
  pk.polynomial_attention_weights: dict(q=QUERIES, k=QUERIES),
  pk.document_runs: dict(segment_ids_BT=integers(B, T)),
  pk.document_starts: dict(runs_BT=integers(B, T)),
}
EACH = pytest.mark.parametrize("operator", OPERATORS, ids=lambda f: f.__name__)
ARRAYS = pytest.mark.parametrize(
  "operator, name",
  [(f, name) for f, good in OPERATORS.items() for name in good],
  ids=lambda x: x if isinstance(x, str) else x.__name__,
)


def leaves(x):
  """Return the arrays of a state or an array, and how each is put back."""
  if not isinstance(x, tuple) or isinstance(x, jax.ShapeDtypeStruct):
    return [("", x, lambda new: new)]
  put = lambda field: lambda new: x._replace(**{field: new})
  return [(f"\\.{field}", getattr(x, field), put(field)) for field in x._fields]


def test_every_public_operator_is_here():
  functions = {getattr(pk, name) for name in pk.__all__}
  public = {f for f in functions if inspect.isfunction(f)}
  others = {
    *(pk.which_implementation, pk.zero_state, pk.empty_wkv_state),
    pk.plain_derivatives,  # a context
  }
  assert public - others == set(OPERATORS)


@ARRAYS
def test_what_is_no_array_is_named(operator, name):
  good = OPERATORS[operator]
  optional = inspect.signature(operator).parameters[name].default is None
  for suffix, x, put in leaves(good[name]):
    wrong = [[[1.0]], 1.0, "1", np.full(x.shape, "1")]
    if suffix or not optional:
      wrong.append(None)
    for value in wrong:
      with pytest.raises(ValueError, match=rf"^{name}{suffix}\b.*array"):
        operator(**good | {name: put(value)})


@ARRAYS
def test_a_wrong_dtype_or_rank_is_named(operator, name):
  good = OPERATORS[operator]
  for suffix, x, put in leaves(good[name]):
    is_integer = jnp.issubdtype(x.dtype, jnp.integer)
    dtypes = ("bool", "complex64", "float32" if is_integer else "int8")
    wrong = [array(*x.shape, dtype=dtype) for dtype in dtypes]
    wrong += [array(1, 1, *x.shape, dtype=x.dtype), array(dtype=x.dtype)]
    for value in wrong:
      if operator is pk.layer_norm and value.ndim > x.ndim and name == "x":
        continue  # any number of axes
      if operator in (pk.gelu, pk.add_layer_norm) and value.ndim == 5:
        continue
      with pytest.raises(ValueError, match=rf"^{name}{suffix}\b"):
        operator(**good | {name: put(value)})


@EACH
def test_numpy_arrays_are_arrays(operator):
  """NumPy arrays of float64 too, which jax makes float32."""
  good = OPERATORS[operator]
  wide = {"float32": "float64", "int32": "int64"}
  numpy = jax.tree.map(lambda x: np.ones(x.shape, wide[x.dtype.name]), good)
  found = jax.eval_shape(lambda: operator(**numpy))
  assert found == jax.eval_shape(lambda arrays: operator(**arrays), good)


@pytest.mark.parametrize(
  "operator",
  [f for f in OPERATORS if "axes" in inspect.signature(f).parameters],
  ids=lambda f: f.__name__,
)
def test_axes_need_a_mesh_that_has_them(operator):
  good = OPERATORS[operator]
  with pytest.raises(ValueError, match=r"^axes=.*no mesh"):
    operator(**good, axes=AXES)
  with pytest.raises(ValueError, match=r"^axes='data'.*ShardAxes"):
    operator(**good, axes="data")
  mesh = jax.make_mesh((2,), ("m",), (jax.sharding.AxisType.Auto,))
  with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"^axes\.batch"):
    operator(**good, axes=AXES)


@pytest.mark.parametrize("field", ["batch", "heads", "time"])
@pytest.mark.parametrize("value", [3, ["data"], ("data", 1), jnp.ones(2)])
def test_the_names_of_mesh_axes_are_texts(field, value):
  with pytest.raises(ValueError, match=rf"^ShardAxes\.{field}="):
    pk.ShardAxes(**{field: value})


SCALARS = [np.float32, np.float64, np.asarray, jnp.float32]
OPTIONS = [
  (pk.layer_norm, LAYER_NORM, "eps", 0.5, SCALARS),
  (pk.add_layer_norm, ADD_LAYER_NORM, "eps", 0.5, SCALARS),
  (pk.polynomial_attention, POLYNOMIAL, "eps", 0.5, SCALARS),
  (pk.polynomial_attention, POLYNOMIAL, "scale", 0.5, SCALARS),
  (
    pk.polynomial_attention,
    POLYNOMIAL,
    "return_state",
    True,
    [np.bool_, np.asarray, jnp.asarray],
  ),
  (pk.cross_entropy, CROSS_ENTROPY, "parts", 2, [np.int64, jnp.int32]),
  (pk.selective_scan, SCAN, "chunk", 2, [np.int8, jnp.int32]),
]


@pytest.mark.parametrize(
  "operator, good, name, value, scalars",
  OPTIONS,
  ids=[f"{case[0].__name__}-{case[2]}" for case in OPTIONS],
)
def test_numpy_and_jax_scalars_are_numbers(
  operator, good, name, value, scalars
):
  """They give the same program. A number made inside jit is named."""
  trace = lambda value: str(
    jax.make_jaxpr(lambda arrays: operator(**arrays, **{name: value}))(good)
  )
  for scalar in scalars:
    assert trace(scalar(value)) == trace(value)
  with pytest.raises(ValueError, match=rf"^{name} .*static_argnames"):
    jax.eval_shape(
      lambda value: operator(**good, **{name: value}), array(dtype="float32")
    )
  for wrong in ("1", [value], None, np.ones(2)):
    if wrong is None and name in ("chunk", "scale"):
      continue
    with pytest.raises(ValueError, match=rf"^{name}="):
      operator(**good, **{name: wrong})


def test_coefficients_are_python_numbers():
  found = pk.Coefficients(jnp.float32(1), np.float32(0), np.asarray(0.5))
  assert found == pk.Coefficients(1, 0, 0.5)
  assert hash(found) == hash(pk.Coefficients(1, 0, 0.5))
  assert {type(x) for x in (found.c0, found.c1, found.c2)} == {float}
  for wrong in ("1", True, None, jnp.ones(2)):
    with pytest.raises(ValueError, match=r"^Coefficients\.c1="):
      pk.Coefficients(1, wrong, 0)


@EACH
@pytest.mark.parametrize("size", ["B", "T", "H", "F", "D", "V", "N"])
def test_no_rows_tokens_or_features(operator, size):
  """An empty axis gives a result, or an error that names an argument."""
  sizes = dict(B=B, T=T, H=H, F=F, D=D, V=V, N=N)
  empty = sizes[size]
  good = jax.tree.map(
    lambda x: array(*(0 if n == empty else n for n in x.shape), dtype=x.dtype),
    OPERATORS[operator],
  )
  try:
    jax.eval_shape(lambda arrays: operator(**arrays), good)
  except ValueError as error:
    assert str(error).startswith(tuple(good)), error
