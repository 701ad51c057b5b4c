"""The equations of every mixer as slow NumPy recurrences, in float64.

Each function takes (config, parameters by path, x_TD) and returns y_TD of one
document, token by token. `mixer_registry.py` says which mixer has which.
"""

from flax import nnx
import jax
import numpy as np

from rebased_jax import (
  AttentionConfig,
  BaseConvConfig,
  BasedConfig,
  HyenaConfig,
  MambaConfig,
  ReBasedConfig,
  RWKVConfig,
)

Params = dict[str, np.ndarray]


def parameters(module: nnx.Module) -> Params:
  """Return the parameters in float64, by path."""
  pure = nnx.to_pure_dict(nnx.state(module, nnx.Param))
  leaves = jax.tree_util.tree_leaves_with_path(pure)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {name(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def rebased(config: ReBasedConfig, params: Params, x_TD: np.ndarray):
  """ReBased: sim = (q·k)² / F of normalised, scaled and shifted features."""
  F = config.features

  def kernel(side: str, x: np.ndarray) -> np.ndarray:
    return kernel_map(config, params, side, x)

  sim = lambda product: product**2 / F
  return _linear_attention(config, params, x_TD, kernel, sim)


def based(config: BasedConfig, params: Params, x_TD: np.ndarray):
  """Based: sim = 1 + s + s²/2 with s = q·k / √F."""

  def sim(product: float) -> float:
    s = product / np.sqrt(config.features)
    return 1 + s + s**2 / 2

  return _linear_attention(config, params, x_TD, lambda side, x: x, sim)


def kernel_map(
  config: ReBasedConfig, params: Params, side: str, x: np.ndarray
) -> np.ndarray:
  """Return φ(x) = γ ∘ norm(x) + β of one token, with all heads' features.

  Args:
    config: which parts φ has.
    params: the mixer's parameters.
    side: "query" or "key".
    x: features (H·F,).
  """
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


def _linear_attention(config, params, x_TD, kernel, sim):
  H, F = config.heads, config.features
  W = {x: params[f"project/{x}/kernel"] for x in "qkvo"}
  past = []
  rows = []
  for x_D in x_TD:
    q, k, v = (x_D @ W[name] for name in "qkv")
    q, k = kernel("query", q), kernel("key", k)
    past.append((k.reshape(H, F), v.reshape(H, -1)))
    heads = []
    for h, q_F in enumerate(q.reshape(H, F)):
      numerator, denominator = 0.0, config.eps
      for k_HF, v_HP in past:
        weight = sim(q_F @ k_HF[h])
        numerator = numerator + weight * v_HP[h]
        denominator = denominator + weight
      heads.append(numerator / denominator)
    rows.append(np.concatenate(heads) @ W["o"])
  return np.stack(rows)


def short_convolution(config: BaseConvConfig, params: Params, x_TD: np.ndarray):
  """BaseConv: a convolution of K taps times a linear gate, plus the input."""
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


def time_mix(config: RWKVConfig, params: Params, x_TD: np.ndarray):
  """RWKV-4's time-mix, without the rounding to bfloat16."""
  del config
  decay_D = np.exp(-np.exp(params["decay"]))
  numerator = denominator = np.zeros_like(x_TD[0])
  before_D = np.zeros_like(x_TD[0])
  rows = []
  for x_D in x_TD:

    def project(name, x_D=x_D, before_D=before_D):
      mix_D = params[f"mix_{name}"]
      shifted_D = mix_D * x_D + (1 - mix_D) * before_D
      return shifted_D @ params[f"{name}/kernel"]

    k, v, r = project("k"), project("v"), project("r")
    own = np.exp(params["first"] + k)
    wkv = (numerator + own * v) / (denominator + own)
    rows.append(wkv / (1 + np.exp(-r)) @ params["o/kernel"])
    numerator = decay_D * numerator + np.exp(k) * v
    denominator = decay_D * denominator + np.exp(k)
    before_D = x_D
  return np.stack(rows)


def mamba(config: MambaConfig, params: Params, x_TD: np.ndarray):
  """Mamba's S6 mixer."""
  N = config.state
  past = [np.zeros(params["D"].shape)] * (config.taps - 1)
  h_IN = np.zeros(params["A_log"].shape)
  A_IN = -np.exp(params["A_log"])
  rows = []
  for x_D in x_TD:
    window = [*past, x_D @ params["in_proj/kernel"]]
    past = window[1:]
    u_I = _silu(
      params["conv/bias"]
      + sum(w * x for w, x in zip(params["conv/kernel"], window, strict=True))
    )
    dt_R, B_N, C_N = np.split(u_I @ params["x_proj/kernel"], (-2 * N, -N))
    delta_I = np.log1p(
      np.exp(dt_R @ params["dt_proj/kernel"] + params["dt_proj/bias"])
    )
    decay_IN = np.exp(delta_I[:, None] * A_IN)
    h_IN = decay_IN * h_IN + (delta_I * u_I)[:, None] * B_N[None]
    gate_I = _silu(x_D @ params["gate_proj/kernel"])
    rows.append(
      (h_IN @ C_N + params["D"] * u_I) * gate_I @ params["out_proj/kernel"]
    )
  return np.stack(rows)


def _silu(x: np.ndarray) -> np.ndarray:
  return x / (1 + np.exp(-x))


def softmax_attention(
  config: AttentionConfig, params: Params, x_TD: np.ndarray
):
  """Multi-head softmax attention, with rotary positions if configured."""
  H = config.heads
  W, b = params["qkv/kernel"], params.get("qkv/bias", 0)
  past = []
  rows = []
  for t, x_D in enumerate(x_TD):
    q, k, v = np.split(x_D @ W + b, 3)
    q, k, v = (x.reshape(H, -1) for x in (q, k, v))
    if config.rotary:
      q, k = _rotate(q, t), _rotate(k, t)
    past.append((k, v))
    heads = []
    for h, q_F in enumerate(q):
      s = np.array([q_F @ k_HF[h] for k_HF, _ in past]) / np.sqrt(q_F.size)
      a = np.exp(s - s.max())
      o_F = sum(w * v_HF[h] for w, (_, v_HF) in zip(a, past, strict=True))
      heads.append(o_F / a.sum())
    o_D = np.concatenate(heads)
    rows.append(o_D @ params["out_proj/kernel"] + params["out_proj/bias"])
  return np.stack(rows)


def _rotate(x_HF: np.ndarray, t: int) -> np.ndarray:
  """Return each pair (i, i + F/2) as a complex number, times exp(i·angle)."""
  x, y = np.split(x_HF, 2, axis=-1)
  K = x.shape[-1]
  z = (x + 1j * y) * np.exp(1j * t * 10000.0 ** (-np.arange(K) / K))
  return np.concatenate([z.real, z.imag], axis=-1)


def hyena(config: HyenaConfig, params: Params, x_TD: np.ndarray):
  """Hyena, its filter computed lag by lag."""
  width = x_TD.shape[1]
  h_LD = [_filter_lag(config, params, p, width) for p in range(config.length)]
  projected = [np.zeros(3 * width)] * (config.taps - 1)
  gated, rows = [], []
  for t, x_D in enumerate(x_TD):
    projected.append(x_D @ params["in_proj/kernel"] + params["in_proj/bias"])
    window = projected[-config.taps :]
    taps = zip(params["conv/kernel"], window, strict=True)
    c = params["conv/bias"] + sum(w * u for w, u in taps)
    x1, x2, v = np.split(c, 3)
    gated.append(x1 * v)
    long = sum(h_LD[t - s] * g_D for s, g_D in enumerate(gated))
    o_D = x2 * (long + params["bias"] * gated[-1])
    rows.append(o_D @ params["out_proj/kernel"] + params["out_proj/bias"])
  return np.stack(rows)


def _filter_lag(config, params: Params, p: int, width: int) -> np.ndarray:
  """Return h_p: the network of z_p under a window that falls with p."""
  x = params["filter/z"][p]
  for layer in range(3):
    name = f"filter/layers/{layer}/"
    x = x @ params[name + "kernel"] + params[name + "bias"]
    x = np.sin(params["filter/frequency"] * x)
  slowest, fastest = np.log(1e-2) / 1.5, np.log(1e-2) / 0.3
  rate_D = np.abs(np.linspace(slowest, fastest, width))
  window_D = np.exp(-p / (config.length - 1) * rate_D)
  return window_D * (x @ params["filter/layers/3/kernel"])
