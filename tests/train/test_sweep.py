"""A cell of a sweep: each of its runs is the run that trains alone."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rebased_jax import BaseConvConfig, ModelConfig, ReBasedConfig
from train import compiled_steps
from train.config import (
  MQARPaperData,
  MQARStreamData,
  OptimizerConfig,
  RunConfig,
)
from train.devices import mesh as mesh_lib
from train.experiments.sweep import Cell, Sweep

pytestmark = pytest.mark.usefixtures("standard_promotion")
EXAMPLES, ROWS = 200, 64  # so that the last batch of an epoch is filled up


@pytest.fixture
def standard_promotion():
  """Promote dtypes as jax does by default, which optax's AdamW needs."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def _run(**changes) -> RunConfig:
  data = MQARPaperData(
    vocab_size=64, length=16, pairs=2, examples=EXAMPLES, epochs=3
  )
  per_epoch = -(-EXAMPLES // ROWS)
  model = ModelConfig(
    BaseConvConfig(),
    ReBasedConfig(heads=2, features=4),
    vocab_size=64,
    width=16,
    positions=16,
    dropout=0.1,
  )
  run = RunConfig(
    model=model,
    data=data,
    optimizer=OptimizerConfig(learning_rate=1e-3, epoch_steps=per_epoch),
    steps=3 * per_epoch,
    batch=ROWS,
  )
  return dataclasses.replace(run, **changes)


def _alone(run: RunConfig):
  """The parameters after all steps of the trainer's own step."""
  mesh = mesh_lib.make_mesh(None, jax.devices()[:1])
  with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
    built = compiled_steps.build(run, mesh)
    state = compiled_steps.fresh_state(run, built)
    data = run.data.train_batches(run.batch, run.seed)
    losses = []
    for number in range(run.steps):
      batch = jax.tree.map(jnp.asarray, data.read_rows(number, 0, run.batch))
      state, metrics = built.train_step(state, batch, built.key)
      losses.append(metrics["loss"])
  return jax.device_get((state["params"], np.stack(losses)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_mapped_run_is_the_run_alone(accumulate):
  run = _run(accumulate=accumulate)
  cell = Cell(run, rates=(1e-3, 1e-2), seeds=(0, 3))
  sweep = Sweep(cell)
  epochs = list(sweep.epochs())
  assert [epoch.number for epoch in epochs] == [0, 1, 2]
  losses_SR = np.concatenate([epoch.metrics_SR["loss"] for epoch in epochs])
  params_R = jax.device_get(sweep.state_R["params"])
  for index, (rate, seed) in enumerate(cell.runs):
    tuned = dataclasses.replace(run.optimizer, learning_rate=rate)
    params, losses = _alone(
      dataclasses.replace(run, optimizer=tuned, seed=seed)
    )
    np.testing.assert_allclose(losses_SR[:, index], losses, rtol=1e-5)
    mine = jax.tree.map(lambda x_R: x_R[index], params_R)  # noqa: B023
    # AdamW divides by the root of the squared gradient, so rounding in a small
    # gradient moves a parameter by a fraction of the rate. Another batch or
    # dropout mask would move it by the rate itself, once a step.
    chex.assert_trees_all_close(mine, params, atol=5e-3 * rate, rtol=1e-5)


def test_a_run_that_stopped_no_longer_moves():
  cell = Cell(_run(stop_accuracy=1e-9), rates=(1e-2,), seeds=(0, 1))
  sweep = Sweep(cell)
  epochs = sweep.epochs()
  first = next(epochs)
  stopped_R = first.accuracy_R > 1e-9
  assert stopped_R.any()
  sweep.active_R = np.array([False, True])  # run 0 stopped, run 1 did not
  sweep.state_R = dict(sweep.state_R, ok=jnp.asarray(sweep.active_R))
  before = jax.device_get(sweep.state_R["params"])
  second = next(epochs)
  after = jax.device_get(sweep.state_R["params"])
  chex.assert_trees_all_equal(
    jax.tree.map(lambda x_R: x_R[0], before),
    jax.tree.map(lambda x_R: x_R[0], after),
  )
  moved = jax.tree.map(lambda a_R, b_R: (a_R[1] != b_R[1]).any(), before, after)
  assert any(jax.tree.leaves(moved))
  np.testing.assert_array_equal(second.active_R, [False, True])


def test_a_cell_is_one_compilation_each_way():
  sweep = Sweep(Cell(_run(), rates=(1e-3,), seeds=(0, 1)))
  list(sweep.epochs())
  assert sweep._train._cache_size() == 1
  assert sweep._evaluate._cache_size() == 1


def test_other_data_are_refused():
  run = _run(data=MQARStreamData(vocab_size=64, length=16, pairs=2))
  with pytest.raises(ValueError, match="MQARStreamData: expected MQARPaper"):
    Cell(run, rates=(1e-3,), seeds=(0,))
  with pytest.raises(ValueError, match=r"Cell.rates=\(\)"):
    Cell(_run(), rates=(), seeds=(0,))
