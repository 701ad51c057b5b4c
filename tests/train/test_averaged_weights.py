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
from train import compiled_steps, init_weights
from train.commands import evaluate as evaluate_command, export
from train.devices import mesh as mesh_lib
from train.devices.mesh_config import MeshConfig
from train.records.run_folder import RunFolder, RunFolderError

_CONFIG = tiny(
  model=dict(mlp_width=8),
  optimizer=dict(name="muon", schedule="wsd", frozen=("norm/*",)),
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


def test_frozen_parameters_have_no_momentum_and_stay(finished) -> None:
  params = _named(finished[1].state.params)
  assert (params["norm/scale"] == 1).all() and not params["norm/bias"].any()
  assert (params["pairs/first/norm1/scale"] != 1).any()
  momenta = _named(finished[1].state.opt_state)
  assert not any(path.endswith("/mu/norm/scale") for path in momenta)
  assert any(path.endswith("/norm1/scale") for path in momenta)


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


def test_another_run_starts_from_the_average(finished, tmp_path) -> None:
  folder, outcome = finished
  begin = tiny(model=dict(mlp_width=8), batch=8, init_from=str(folder))
  mesh = mesh_lib.make_mesh()
  with jax.set_mesh(mesh):
    built = compiled_steps.build(begin, mesh)
    for name in ("trained", "ema"):
      config = dataclasses.replace(begin, init_weights=name)
      params, (note,) = init_weights.source_weights(config, built)
      assert note.startswith(f"{name} weights of {folder}, step 4")
      assert ("--init-weights ema" in note) == (name == "trained")
      state = outcome.state.params if name == "trained" else outcome.state.ema
      chex.assert_trees_all_equal(jax.device_get(params), jax.device_get(state))
  # A run without an average, and an exported model.
  other = RunFolder(tmp_path / "run")
  other.open(tiny(model=dict(mlp_width=8)))
  exported = tmp_path / "model"
  rebased_jax.save(rebased_jax.load(folder), exported)
  for source, message in (
    (other.path, "weights='ema': expected 'trained'"),
    (exported, "init_weights=ema: .* is an exported model"),
  ):
    config = dataclasses.replace(
      begin, init_from=str(source), init_weights="ema"
    )
    with pytest.raises(RunFolderError, match=message):
      init_weights.source_weights(config, built)
  with pytest.raises(ValueError, match="init_weights=.* without init_from"):
    tiny(init_weights="ema")
  with pytest.raises(
    ValueError, match="init_weights='mean': expected one of .'trained'"
  ):
    tiny(init_from="run", init_weights="mean")
  with pytest.raises(ValueError, match="ema=0.9: .*param_dtype=bfloat16"):
    tiny(ema=0.9, model=dict(param_dtype="bfloat16"))


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
  with pytest.raises(ValueError, match="weights='mean': expected one of"):
    rebased_jax.load(folder.path, weights="mean")


@pytest.mark.parametrize("ema", [0.0, 1.0, -0.5])
def test_a_wrong_decay_of_the_average_is_refused(ema) -> None:
  with pytest.raises(
    ValueError, match="ema=.*None or a number above 0, below 1"
  ):
    tiny(ema=ema)
  with pytest.raises(ValueError, match="z_loss=-1"):
    tiny(z_loss=-1.0)
