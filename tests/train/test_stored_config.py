"""Configs as JSON: classes from any module, and configs that are refused."""

import dataclasses
import enum
import importlib
import json
from pathlib import Path
import sys

import chex
import pytest
from train_cases import files, tiny, trainer as trainer

from rebased_jax import BaseConvConfig
import train
from train import compiled_steps, stored_config
from train.checkpoint import read_meta
from train.stored_config import ConfigError

_MODULE = """
import dataclasses
from rebased_jax import BaseConvConfig
from train import MQARStreamData

@dataclasses.dataclass(frozen=True)
class MineConfig(BaseConvConfig):
  sizes: tuple[int, ...] = (1, 2)

@dataclasses.dataclass(frozen=True)
class MineData(MQARStreamData):
  note: str = "mine"
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch):
  """A module of a user, with a mixer config and a data config."""
  (tmp_path / "modules").mkdir()
  (tmp_path / "modules" / "users_module.py").write_text(_MODULE)
  monkeypatch.syspath_prepend(tmp_path / "modules")
  yield importlib.import_module("users_module")
  sys.modules.pop("users_module", None)


def _with(config, *, second=None, data=None):
  if second is not None:
    model = dataclasses.replace(config.model, second=second)
    config = dataclasses.replace(config, model=model)
  return config if data is None else dataclasses.replace(config, data=data)


def _users_run(users, **changes):
  config = tiny(steps=3, log_every=3, **changes)
  fields = {
    field.name: getattr(config.data, field.name)
    for field in dataclasses.fields(config.data)
  }
  return _with(config, second=users.MineConfig(), data=users.MineData(**fields))


@pytest.mark.quick
def test_our_classes_are_stored_by_their_packages() -> None:
  data = stored_config.to_dict(tiny())
  assert data["class"] == "train:RunConfig"
  assert data["model"]["class"] == "rebased_jax:ModelConfig"
  assert data["model"]["second"]["class"] == "rebased_jax:ReBasedConfig"
  assert data["data"]["class"] == "train:MQARStreamData"
  assert data["mesh"]["class"] == "train:MeshConfig"
  assert data["optimizer"]["class"] == "train:OptimizerConfig"
  assert data["profile"]["class"] == "train:ProfileConfig"


def test_a_users_mixer_and_data_train_resume_and_load(
  users, tmp_path: Path, capsys
) -> None:
  config, folder = _users_run(users), tmp_path / "run"
  outcome = train.run(config, folder)
  assert (outcome.step, outcome.reason, outcome.exit_code) == (3, "finished", 0)
  stored = json.loads((folder / "config.json").read_text())["run"]
  assert stored["model"]["second"]["class"] == "users_module:MineConfig"
  assert stored["data"]["class"] == "users_module:MineData"
  assert read_meta(folder / "checkpoints")[1]["config"] == stored
  model = train.load(folder)
  assert model.config == config.model
  chex.assert_trees_all_equal(
    compiled_steps.to_dicts(outcome.state)["params"]["token_embedding"],
    model.token_embedding[...],
  )
  again = train.run(config, folder)
  assert (again.step, again.reason) == (3, "finished")
  assert again.held_out == outcome.held_out
  assert "resuming at step 3" in capsys.readouterr().out


def test_a_module_that_is_gone_is_named(users, tmp_path, monkeypatch) -> None:
  text = stored_config.to_json(_users_run(users))
  sys.modules.pop("users_module")
  (tmp_path / "modules" / "users_module.py").unlink()
  importlib.invalidate_caches()
  with pytest.raises(ConfigError) as error:
    stored_config.from_json(text)
  message = str(error.value)
  assert "run.model.second.class='users_module:MineConfig'" in message
  assert "No module named 'users_module'" in message
  assert "add the folder that holds it to the environment variable" in message
  assert message.endswith("PYTHONPATH")


class Colour(enum.Enum):
  RED = 1


@dataclasses.dataclass(frozen=True)
class OneValue(BaseConvConfig):
  value: object = None


@dataclasses.dataclass
class NotFrozenData:
  pass


class UndecoratedConfig(BaseConvConfig):
  """A config with its own constructor instead of fields."""

  def __init__(self, a: int):
    super().__init__()
    object.__setattr__(self, "a", a)


@dataclasses.dataclass(frozen=True)
class Growing(BaseConvConfig):
  value: int = 0

  def __post_init__(self):
    super().__post_init__()
    object.__setattr__(self, "value", self.value + 1)


def _local() -> type:
  @dataclasses.dataclass(frozen=True)
  class Local(BaseConvConfig):
    pass

  return Local


def _hidden() -> type:
  """Return a class whose name gives another object."""
  cls = dataclasses.dataclass(frozen=True)(type("Colour", (OneValue,), {}))
  cls.__module__, cls.__qualname__ = __name__, "Colour"
  return cls


def _of_the_script() -> type:
  cls = dataclasses.dataclass(frozen=True)(type("Mine", (OneValue,), {}))
  cls.__module__ = "__main__"
  return cls


_REFUSED = {
  "a list": (lambda: OneValue(value=[1]), "second.value is a list: .* tuple"),
  "a dict": (lambda: OneValue(value={"a": 1}), "second.value is a dict"),
  "an enum": (lambda: OneValue(value=Colour.RED), "second.value is a Colour"),
  "a function": (lambda: OneValue(value=print), "value is a builtin_function"),
  "infinity": (lambda: OneValue(value=float("inf")), "value=inf: .* finite"),
  "inside a tuple": (lambda: OneValue(value=(1, {2})), r"value\[1\] is a set"),
  "in a function": (lambda: _local()(), "a class inside a function"),
  "of a script": (lambda: _of_the_script()(), "of the script that runs"),
  "not found": (lambda: _hidden()(), "gives something else or nothing"),
  "not frozen": (lambda: OneValue(value=NotFrozenData()), "expected a frozen"),
  "no dataclass": (
    lambda: UndecoratedConfig(1),
    "UndecoratedConfig': expected a frozen dataclass",
  ),
  "not equal": (Growing, "run.model.second.value is not the same after"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", _REFUSED)
def test_what_cannot_be_read_back_is_refused(name: str, tmp_path) -> None:
  """And the folder of the run is not made."""
  make, message = _REFUSED[name]
  config = _with(tiny(), second=make())
  with pytest.raises(ConfigError, match=message):
    train.run(config, tmp_path / "runs" / "mine")
  assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_is_left_as_it_is(tmp_path: Path) -> None:
  (tmp_path / "config.json").write_text(stored_config.to_json(tiny()))
  before = files(tmp_path)
  with pytest.raises(ConfigError, match="second.value is a list"):
    train.run(_with(tiny(), second=OneValue(value=[1])), tmp_path)
  assert files(tmp_path) == before


_CLASSES = {
  "no name": (None, "expected 'module:Class'"),
  "no module": ("MQARStreamData", "expected 'module:Class'"),
  "not there": ("train:MQARStreamDat", "train has no MQARStreamDat"),
  "no class": ("json:dumps", "expected a frozen dataclass"),
  "no dataclass": ("json:JSONDecoder", "expected a frozen dataclass"),
  "not frozen": (f"{__name__}:NotFrozenData", "expected a frozen dataclass"),
  "a user's train": ("train.mine:Mine", "the trainer's own package here"),
}


@pytest.mark.parametrize("name", _CLASSES)
def test_a_stored_class_that_cannot_be_built_is_refused(name: str) -> None:
  cls, message = _CLASSES[name]
  data = json.loads(stored_config.to_json(tiny()))
  data["run"]["data"]["class"] = cls
  with pytest.raises(ConfigError, match="run.data.class") as error:
    stored_config.from_json(json.dumps(data))
  assert message in str(error.value)


def test_a_module_that_fails_is_named(tmp_path: Path, monkeypatch) -> None:
  (tmp_path / "broken_module.py").write_text("raise RuntimeError('no card')")
  monkeypatch.syspath_prepend(tmp_path)
  data = json.loads(stored_config.to_json(tiny()))
  data["run"]["data"]["class"] = "broken_module:Data"
  with pytest.raises(ConfigError, match="RuntimeError: no card"):
    stored_config.from_json(json.dumps(data))


def test_a_config_stored_before_precision_has_none() -> None:
  config = tiny()
  data = json.loads(stored_config.to_json(config))
  assert data["run"]["model"].pop("precision") is None
  assert stored_config.from_json(json.dumps(data)) == config
  changed = tiny(model=dict(precision="highest"))
  again = stored_config.from_json(stored_config.to_json(changed))
  assert again.model.precision == "highest"
  (difference,) = stored_config.differences(config, again)
  assert difference == "model.precision: None → 'highest'"


def test_an_optimizer_stored_before_it_had_a_name_is_adamw() -> None:
  data = json.loads(stored_config.to_json(tiny()))
  data["run"]["optimizer"] = {
    "class": "train:OptimizerConfig",
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "final_fraction": 0.0,
    "epoch_steps": None,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "decay": "all",
    "clip_norm": 1.0,
  }
  again = stored_config.from_json(json.dumps(data))
  assert stored_config.differences(again, tiny()) == []
  assert (again.optimizer.name, again.optimizer.schedule) == ("adamw", "cosine")


def test_older_configs_are_refused_with_advice() -> None:
  data = json.loads(stored_config.to_json(tiny()))
  data["version"] = 1
  with pytest.raises(ConfigError, match="version=1: expected 2.*again"):
    stored_config.from_json(json.dumps(data))


def test_what_a_change_is_about() -> None:
  """It decides which option of a resume lets the field change, if any does."""
  for fields, expected in (
    ("steps z_loss optimizer.learning_rate optimizer.name", {"optimizer"}),
    ("batch accumulate seed data.length data.test_examples", {"data"}),
    ("data.path data.eval_path data.cache_dir", {"data", "paths"}),
    ("data.workers data.timeout", {"data", "work"}),
    ("log_every keep_best stop_accuracy nan loss_chunks", {"work"}),
    ("mesh.fsdp profile.start model.remat model.scan_layers", {"work"}),
    ("model.width model.second.heads model.dtype ema init_from", set()),
  ):
    for field in fields.split():
      found = {
        name
        for name in ("data", "optimizer", "paths", "work")
        if getattr(stored_config, f"is_about_{name}")(f"{field}: 1 → 2")
      }
      assert found == expected, field
