"""Mamba in the trainer: weight decay, a run, and `inspect`."""

import dataclasses
import io

from flax import nnx
import jax
from rich.console import Console
from train_cases import tiny, trainer as trainer

from rebased_jax import BaseConvConfig, MambaConfig
from train import compiled_steps, optimizer, start_run, stored_config
from train.commands import inspect
from train.config import RunConfig
from train.records import report
from train.records.run_folder import RunFolder

_MATRICES = ("in_proj", "gate_proj", "x_proj", "dt_proj", "out_proj")


def mamba_run(**model) -> RunConfig:
  mixer = MambaConfig(state=2)
  config = tiny()
  fields = {**dict(first=mixer, second=mixer, block="mamba"), **model}
  return dataclasses.replace(
    config, model=dataclasses.replace(config.model, **fields)
  )


def _names(tree) -> dict:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {name(path): leaf for path, leaf in leaves}


def _decayed(config: RunConfig, which: str) -> set[str]:
  model = compiled_steps.abstract_model(config)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  mask = _names(optimizer.decayed(params, which))
  assert mask.keys() == _names(params).keys()
  return {name for name, decays in mask.items() if decays}


def test_the_papers_decay_takes_a_log_and_d() -> None:
  found = _decayed(mamba_run(), "all")
  for place in ("first", "second"):
    for name in ("A_log", "D", "conv/kernel", "dt_proj/bias"):
      assert f"pairs/{place}/mixer/{name}" in found


def test_matrices_are_mambas_projections() -> None:
  assert _decayed(mamba_run(), "matrices") == {
    f"pairs/{place}/mixer/{name}/kernel"
    for place in ("first", "second")
    for name in _MATRICES
  }


def test_convolution_taps_do_not_decay_as_matrices() -> None:
  config = mamba_run(second=BaseConvConfig(), first=BaseConvConfig())
  assert _decayed(config, "matrices") == {
    f"pairs/{place}/mixer/gate/kernel" for place in ("first", "second")
  }


def test_inspect_lists_the_parameters() -> None:
  text = io.StringIO()
  config = mamba_run()
  console = Console(file=text, width=200)
  inspect.show_config(config, "mine", console, everything=True)
  lines = [line.split() for line in text.getvalue().splitlines()]
  cells = {line[1]: line[-2] for line in lines if len(line) > 3}
  assert cells["pairs/second/mixer/A_log"] == "64"  # 32 channels, 2 states
  assert cells["pairs/second/mixer/D"] == "32"
  # Two mixers of 3 past inputs and 2 states of 32 channels; the position.
  assert f"{4 + 2 * 4 * 32 * (3 + 2):,} bytes" in text.getvalue()


def test_a_run_without_an_attention_picture(tmp_path) -> None:
  config, text = mamba_run(), io.StringIO()
  folder, console = RunFolder(tmp_path / "run"), Console(file=text, width=200)
  outcome = start_run.train(config, folder, console)
  report.finish(config, folder, outcome, console)
  assert outcome.step == config.steps
  names = {path.name for path in folder.path.iterdir()}
  assert "learning.png" in names and "attention.png" not in names
  assert "attention.png" not in text.getvalue()
  assert "None" not in text.getvalue()  # it has no goal to speak of
  assert folder.read_config() == config


def test_a_stored_config_without_a_block_is_pre_norm() -> None:
  old = stored_config.to_dict(tiny())
  del old["model"]["block"]
  assert stored_config.from_dict(old) == tiny()
