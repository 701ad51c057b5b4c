"""The mixers whose state grows, as slow NumPy recurrences in float64."""

import numpy as np

from rebased_jax import AttentionConfig, HyenaConfig


def attention(config: AttentionConfig, params: dict, x_TD: np.ndarray):
  """y_TD of softmax attention, token by token."""
  H = config.heads
  W, b = params["qkv/kernel"], params.get("qkv/bias", 0)
  past = []
  rows = []
  for t, x_D in enumerate(x_TD):
    q, k, v = np.split(x_D @ W + b, 3)
    q, k, v = (x.reshape(H, -1) for x in (q, k, v))
    if config.rotary:
      q, k = _turn(q, t), _turn(k, t)
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


def _turn(x_HF: np.ndarray, t: int) -> np.ndarray:
  """Each pair (i, i + F/2) as a complex number, times exp(i·angle)."""
  x, y = np.split(x_HF, 2, axis=-1)
  K = x.shape[-1]
  z = (x + 1j * y) * np.exp(1j * t * 10000.0 ** (-np.arange(K) / K))
  return np.concatenate([z.real, z.imag], axis=-1)


def hyena(config: HyenaConfig, params: dict, x_TD: np.ndarray):
  """y_TD of Hyena, token by token, its filter lag by lag."""
  h_LD = [_lag(config, params, p, x_TD.shape[1]) for p in range(config.length)]
  projected = [np.zeros(3 * x_TD.shape[1])] * (config.taps - 1)
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


def _lag(config, params: dict, p: int, width: int) -> np.ndarray:
  """h_p: the network of z_p under a window that falls with p."""
  x = params["filter/z"][p]
  for layer in range(3):
    name = f"filter/layers/{layer}/"
    x = x @ params[name + "kernel"] + params[name + "bias"]
    x = np.sin(params["filter/frequency"] * x)
  slowest, fastest = np.log(1e-2) / 1.5, np.log(1e-2) / 0.3
  rate_D = np.abs(np.linspace(slowest, fastest, width))
  window_D = np.exp(-p / (config.length - 1) * rate_D)
  return window_D * (x @ params["filter/layers/3/kernel"])
