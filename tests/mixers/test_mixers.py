"""Tests of every mixer: values, causality, states, documents, dtypes."""

import importlib
import inspect
import pkgutil

from flax import nnx
import jax
import jax.numpy as jnp
import mixer_equations
from mixer_registry import MIXERS, ONE_OF_EACH
from mixer_subject import (
  CLOSE,
  HALF,
  B,
  D,
  T,
  assert_close,
  make,
  tokens,
)
import numpy as np
import pytest

from rebased_jax import Mixer, MixerConfig, Site, mixers, presets

# Documents are runs of one id: of 3, 6, 3 and of 1, 6, 4, 1 tokens.
IDS_BT = np.array(
  [[7] * 3 + [3] * 6 + [5] * 3, [1] + [2] * 6 + [1] * 4 + [2]], np.int32
)
DOCUMENTS = ((0, 0, 3), (0, 3, 9), (0, 9, 12), (1, 0, 1), (1, 1, 7), (1, 7, 11))
LAST = ((0, 9), (1, 11))  # where each row's last document starts

each_mixer = pytest.mark.parametrize("name", MIXERS)
each_mixer_of_documents = pytest.mark.parametrize(
  "name", [name for name in MIXERS if MIXERS[name].takes_documents]
)


def _others_are_slow(name: str):
  """A parameter that only the first config of each class runs every time."""
  if name in ONE_OF_EACH:
    return pytest.param(name)
  return pytest.param(name, marks=pytest.mark.slow)


one_of_each_mixer = pytest.mark.parametrize(
  "name", [_others_are_slow(name) for name in MIXERS]
)


@pytest.mark.quick
def test_the_registry_has_every_mixer() -> None:
  written = set()
  for module in pkgutil.iter_modules(mixers.__path__, mixers.__name__ + "."):
    written |= _concrete_configs(importlib.import_module(module.name))
  registered = {type(entry.config) for entry in MIXERS.values()}
  assert registered == written == _concrete_configs(mixers)
  assert MIXERS.keys() >= presets.VARIANTS.keys()


def _concrete_configs(module) -> set[type]:
  return {
    value
    for value in vars(module).values()
    if inspect.isclass(value)
    and issubclass(value, MixerConfig)
    and not inspect.isabstract(value)
  }


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_no_mixer_skips_the_checks_of_the_base_class(name) -> None:
  for method in ("__call__", "prefill", "step"):
    own = getattr(MIXERS[name].mixer_class, method)
    assert own is getattr(Mixer, method)


@pytest.mark.quick
@each_mixer
def test_equals_the_recurrence(name) -> None:
  subject = make(name)
  params = mixer_equations.parameters(subject.mixer)
  x_BTD = tokens()
  for x_TD, y_TD in zip(x_BTD, subject(x_BTD), strict=True):
    entry = MIXERS[name]
    wanted_TD = entry.recurrence(entry.config, params, np.float64(x_TD))
    np.testing.assert_allclose(y_TD, wanted_TD, **CLOSE)


@each_mixer
def test_is_causal(name) -> None:
  reach = np.zeros((T, T), bool)  # y_t depends on x_s
  for t in range(T):
    w_BTD = tokens(13) * (np.arange(T) == t)[None, :, None]
    (_, dx_BTD), _ = make(name).gradients(tokens(), w_BTD)
    assert np.isfinite(dx_BTD).all()
    noise = MIXERS[name].noise * np.abs(dx_BTD).max()
    reach[t] = np.asarray(np.abs(dx_BTD) > noise).any(axis=(0, 2))
  assert not np.triu(reach, 1).any()
  assert np.diagonal(reach).all()
  assert (np.diagonal(reach, -1) == MIXERS[name].has_memory).all()


@each_mixer
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_nonfinite_token_changes_no_earlier_output(name, value) -> None:
  subject, x_BTD = make(name), tokens()
  spoilt_BTD = x_BTD.copy()
  spoilt_BTD[0, HALF] = value
  for call in (subject, lambda x: subject.prefill(x, subject.zero)[0]):
    wanted_BTD, found_BTD = call(x_BTD), call(spoilt_BTD)
    # Fourier transforms spread their roundings over the whole row.
    exact = dict(rtol=0, atol=0) if not MIXERS[name].noise else CLOSE
    assert_close(found_BTD[0, :HALF], wanted_BTD[0, :HALF], **exact)
    np.testing.assert_array_equal(found_BTD[1], wanted_BTD[1])
    assert not np.isfinite(found_BTD[0, HALF]).all()


@each_mixer
def test_prefill_and_steps_equal_the_whole(name) -> None:
  subject = make(name)
  x_BTD, state = tokens(), subject.zero
  y_BTD, after = subject.prefill(x_BTD, state)
  assert_close(y_BTD, subject(x_BTD))
  states = [state]
  for t in range(T):
    y_BD, state = subject.step(x_BTD[:, t], state)
    assert_close(y_BD, y_BTD[:, t])
    states.append(state)
  assert_close(state, after)
  # From a state at any point, a prefill ends in the state further on.
  for start in range(T - HALF + 1):
    part = slice(start, start + HALF)
    y_BHD, state = subject.prefill(x_BTD[:, part], states[start])
    assert_close((y_BHD, state), (y_BTD[:, part], states[start + HALF]))


@each_mixer_of_documents
def test_documents_do_not_see_each_other(name) -> None:
  subject = make(name)
  x_BTD, ids_BT = tokens(), IDS_BT
  for row, start, stop in DOCUMENTS:
    own_BT = np.zeros((B, T), bool)
    own_BT[row, start:stop] = True
    own_BT1 = own_BT[..., None]
    w_BTD = np.where(own_BT1, tokens(13), np.float32(0))
    (_, before), y_BTD = subject.gradients(x_BTD, w_BTD, ids_BT)
    assert not before[~own_BT].any()
    alone, _ = subject.steps(x_BTD[:, start:stop], subject.zero)
    np.testing.assert_allclose(y_BTD[own_BT], alone[row], **CLOSE)
    for others in (tokens(14), np.full((B, T, D), np.nan, np.float32)):
      other_BTD = np.where(own_BT1, x_BTD, others)
      (_, after), changed = subject.gradients(other_BTD, w_BTD, ids_BT)
      np.testing.assert_array_equal(changed[own_BT], y_BTD[own_BT])
      np.testing.assert_array_equal(after[own_BT], before[own_BT])


@each_mixer_of_documents
def test_the_state_is_the_last_documents(name) -> None:
  subject = make(name)
  x_BTD, ids_BT = tokens(), IDS_BT
  y_BTD, state = subject.prefill(x_BTD, subject.zero, ids_BT)
  assert_close(y_BTD, subject(x_BTD, ids_BT))
  for row, start in LAST:
    _, alone = subject.steps(x_BTD[:, start:], subject.zero)
    pick = lambda s, row=row: jax.tree.map(lambda x: x[row], s)
    assert_close(pick(state), pick(alone))
  # An earlier document's NaN does not reach it.
  spoilt = x_BTD.copy()
  spoilt[:, : LAST[0][1]] = np.nan
  _, clean = subject.prefill(spoilt, subject.zero, ids_BT)
  assert_close(clean, state, rtol=0, atol=0)


@each_mixer_of_documents
def test_an_incoming_state_is_the_first_documents(name) -> None:
  subject = make(name)
  x_BTD, ids_BT = tokens(), IDS_BT
  whole = subject.prefill(x_BTD, subject.zero, ids_BT)
  state, ys = subject.zero, []
  for half in (slice(HALF), slice(HALF, T)):  # cut in a document, in both rows
    y_BHD, state = subject.prefill(x_BTD[:, half], state, ids_BT[:, half])
    ys.append(y_BHD)
  assert_close((np.concatenate(ys, axis=1), state), whole)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_gradients_pass_through_prefill_and_steps(name) -> None:
  subject = make(name)

  def loss(params, x_BTD):
    mixer = subject.of(params)
    y_BTD, state = mixer.prefill(x_BTD[:, :HALF], subject.zero)
    parts = [y_BTD]
    for t in (HALF, HALF + 1):
      y_BD, state = mixer.step(x_BTD[:, t], state)
      parts.append(y_BD[:, None])
    parts.append(mixer.prefill(x_BTD[:, HALF + 2 :], state)[0])
    return (jnp.concatenate(parts, axis=1) * w_BTD).sum()

  # Larger keys than at the start, so that a running maximum changes.
  x_BTD, w_BTD = 3 * tokens(), tokens(13)
  found = jax.jit(jax.grad(loss, argnums=(0, 1)))(subject.params, x_BTD)
  wanted, _ = subject.gradients(x_BTD, w_BTD)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    # float32 sums in another order, relative to the whole array.
    assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(y)


@each_mixer
def test_every_parameter_has_a_gradient(name) -> None:
  (grads, _), _ = make(name).gradients(tokens(), tokens(13))
  assert jax.tree.leaves(grads)
  without = MIXERS[name].without_gradient
  # sim ignores the joint scale of γ and β but for eps, which makes the gradient
  # orthogonal to them; its entries are not zero.
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    where = jax.tree_util.keystr(path, simple=True, separator="/")
    no_effect = without.get(where, np.zeros(grad.shape, bool))
    assert np.isfinite(grad).all() and (grad[~no_effect] != 0).all(), where
  assert without.keys() <= mixer_equations.parameters(make(name).mixer).keys()


@one_of_each_mixer
def test_works_under_transformations(name) -> None:
  """Use vmap, scan and checkpoint under jit; gradients pass through states."""
  subject = make(name)
  x_BTD, w_BTD = tokens(), tokens(13)
  call = lambda p, x: subject.of(p)(x)

  def split(p, x_BTD):
    mixer = subject.of(p)
    left, state = mixer.prefill(x_BTD[:, :HALF], subject.zero)
    right, _ = mixer.prefill(x_BTD[:, HALF:], state)
    return jnp.concatenate([left, right], axis=1)

  def scanned(p, x_BTD):
    mixer = subject.of(p)
    body = lambda state, x_BD: mixer.step(x_BD, state)[::-1]
    steps = jnp.moveaxis(x_BTD, 1, 0)
    return jnp.moveaxis(jax.lax.scan(body, subject.zero, steps)[1], 0, 1)

  def run(p, x_BTD):
    loss = lambda p, x: (jax.checkpoint(split)(p, x) * w_BTD).sum()
    twice = jax.vmap(call, in_axes=(None, 0))(p, jnp.stack([x_BTD, x_BTD]))
    return twice, scanned(p, x_BTD), jax.grad(loss, argnums=(0, 1))(p, x_BTD)

  grads, y_BTD = subject.gradients(x_BTD, w_BTD)
  wanted = np.stack([y_BTD, y_BTD]), y_BTD, grads
  assert_close(jax.jit(run)(subject.params, x_BTD), wanted)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_float64_is_float64_throughout(name) -> None:
  """Its parameters are float32 all the same."""
  entry, moved = MIXERS[name], make(name).params
  x_BTD = tokens().astype(np.float64)
  with jax.enable_x64(True):
    site = Site(D, layer=1, layers=2, dtype="float64")
    fresh = lambda: entry.config.make(site, rngs=nnx.Rngs(0))
    graph, params = nnx.split(nnx.eval_shape(fresh))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    @jax.jit
    def run(params, x_BTD):
      mixer = nnx.merge(graph, params)
      y_BTD, state = mixer.prefill(x_BTD[:, :-1], mixer.init_state(B))
      return y_BTD, mixer.step(x_BTD[:, -1], state)[0]

    y_BTD, y_BD = jax.device_get(run(moved, x_BTD))
  assert y_BTD.dtype == y_BD.dtype == np.float64
  arrays = mixer_equations.parameters(make(name).mixer)
  for row in range(B):
    wanted_TD = entry.recurrence(entry.config, arrays, x_BTD[row])
    found_TD = np.concatenate([y_BTD[row], y_BD[row][None]])
    # Sums of a few dozen terms of size 1, rounded to 1e-16 each.
    np.testing.assert_allclose(found_TD, wanted_TD, rtol=1e-12, atol=1e-12)


@each_mixer
def test_bfloat16_is_close_to_float32(name) -> None:
  low = make(name, "bfloat16")
  y_BTD, _ = low.prefill(tokens().astype(jnp.bfloat16), low.zero)
  assert y_BTD.dtype == jnp.bfloat16
  wanted_BTD = make(name)(tokens())
  error = np.linalg.norm(y_BTD.astype(np.float32) - wanted_BTD)
  # A rounding of 2⁻⁹ = 0.2 % after each of some five operations, and q·k is
  # squared (measured, at most 0.9 %).
  assert error <= 0.03 * np.linalg.norm(wanted_BTD)


@each_mixer
def test_state_size_is_the_bytes_held(name) -> None:
  _check_state_size(name, "float32")


@one_of_each_mixer
def test_state_size_is_the_bytes_held_in_bfloat16(name) -> None:
  _check_state_size(name, "bfloat16")


def _check_state_size(name: str, dtype: str) -> None:
  subject = make(name, dtype)
  x_BTD = tokens().astype(dtype)
  for state in (
    subject.zero,
    subject.prefill(x_BTD, subject.zero)[1],
    subject.step(x_BTD[:, 0], subject.zero)[1],
  ):
    held = sum(x.nbytes for x in jax.tree.leaves(state)) / B
    mixer = subject.mixer
    assert mixer.state_size(T) == mixer.state_size(1000) == held


@each_mixer
@pytest.mark.parametrize(
  # Polynomial attention computes 5 positions alone. 65 are more than the row
  # has tokens, and take the operator over the row.
  ("count", "documents"),
  [
    (5, True),
    (65, True),
    pytest.param(5, False, marks=pytest.mark.slow),
    pytest.param(65, False, marks=pytest.mark.slow),
  ],
)
def test_query_positions_are_rows_of_the_whole(name, count, documents) -> None:
  documents = documents and MIXERS[name].takes_documents
  ids_BT = IDS_BT if documents else None
  rng = np.random.default_rng(5)
  positions_BM = rng.integers(T, size=(B, count), dtype=np.int32)
  w_BMD = rng.normal(size=(B, count, D)).astype(np.float32)
  found = make(name).gradients(tokens(), w_BMD, ids_BT, positions_BM)
  # The same loss over all positions has the sum of each one's weights.
  w_BTD = np.zeros((B, T, D), np.float32)
  for row in range(B):
    np.add.at(w_BTD[row], positions_BM[row], w_BMD[row])
  grads, y_BTD = make(name).gradients(tokens(), w_BTD, ids_BT)
  rows = zip(y_BTD, positions_BM, strict=True)
  y_BMD = np.stack([y_TD[positions_M] for y_TD, positions_M in rows])
  assert_close(found, (grads, y_BMD))
