"""Errors of bad arguments: each names its argument, before any computation.

The arguments are shapes instead of arrays, so that no computation could run.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk


def array(*shape, dtype="float32"):
  return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def state(*kv, kk=(2, 3, 4, 4), dtype="float32"):
  return pk.State(array(*kv, dtype=dtype), array(*kk, dtype=dtype))


B, T, H, F, P = 2, 6, 3, 4, 5
X = array(B, T, H, F)
GOOD = dict(q=X, k=X, v=array(B, T, H, P))
HALF = array(B, T, H, F, dtype="float16")
INTEGERS = array(B, T, H, F, dtype="int32")
KV, KK = r"initial_state\.kv_BHEP", r"initial_state\.kk_BHGG"

BAD_CALLS = [
  ("q", "shape", dict(q=array(T, H, F))),
  ("q", "length 0", dict(q=array(B, 0, H, F), k=array(B, 0, H, F))),
  ("q", "length 0", dict(q=array(B, T, H, 0), k=array(B, T, H, 0))),
  ("q", "int32", dict(q=INTEGERS, k=INTEGERS)),
  ("k", "float16", dict(k=HALF)),
  ("k", "shape", dict(k=array(B, T, H, F + 1))),
  ("k", "shape", dict(k=array(B, T + 1, H, F))),
  ("k", "shape", dict(k=array(B, T, F))),
  ("v", "shape", dict(v=array(B, T, H + 1, P))),
  ("v", "shape", dict(v=array(B, T, H))),
  ("v", "length 0", dict(v=array(B, T, H, 0))),
  ("v", "bfloat16", dict(v=array(B, T, H, P, dtype="bfloat16"))),
  ("segment_ids", "shape", dict(segment_ids=array(B, T + 1, dtype="int32"))),
  ("segment_ids", "shape", dict(segment_ids=array(T, dtype="int32"))),
  ("segment_ids", "float32", dict(segment_ids=array(B, T))),
  ("coefficients", "Coefficients", dict(coefficients=(0, 0, 1))),
  ("scale", "finite", dict(scale=float("nan"))),
  ("scale", "finite", dict(scale=array())),
  ("eps", "finite", dict(eps=float("inf"))),
  ("eps", "≥ 0", dict(eps=-1e-6)),
  (
    KV,
    "float32",
    dict(initial_state=state(B, H, 11, P)),
  ),
  (
    KV,
    "shape|float32",
    dict(initial_state=state(B, 1, 12, P)),
  ),
  (
    KV,
    "float16",
    dict(initial_state=state(B, H, 12, P, dtype="float16")),
  ),
  (
    KK,
    r"\(2, 3, 4, 4\)",
    dict(initial_state=state(B, H, 12, P, kk=(2, 3, 5, 5))),
  ),
  ("implementation", "cuda", dict(implementation="cuda")),
]


def named(name: str, part: str) -> str:
  """Return a pattern of messages that start with the name and have the part."""
  return rf"^{name}.*({part})"


@pytest.mark.quick
@pytest.mark.parametrize(("name", "part", "bad"), BAD_CALLS)
def test_polynomial_attention_names_the_argument(name, part, bad):
  with pytest.raises(ValueError, match=named(name, part)):
    pk.polynomial_attention(**GOOD | bad)


GOOD_STEP = dict(
  state=state(B, H, 12, P), q=array(B, H, F), k=array(B, H, F), v=array(B, H, P)
)


@pytest.mark.parametrize(
  ("name", "part", "bad"),
  [
    ("q", "shape", dict(q=array(B, 1, H, F))),
    ("k", "shape", dict(k=array(B, H, F + 1))),
    ("v", "shape", dict(v=array(B, H + 1, P))),
    ("v", "float16", dict(v=array(B, H, P, dtype="float16"))),
    (r"state\.kv_", "float32", dict(state=state(B, H, 12, P + 1))),
    (
      r"state\.kk_",
      "float32",
      dict(state=state(B, H, 12, P, kk=(2, 3, 4, 5))),
    ),
    (r"state\.kv_", "float32", dict(coefficients=pk.BASED)),
    ("coefficients", "Coefficients", dict(coefficients=None)),
    ("eps", "≥ 0", dict(eps=-1)),
  ],
)
def test_polynomial_attention_step_names_the_argument(name, part, bad):
  with pytest.raises(ValueError, match=named(name, part)):
    pk.polynomial_attention_step(**GOOD_STEP | bad)


M = 2
GOOD_AT = GOOD | dict(q=array(B, M, H, F), positions=array(B, M, dtype="int32"))


@pytest.mark.parametrize(
  ("name", "part", "bad"),
  [
    ("q", "shape", dict(q=array(B, M, F))),
    ("q", "shape", dict(q=array(B, M, H, F + 1))),
    ("q", "float16", dict(q=array(B, M, H, F, dtype="float16"))),
    ("k", "shape", dict(k=array(B, T, F))),
    ("k", "int32", dict(k=INTEGERS)),
    ("v", "shape", dict(v=array(B, T + 1, H, P))),
    ("v", "float16", dict(v=array(B, T, H, P, dtype="float16"))),
    ("positions", "shape", dict(positions=array(M, dtype="int32"))),
    ("positions", "float32", dict(positions=array(B, M))),
    ("segment_ids", "shape", dict(segment_ids=array(B, M, dtype="int32"))),
    ("scale", "finite", dict(scale="1")),
  ],
)
def test_polynomial_attention_at_names_the_argument(name, part, bad):
  with pytest.raises(ValueError, match=named(name, part)):
    pk.polynomial_attention_at(**GOOD_AT | bad)


@pytest.mark.parametrize(
  ("name", "part", "bad"),
  [
    ("q", "shape", dict(q=array(T, H, F))),
    ("k", "shape", dict(k=array(B, T, H, F + 1))),
    ("k", "float16", dict(k=HALF)),
    ("eps", "finite", dict(eps=None)),
  ],
)
def test_polynomial_attention_weights_names_the_argument(name, part, bad):
  with pytest.raises(ValueError, match=named(name, part)):
    pk.polynomial_attention_weights(**dict(q=X, k=X) | bad)


def test_bad_coefficients_are_named():
  with pytest.raises(ValueError, match=r"Coefficients\.c1=nan"):
    pk.Coefficients(1, np.nan, 0)
  with pytest.raises(ValueError, match="all three are 0"):
    pk.Coefficients(0, 0.0, 0)


def test_reference_does_not_split_time():
  axes = pk.ShardAxes(time="t")
  mesh = jax.make_mesh((2,), ("t",), axis_types=(jax.sharding.AxisType.Auto,))
  message = r"implementation='reference'.*axes\.time='t'"
  with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match=message):
    pk.polynomial_attention(**GOOD, axes=axes, implementation="reference")
  with pytest.raises(NotImplementedError, match=message):
    pk.which_implementation("reference", axes=axes)


@pytest.mark.quick
def test_which_implementation_on_a_cpu():
  name, reason = pk.which_implementation()
  assert name == "xla" and "cpu" in reason
  for name in ("xla", "reference"):
    assert pk.which_implementation(name)[0] == name
  with pytest.raises(ValueError, match="flash"):
    pk.which_implementation("flash")
  with pytest.raises(NotImplementedError, match="Hopper.*cpu"):
    pk.which_implementation("gpu")
