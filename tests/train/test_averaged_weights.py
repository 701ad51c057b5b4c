"""A run with Muon and an average of its weights, on a mesh of eight devices."""

import dataclasses
from pathlib import Path
import shutil

import chex
from flax import nnx
import jax
import pytest
from train_cases import (
  bits,
  built_once as built_once,
  run,
  tiny,
  trainer as trainer,
)

import rebased_jax
from train.commands import evaluate as evaluate_command, export
from train.devices.mesh_config import MeshConfig
from train.records.run_folder import RunFolder

_CONFIG = tiny(
  model=dict(mlp_width=8),
  optimizer=dict(name="muon", schedule="wsd"),
  ema=0.5,
  z_loss=1e-2,
  accumulate=2,
  batch=8,
  steps=4,
  mesh=MeshConfig(fsdp=2, tensor=2),
)


@pytest.fixture(scope="module")
def finished(built_once, tmp_path_factory):
  """A run of four steps: its folder and its outcome."""
  folder = tmp_path_factory.mktemp("averaged") / "run"
  return folder, run(_CONFIG, folder)[0]


def _named(tree) -> dict:
  """Return the leaves by their paths."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): x
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_momentum_and_average_lie_where_the_parameter_lies(finished) -> None:
  state = finished[1].state
  params, split = _named(state.params), 0
  for path, x in _named((state.opt_state, state.ema)).items():
    owner = [name for name in params if path.endswith(f"/{name}")]
    if owner:
      assert x.sharding == params[max(owner, key=len)].sharding, path
      split += not x.sharding.is_fully_replicated
  assert split > 20


def test_a_run_of_the_older_step_ends_the_same(finished, tmp_path) -> None:
  """Momentum and average come back from the checkpoint, bit by bit."""
  folder, outcome = finished
  shutil.copytree(folder, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
  again, out = run(_CONFIG, tmp_path / "run")
  assert "resuming at step 2" in out
  assert bits(again.state) == bits(outcome.state)
  assert again.held_out == outcome.held_out


@pytest.mark.slow
def test_another_mesh_goes_on(finished, tmp_path) -> None:
  """The sums differ by rounding."""
  folder, outcome = finished
  shutil.copytree(folder, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
  mesh = MeshConfig(data=4, tensor=2)
  again, _ = run(dataclasses.replace(_CONFIG, mesh=mesh), tmp_path / "run")
  for name in ("params", "ema"):
    found, expected = getattr(again.state, name), getattr(outcome.state, name)
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-4)


def test_both_weights_are_evaluated_and_loaded(finished, capsys) -> None:
  folder, outcome = finished
  held_out = outcome.held_out
  assert held_out["ema_loss"] != held_out["loss"]
  assert held_out.keys() >= {"accuracy", "ema_accuracy", "tokens"}
  record = RunFolder(folder).read_metrics()[-1]
  assert record["ema_loss"] == held_out["ema_loss"]
  for weights, name in (("trained", ""), ("ema", "ema_")):
    model = rebased_jax.load(folder, weights=weights)
    state = outcome.state.params if weights == "trained" else outcome.state.ema
    found = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(state))
    evaluate_command.run([str(folder), "--weights", weights])
    assert f"{held_out[f'{name}loss']:.4f}" in capsys.readouterr().out


def test_the_average_is_exported(finished, tmp_path: Path) -> None:
  folder, outcome = finished
  out = tmp_path / "model"
  assert export.run([str(folder), "--out", str(out), "--weights", "ema"]) == 0
  found = nnx.to_pure_dict(nnx.state(rebased_jax.load(out), nnx.Param))
  chex.assert_trees_all_equal(
    jax.device_get(found), jax.device_get(outcome.state.ema)
  )
  with pytest.raises(ValueError, match="weights=ema: .* an exported model"):
    rebased_jax.load(out, weights="ema")


def test_a_run_without_an_average_says_so(tmp_path: Path) -> None:
  without = dataclasses.replace(_CONFIG, ema=None)
  folder = RunFolder(tmp_path / "run")
  folder.open(without)
  message = "weights='ema': expected 'trained', because the run keeps no"
  for read in (
    lambda: rebased_jax.load(folder.path, weights="ema"),
    lambda: evaluate_command.run([str(folder.path), "--weights", "ema"]),
  ):
    with pytest.raises(ValueError, match=message):
      read()
  with pytest.raises(ValueError, match="weights='mean': expected 'trained'"):
    rebased_jax.load(folder.path, weights="mean")


@pytest.mark.parametrize("ema", [0.0, 1.0, -0.5])
def test_a_wrong_decay_of_the_average_is_refused(ema) -> None:
  with pytest.raises(ValueError, match="ema=.*above 0, below 1, or None"):
    tiny(ema=ema)
  with pytest.raises(ValueError, match="z_loss=-1"):
    tiny(z_loss=-1.0)
