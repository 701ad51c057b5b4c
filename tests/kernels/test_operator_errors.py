"""Wrong arguments: every error names the argument, before any computation.

Shapes stand in for arrays, so that a computation could not run at all.
"""

import jax
import jax.numpy as jnp
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
