"""Values of another type in config.json and metrics.jsonl are named."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
import numpy as np
import pytest
from train_cases import call as call, tiny, trainer as trainer

from rebased_jax import BaseConvConfig, field_types
from train import stored_config
from train.records.run_folder import RunFolder, RunFolderError
from train.stored_config import ConfigError

if TYPE_CHECKING:
  from fractions import Fraction


def _stored() -> dict[str, Any]:
  return json.loads(stored_config.to_json(tiny(), "mine-1"))


def _with(path: str, value: Any) -> str:
  """Return a config.json with another value at a place."""
  data = _stored()
  *parents, last = path.split(".")
  place = data
  for parent in parents:
    place = place[parent]
  place[last] = value
  return json.dumps(data)


_WRONG = {
  "run.tensorboard": ("false", "run.tensorboard='false': expected bool"),
  "run.seed": (1.5, "run.seed=1.5: expected int"),
  "run.steps": (True, "run.steps=True: expected int"),
  "run.batch": ("8", "run.batch='8': expected int"),
  "run.nan": ("ignore", "run.nan='ignore': expected Literal"),
  "run.wandb": (3, "run.wandb=3: expected str | None"),
  "run.init_from": (["a"], r"run.init_from=\('a',\): expected str | None"),
  "run.stop_accuracy": ("1", "stop_accuracy='1': expected float | None"),
  "run.mesh": (None, "run.mesh=None: expected MeshConfig"),
  "run.mesh.fsdp": (True, "run.mesh.fsdp=True: expected int"),
  "run.profile": ([], r"run.profile=\(\): expected ProfileConfig"),
  "run.optimizer": (1, "run.optimizer=1: expected OptimizerConfig"),
  "run.optimizer.learning_rate": (True, "learning_rate=True: expected float"),
  "run.optimizer.eps": (10**400, "optimizer.eps=1000.*: expected float"),
  "run.optimizer.epoch_steps": (2.0, "epoch_steps=2.0: expected int | None"),
  "run.model": ("LM", "run.model='LM': expected ModelConfig"),
  "run.model.scan_layers": ("no", "scan_layers='no': expected bool"),
  "run.model.pairs": (2**31, "run.model: .*pairs=2147483648: expected at most"),
  "run.model.width": (16.0, "run.model.width=16.0: expected int"),
  "run.model.vocab_size": (
    2**63,
    "vocab_size=9.*: expected at most 2147483647",
  ),
  "run.model.first.taps": (
    2**31,
    "taps=2147483648: expected at most 2147483647",
  ),
  "run.model.dropout": ("0", "run.model.dropout='0': expected float"),
  "run.model.first": (None, "run.model.first=None: expected MixerConfig"),
  "run.model.second.heads": ([2], r"second.heads=\(2,\): expected int"),
  "run.data": (None, "run.data=None: expected DataConfig"),
  "run.data.length": ("16", "run.data.length='16': expected int"),
  "run.data.power": ("x", "run.data.power='x': expected float"),
  "run.data.class": (["a"], r"run.data.class=\['a'\]: expected 'module:C"),
  "run": ([1, 2], "run has type tuple: expected train:RunConfig"),
  "version": (True, "version=True: expected 2"),
  "id": (7, "id=7: expected a string"),
}


@pytest.mark.parametrize("path", _WRONG)
def test_a_stored_value_of_another_type_is_named(
  path: str, tmp_path: Path
) -> None:
  value, message = _WRONG[path]
  (tmp_path / "config.json").write_text(_with(path, value))
  folder = RunFolder(tmp_path)
  with pytest.raises(RunFolderError, match=message) as error:
    folder.read_config()
    folder.run_id()
  assert str(error.value).startswith(f"{folder.config_file}: ")
  assert "\n" not in str(error.value)


_TEXTS = {
  "deep": ('{"version": 2, "run": ' + 100_000 * "[", "not JSON: .*recursion"),
  "deep and whole": (
    '{"version": 2, "run": ' + 600 * "[" + 600 * "]" + "}",
    "nested too deeply|run has type tuple",
  ),
  "a list": ("[]", "version=None: expected 2"),
  "a number": ("2", "version=None: expected 2"),
  "nothing": ("", "not JSON"),
  "infinity": ('{"version": Infinity}', "not JSON: Infinity: .* finite"),
  "many digits": ('{"version": ' + 5000 * "1" + "}", "not JSON: .*digits"),
  "twice": ('{"version": 1, "version": 2}', "'version' is there twice"),
  "no run": ('{"version": 2}', "run has type NoneType: expected"),
  "one and a bit": ('{"version": 2.0}', "version=2.0: expected 2"),
}


@pytest.mark.parametrize("name", _TEXTS)
def test_a_text_that_is_no_config_is_named(name: str) -> None:
  text, message = _TEXTS[name]
  with pytest.raises(ConfigError, match=message):
    stored_config.from_json(text)


def test_a_module_that_ends_the_process_is_named(tmp_path, monkeypatch) -> None:
  (tmp_path / "leaving_module.py").write_text("raise SystemExit(3)")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ConfigError, match="import leaving_module .SystemExit"):
    stored_config.from_json(_with("run.data.class", "leaving_module:Data"))


@dataclasses.dataclass(frozen=True)
class Typed(BaseConvConfig):
  """A user's config with many annotations."""

  sizes: tuple[int, ...] = (1,)
  pair: tuple[int, str] = (1, "a")
  mode: Literal["a", 1] = "a"
  either: int | str | None = None
  anything: Any = None
  ratio: float = 1.0
  flag: bool = False


@dataclasses.dataclass(frozen=True)
class Unresolved(BaseConvConfig):
  """A config with an annotation that is there for type checkers only."""

  share: "Fraction | None" = None
  flag: bool = False


@pytest.mark.parametrize(
  ("field", "right", "wrong"),
  [
    ("sizes", [(), (1, 2)], [1, (1, True), (1.0,), ("a",), None]),
    ("pair", [(2, "b")], [(2,), (2, "b", 1), ("b", 2), (True, "b")]),
    ("mode", ["a", 1], ["b", True, 1.0, None]),
    ("either", [None, 3, "x"], [1.5, True, (1,)]),
    ("anything", [None, True, 1.5, ("a", 1)], []),
    ("ratio", [1, 0.5, -2], [True, "1", None, (1.0,)]),
    ("flag", [True, False], [0, 1, "false", None]),
  ],
)
def test_a_users_field_has_the_type_of_its_annotation(
  field: str, right: list, wrong: list
) -> None:
  for value in right:
    config = Typed(**{field: value})
    again = stored_config.from_dict(stored_config.to_dict(config))
    assert again == config and type(getattr(again, field)) is type(value)
  for value in wrong:
    data = stored_config.to_dict(Typed()) | {
      field: list(value) if isinstance(value, tuple) else value
    }
    with pytest.raises(ConfigError, match=f"^config.{field}=.*: expected "):
      stored_config.from_dict(data)


def test_an_annotation_for_type_checkers_is_not_compared() -> None:
  data = stored_config.to_dict(Unresolved()) | {"share": "anything"}
  assert stored_config.from_dict(data) == Unresolved(share="anything")
  with pytest.raises(ConfigError, match="flag='yes': expected bool"):
    stored_config.from_dict(data | {"flag": "yes"})


def test_names_of_types() -> None:
  assert field_types.name(tuple[int, ...]) == "tuple[int, ...]"
  assert field_types.name(Literal["a"] | None) == "Literal['a'] | None"


def test_a_config_from_python_is_compared_too(tmp_path: Path) -> None:
  config = tiny()
  object.__setattr__(config.model, "scan_layers", "no")
  with pytest.raises(ConfigError, match="scan_layers='no': expected bool"):
    stored_config.check_storable(config)
  with pytest.raises(ValueError, match="^tensorboard='false': expected True"):
    tiny(tensorboard="false")
  with pytest.raises(ValueError, match="^seed=1.5: expected an integer"):
    tiny(seed=1.5)
  with pytest.raises(ValueError, match="^steps=True: expected an integer"):
    tiny(steps=True)


def test_scalars_of_numpy_and_jax_become_plain_numbers() -> None:
  config = tiny(
    steps=np.int64(6),
    batch=np.uint8(8),
    seed=jnp.int32(0),
    tensorboard=np.bool_(False),
    optimizer=dict(learning_rate=np.float64(1e-2), clip_norm=jnp.float32(1)),
    data=dict(length=np.int32(16), power=np.float64(0.01)),
  )
  assert config == tiny() and type(config.batch) is int
  stored_config.check_storable(config)
  assert stored_config.to_json(config) == stored_config.to_json(tiny())


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"kind": "train", "step": null}', "step=None: expected an integer ≥ 0"),
    ('{"kind": "train", "step": true}', "step=True: expected an integer ≥ 0"),
    ('{"kind": "train", "step": -1}', "step=-1: expected an integer ≥ 0"),
    ('{"kind": 3, "step": 1}', "kind=3: expected a string"),
    ('{"kind": "train", "step": 1, "loss": "a"}', "loss='a': expected a num"),
    ('{"kind": "train", "step": 1, "loss": [1]}', r"loss=\[1\]: expected a nu"),
    ('{"kind": "train"}', "expected a record with a kind and a step"),
    ("[" * 100_000, "recursion"),
    ("\xff", "can't decode byte"),
  ],
)
def test_a_wrong_record_of_metrics_is_named(
  tmp_path: Path, line: str, message: str
) -> None:
  good = '{"kind": "train", "step": 1, "loss": NaN, "count": 2}\n'
  (tmp_path / "metrics.jsonl").write_bytes(
    (good + line + "\n" + good).encode("latin-1")
  )
  with pytest.raises(RunFolderError, match=f"line 2: .*{message}"):
    RunFolder(tmp_path).cut_metrics(1)


@pytest.mark.parametrize("verb", ["resume", "evaluate", "inspect", "generate"])
def test_a_command_names_the_value_in_one_line(
  verb: str, call, tmp_path: Path
) -> None:
  folder = tmp_path / "run"
  folder.mkdir()
  text = _with("run.tensorboard", "false")
  (folder / "config.json").write_text(text)
  more = ("--prompt", "a") if verb == "generate" else ()
  code, out, err = call(verb, str(folder), *more)
  assert (code, out) == (2, "")
  assert err == (
    f"rebased: {folder / 'config.json'}: run.tensorboard='false': "
    "expected bool\n"
  )
