"""Runs that start from an exported model, and weights that are refused."""

import dataclasses
from pathlib import Path
import shutil

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from train_cases import run, tiny, trainer as trainer

import rebased_jax
from rebased_jax import (
  BasedConfig,
  HyenaConfig,
  ReBasedConfig,
  model_files,
)
from train import compiled_steps, init_weights
from train.checkpoint.checkpoints import Checkpoints
from train.devices import mesh as mesh_lib
from train.records.run_folder import RunFolder, RunFolderError

_CONFIG = tiny(steps=3)
# Without norm, γ and β ReBased has the parameters of Based.
_PLAIN = ReBasedConfig(
  heads=2, features=4, normalize=False, use_gamma=False, use_beta=False
)


def _export(config, folder: Path) -> Path:
  """Write a model of random parameters."""
  rng = np.random.default_rng(0)
  graph, abstract = model_files.abstract_lm(config)
  draw = lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype)
  rebased_jax.save(nnx.merge(graph, jax.tree.map(draw, abstract)), folder)
  return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
  return _export(_CONFIG.model, tmp_path_factory.mktemp("source") / "model")


def _from(path: Path, **model):
  changed = dataclasses.replace(_CONFIG.model, **model)
  return dataclasses.replace(_CONFIG, model=changed, init_from=str(path))


def test_a_run_starts_from_an_exported_model(source, tmp_path: Path) -> None:
  """It takes the weights once; a resume needs the export no more."""
  export = tmp_path / "export"
  shutil.copytree(source, export)
  # Such a rate changes no float32.
  still = dataclasses.replace(_CONFIG.optimizer, learning_rate=1e-30)
  config = dataclasses.replace(_from(export, dropout=0.5), optimizer=still)
  outcome, out = run(config, tmp_path / "run")
  assert f"weights of {export}; fresh optimiser" in out
  assert "warning" not in out  # dropout does not change what weights mean
  wanted = rebased_jax.load(source)
  found = rebased_jax.load(tmp_path / "run")
  for x, y in zip(
    jax.tree.leaves(nnx.state(found, nnx.Param)),
    jax.tree.leaves(nnx.state(wanted, nnx.Param)),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)
  stored = RunFolder(tmp_path / "run").read_config()
  assert stored.init_from == str(export)
  shutil.rmtree(export)
  again, out = run(config, tmp_path / "run")
  assert again.step == outcome.step and again.reason == "finished"


def test_weights_become_those_of_another_param_dtype(source, tmp_path) -> None:
  """A step keeps that dtype; an export has it, and becomes float32 again."""
  narrow = _from(source, param_dtype=jnp.bfloat16)
  narrow = dataclasses.replace(narrow, batch=16, accumulate=2)
  wanted = nnx.state(rebased_jax.load(source), nnx.Param)
  mesh = mesh_lib.make_mesh()
  with jax.set_mesh(mesh):
    built = compiled_steps.build(narrow, mesh)
    inputs = compiled_steps.step_inputs(narrow, built)
    for x in jax.tree.leaves(built.train_step.eval_shape(*inputs)[0][2:]):
      assert x.dtype == (jnp.bfloat16 if x.ndim else jnp.int32)
    params, notes = init_weights.source_weights(narrow, built)
    assert notes == [f"weights of {source}; fresh optimiser"]
  params = jax.device_get(params)
  graph, _ = model_files.abstract_lm(narrow.model)
  export = tmp_path / "export"
  rebased_jax.save(nnx.merge(graph, params), export)
  assert rebased_jax.load(export).config == narrow.model
  with jax.set_mesh(mesh):
    built = compiled_steps.build(_CONFIG, mesh)
    wide, _ = init_weights.source_weights(_from(export), built)
  for x, y, z in zip(
    *map(jax.tree.leaves, (params, wide, wanted)), strict=True
  ):
    assert (x.dtype, y.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(x, z.astype(jnp.bfloat16))
    np.testing.assert_array_equal(y, x.astype(np.float32))


def _refuse(config, folder: Path, message: str) -> None:
  with pytest.raises(RunFolderError, match=message):
    run(config, folder)
  assert not folder.exists()


def test_another_model_is_refused_with_the_flags_to_add(
  source, tmp_path: Path
) -> None:
  wide = _from(source, width=24, second=ReBasedConfig(heads=3, features=4))
  _refuse(
    wide,
    tmp_path / "run",
    "init_from=.*model.second.heads is 3: expected 2; model.width is 24: "
    "expected 16; choose .*, and add --model.second.heads 2 --model.width 16",
  )
  _refuse(
    _from(source, vocab_size=40),
    tmp_path / "run",
    "model.vocab_size is 40: expected 32",
  )


def test_another_mixer_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
  model = dataclasses.replace(_CONFIG.model, second=_PLAIN)
  export = _export(model, tmp_path / "model")
  based = BasedConfig(heads=2, features=4)
  _refuse(
    _from(export, second=based),
    tmp_path / "run",
    "second.class is 'rebased_jax:BasedConfig'.*'rebased_jax:ReBasedConfig'",
  )


def test_damaged_weights_are_refused(source, tmp_path: Path) -> None:
  export = tmp_path / "export"
  shutil.copytree(source, export)
  path = export / "model.safetensors"
  arrays = load_file(path)
  arrays["norm.bias"][2] = np.nan
  save_file(arrays, path)
  message = r"init_from=.*norm.bias has 1 values .*\[2\]: expected finite"
  _refuse(_from(export), tmp_path / "run", message)
  path.write_bytes(path.read_bytes()[:-9])
  _refuse(_from(export), tmp_path / "run", "init_from=.*cannot be read")
  (export / "config.json").unlink()
  _refuse(_from(export), tmp_path / "run", "init_from=.*config.json")


def test_another_eps_is_a_warning() -> None:
  second = dataclasses.replace(_CONFIG.model.second, eps=1e-3)
  notes = init_weights.compare(
    "there",
    _CONFIG.model,
    dataclasses.replace(_CONFIG.model, second=second),
  )
  assert len(notes) == 1
  assert "warning" in notes[0] and "model.second.eps is 0.001" in notes[0]


def test_parameters_in_a_list_are_found(tmp_path: Path) -> None:
  """Hyena has a list of layers, whose numbers are names in a checkpoint."""
  hyena = dataclasses.replace(_CONFIG.model, second=HyenaConfig(filter_width=4))
  config = dataclasses.replace(_CONFIG, model=hyena)
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape).astype(x.dtype))
  mesh = mesh_lib.make_mesh()
  with jax.set_mesh(mesh):
    built = compiled_steps.build(config, mesh)
    state = jax.tree.map(draw, built.abstract)
    folder = RunFolder(tmp_path / "run")
    folder.open(config)
    with Checkpoints(folder.checkpoints, run=folder.run_id()) as checkpoints:
      checkpoints.save(1, compiled_steps.to_dicts(state), {})
  model = rebased_jax.load(tmp_path / "run")
  rebased_jax.save(model, tmp_path / "model")
  with jax.set_mesh(mesh):
    for source in ("run", "model"):
      warm = dataclasses.replace(config, init_from=str(tmp_path / source))
      params, notes = init_weights.source_weights(warm, built)
      chex.assert_trees_all_equal(params, state.params)
      assert len(notes) == 1, notes
  found = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  chex.assert_trees_all_equal(found, state.params)
