"""Mamba's equations as a slow NumPy recurrence, in float64."""

import numpy as np

from rebased_jax import MambaConfig


def mamba(config: MambaConfig, params: dict, x_TD: np.ndarray) -> np.ndarray:
  """y_TD of one document, token by token."""
  N = config.state
  past = [np.zeros(params["D"].shape)] * (config.taps - 1)
  h_IN = np.zeros(params["A_log"].shape)
  rows = []
  for x_D in x_TD:
    window = [*past, x_D @ params["in_proj/kernel"]]
    past = window[1:]
    u_I = silu(
      params["conv/bias"]
      + sum(w * x for w, x in zip(params["conv/kernel"], window, strict=True))
    )
    dt_R, B_N, C_N = np.split(u_I @ params["x_proj/kernel"], (-2 * N, -N))
    delta_I = np.log1p(
      np.exp(dt_R @ params["dt_proj/kernel"] + params["dt_proj/bias"])
    )
    A_IN = -np.exp(params["A_log"])
    h_IN, y_I = scan_token(u_I, delta_I, A_IN, B_N, C_N, h_IN)
    y_I = (y_I + params["D"] * u_I) * silu(x_D @ params["gate_proj/kernel"])
    rows.append(y_I @ params["out_proj/kernel"])
  return np.stack(rows)


def scan_token(u_I, delta_I, A_IN, B_N, C_N, h_IN):
  """(h_IN, y_I) after one token."""
  decay_IN = np.exp(delta_I[:, None] * A_IN)
  h_IN = decay_IN * h_IN + (delta_I * u_I)[:, None] * B_N[None]
  return h_IN, h_IN @ C_N


def silu(x: np.ndarray) -> np.ndarray:
  return x / (1 + np.exp(-x))
