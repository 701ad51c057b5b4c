"""Every mixer to be tested, and its equations as a slow NumPy recurrence."""

import dataclasses

import baseline_equations
from flax import nnx
import jax
from mamba_equations import mamba
import numpy as np

from rebased_jax import (
  AttentionConfig,
  BaseConvConfig,
  BasedConfig,
  HyenaConfig,
  MambaConfig,
  ReBasedConfig,
  RWKVConfig,
  presets,
)

# Small, and no two sizes alike. With an eps this large it counts in every
# equation, and a first token whose q·k is near 0 is well-conditioned: a state
# knows (q·k)² to 1e-7 of |q|²|k|² alone.
_SIZES = dict(heads=2, features=4, value_features=3, eps=0.1)
CASES = {
  **{
    name: dataclasses.replace(config, **_SIZES)
    for name, config in presets.VARIANTS.items()
  },
  "rebased-head": ReBasedConfig(norm_scope="head", **_SIZES),
  "conv": BaseConvConfig(),
  "conv-1": BaseConvConfig(taps=1),
  # As published, WKV is rounded to bfloat16: test_rwkv.py has that.
  "rwkv": RWKVConfig(wkv_dtype="float32"),
  "mamba": MambaConfig(state=5, taps=3),
  "attention": AttentionConfig(heads=2, length=14),
  "attention-rotary": AttentionConfig(
    heads=2, rotary=True, use_bias=False, length=14
  ),
  # As long as the tests' rows: a longer filter's last lags have no gradient.
  "hyena": HyenaConfig(length=12, filter_width=4),
}
# Mixers that refuse documents: a Fourier transform is of the whole row.
NO_DOCUMENTS = {"hyena"}


def parameters(module: nnx.Module) -> dict[str, np.ndarray]:
  """The parameters in float64, by path."""
  pure = nnx.to_pure_dict(nnx.state(module, nnx.Param))
  pairs = jax.tree_util.tree_leaves_with_path(pure)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {name(path): np.asarray(leaf, np.float64) for path, leaf in pairs}


def recurrence(config, params: dict, x_TD: np.ndarray) -> np.ndarray:
  """y_TD of one document, token by token, in float64."""
  x_TD = x_TD.astype(np.float64)
  if isinstance(config, BaseConvConfig):
    return _convolution(config, params, x_TD)
  if isinstance(config, RWKVConfig):
    return _time_mix(params, x_TD)
  if isinstance(config, MambaConfig):
    return mamba(config, params, x_TD)
  if isinstance(config, AttentionConfig):
    return baseline_equations.attention(config, params, x_TD)
  if isinstance(config, HyenaConfig):
    return baseline_equations.hyena(config, params, x_TD)
  return _attention(config, params, x_TD)


def kernel_map(config: ReBasedConfig, params: dict, side: str, x: np.ndarray):
  """φ(x) = γ ∘ norm(x) + β of one token, all heads' features together."""
  if config.normalize:
    groups = np.split(x, config.heads if config.norm_scope == "head" else 1)
    x = np.concatenate(
      [(g - g.mean()) / np.sqrt(g.var() + 1e-5) for g in groups]
    )
  if config.use_gamma:
    x = params[f"{side}_affine/gamma"] * x
  if config.use_beta:
    x = x + params[f"{side}_affine/beta"]
  return x


def _attention(config, params, x_TD):
  H, F = config.heads, config.features
  W = {x: params[f"project/{x}/kernel"] for x in "qkvo"}
  past = []
  rows = []
  for x_D in x_TD:
    q, k, v = (x_D @ W[name] for name in "qkv")
    if isinstance(config, ReBasedConfig):
      q = kernel_map(config, params, "query", q)
      k = kernel_map(config, params, "key", k)
    past.append((k.reshape(H, F), v.reshape(H, -1)))
    heads = []
    for h, q_F in enumerate(q.reshape(H, F)):
      numerator, denominator = 0.0, config.eps
      for k_HF, v_HP in past:
        weight = _sim(config, q_F @ k_HF[h], F)
        numerator = numerator + weight * v_HP[h]
        denominator = denominator + weight
      heads.append(numerator / denominator)
    rows.append(np.concatenate(heads) @ W["o"])
  return np.stack(rows)


def _sim(config, product: float, features: int) -> float:
  if isinstance(config, BasedConfig):
    s = product / np.sqrt(features)
    return 1 + s + s**2 / 2
  return product**2 / features


def _convolution(config, params, x_TD):
  past = [np.zeros_like(x_TD[0])] * (config.taps - 1)
  rows = []
  for u_D in x_TD:
    window = [*past, u_D]
    c_D = params["bias"] + sum(
      w * u for w, u in zip(params["kernel"], window, strict=True)
    )
    gate_D = u_D @ params["gate/kernel"] + params["gate/bias"]
    rows.append(c_D * gate_D + u_D)
    past = window[1:]
  return np.stack(rows)


def _time_mix(params, x_TD):
  decay_D = np.exp(-np.exp(params["decay"]))
  numerator = denominator = np.zeros_like(x_TD[0])
  before_D = np.zeros_like(x_TD[0])
  rows = []
  for x_D in x_TD:
    k, v, r = (
      (mix * x_D + (1 - mix) * before_D) @ params[f"{name}/kernel"]
      for name in "kvr"
      for mix in [params[f"mix_{name}"]]
    )
    own = np.exp(params["first"] + k)
    wkv = (numerator + own * v) / (denominator + own)
    rows.append(wkv / (1 + np.exp(-r)) @ params["o/kernel"])
    numerator = decay_D * numerator + np.exp(k) * v
    denominator = decay_D * denominator + np.exp(k)
    before_D = x_D
  return np.stack(rows)
