"""Checkpoints of PyTorch models: the official code's, Zoology's and FLA's."""

import dataclasses
from pathlib import Path
import re
import sys

from flax import nnx
import golden_map
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import rebased_jax
from rebased_jax import (
  BasedConfig,
  ReBasedConfig,
  WeightsError,
  pytorch,
  pytorch_names,
  tensor_files,
)

# The golden files, and the names of their systems.
_SYSTEMS = golden_map.KERNELS | golden_map.SYSTEMS
# The same formulas in float32: roundings of 6e-8, measured at most 6e-7.
_TOLERANCE = 1e-5


def _arrays(name: str) -> dict[str, np.ndarray]:
  """Return what `state_dict` of the official model holds, in float32."""
  found = golden_map.official(golden_map.read(name), "param")
  arrays = {key: x.astype(np.float32) for key, x in found.items()}
  words = arrays["backbone.embeddings.word_embeddings.weight"]
  arrays["lm_head.weight"] = words.copy()
  for key in list(arrays):
    # One module is in three places of the list of layers, and so of the dict.
    if key.endswith("implicit_filter.1.freq"):
      arrays[key.replace(".1.freq", ".3.freq")] = arrays[key].copy()
      arrays[key.replace(".1.freq", ".5.freq")] = arrays[key].copy()
    if key.endswith("pos_emb.z"):
      prefix, lags = key.removesuffix("pos_emb.z"), arrays[key].shape[1]
      t = np.linspace(0, 1, lags, dtype=np.float32)
      arrays[f"{prefix}pos_emb.t"] = t[None, :, None]
      rates = np.log(1e-2) / np.array([1.5, 0.3])
      deltas = np.linspace(*rates, words.shape[1], dtype=np.float32)
      arrays[f"{prefix}modulation.deltas"] = deltas[None, None]
    if key.endswith("ln_q.gamma") and name == "rebased_gx":
      for side in "qk":
        beta = key.replace("ln_q.gamma", f"ln_{side}.beta")
        arrays[beta] = np.zeros_like(arrays[key])
  return arrays


def _difference(ours, theirs: np.ndarray) -> float:
  ours = np.asarray(ours, np.float64)
  assert ours.shape == theirs.shape
  return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("name", _SYSTEMS)
def test_an_official_checkpoint_gives_the_official_logits(
  name: str, tmp_path: Path
) -> None:
  """Import from a file, write it as our own, and read that."""
  golden = golden_map.read(name)
  save_file(_arrays(name), tmp_path / "official.safetensors")
  model = pytorch.load(tmp_path / "official.safetensors", system=_SYSTEMS[name])
  rebased_jax.save(model, tmp_path / "model")
  model = rebased_jax.load(tmp_path / "model")
  rows = golden["param/backbone.embeddings.position_embeddings.weight"]
  assert model.config.positions == rows.shape[0]
  # The official code rounds WKV to bfloat16, and so does our system: 2⁻⁸.
  tolerance = 4e-3 if "rwkv" in name else _TOLERANCE
  call = jax.jit(
    lambda model, tokens: model(tokens),
    compiler_options={"xla_backend_optimization_level": 0},
  )
  logits_BTV = call(model, golden["tokens"].astype(np.int32))
  assert _difference(logits_BTV, golden["logits"]) <= tolerance


def _fla(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  golden = golden_map.read(name)
  prefix = "param/"
  arrays = {
    f"model.layers.3.attn.{key.removeprefix(prefix)}": x.astype(np.float32)
    for key, x in golden.items()
    if key.startswith(prefix)
  }
  return golden, {"other.weight": np.zeros(3, np.float32), **arrays}


_SIZES = dict(heads=2, features=8)
_HEADS = ReBasedConfig(**_SIZES, norm_scope="head", eps=1e-5)
_FLA = {
  "fla_rebased": _HEADS,
  "fla_rebased_gamma": dataclasses.replace(
    _HEADS, normalize=False, use_beta=False
  ),
  "fla_based": BasedConfig(**_SIZES, eps=1e-12),
}


@pytest.mark.parametrize("name", _FLA)
def test_a_layer_of_fla_gives_its_outputs_and_gradients(name: str) -> None:
  golden, arrays = _fla(name)
  mixer = pytorch.load_mixer(
    arrays, _FLA[name], width=26, prefix="model.layers.3.attn."
  )
  graph, params = nnx.split(mixer)
  cotangent_BTD = jnp.asarray(golden["cotangent"], jnp.float32)

  def loss(params, x_BTD):
    y_BTD = nnx.merge(graph, params)(x_BTD)
    return (y_BTD * cotangent_BTD).sum(), y_BTD

  grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  x_BTD = jnp.asarray(golden["x"], jnp.float32)
  (param_grads, x_grad), y_BTD = grad(params, x_BTD)
  assert _difference(y_BTD, golden["y"]) <= _TOLERANCE
  assert _difference(x_grad, golden["grad_x"]) <= _TOLERANCE
  found = golden_map.flat(param_grads)
  for x in "qkvo":
    wanted = golden[f"grad/{x}_proj.weight"].T
    assert _difference(found[f"project/{x}/kernel"], wanted) <= _TOLERANCE
  for which in ("gamma", "beta"):
    if f"grad/feature_map.{which}" in golden:
      shared = sum(
        found[f"{side}_affine/{which}"].reshape(2, 8).sum(axis=0)
        for side in ("query", "key")
      )
      wanted = golden[f"grad/feature_map.{which}"]
      assert _difference(shared, wanted) <= _TOLERANCE


def test_a_deep_model_with_mlps_and_wrapped_names(tmp_path: Path) -> None:
  """Layers alternate between the two mixers, and are stacked by pairs."""
  two, rng = _arrays("based"), np.random.default_rng(0)
  arrays = {}
  for key, x in two.items():
    arrays[key] = x
    if ".layers." in key:
      deep = re.sub(r"layers.(\d)", lambda m: f"layers.{int(m[1]) + 2}", key)
      arrays[deep] = x + 1
  for layer in range(4):
    for name, shape in {
      "fc1.weight": (40, 32),
      "fc1.bias": (40,),
      "fc2.weight": (32, 40),
      "fc2.bias": (32,),
    }.items():
      key = f"backbone.layers.{layer}.state_mixer.{name}"
      arrays[key] = rng.normal(size=shape).astype(np.float32)
  wrapped = {f"module.{key}": x for key, x in arrays.items()}
  tensor_files.write(tmp_path, wrapped, max_file_bytes=50_000)
  assert (tmp_path / tensor_files.INDEX).exists()
  model = pytorch.load(tmp_path, system="based")
  assert (model.config.pairs, model.config.mlp_width) == (2, 40)
  pairs = model.pairs
  prefix = "backbone.layers"
  for layer, found in (
    (0, pairs.first.mlp.up.kernel[0]),
    (3, pairs.second.mlp.up.kernel[1]),
  ):
    wanted = arrays[f"{prefix}.{layer}.state_mixer.fc1.weight"].T
    np.testing.assert_array_equal(found, wanted)
  query = arrays[f"{prefix}.1.sequence_mixer.mixer.proj_q.weight"].T
  kernel = pairs.second.mixer.project.q.kernel
  np.testing.assert_array_equal(kernel[0], query)
  np.testing.assert_array_equal(kernel[1], query + 1)


def _renamed(name: str) -> dict[str, np.ndarray]:
  """Return an official model whose second mixer has FLA's names."""
  return {
    re.sub(r"proj_([qkvo])", r"\1_proj", key): x
    for key, x in _arrays(name).items()
  }


def test_a_model_with_layers_of_fla_has_their_config() -> None:
  model = pytorch.load(_renamed("based"), system="based")
  assert model.config.second == BasedConfig(
    heads=12, features=16, value_features=2, eps=1e-6
  )
  arrays = {
    k: x
    for k, x in _renamed("rebased").items()
    if "ln_" not in k or "ln_f" in k
  }
  mixer = "backbone.layers.1.sequence_mixer.mixer"
  arrays[f"{mixer}.feature_map.gamma"] = np.arange(16, dtype=np.float32)
  arrays[f"{mixer}.feature_map.beta"] = np.ones(16, np.float32)
  model = pytorch.load(arrays, system="rebased", heads=12)
  assert model.config.second == ReBasedConfig(
    heads=12, features=16, value_features=2, eps=1e-5, norm_scope="head"
  )
  gamma = model.pairs.second.mixer.key_affine.gamma[0]
  np.testing.assert_array_equal(gamma.reshape(12, 16)[7], np.arange(16))


def test_every_row_of_the_table_is_used() -> None:
  used = {"state_mixer.fc1.weight", "state_mixer.fc2.weight"}  # above
  used |= {"state_mixer.fc1.bias", "state_mixer.fc2.bias"}
  for name in _SYSTEMS:
    for key in _arrays(name):
      key = re.sub(r"^backbone\.(layers\.\d\.)?", "", key)
      used.add(pytorch_names.MIXER.sub("", key))
  for name in _FLA:
    used |= {key.removeprefix("param/") for key in golden_map.read(name)}
  rows = {row.name for row in (*pytorch_names.MODEL, *pytorch_names.BLOCK)}
  for table in pytorch_names.MIXERS.values():
    rows |= {row.name for row in table}
  assert rows <= used


_QUERY = "backbone.layers.1.sequence_mixer.mixer.proj_q.weight"
_DELTAS = "backbone.layers.0.sequence_mixer.filter_fn.modulation.deltas"


def _with(name: str, **changes: np.ndarray | None) -> dict[str, np.ndarray]:
  arrays = {**_arrays(name), **changes}
  return {key: x for key, x in arrays.items() if x is not None}


# The system that is named, how arrays differ from its own, and the message.
_REFUSED = {
  "another system": (
    "conv-attention",
    lambda: _with("based"),
    r"layers.1.proj_k.weight.*: not expected: .* another system",
  ),
  "a system without norm": (
    "x2",
    lambda: _with("rebased"),
    "key_affine/beta is not expected",
  ),
  "a used β": (
    "gamma",
    lambda: _with("rebased_gxb"),
    "ln_k.beta is not 0: .* is it gamma-beta",
  ),
  "missing": (
    "based",
    lambda: _with("based", **{_QUERY: None}),
    "second/mixer/project/q/kernel is missing",
  ),
  "a missing table": (
    "based",
    lambda: {"fc.weight": np.zeros((2, 2))},
    "word_embeddings.weight is missing: .*load_mixer",
  ),
  "unknown": (
    "based",
    lambda: _with("based", **{"backbone.more.weight": np.zeros(3)}),
    "more.weight: not expected",
  ),
  "shape": (
    "based",
    lambda: _with("based", **{_QUERY: np.zeros((192, 31), np.float32)}),
    r"project/q/kernel has shape \(1, 31, 192\): expected \(1, 32, 192\)",
  ),
  "rank": (
    "based",
    lambda: _with(
      "based",
      **{"backbone.layers.0.sequence_mixer.mixer.conv.conv.weight": np.ones(3)},
    ),
    r"conv.conv.weight has shape \(3,\)",
  ),
  "nan": (
    "based",
    # One value of 192 · 32.
    lambda: _with("based", **{_QUERY: np.pad([[np.nan]], ((9, 182), (0, 31)))}),
    "project/q/kernel has values that are not finite",
  ),
  "an untied head": (
    "based",
    lambda: _with("based", **{"lm_head.weight": np.zeros((64, 32))}),
    "lm_head.weight differs from embeddings.word_embeddings.weight",
  ),
  "an odd layer": (
    "based",
    lambda: _with("based", **{"backbone.layers.2.norm1.bias": np.zeros(32)}),
    r"layers \[0, 1, 2\]: expected an even number",
  ),
  "another window": (
    "hyena",
    lambda: _with("hyena", **{_DELTAS: 1.001 * _arrays("hyena")[_DELTAS]}),
    "modulation.deltas has other values",
  ),
  "both layouts": (
    "based",
    lambda: {**_arrays("based"), **_renamed("based")},
    "there is another array for project/k/kernel",
  ),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_wrong_arrays_are_named(case: str) -> None:
  system, make, message = _REFUSED[case]
  with pytest.raises(WeightsError, match=message):
    pytorch.load(make(), system=system)


def test_wrong_arguments_are_named(tmp_path: Path, monkeypatch) -> None:
  with pytest.raises(
    ValueError, match="system='rebasd': expected one of .'att"
  ):
    pytorch.load({}, system="rebasd")
  with pytest.raises(WeightsError, match="heads=5: the queries have 192"):
    pytorch.load(_arrays("based"), system="based", heads=5)
  with pytest.raises(WeightsError, match="absent.pt is no file"):
    pytorch.load(tmp_path / "absent.pt", system="based")
  path = tmp_path / "x.safetensors"
  path.write_bytes(b"123")
  with pytest.raises(WeightsError, match="x.safetensors cannot be read"):
    pytorch.load(path, system="based")
  monkeypatch.setitem(sys.modules, "torch", None)
  path.rename(tmp_path / "x.pth")
  with pytest.raises(WeightsError, match="needs the package torch: pip"):
    pytorch.load(tmp_path / "x.pth", system="based")
  golden, arrays = _fla("fla_rebased")
  wrong = dataclasses.replace(_HEADS, heads=4, features=4, value_features=6)
  with pytest.raises(WeightsError, match="gamma has shape .32,.: expected .16"):
    pytorch.load_mixer(arrays, wrong, width=26, prefix="model.layers.3.attn.")
  with pytest.raises(WeightsError, match="project/q/kernel is missing"):
    pytorch.load_mixer(arrays, _HEADS, width=26, prefix="nowhere.")


def test_a_state_dict_of_torch_is_read_without_code(tmp_path: Path) -> None:
  torch = pytest.importorskip("torch", reason="torch is not installed")
  arrays = _arrays("based")
  tensors = {key: torch.tensor(x) for key, x in arrays.items()}
  torch.save({"state_dict": tensors}, tmp_path / "x.pth")
  found = pytorch.read(tmp_path / "x.pth")
  assert found.keys() == arrays.keys()
  for key, x in arrays.items():
    np.testing.assert_array_equal(found[key], x)
  half = {key: x.to(torch.bfloat16) for key, x in tensors.items()}
  torch.save(half, tmp_path / "half.pth")
  found = pytorch.read(tmp_path / "half.pth")
  assert {x.dtype for x in found.values()} == {np.dtype("float32")}
  torch.save({"model": Path("x"), "step": 3}, tmp_path / "code.pth")
  with pytest.raises(WeightsError, match="cannot be read: Weights only"):
    pytorch.read(tmp_path / "code.pth")
  torch.save({"step": 3}, tmp_path / "step.pth")
  with pytest.raises(WeightsError, match="holds no state_dict"):
    pytorch.read(tmp_path / "step.pth")
