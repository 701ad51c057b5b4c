"""One step: loss, accumulation, failures and devices; golden metrics."""

from collections.abc import Callable
import functools
import re
from typing import NamedTuple

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_cases import bits, tiny, trainer as trainer

from rebased_jax import parameter_axes
from train import compiled_steps, optimizer, step
from train.devices import batch_sharding, mesh as mesh_lib, parameter_sharding

_CONFIG = tiny()
# The run on devices has dropout and two micro-batches.
_FULL = tiny(model=dict(dropout=0.2), batch=16, accumulate=2)
_KEY = jax.random.key(7)

# Loss, gradient norm and parameter norm of `_FULL`'s five steps on 8 CPU
# devices. jax 0.10.2 and 0.12.0 give the same numbers, to the tolerance.
_GOLDEN = (
  (3.4860899448394775, 0.9979709982872009, 10.197152137756348),
  (3.484074115753174, 1.008072018623352, 10.191300392150879),
  (3.469634771347046, 0.8512875437736511, 10.179367065429688),
  (3.462764024734497, 0.9850252270698547, 10.175029754638672),
  (3.4869422912597656, 1.034794569015503, 10.171751976013184),
)
_TOLERANCE = 1e-5  # roundings of 6e-8, summed in another order
_REGENERATE = (
  "the numbers of training changed. Regenerate _GOLDEN (print `found`) only "
  "after a change that means to change them: of the model, its initialisation, "
  "the data, the loss or the optimiser"
)


class Parts(NamedTuple):
  """A program without a mesh, its state, and compiled functions of it."""

  state: step.State
  run: Callable  # (state, batch, key)
  evaluate: Callable  # (params, batch)
  logits: Callable  # (params, tokens)
  sums: Callable  # (params, batch, key)


def _parts(config) -> Parts:
  graph, _ = nnx.split(compiled_steps.abstract_model(config))
  tx = optimizer.make(config.optimizer, config.steps)
  program = step.Program(graph, tx, config.accumulate, None)
  jit = lambda f: jax.jit(functools.partial(f, program=program))
  return Parts(
    jax.jit(lambda: compiled_steps.new_state(config.model, config.seed, tx))(),
    jit(step.train_step),
    jit(step.eval_step),
    jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens)),
    jax.jit(lambda p, batch, key: step.loss_sums(p, batch, program, key)),
  )


@pytest.fixture(scope="module")
def parts() -> Parts:
  return _parts(_CONFIG)


class Run(NamedTuple):
  """Five steps of `_FULL` on a mesh, copied to the host."""

  mesh: jax.sharding.Mesh
  built: compiled_steps.Built
  batch: dict  # of the last step, on the mesh
  placed: dict  # the last state, on the mesh
  states: list  # before step 0, and after each
  metrics: list


def _five_steps(mesh) -> Run:
  with jax.set_mesh(mesh):
    built = compiled_steps.build(_FULL, mesh)
    state = compiled_steps.fresh_state(_FULL, built)
    data = _FULL.data.train_batches(_FULL.batch, _FULL.seed)
    states, metrics = [jax.device_get(state)], []
    for index in range(5):
      batch = batch_sharding.put_batch(data.read(index), mesh)
      state, found = built.train_step(state, batch, built.key)
      states.append(jax.device_get(state))
      metrics.append(jax.device_get(found))
  return Run(mesh, built, batch, state, states, metrics)


@pytest.fixture(scope="module")
def eight() -> Run:
  return _five_steps(mesh_lib.make_mesh())


def test_a_first_state_takes_over_its_parameters(eight: Run) -> None:
  params = jax.tree.map(jnp.copy, eight.placed.params)
  with jax.set_mesh(eight.mesh):
    state = compiled_steps.warm_state(params, eight.built)
  assert all(x.is_deleted() for x in jax.tree.leaves(params))
  assert bits(state.params) == bits(eight.placed.params)


def _batch(seed: int = 0) -> dict[str, np.ndarray]:
  """Return eight rows with weights 0 and 1, some of them padding."""
  batch = _CONFIG.data.train_batches(8, seed).read(0)
  batch["weights"] = np.ones_like(batch["weights"])
  batch["weights"][2] = 0
  batch["weights"][5, 1] = 0
  return batch


def _formula(logits_BTV, batch) -> tuple[float, float, float]:
  """Return mean loss, tokens and accuracy, in float64, target by target."""
  loss = tokens = right = 0.0
  for b, t in np.ndindex(*batch["targets"].shape):
    z_V = np.float64(logits_BTV[b, batch["positions"][b, t]])
    target, weight = batch["targets"][b, t], float(batch["weights"][b, t])
    shift = z_V.max()
    log_sum = shift + np.log(np.exp(z_V - shift).sum())
    loss += weight * (log_sum - z_V[target])
    right += weight * (z_V.argmax() == target)
    tokens += weight
  return loss / tokens, tokens, right / tokens


@pytest.mark.quick
def test_loss_is_the_formula(parts: Parts) -> None:
  state, batch = parts.state, _batch()
  with jax.numpy_dtype_promotion("strict"):
    logits_BTV = np.asarray(parts.logits(state.params, batch["tokens"]))
  # Half of the targets are made right, so that accuracy is not 0.
  picked_BMV = np.take_along_axis(
    logits_BTV, batch["positions"][..., None], axis=1
  )
  batch["targets"][:4] = picked_BMV[:4].argmax(-1)
  loss, tokens, accuracy = _formula(logits_BTV, batch)
  assert 0.3 < accuracy < 0.7 and tokens == 13
  with jax.numpy_dtype_promotion("strict"):
    sums = parts.evaluate(state.params, batch)
  assert float(sums["tokens"]) == tokens
  np.testing.assert_allclose(sums["loss"] / tokens, loss, rtol=1e-6)
  np.testing.assert_allclose(sums["accuracy"] / tokens, accuracy, rtol=1e-6)
  _, found = parts.run(state, batch, _KEY)
  np.testing.assert_allclose(found["loss"], loss, rtol=1e-6)
  np.testing.assert_allclose(found["accuracy"], accuracy, rtol=1e-6)


def test_z_loss_and_average_of_a_step(parts: Parts) -> None:
  """The records have the loss without the z-loss, as evaluations do."""
  config = tiny(z_loss=0.1, ema=0.9, accumulate=2)
  graph, _ = nnx.split(compiled_steps.abstract_model(config))
  tx = optimizer.make(config.optimizer, config.steps)
  program = step.Program(graph, tx, 2, None, z_loss=0.1, ema=0.9)
  run = jax.jit(functools.partial(step.train_step, program=program))
  batch, params = _batch(), parts.state.params
  new, found = run(step.init_state(params, tx, ema=True), batch, _KEY)

  def objective(params):
    z_BTV = nnx.merge(graph, params)(batch["tokens"])
    z_BMV = jnp.take_along_axis(z_BTV, batch["positions"][..., None], axis=1)
    l_BM = jax.nn.logsumexp(z_BMV, axis=-1)
    target_BM = jnp.take_along_axis(z_BMV, batch["targets"][..., None], axis=-1)
    each = l_BM - target_BM[..., 0], 0.1 * l_BM**2
    weights_BM = batch["weights"]
    nll, z_loss = ((weights_BM * x).sum() / weights_BM.sum() for x in each)
    return nll + z_loss, (nll, z_loss)

  grads, (nll, z_loss) = jax.jit(jax.grad(objective, has_aux=True))(params)
  assert z_loss > 0.5
  np.testing.assert_allclose(found["loss"], nll, rtol=1e-5)
  np.testing.assert_allclose(found["z_loss"], z_loss, rtol=1e-5)
  norm = optax.tree.norm(grads)
  np.testing.assert_allclose(found["grad_norm"], norm, rtol=1e-5)
  _close(new.ema, optax.incremental_update(new.params, params, 0.1), 1e-6)
  # A step that is not finite leaves the average as it is.
  batch["weights"][1, 1] = np.nan
  bad, _ = run(new, batch, _KEY)
  assert bits(bad.ema) == bits(new.ema)


def test_targets_of_weight_0_change_nothing(parts: Parts) -> None:
  batch, other = _batch(), _batch()
  other["tokens"][2] = 1
  other["targets"][2] = 3
  other["targets"][5, 1] = 3
  new, found = parts.run(parts.state, batch, _KEY)
  same, other_found = parts.run(parts.state, other, _KEY)
  assert bits((new, found)) == bits((same, other_found))


def test_micro_batches_are_weighted_by_their_tokens(parts: Parts) -> None:
  state, batch = parts.state, _batch()
  batch["weights"][0::4] = [1, 0]  # micro-batch 0 has half the targets
  batch["weights"][[3, 7]] = 0  # micro-batch 3 has none
  expected, expected_found = parts.run(state, batch, _KEY)
  new, found = _parts(tiny(accumulate=4)).run(state, batch, _KEY)
  _close(found, expected_found, 1e-6)
  # Adam's first step is g / (|g| + 1e-8): where g is near 0 its rounding shows.
  _close(new, expected, 3e-6)
  moved = jax.tree.map(lambda a, b: a - b, new.params, state.params)
  assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("where", ["loss", "gradient", "both", "update"])
def test_a_step_that_is_not_finite_changes_nothing(
  parts: Parts, where: str
) -> None:
  state, batch = parts.state, _batch()
  if where == "loss":  # Σ w nll overflows; Σ w and the gradient do not
    batch["weights"] *= np.float32(9e36)
  elif where == "gradient":  # logits of 1e25; their gradient's square overflows
    params = dict(state.params)
    scale = params["norm"]["scale"] * 1e25
    params["norm"] = dict(params["norm"], scale=scale)
    state = state._replace(params=params)
  elif where == "update":  # Adam's average gradient is of another scale
    moments = jax.tree.map(lambda x: jnp.full_like(x, 1e34), state.params)
    opt_state = optax.tree.set(state.opt_state, mu=moments)
    state = state._replace(opt_state=opt_state)
  else:
    batch["weights"][1, 1] = np.nan
  bad, found = parts.run(state, batch, _KEY)
  assert bool(jnp.isfinite(found["loss"])) == (where in ("gradient", "update"))
  assert bool(jnp.isfinite(found["grad_norm"])) == (where in ("loss", "update"))
  assert not bool(bad.ok)
  assert bits(bad._replace(ok=state.ok)) == bits(state)
  bad = parts.state._replace(ok=bad.ok)
  after, found = parts.run(bad, _batch(), _KEY)
  assert jnp.isfinite(found["loss"]) and jnp.isfinite(found["grad_norm"])
  assert bits(after) == bits(bad)


@pytest.mark.quick
def test_golden_metrics(eight: Run) -> None:
  assert int(eight.states[-1].step) == 5 and bool(eight.states[-1].ok)
  names = ("loss", "grad_norm", "param_norm")
  found = [tuple(float(x[name]) for name in names) for x in eight.metrics]
  np.testing.assert_allclose(
    found, _GOLDEN, rtol=_TOLERANCE, err_msg=f"{_REGENERATE}\nfound={found}"
  )


def test_every_parameter_moves(eight: Run) -> None:
  before, after = (bits(eight.states[at].params) for at in (0, -1))
  assert {path for path in before if before[path] == after[path]} == set()
  affine = {x for x in before if x.endswith(("gamma", "beta"))}
  assert affine == {
    f"pairs/second/mixer/{side}_affine/{name}"
    for side in ("query", "key")
    for name in ("gamma", "beta")
  }


def test_every_step_draws_another_dropout_mask(eight: Run) -> None:
  batch = _FULL.data.train_batches(_FULL.batch, 0).read(0)
  sums, first = _parts(_FULL).sums, eight.states[0]

  def loss(at: int, seed: int) -> float:
    state = first._replace(step=np.int32(at))
    with jax.set_mesh(eight.mesh):
      placed = batch_sharding.put_batch(batch, eight.mesh)
      _, found = eight.built.train_step(state, placed, jax.random.key(seed))
    return float(found["loss"])

  def expected(at: int, seed: int) -> float:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), at), 2)
    parts = [
      sums(first.params, {k: x[a::2] for k, x in batch.items()}, keys[a])
      for a in range(2)
    ]
    return float(sum(x[0] for x in parts) / sum(x[1]["tokens"] for x in parts))

  found = {(at, seed): loss(at, seed) for at, seed in ((3, 7), (4, 7), (3, 8))}
  assert len(set(found.values())) == 3
  for where, value in found.items():
    np.testing.assert_allclose(value, expected(*where), rtol=1e-5)


def test_eight_devices_train_as_one(eight: Run) -> None:
  assert jax.device_count() == 8
  shards = eight.batch["tokens"].addressable_shards
  assert {shard.data.shape[0] for shard in shards} == {2}
  assert len({shard.device for shard in shards}) == 8
  for leaf in jax.tree.leaves(eight.placed):
    assert leaf.sharding.is_fully_replicated
    assert len(leaf.sharding.device_set) == 8
  alone = _five_steps(mesh_lib.make_mesh(devices=jax.devices()[:1]))
  _close(eight.metrics, alone.metrics, 1e-5)
  _close(eight.states[1:], alone.states[1:], 1e-4)  # m/√v enlarges roundings


def test_every_parameter_has_a_rule() -> None:
  params = nnx.to_pure_dict(
    nnx.state(
      compiled_steps.abstract_model(tiny(model=dict(mlp_width=8))), nnx.Param
    )
  )
  paths = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]
  assert len(paths) > 20
  for path in paths:
    assert any(re.search(rule, path) for rule, _ in parameter_axes.RULES), path
  placed = parameter_sharding.named_shardings(params, mesh_lib.make_mesh())
  assert all(x.is_fully_replicated for x in jax.tree.leaves(placed))


def _close(found, expected, tolerance: float) -> None:
  """Check that leaves agree within `tolerance`, relative and absolute."""
  chex.assert_trees_all_close(found, expected, rtol=tolerance, atol=tolerance)
