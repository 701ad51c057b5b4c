"""Exported models: written, read back bit-identical, and refused when wrong."""

from collections.abc import Callable
import dataclasses
import functools
import importlib
import json
from pathlib import Path
import subprocess
import sys
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from mixer_registry import MIXERS, ONE_OF_EACH
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import rebased_jax
from rebased_jax import (
  LM,
  BaseConvConfig,
  ModelConfig,
  ReBasedConfig,
  WeightsError,
  model_files,
  presets,
  tensor_files,
)
from rebased_jax.config_json import ConfigError
import rebased_jax.linen

V, T = 11, 6
CONFIG = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(heads=2, features=4),
  vocab_size=V,
  width=8,
  positions=T,
  pairs=2,
)
TOKENS_BT = np.random.default_rng(1).integers(V, size=(2, T), dtype=np.int32)
GAMMA = "pairs.second.mixer.query_affine.gamma"


_abstract = functools.cache(model_files.abstract_lm)


def _model(config: ModelConfig = CONFIG, seed: int = 0) -> LM:
  """Return a model with random parameters; nothing is compiled."""
  rng = np.random.default_rng(seed)
  graph, abstract = _abstract(config)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
  return nnx.merge(graph, jax.tree.map(draw, abstract))


def _arrays(model) -> dict[str, np.ndarray]:
  return model_files.by_name(
    jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  )


def _check_same(found: LM, wanted: LM) -> None:
  """Check that programs and parameters, and so all outputs, are identical."""
  assert found.config == wanted.config
  assert nnx.split(found)[0] == nnx.split(wanted)[0]
  arrays = _arrays(found)
  for name, x in _arrays(wanted).items():
    np.testing.assert_array_equal(arrays[name], x, err_msg=name, strict=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("exports") / "model"
  rebased_jax.save(_model(), folder)
  return folder


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
  """An export whose files a test may change."""
  folder = tmp_path / "copied"
  folder.mkdir()
  for file in exported.iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
  return folder


@pytest.mark.quick
def test_logits_of_a_loaded_model_are_bit_identical(exported: Path) -> None:
  model, loaded = _model(), rebased_jax.load(exported)
  _check_same(loaded, model)
  logits_BTV = jax.jit(lambda m: m(TOKENS_BT))(model)
  np.testing.assert_array_equal(
    jax.jit(lambda m: m(TOKENS_BT))(loaded), logits_BTV
  )
  lm, params = rebased_jax.linen.load(exported)
  found_BTV = jax.jit(lm.apply)({"params": params}, TOKENS_BT)
  np.testing.assert_array_equal(found_BTV, logits_BTV)
  files = sorted(exported.iterdir())
  assert [x.name for x in files] == ["config.json", "model.safetensors"]
  assert files[0].stat().st_mode == files[1].stat().st_mode


def _systems() -> dict[str, ModelConfig]:
  variants = {x: presets.hybrid(y) for x, y in presets.VARIANTS.items()}
  systems = {**presets.SYSTEMS, **variants}
  return {
    name: presets.mqar(system, width=24, length=T, vocab_size=V)
    for name, system in systems.items()
  }


@pytest.mark.parametrize("name", _systems())
def test_a_round_trip_of_every_system(name: str, tmp_path: Path) -> None:
  model = _model(_systems()[name])
  rebased_jax.save(model, tmp_path / "model")
  _check_same(rebased_jax.load(tmp_path / "model"), model)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_names_are_those_that_other_programs_read(name, tmp_path) -> None:
  """Read the files with the library alone, and compare with the paths."""
  mixer = MIXERS[name].config
  if hasattr(mixer, "length"):
    mixer = dataclasses.replace(mixer, length=T)
  model = _model(dataclasses.replace(CONFIG, second=mixer))
  rebased_jax.save(model, tmp_path / "model")
  found = load_file(tmp_path / "model" / "model.safetensors")
  state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  pairs = jax.tree_util.tree_leaves_with_path(state)
  assert len(found) == len(pairs)
  for path, x in pairs:
    name = ".".join(str(key.key) for key in path)
    np.testing.assert_array_equal(found[name], x, strict=True)


def test_weights_in_several_files(tmp_path: Path) -> None:
  model = _model()
  limit = 1000
  rebased_jax.save(model, tmp_path / "model", max_file_bytes=limit)
  _check_same(rebased_jax.load(tmp_path / "model"), model)
  index = json.loads((tmp_path / "model" / tensor_files.INDEX).read_text())
  arrays = _arrays(model)
  assert index["weight_map"].keys() == arrays.keys()
  assert index["metadata"]["total_size"] == sum(
    x.nbytes for x in arrays.values()
  )
  files = sorted(set(index["weight_map"].values()))
  assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
  assert len(files) > 2
  for file in files:
    names = [x for x, y in index["weight_map"].items() if y == file]
    size = sum(arrays[name].nbytes for name in names)
    assert len(names) == 1 or size <= limit


class _Devices:
  """A sharding that splits the widest axis over the test's devices."""

  def __init__(self):
    self.paths = []
    self.mesh = jax.make_mesh((len(jax.devices()),), ("all",))

  def __call__(self, path: str, x: jax.ShapeDtypeStruct):
    self.paths.append(path)
    count = len(jax.devices())
    axis = int(np.argmax(x.shape))
    names = [None] * len(x.shape)
    if x.shape[axis] % count == 0:
      names[axis] = "all"
    spec = jax.sharding.PartitionSpec(*names)
    return jax.sharding.NamedSharding(self.mesh, spec)


def test_arrays_go_straight_to_the_devices_of_a_mesh(tmp_path, exported):
  """A model that was split is written, and read back split."""
  place = _Devices()
  loaded = rebased_jax.load(exported, sharding=place)
  _check_same(loaded, _model())
  assert "pairs/second/mixer/project/q/kernel" in place.paths
  kernel = loaded.pairs.second.mixer.project.q.kernel[...]
  assert len(kernel.sharding.device_set) == len(jax.devices())
  assert kernel.addressable_shards[0].data.size == kernel.size // len(
    jax.devices()
  )
  rebased_jax.save(loaded, tmp_path / "split")
  _check_same(rebased_jax.load(tmp_path / "split"), _model())
  everywhere = jax.sharding.NamedSharding(place.mesh, jax.P())
  loaded = rebased_jax.load(exported, sharding=everywhere)
  assert loaded.norm.scale[...].sharding == everywhere


def test_half_precision_weights_become_float32(copied: Path) -> None:
  path = copied / "model.safetensors"
  arrays = load_file(path)
  narrow = {x: y.astype(ml_dtypes.bfloat16) for x, y in arrays.items()}
  narrow[GAMMA] = arrays[GAMMA].astype(np.float16)
  save_file(narrow, path)
  for name, x in _arrays(rebased_jax.load(copied)).items():
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, narrow[name].astype(np.float32))


def test_the_file_has_c_order(tmp_path: Path) -> None:
  """The library would write a transposed array as it lies in memory."""
  x = np.arange(6, dtype=np.float32).reshape(2, 3)
  tensor_files.write(tmp_path, {"x": x.T, "s": np.float32(2) + np.zeros(())})
  found = load_file(tmp_path / "model.safetensors")
  np.testing.assert_array_equal(found["x"], x.T)
  assert found["s"].shape == ()
  with safe_open(tmp_path / "model.safetensors", "numpy") as file:
    assert file.metadata() == {"format": "flax"}
  with pytest.raises(WeightsError, match="s has the dtype complex64: expected"):
    tensor_files.write(tmp_path / "other", {"x": x, "s": x.astype("complex64")})
  assert not (tmp_path / "other" / "model.safetensors").exists()


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
  tokenizer = tmp_path / "any.json"
  tokenizer.write_text("{}")
  rebased_jax.save(_model(), tmp_path / "a", tokenizer=tokenizer, eos=3)
  assert model_files.read_tokenizer(tmp_path / "a") == b"{}"
  info = model_files.read_info(tmp_path / "a").tokenizer
  assert (info.type, info.eos) == ("file", 3)
  rebased_jax.save(_model(), tmp_path / "b", tokenizer="bytes")
  info = model_files.read_info(tmp_path / "b").tokenizer
  assert info == model_files.TokenizerInfo("bytes", None)
  (tmp_path / "a" / "tokenizer.json").write_text("{} ")
  with pytest.raises(WeightsError, match="is not the tokenizer of config"):
    model_files.read_tokenizer(tmp_path / "a")


def _drop(name: str) -> Callable[[dict[str, Any]], None]:
  return lambda arrays: arrays.pop(name)


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
  return lambda arrays: arrays.update({name: value})


def _spoil(arrays: dict[str, np.ndarray]) -> None:
  arrays[GAMMA][1, 5] = np.nan


# What is done to the arrays, and what the message says.
_WRONG_ARRAYS = {
  "missing": (_drop(GAMMA), f"{GAMMA} is missing"),
  "unexpected": (
    _set("more", np.zeros(3, np.float32)),
    "more is not expected",
  ),
  "shape": (
    _set(GAMMA, np.zeros((2, 9), np.float32)),
    rf"{GAMMA} has shape \(2, 9\): expected \(2, 8\)",
  ),
  "vocabulary": (
    _set("token_embedding", np.zeros((12, 8), np.float32)),
    r"token_embedding has shape \(12, 8\): expected \(11, 8\)",
  ),
  "dtype": (
    _set(GAMMA, np.zeros((2, 8))),
    f"{GAMMA} is float64: expected float32",
  ),
  "nan": (_spoil, rf"{GAMMA} has 1 values .* at \[1, 5\]: expected finite"),
}


@pytest.mark.parametrize("case", _WRONG_ARRAYS)
def test_wrong_weights_are_named(case: str, copied: Path) -> None:
  change, message = _WRONG_ARRAYS[case]
  path = copied / "model.safetensors"
  arrays = load_file(path)
  change(arrays)
  save_file(arrays, path)
  with pytest.raises(WeightsError, match=message):
    rebased_jax.load(copied)
  with pytest.raises(WeightsError, match=message):
    rebased_jax.load(copied, sharding=_Devices())


def test_many_faults_are_listed_and_counted(copied: Path) -> None:
  save_file({"x": np.zeros(1, np.float32)}, copied / "model.safetensors")
  count = len(_arrays(_model())) + 1
  with pytest.raises(WeightsError, match=f"missing; .*and {count - 8} more"):
    rebased_jax.load(copied)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file_is_named(size: int, copied: Path) -> None:
  path = copied / "model.safetensors"
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(WeightsError, match="model.safetensors cannot be read"):
    rebased_jax.load(copied)


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
  def apply(folder: Path) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))

  return apply


_WRONG_FOLDERS = {
  "no weights": (
    lambda path: (path / "model.safetensors").unlink(),
    "holds no model.safetensors",
  ),
  "no config": (
    lambda path: (path / "config.json").unlink(),
    "config.json: No such file",
  ),
  "no JSON": (
    lambda path: (path / "config.json").write_text("{"),
    "config.json: not JSON",
  ),
  "another library's": (
    _config(lambda data: data.pop("format")),
    "format=None: expected 'rebased-jax model'",
  ),
  "a later version": (
    _config(lambda data: data.update(version=2)),
    "version=2: expected 1",
  ),
  "another class": (
    _config(lambda data: data.update(model=data["model"]["first"])),
    "model is a BaseConvConfig: expected rebased_jax:ModelConfig",
  ),
  "a wrong field": (
    _config(lambda data: data["model"].update(width="8")),
    "model.width='8': expected int",
  ),
  "no such module": (
    _config(lambda data: data["model"]["first"].update({"class": "no:No"})),
    "cannot import no",
  ),
  "a wrong tokenizer": (
    _config(lambda data: data.update(tokenizer={"type": "bytes"})),
    "tokenizer=.*: expected null or",
  ),
  "a number": (
    lambda path: (path / "config.json").write_text("5"),
    "config.json: .*expected",
  ),
  "two exports": (
    lambda path: (path / tensor_files.INDEX).write_text("{}"),
    "expected one of them",
  ),
}


@pytest.mark.parametrize("case", _WRONG_FOLDERS)
def test_a_wrong_folder_is_named(case: str, copied: Path) -> None:
  change, message = _WRONG_FOLDERS[case]
  change(copied)
  with pytest.raises(WeightsError, match=message):
    rebased_jax.load(copied)


def test_a_wrong_index_is_named(tmp_path: Path) -> None:
  folder = tmp_path / "model"
  rebased_jax.save(_model(), folder, max_file_bytes=2000)
  path = folder / tensor_files.INDEX
  index = json.loads(path.read_text())
  files = sorted(set(index["weight_map"].values()))

  def check(message: str, **changes: str) -> None:
    weight_map = {**index["weight_map"], **changes}
    path.write_text(json.dumps({**index, "weight_map": weight_map}))
    with pytest.raises(WeightsError, match=message):
      rebased_jax.load(folder)

  there = index["weight_map"]["norm.scale"]
  other = next(file for file in files if file != there)
  check("disagree on norm.scale", **{"norm.scale": other})
  check("expected the name of a file", **{"norm.scale": "../secret"})
  check("absent.* is missing", **{"norm.scale": "absent.safetensors"})
  path.write_text("[]")
  with pytest.raises(WeightsError, match="weight_map: expected the file"):
    rebased_jax.load(folder)


def _files(folder: Path) -> list[str]:
  return sorted(x.name for x in folder.iterdir())


def test_a_model_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
  def check(message: str, model: LM, error=WeightsError, **options) -> None:
    with pytest.raises(error, match=message):
      rebased_jax.save(model, tmp_path / "model", **options)
    assert _files(tmp_path) == []

  model = _model()
  model.norm.scale[...] = model.norm.scale[...].at[3].set(jnp.inf)
  check(r"norm.scale has 1 values .* at \[3\]", model)
  model = _model()
  model.norm.scale = nnx.Param(jnp.zeros(9))
  check(r"norm.scale has shape \(9,\): expected \(8,\)", model)
  model = _model()
  model.more = nnx.Param(jnp.zeros(9))
  check("more is not expected", model)
  model = _model()
  model.count = nnx.BatchStat(jnp.zeros(9))
  check("count is a variable but no nnx.Param", model)
  model = _model()
  check("eos=3: expected None", model, eos=3)
  check("eos=11: expected a token", model, tokenizer="bytes", eos=11)
  check("absent.json.: No such file", model, tokenizer="absent.json")
  check("max_file_bytes=0", model, ValueError, max_file_bytes=0)
  check("expected a rebased_jax.LM", model.pairs)

  @dataclasses.dataclass(frozen=True)
  class Local(ReBasedConfig):
    pass

  second = Local(heads=2, features=4)
  local = _model(dataclasses.replace(CONFIG, second=second))
  check("a class inside a function", local, ConfigError)


def test_an_existing_folder_is_not_changed(exported, tmp_path) -> None:
  before = (exported / "model.safetensors").read_bytes()
  with pytest.raises(WeightsError, match="is not empty: expected a new folder"):
    rebased_jax.save(_model(seed=1), exported)
  assert (exported / "model.safetensors").read_bytes() == before
  (tmp_path / "file").write_text("")
  with pytest.raises(WeightsError, match="is a file"):
    rebased_jax.save(_model(), tmp_path / "file")
  with pytest.raises(WeightsError, match="inner cannot be made: .*exists"):
    rebased_jax.save(_model(), tmp_path / "file" / "inner")
  (tmp_path / "empty").mkdir()
  rebased_jax.save(_model(), tmp_path / "empty")
  _check_same(rebased_jax.load(tmp_path / "empty"), _model())
  with pytest.raises(WeightsError, match="gs://.*: expected a local folder"):
    rebased_jax.save(_model(), "gs://bucket/model")


def test_a_step_of_an_export_is_refused(exported: Path) -> None:
  with pytest.raises(ValueError, match="step=3: .* has one set of weights"):
    rebased_jax.load(exported, 3)
  with pytest.raises(ValueError, match="step=trained: .* expected no step"):
    rebased_jax.load(exported, "trained")
  with pytest.raises(ValueError, match="weights=None: .* expected no weights"):
    rebased_jax.load(exported, weights=None)


_ELSEWHERE = """
import sys
import rebased_jax
from flax import nnx
model = rebased_jax.load(sys.argv[1])
assert type(model.pairs.second.mixer).__name__ == "Mine"
assert model.pairs.second.mixer.slope[...].sum() == 16
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"train", "orbax", "grain"}, loaded
print("loaded")
"""
_MINE = """
import dataclasses
from flax import nnx
import jax.numpy as jnp
from rebased_jax import Mixer, MixerConfig

@dataclasses.dataclass(frozen=True)
class MineConfig(MixerConfig):
  slope: float = 2.0
  def make(self, site, *, rngs):
    return Mine(site.width, self, dtype=site.dtype, rngs=rngs)

class Mine(Mixer):
  config_type = MineConfig
  def __init__(self, width, config, *, dtype="float32", rngs):
    super().__init__(width, config, dtype=dtype)
    self.slope = nnx.Param(jnp.full(width, config.slope))
  def init_state(self, batch):
    return jnp.zeros((batch, 1))
  def _prefill(self, x_BTD, state, *, segment_ids, axes):
    return x_BTD * self.slope[...], state
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch) -> Path:
  """An exported model with a mixer from a user's own module."""
  (tmp_path / "mine_of_a_user.py").write_text(_MINE)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "mine_of_a_user", raising=False)
  module = importlib.import_module("mine_of_a_user")
  second = module.MineConfig(slope=1.0)
  config = dataclasses.replace(CONFIG, second=second)
  model = LM(config, rngs=nnx.Rngs(0))
  rebased_jax.save(model, tmp_path / "model")
  with monkeypatch.context() as patch:
    patch.setattr(model_files, "import_trainer", None)
    _check_same(rebased_jax.load(tmp_path / "model"), model)
  return tmp_path


def test_a_users_mixer_is_loaded_without_the_trainer(mine: Path) -> None:
  stored = json.loads((mine / "model" / "config.json").read_text())
  assert stored["model"]["second"] == {
    "class": "mine_of_a_user:MineConfig",
    "slope": 1.0,
  }


@pytest.mark.slow
def test_a_process_that_loads_a_model_imports_no_trainer(mine: Path) -> None:
  (mine / "elsewhere.py").write_text(_ELSEWHERE)
  done = subprocess.run(
    [sys.executable, "elsewhere.py", "model"],
    cwd=mine,
    capture_output=True,
    text=True,
  )
  assert done.stdout == "loaded\n", done.stderr
