"""Tests of the language model: causality, documents, positions, dropout."""

import contextlib
import dataclasses

import chex
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from model_cases import make
import numpy as np
import pytest

from rebased_jax import (
  AttentionConfig,
  BaseConvConfig,
  ModelConfig,
  ReBasedConfig,
  ShardAxes,
)

B, T, V, D = 2, 16, 11, 8
CONFIG = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(heads=2, features=4),
  vocab_size=V,
  width=D,
  pairs=3,
  positions=T,
  mlp_width=12,
  dropout=0.25,
)
ONE_PAIR = dataclasses.replace(CONFIG, pairs=1)  # where gradients compile
TOKENS_BT = np.random.default_rng(1).integers(V, size=(B, T), dtype=np.int32)
IDS_BT = np.array([[4] * 5 + [2] * 11, [1] * 9 + [2] * 3 + [1] * 4], np.int32)
# Two float32 orders of the same sums: roundings of 6e-8 through six blocks,
# whose norms divide by values below 1.
CLOSE = dict(rtol=3e-5, atol=3e-5)


@jax.jit
def logits(params, tokens_BT, **kwargs):
  return nnx.merge(make(CONFIG)[0], params)(tokens_BT, **kwargs)


def loss(params, tokens_BT, w_BMV, **kwargs):
  """Return Σ w logits, and the logits."""
  logits_BMV = nnx.merge(make(ONE_PAIR)[0], params)(tokens_BT, **kwargs)
  return (logits_BMV * w_BMV).sum(), logits_BMV


gradient = jax.jit(jax.grad(loss, has_aux=True))  # of one pair


def weights(length: int = T):
  rng = np.random.default_rng(3)
  return rng.normal(size=(B, length, V)).astype(np.float32)


def assert_close(found, wanted) -> None:
  chex.assert_trees_all_close(found, wanted, **CLOSE)


def assert_near(found, wanted) -> None:
  """Compare by each array's norm: a gradient sums over all the positions."""
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    x, y = jax.device_get((x, y))
    assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)


@pytest.mark.quick
def test_is_causal() -> None:
  reach = np.zeros((T, T), bool)  # the logits at t depend on position s
  for t in range(T):
    w_BTV = weights() * (np.arange(T) == t)[None, :, None]
    grads, _ = gradient(make(ONE_PAIR)[1], TOKENS_BT, w_BTV)
    place_TD = np.asarray(grads.position_embedding[...])
    reach[t] = (place_TD != 0).any(axis=-1)
  np.testing.assert_array_equal(reach, np.tri(T, dtype=bool))


@jax.jit
def layer_by_layer(params):
  model = nnx.merge(make(CONFIG)[0], params)
  x_BTD = model.token_embedding[...][TOKENS_BT]
  x_BTD = x_BTD + model.position_embedding[...][None]
  stack = nnx.split(model.pairs)
  for i in range(CONFIG.pairs):
    pair = nnx.merge(stack[0], jax.tree.map(lambda p, i=i: p[i], stack[1]))
    for block in (pair.first, pair.second):
      x_BTD = x_BTD + block.mixer(block.norm1(x_BTD))
      h_BTM = block.mlp.up(block.norm2(x_BTD))
      h_BTM = h_BTM * (1 + jax.lax.erf(h_BTM / 2**0.5)) / 2
      x_BTD = x_BTD + block.mlp.down(h_BTM)
  return model.norm(x_BTD) @ model.token_embedding[...].T


def test_the_scan_equals_a_loop_and_the_head_is_tied() -> None:
  params = make(CONFIG)[1]
  wanted_BTV = jax.device_get(layer_by_layer(params))
  assert_close(logits(params, TOKENS_BT), wanted_BTV)
  assert wanted_BTV.std() > 0.1  # the comparison is of something


def test_positions_to_predict_are_rows_of_the_whole() -> None:
  params, count = make(ONE_PAIR)[1], 5
  rng = np.random.default_rng(4)
  positions_BM = rng.integers(T, size=(B, count), dtype=np.int32)
  w_BMV = weights(count)
  found = gradient(
    params,
    TOKENS_BT,
    w_BMV,
    positions_to_predict=positions_BM,
    segment_ids=IDS_BT,
  )
  w_BTV = np.zeros((B, T, V), np.float32)
  for row in range(B):
    np.add.at(w_BTV[row], positions_BM[row], w_BMV[row])
  grads, logits_BTV = gradient(params, TOKENS_BT, w_BTV, segment_ids=IDS_BT)
  rows = zip(np.asarray(logits_BTV), positions_BM, strict=True)
  wanted = grads, np.stack([row_TV[p_M] for row_TV, p_M in rows])
  assert_near(found, wanted)


def test_documents_do_not_see_each_other() -> None:
  params = make(CONFIG)[1]
  run = lambda tokens_BT, **kwargs: np.asarray(
    logits(params, tokens_BT, **kwargs)
  )
  wanted_BTV = run(TOKENS_BT, segment_ids=IDS_BT)
  rng = np.random.default_rng(5)
  other_BT = rng.integers(V, size=(B, T), dtype=np.int32)
  for row, start, stop in ((0, 0, 5), (0, 5, 16), (1, 0, 9), (1, 9, 12)):
    own = (row, slice(start, stop))
    for others in (other_BT, np.full_like(other_BT, V)):  # V has NaN logits
      tokens_BT = others.copy()
      tokens_BT[own] = TOKENS_BT[own]
      found_BTV = run(tokens_BT, segment_ids=IDS_BT)
      np.testing.assert_array_equal(found_BTV[own], wanted_BTV[own])
  # Alone, a first document has the same logits.
  alone_BTV = run(TOKENS_BT)
  assert_close(alone_BTV[0, :5], wanted_BTV[0, :5])
  assert np.abs(alone_BTV[0, 5:] - wanted_BTV[0, 5:]).max() > 1e-2


@pytest.mark.quick
def test_prefill_and_steps_equal_the_whole() -> None:
  graph, params = make(CONFIG)
  wanted_BTV = np.asarray(logits(params, TOKENS_BT))
  prefill = jax.jit(lambda p, x, s: nnx.merge(graph, p).prefill(x, s))
  step = jax.jit(lambda p, x, s: nnx.merge(graph, p).step(x, s))
  state = nnx.merge(graph, params).init_state(B)
  for half in (slice(T // 2), slice(T // 2, T)):
    before = state
    found_BV, state = prefill(params, TOKENS_BT[:, half], state)
    assert_close(found_BV, wanted_BTV[:, half.stop - 1])
  after, state = state, before
  for t in range(T // 2, T):
    found_BV, state = step(params, TOKENS_BT[:, t], state)
    assert_close(found_BV, wanted_BTV[:, t])
  assert_close(state, after)
  # Past the table there is no position: NaN, as a traced step cannot raise.
  beyond_BV, _ = step(params, TOKENS_BT[:, 0], state)
  assert np.isnan(beyond_BV).all()
  held = sum(x.nbytes for x in jax.tree.leaves(state)) / B
  model = nnx.merge(graph, params)
  assert model.state_size(T) == model.state_size(10 * T) == held


def test_a_row_past_the_table_is_named() -> None:
  model = nnx.merge(*make(CONFIG))
  long_BT = np.zeros((B, T + 1), np.int32)
  message = rf"{T + 1} tokens: .* {T} rows \(ModelConfig.positions\)"
  with pytest.raises(ValueError, match=message):
    model(long_BT)
  with pytest.raises(ValueError, match=message):
    model.prefill(long_BT, model.init_state(B))


@pytest.mark.parametrize("token", [-1, V])
def test_a_token_out_of_the_vocabulary_is_nan(token) -> None:
  tokens_BT = TOKENS_BT.copy()
  tokens_BT[0, 7] = token
  found_BTV = np.asarray(logits(make(CONFIG)[1], tokens_BT))
  wanted_BTV = logits(make(CONFIG)[1], TOKENS_BT)
  assert np.isnan(found_BTV[0, 7:]).all()
  np.testing.assert_array_equal(found_BTV[1], wanted_BTV[1])


@pytest.mark.parametrize(
  "dtype", ["int8", "uint8", "int16", "uint16", "uint32", "int64", "uint64"]
)
def test_integers_of_any_dtype(dtype) -> None:
  """A vocabulary of 256 and rows of 130 tokens, which int8 does not hold."""
  config = dataclasses.replace(
    ONE_PAIR, vocab_size=256, positions=130, mlp_width=None
  )
  model = nnx.merge(*make(config))
  rng = np.random.default_rng(6)
  tokens_BT = rng.integers(128, size=(B, 130), dtype=np.int32)
  at_BM = np.array([[0, 7, 127], [3, 99, 5]], np.int32)
  wanted_BMV = model(tokens_BT, positions_to_predict=at_BM)
  for convert in (np.asarray, jnp.asarray):
    if convert is jnp.asarray and dtype.endswith("64"):
      continue  # jax makes them 32 bits wide
    tokens, at = (convert(x.astype(dtype)) for x in (tokens_BT, at_BM))
    found_BMV = model(tokens, positions_to_predict=at, segment_ids=tokens * 0)
    assert np.isfinite(found_BMV).all()
    assert_close(found_BMV, wanted_BMV)


@pytest.mark.parametrize("token", [2**32, 2**31, -(2**32) + 1])
def test_a_token_of_64_bits_is_not_cut_to_32(token) -> None:
  tokens_BT = TOKENS_BT.astype(np.int64)
  tokens_BT[0, 7] = token
  found_BTV = np.asarray(nnx.merge(*make(CONFIG))(tokens_BT))
  assert np.isnan(found_BTV[0, 7:]).all()
  assert np.isfinite(found_BTV[1]).all()


def test_segment_ids_of_64_bits_are_not_cut_to_32() -> None:
  model = nnx.merge(*make(CONFIG))
  ids_BT = TOKENS_BT.astype(np.int64) + 2**32
  calls = (
    lambda: model(TOKENS_BT, segment_ids=ids_BT),
    lambda: model.prefill(TOKENS_BT, model.init_state(B), segment_ids=ids_BT),
  )
  explicit = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
  for mesh in (contextlib.nullcontext(), jax.set_mesh(explicit)):
    with mesh:
      for call in calls:
        with pytest.raises(
          ValueError, match=r"^segment_ids holds 42949\d+: ex"
        ):
          call()


@pytest.mark.parametrize(
  ("tokens", "message"),
  [
    (TOKENS_BT > 3, "tokens has dtype bool: expected integers"),
    (TOKENS_BT * 1.0, "tokens has dtype float64: expected integers"),
    (TOKENS_BT.tolist(), "tokens is a list: expected an array"),
    (None, "tokens is None: expected an array"),
  ],
)
def test_tokens_of_another_kind_are_named(tokens, message) -> None:
  model = nnx.merge(*make(CONFIG))
  state = model.init_state(B)
  chosen = [[1]] if tokens is None else tokens
  for call in (
    lambda: model(tokens),
    lambda: model.features(tokens),
    lambda: model.prefill(tokens, state),
    lambda: model.step(tokens, state),
    lambda: model.attention_matrix(tokens),
    lambda: model(TOKENS_BT, positions_to_predict=chosen),
  ):
    name = r"(tokens|positions_to_predict) (is|has dtype) "
    with pytest.raises(ValueError, match=name):
      call()
  with pytest.raises(ValueError, match=message):
    model(tokens)
  for token_B in (TOKENS_BT, TOKENS_BT[:0, 0], TOKENS_BT[0, 0]):
    with pytest.raises(ValueError, match=r"tokens has shape .*expected \(B,\)"):
      model.step(token_B, state)


def test_dropout_of_a_mixer() -> None:
  """Scanned pairs drop the weights that pairs run one by one drop."""
  mixer = AttentionConfig(dropout=0.5)
  found = []
  for scan in (True, False):
    config = dataclasses.replace(
      CONFIG, second=mixer, dropout=0, pairs=2, mlp_width=None, scan_layers=scan
    )
    graph, params = make(config)

    @jax.jit
    def call(params, graph=graph):
      model, key = nnx.merge(graph, params), jax.random.key(3)
      return model(TOKENS_BT, dropout_key=key), model(TOKENS_BT)

    dropped, whole = call(params)
    assert (dropped != whole).any()
    found.append(dropped)
  assert_close(*found)


def test_dropout() -> None:
  params = make(CONFIG)[1]
  call = lambda seed: np.asarray(
    logits(params, TOKENS_BT, dropout_key=jax.random.key(seed))
  )
  np.testing.assert_array_equal(call(1), call(1))
  assert (call(1) != call(2)).any()
  assert (call(1) != np.asarray(logits(params, TOKENS_BT))).any()
  model = nnx.merge(*make(CONFIG))
  x_BTD = np.asarray(model._embed(TOKENS_BT))
  keys = jax.random.split(jax.random.key(6), 4096)
  embed = lambda key: model._embed(TOKENS_BT, dropout_key=key)
  y_NBTD = np.asarray(jax.jit(jax.vmap(embed))(keys))
  # A mean of n drops of p = ¼ has a deviation of |x| √(p / (1 − p) / n).
  sigma_BTD = np.abs(x_BTD) * np.sqrt(1 / 3 / len(keys))
  assert (np.abs(y_NBTD.mean(axis=0) - x_BTD) <= 5 * sigma_BTD).all()
  assert np.mean(y_NBTD == 0) == pytest.approx(0.25, abs=0.01)


def test_works_under_nnx_transformations() -> None:
  graph, params = make(ONE_PAIR)
  call = lambda model: jnp.square(model(TOKENS_BT)).sum()
  value, grads = nnx.jit(nnx.value_and_grad(call))(nnx.merge(graph, params))
  wanted = jax.jit(
    jax.value_and_grad(lambda params: call(nnx.merge(graph, params)))
  )(params)
  assert_near((value, grads), wanted)


def test_a_mesh_gives_what_one_device_gives() -> None:
  params = make(ONE_PAIR)[1]
  wanted = gradient(params, TOKENS_BT, weights(), segment_ids=IDS_BT)
  axes = ShardAxes(batch="data", time="time")
  mesh = jax.make_mesh(
    (2, 4), ("data", "time"), axis_types=(AxisType.Auto,) * 2
  )
  call = lambda *args: loss(*args, segment_ids=IDS_BT, axes=axes)
  with jax.set_mesh(mesh):
    found = jax.jit(jax.grad(call, has_aux=True))(params, TOKENS_BT, weights())
  assert_near(found, wanted)


@pytest.mark.quick
@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("vocab_size", 0),
    ("width", 0),
    ("pairs", 0),
    ("positions", 0),
    ("mlp_width", 0),
    ("dropout", 1.0),
    ("dtype", "int8"),
    ("param_dtype", "int8"),
  ],
)
def test_a_wrong_field_is_named(field, value) -> None:
  with pytest.raises(ValueError, match=rf"ModelConfig\.{field}="):
    dataclasses.replace(CONFIG, **{field: value})


@pytest.mark.parametrize("value", ["rebased", type(CONFIG.second), None])
def test_what_is_no_mixer_is_named(value) -> None:
  with pytest.raises(
    TypeError, match=r"ModelConfig\.second=.*expected the con"
  ):
    dataclasses.replace(CONFIG, second=value)
