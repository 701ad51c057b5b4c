"""A cell of a sweep: each of its runs is the run that trains alone."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_cases import trainer as trainer

from rebased_jax import BaseConvConfig, ModelConfig, ReBasedConfig
from train import compiled_steps
from train.config import (
  MQARPaperData,
  MQARStreamData,
  OptimizerConfig,
  RunConfig,
)
from train.devices import mesh as mesh_lib
from train.experiments import (
  record as records,
  run_cell as run_cell_lib,
  sweep as sweep_lib,
)
from train.experiments.run_cell import run_cell
from train.experiments.sweep import Cell, Sweep
from train.presets import make_presets

EXAMPLES, ROWS = 200, 64  # so that the last batch of an epoch is filled up


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


@functools.cache
def _compiled(run: RunConfig) -> compiled_steps.Built:
  mesh = mesh_lib.make_mesh(None, jax.devices()[:1])
  with jax.set_mesh(mesh):
    return compiled_steps.build(run, mesh)


@functools.cache
def _alone(run: RunConfig):
  """The parameters after all steps of the trainer's own step."""
  # The seed is no part of the program.
  built = _compiled(dataclasses.replace(run, seed=0))
  key = compiled_steps.dropout_key(run.seed)
  key = jax.device_put(key, mesh_lib.replicated(built.mesh))
  with jax.set_mesh(built.mesh), jax.default_matmul_precision("highest"):
    state = compiled_steps.fresh_state(run, built)
    data = run.data.train_batches(run.batch, run.seed)
    losses = []
    for number in range(run.steps):
      batch = jax.tree.map(jnp.asarray, data.read_rows(number, 0, run.batch))
      state, metrics = built.train_step(state, batch, key)
      losses.append(metrics["loss"])
  return jax.device_get((state.params, np.stack(losses)))


@pytest.mark.parametrize(
  ("accumulate", "devices"), [(1, 1), (2, 1), (1, 3)], ids=str
)
def test_a_mapped_run_is_the_run_alone(accumulate, devices):
  run = _run(accumulate=accumulate, z_loss=0.1 if accumulate > 1 else 0.0)
  cell = Cell(run, rates=(1e-3, 1e-2), seeds=(0, 3))
  sweep = Sweep(cell, devices=jax.devices()[:devices])
  epochs = list(sweep.epochs())
  assert [epoch.number for epoch in epochs] == [0, 1, 2]
  losses_SR = np.concatenate([epoch.metrics_SR["loss"] for epoch in epochs])
  params_R = jax.device_get(sweep.state_R.params)
  affine = params_R["pairs"]["second"]["mixer"]["key_affine"]
  gamma_RF = affine["gamma"][...][:, 0]
  moments_R2 = np.stack([gamma_RF.mean(axis=1), gamma_RF.std(axis=1)], axis=1)
  found_R2 = epochs[-1].affine_R2["layer1.key_affine.gamma"]
  np.testing.assert_allclose(found_R2, moments_R2, rtol=1e-4)
  assert len(epochs[-1].affine_R2) == 4
  # Runs 0 and 3 differ in rate and seed; alone each takes a compilation.
  checked = range(4) if (accumulate, devices) == (1, 1) else (0, 3)
  for index in checked:
    rate, seed = cell.runs[index]
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
  sweep = Sweep(cell, devices=jax.devices()[:1])
  epochs = sweep.epochs()
  first = next(epochs)
  stopped_R = first.accuracy_R > 1e-9
  assert stopped_R.any()
  sweep.active_R = np.array([False, True])  # run 0 stopped, run 1 did not
  sweep.state_R = sweep.state_R._replace(ok=jnp.asarray(sweep.active_R))
  before = jax.device_get(sweep.state_R.params)
  second = next(epochs)
  after = jax.device_get(sweep.state_R.params)
  chex.assert_trees_all_equal(
    jax.tree.map(lambda x_R: x_R[0], before),
    jax.tree.map(lambda x_R: x_R[0], after),
  )
  moved = jax.tree.map(lambda a_R, b_R: (a_R[1] != b_R[1]).any(), before, after)
  assert any(jax.tree.leaves(moved))
  np.testing.assert_array_equal(second.active_R, [False, True])
  # A sweep that is resumed knows which of its runs have stopped.
  saved, active_R = sweep.arrays(), sweep.active_R
  assert not active_R[0]
  sweep.active_R = np.ones(2, bool)
  sweep.load(saved, 2)
  np.testing.assert_array_equal(sweep.active_R, active_R)


def test_a_cell_is_one_compilation(monkeypatch):
  """The order of each epoch is made once, before the one before is read."""
  order, get, done = Cell.order, jax.device_get, []

  def note_order(cell, epoch, seeds):
    done.append(epoch)
    return order(cell, epoch, seeds)

  def note_read(tree):
    done.append("read")
    return get(tree)

  monkeypatch.setattr(Cell, "order", note_order)
  monkeypatch.setattr(jax, "device_get", note_read)
  sweep = Sweep(Cell(_run(), rates=(1e-3,), seeds=(0, 1)))
  list(sweep.epochs())
  assert len(sweep.compile_seconds) == 1
  assert done == [0, 1, "read", 2, "read", "read"]


def test_runs_are_shared_among_devices():
  sweep = Sweep(Cell(_run(), rates=(1e-3,), seeds=(0, 1, 2, 3)))
  sharding = sweep.state_R.ok.sharding
  assert len(sharding.device_set) == 4  # of eight
  assert sharding.shard_shape((4,)) == (1,)


def _stream(**changes) -> RunConfig:
  data = MQARStreamData(vocab_size=64, length=16, pairs=2, test_examples=70)
  return _run(data=data, eval_every=2, steps=6, **changes)


def test_runs_on_unlimited_data_see_the_rows_of_their_seeds():
  cell = Cell(_stream(), rates=(1e-3, 1e-2), seeds=(0, 3))
  assert (cell.epochs, cell.epoch_steps) == (3, 2)
  seeds = [seed for _, seed in cell.runs]
  rows_N = cell.examples(1, seeds)
  order_RSB, weights_SB = cell.order(1, seeds)
  assert weights_SB.all() and len(rows_N["tokens"]) == 2 * 2 * ROWS
  held_out = cell.held_out(seeds)
  for run, seed in enumerate(seeds):
    data = cell.run.data.train_batches(ROWS, seed)
    for number in range(2):
      for name, wanted in data.read_rows(2 + number, 0, ROWS).items():
        found = rows_N[name][order_RSB[run, number]]
        np.testing.assert_array_equal(found, wanted)
    data = cell.run.data.eval_batches(70, seed)
    for name, wanted in data.read_rows(0, 0, 70).items():
      np.testing.assert_array_equal(held_out[name][run, :70], wanted)
    assert held_out["weights"][run].sum() == 70 * 2


def _numbers(record):
  """The record without what depends on time."""
  times = ("seconds", "ms_per_run_step", "commit")
  return {name: x for name, x in record.items() if name not in times}


@pytest.mark.parametrize(
  "data", ["paper", pytest.param("stream", marks=pytest.mark.slow)]
)
def test_a_cell_that_is_killed_and_resumed_has_the_same_record(
  tmp_path, data, monkeypatch
):
  monkeypatch.setattr(run_cell_lib, "_SAVE_SECONDS", 0)  # after each epoch
  run = _run() if data == "paper" else _stream()
  seeds = (0,) if data == "paper" else (0, 3)  # on 2 devices, or on 4
  cell = Cell(run, rates=(1e-3, 1e-2), seeds=seeds)
  whole = run_cell("cell", cell, tmp_path / "whole")

  def kill(progress):
    if progress.epoch.number == 1:
      raise SystemExit("killed before the save")

  with pytest.raises(SystemExit, match="killed before the save"):
    run_cell("cell", cell, tmp_path / "parts", report=kill)
  assert not (tmp_path / "parts" / "cell.json").exists()
  epochs = []
  resumed = run_cell(
    "cell",
    cell,
    tmp_path / "parts",
    report=lambda progress: epochs.append(progress.epoch.number),
  )
  assert epochs == [1, 2]
  assert _numbers(resumed) == _numbers(whole)
  moments = resumed["runs"][0]["affine"]["layer1.query_affine.beta"]
  assert len(moments["mean"]) == len(moments["std"]) == 3
  assert [path.name for path in (tmp_path / "parts").iterdir()] == ["cell.json"]
  again = run_cell("cell", cell, tmp_path / "parts", report=epochs.append)
  assert again == resumed and epochs == [1, 2]
  assert records.cell_of(resumed) == cell


def test_another_cell_under_the_same_name_is_refused(tmp_path):
  cell = Cell(_run(), rates=(1e-3,), seeds=(0,))
  assert run_cell("cell", cell, tmp_path, stop=lambda: True) is None
  other = dataclasses.replace(cell, rates=(1e-2,))
  with pytest.raises(records.RecordError, match="is of another cell"):
    run_cell("cell", other, tmp_path)
  history = records.History.empty(cell)
  for field in jax.tree.leaves(history.arrays()):
    field[:1] = 1.0
  record = records.make(cell, history, name="cell", commit=None, seconds=1.0)
  records.write(tmp_path / "cell.json", record)
  assert run_cell("cell", cell, tmp_path) == record
  with pytest.raises(records.RecordError, match="is of another cell"):
    run_cell("cell", other, tmp_path)


def test_runs_that_memory_does_not_hold_follow_each_other(
  tmp_path, monkeypatch
):
  cell = Cell(_run(), rates=(1e-3,), seeds=(0, 1, 2))
  whole = run_cell("whole", cell, tmp_path, devices=jax.devices()[:1])
  sizes = []

  def check(program, device, runs):
    sizes.append(runs)
    if runs > 2:
      raise MemoryError(f"{runs} runs")

  monkeypatch.setattr(sweep_lib, "_check_memory", check)
  parts = run_cell("parts", cell, tmp_path, devices=jax.devices()[:1])
  assert sizes == [3, 2, 2, 1, 1]
  for a, b in zip(whole["runs"], parts["runs"], strict=True):
    np.testing.assert_allclose(a["train_loss"], b["train_loss"], rtol=1e-4)


def test_half_of_the_runs_continue_in_a_smaller_program(monkeypatch):
  monkeypatch.setattr(sweep_lib, "_EPOCHS_WORTH_COMPILING", 1)
  cell = Cell(_run(stop_accuracy=0.99), rates=(1e-3, 1e-2, 3e-2), seeds=(0,))
  alone = [x.train_loss_R for x in Sweep(cell, runs=[1]).epochs()]
  sweep = Sweep(cell, devices=jax.devices()[:1])
  epochs = sweep.epochs()
  first = next(epochs)
  found = [first.train_loss_R[1]]
  sweep._stop(first._replace(accuracy_R=np.array([0.995, 0.1, 0.1])))
  assert sweep.runs == (0, 1, 2)  # more than half are left
  sweep._stop(first._replace(accuracy_R=np.array([0.995, 0.1, 0.995])))
  assert sweep.runs == (1,)
  found += [epoch.train_loss_R[0] for epoch in epochs]
  np.testing.assert_allclose(found, np.ravel(alone), rtol=1e-5)
  assert len(sweep.compile_seconds) == 2
  sweep.epoch, sweep.active_R = 0, np.zeros(1, bool)
  assert list(sweep.epochs()) == []  # no epoch for runs that have stopped


def test_a_run_that_is_not_finite_stops(tmp_path):
  cell = Cell(_run(), rates=(1e-3, 1e30), seeds=(0,))
  record = run_cell("cell", cell, tmp_path)
  good, bad = record["runs"]
  assert good["finite"] and good["epochs"] == 3
  assert not bad["finite"] and bad["epochs"] == 1


def test_what_a_sweep_does_not_do_is_refused():
  for change, message in (
    (dict(ema=0.9), "ema=0.9: expected None"),
    (dict(nan="skip"), "nan='skip': expected 'abort'"),
    (dict(init_from="run"), "init_from='run': expected None"),
    (dict(wandb="project"), "wandb='project': expected None"),
  ):
    with pytest.raises(ValueError, match=message):
      Cell(_run(**change), rates=(1e-3,), seeds=(0,))
  with pytest.raises(ValueError, match="TextData: expected MQAR"):
    Cell(make_presets()["lm-tiny"], rates=(1e-3,), seeds=(0,))
  with pytest.raises(ValueError, match=r"steps of an epoch, 4 \(eval_every\)"):
    Cell(dataclasses.replace(_stream(), eval_every=4), (1e-3,), (0,))
  with pytest.raises(ValueError, match=r"^rates=\(\)"):
    Cell(_run(), rates=(), seeds=(0,))
