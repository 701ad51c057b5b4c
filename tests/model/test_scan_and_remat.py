"""Tests of layers scanned or one by one, rematerialisation, and dtypes."""

import collections
import dataclasses
import itertools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from model_cases import make
import numpy as np
import pytest

from pallas_kernels import devices
from rebased_jax import (
  LM,
  BaseConvConfig,
  ModelConfig,
  ReBasedConfig,
  ShardAxes,
)

B, T, V = 2, 16, 11
CONFIG = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(heads=2, features=4),
  vocab_size=V,
  width=8,
  pairs=2,
  positions=T,
  mlp_width=12,
)
TOKENS_BT = np.random.default_rng(1).integers(V, size=(B, T), dtype=np.int32)
IDS_BT = np.array([[4] * 5 + [2] * 11, [1] * 9 + [2] * 3 + [1] * 4], np.int32)
POSITIONS_BM = np.array([[1, 5, 9], [0, 2, 15]], np.int32)
# Relative to the whole gradient's norm: the same sums in another order. Norms
# over few features amplify roundings: each of these programs is 4e-7 to 9e-6
# away from float64.
TOLERANCE = 2e-5
OTHERS = {
  "unrolled": dict(scan_layers=False),
  "dots": dict(remat="dots"),
  "full": dict(remat="full"),
  "unrolled, full": dict(scan_layers=False, remat="full"),
}


def _loss(params, config: ModelConfig, **kwargs):
  """Return a number that depends on all logits, and the logits."""
  graph, _ = nnx.split(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))))
  logits_V = nnx.merge(graph, params)(TOKENS_BT, **kwargs)
  return jnp.square(jax.nn.log_softmax(logits_V)).mean(), logits_V


def _both(config: ModelConfig, **kwargs):
  """Return the logits, and the gradient of every parameter."""
  run = jax.jit(jax.value_and_grad(_loss, has_aux=True), static_argnums=1)
  (_, logits_V), grads = run(make(CONFIG)[1], config, **kwargs)
  return jax.device_get((logits_V, grads))


@pytest.fixture(scope="module")
def expected():
  whole = _both(CONFIG, segment_ids=IDS_BT)
  return whole, _both(CONFIG, positions_to_predict=POSITIONS_BM)


@pytest.mark.parametrize("name", OTHERS)
def test_values_and_gradients_are_the_same(expected, name: str) -> None:
  config = dataclasses.replace(CONFIG, **OTHERS[name])
  _assert_near(_both(config, segment_ids=IDS_BT), expected[0])
  if name == "unrolled, full":  # here the last pair runs separately
    at = _both(config, positions_to_predict=POSITIONS_BM)
    _assert_near(at, expected[1])


def _assert_near(found, wanted) -> None:
  """Compare logits and gradient, each relative to its norm."""
  for x, y in zip(found, wanted, strict=True):
    difference = _norm(jax.tree.map(np.subtract, x, y))
    assert difference <= TOLERANCE * _norm(y)


def _norm(tree) -> float:
  return np.linalg.norm([np.linalg.norm(x) for x in jax.tree.leaves(tree)])


def _lowered(config: ModelConfig):
  """Return the gradient's program."""
  make = lambda: nnx.split(LM(config, rngs=nnx.Rngs(0)))[1]
  run = jax.jit(jax.value_and_grad(_loss, has_aux=True), static_argnums=1)
  return run.lower(jax.eval_shape(make), config)


def test_a_scanned_program_does_not_grow_with_depth() -> None:
  def lines(**changes) -> list[int]:
    configs = [
      dataclasses.replace(CONFIG, pairs=pairs, **changes) for pairs in (2, 4)
    ]
    return [len(_lowered(x).as_text().splitlines()) for x in configs]

  for scanned in (dict(), dict(remat="full")):
    two, four = lines(**scanned)
    assert two == four
  # With layers one by one, the program has one pair and calls it for each.
  two, four = lines(scan_layers=False)
  assert two < four < 1.8 * two


def test_a_gpu_takes_layers_one_by_one(monkeypatch) -> None:
  assert CONFIG.scans and "call @run" not in _lowered(CONFIG).as_text()
  monkeypatch.setattr(devices, "platform", lambda: "gpu")
  mixer = dataclasses.replace(CONFIG.second, implementation="xla")
  chosen = dataclasses.replace(CONFIG, second=mixer)
  assert not chosen.scans
  assert dataclasses.replace(chosen, scan_layers=True).scans
  text = _lowered(chosen).as_text()
  assert "call @run" in text and text.count("func.func private @run") <= 4


def test_remat_holds_less() -> None:
  """Compare XLA's account of the compiled programs at long rows."""
  config = dataclasses.replace(CONFIG, positions=None, pairs=4, mlp_width=64)

  def temporaries(**changes) -> int:
    changed = dataclasses.replace(config, **changes)
    make = lambda: nnx.split(LM(changed, rngs=nnx.Rngs(0)))[1]
    tokens = jax.ShapeDtypeStruct((2, 512), jnp.int32)

    def loss(params, tokens_BT):
      graph, _ = nnx.split(
        nnx.eval_shape(lambda: LM(changed, rngs=nnx.Rngs(0)))
      )
      x_BTD = nnx.merge(graph, params).features(tokens_BT)
      return jnp.square(x_BTD).mean()

    lowered = jax.jit(jax.grad(loss)).lower(jax.eval_shape(make), tokens)
    memory = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes

  none, dots, full = (temporaries(remat=x) for x in ("none", "dots", "full"))
  assert full < 0.9 * dots < 0.9 * none


def _equations(jaxpr):
  """Yield the equations of a program, those of its callees too."""
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from _equations(inner)


def _gradient_counts(config: ModelConfig, **kwargs) -> collections.Counter:
  """Return how often each primitive is in the gradient's program."""
  make = lambda: nnx.split(LM(config, rngs=nnx.Rngs(0)))[1]
  grad = jax.grad(lambda params: _loss(params, config, **kwargs)[0])
  jaxpr = jax.make_jaxpr(grad)(jax.eval_shape(make)).jaxpr
  return collections.Counter(x.primitive.name for x in _equations(jaxpr))


@pytest.mark.parametrize("at", [None, POSITIONS_BM])
def test_the_gradient_of_unrolled_layers_grows_linearly(at) -> None:
  """Join the pairs' gradients once; a sum of padded stacks costs pairs²."""
  counts = []
  for pairs in (2, 3, 4):
    config = dataclasses.replace(CONFIG, pairs=pairs, scan_layers=False)
    counts.append(_gradient_counts(config, positions_to_predict=at))
  leaves = len(jax.tree.leaves(make(CONFIG)[1].pairs))
  for few, more in itertools.pairwise(counts):
    # A pad or a sum of a stack would come once more for each parameter.
    assert more["pad"] - few["pad"] < leaves
    assert more["scatter-add"] == few["scatter-add"]
  assert counts[0]["split"] >= leaves
  # Each pair more costs as much as the one before.
  total = [sum(count.values()) for count in counts]
  assert total[2] - total[1] <= total[1] - total[0]


def test_pairs_wait_for_the_one_before_on_a_mesh() -> None:
  """XLA would gather the parameters of all pairs at the start otherwise."""
  mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
  config = dataclasses.replace(CONFIG, pairs=3, scan_layers=False)
  alone = _gradient_counts(config)["optimization_barrier"]
  with jax.set_mesh(mesh):
    axes = ShardAxes(batch="data")
    found = _gradient_counts(config, axes=axes)["optimization_barrier"]
  assert found - alone >= config.pairs


@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.parametrize("scan", [False, True])
def test_remat_of_unrolled_layers_is_not_undone(scan, remat) -> None:
  """XLA merges what is computed twice, unless jax is told to prevent it."""
  config = dataclasses.replace(CONFIG, scan_layers=scan, remat=remat)
  make = lambda: nnx.split(LM(config, rngs=nnx.Rngs(0)))[1]
  forward = lambda params: _loss(params, config)[0]
  jaxpr = jax.make_jaxpr(forward)(jax.eval_shape(make)).jaxpr
  prevents = [
    equation.params["prevent_cse"]
    for equation in _equations(jaxpr)
    if "prevent_cse" in equation.params
  ]
  # The first is that of a pair; an operator inside it may have its own. In a
  # scan the loop itself keeps the two apart.
  assert prevents[0] is not scan
  assert scan or set(prevents) == {True}


def test_bfloat16_computes_over_float32_parameters() -> None:
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  params = jax.eval_shape(lambda: nnx.split(LM(config, rngs=nnx.Rngs(0)))[1])
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  text = jax.jit(_loss, static_argnums=1).lower(params, config).as_text()
  # Every projection, the MLPs and the head: no product of float32 matrices
  # with a parameter's shape is left.
  products = [x for x in text.splitlines() if "stablehlo.dot_general" in x]
  widths = ("8x8x", "8x12x", "12x8x", f"{V}x8x")
  of_weights = [x for x in products if any(f"tensor<{w}" in x for w in widths)]
  assert len(of_weights) >= 8
  for line in of_weights:
    operands = line.partition(" : (")[2].partition(") ->")[0]
    assert operands.count("bf16") == 2 and "f32" not in operands, line


def test_remat_is_refused_by_name() -> None:
  with pytest.raises(ValueError, match="remat='some': expected one of"):
    dataclasses.replace(CONFIG, remat="some")
