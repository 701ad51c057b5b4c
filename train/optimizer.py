"""AdamW with the run's schedule, decay mask and clipping, from optax."""

import dataclasses
import math
from typing import Any, Literal

import jax
from jax import Array
import jax.numpy as jnp
import optax

from train.data.checks import require


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW; the defaults are the paper's for MQAR.

  The learning rate rises linearly over `warmup_steps`, then falls as a half
  cosine from `learning_rate` at `warmup_steps` to `final_fraction` of it at
  the run's last step. With `epoch_steps` it is held for that many steps at a
  time, as in a schedule that is stepped once an epoch.
  """

  learning_rate: float = 1e-3
  warmup_steps: int = 0
  final_fraction: float = 0.0
  epoch_steps: int | None = None
  beta1: float = 0.9
  beta2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.1
  decay: Literal["all", "matrices"] = "all"  # which parameters decay
  clip_norm: float | None = None  # of the gradient over all parameters

  def __post_init__(self):
    check = lambda ok, name, expected: require(
      ok, f"optimizer.{name}", getattr(self, name), expected
    )
    positive = ("learning_rate", "eps") + ("clip_norm",) * (
      self.clip_norm is not None
    )
    for name in positive:
      value = getattr(self, name)
      check(0 < value < math.inf, name, "a number above 0")
    for name in ("beta1", "beta2"):
      check(0 <= getattr(self, name) < 1, name, "a number in [0, 1)")
    check(0 <= self.weight_decay < math.inf, "weight_decay", "finite, ≥ 0")
    for name in ("warmup_steps", "epoch_steps"):
      check(isinstance(getattr(self, name), int | None), name, "an integer")
    check(self.warmup_steps >= 0, "warmup_steps", "an integer ≥ 0")
    check(0 <= self.final_fraction <= 1, "final_fraction", "0 to 1")
    check(
      self.epoch_steps is None or self.epoch_steps >= 1, "epoch_steps", "≥ 1"
    )
    check(self.decay in ("all", "matrices"), "decay", "'all' or 'matrices'")


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """The learning rate at a step; `steps` is where the cosine ends.

  With `epoch_steps` the cosine is taken at the first step of the epoch and
  ends after the last: lr · (1 + cos(π e / E)) / 2 in epoch e of E.
  """
  warmup, epoch = config.warmup_steps, config.epoch_steps
  last = float(steps if epoch is None else epoch * math.ceil(steps / epoch))

  def rate(step: Array) -> Array:
    step = jnp.asarray(step, jnp.float32)
    at = step if epoch is None else jnp.floor(step / epoch) * epoch
    done = jnp.clip((at - warmup) / (last - warmup), 0, 1)
    cosine = (1 + jnp.cos(jnp.pi * done)) / 2
    factor = config.final_fraction + (1 - config.final_fraction) * cosine
    if warmup:
      factor = jnp.where(step < warmup, (step + 1) / warmup, factor)
    return config.learning_rate * factor

  return rate


def decayed(params: Any, which: str) -> Any:
  """True where weight decay acts: everywhere, or on weight matrices alone.

  "matrices" are the projections' kernels: no bias, norm, γ, β, embedding or
  convolution, and nothing of Mamba's A_log and D.
  """

  def matrix(path, _) -> bool:
    names = [str(key.key) for key in path]
    # A convolution's taps lie in the mixer itself, or under conv.
    return names[-1] == "kernel" and names[-2] not in ("mixer", "conv")

  if which == "all":
    return jax.tree.map(lambda _: True, params)
  return jax.tree_util.tree_map_with_path(matrix, params)


def make(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """The whole update rule."""
  adamw = optax.adamw(
    schedule(config, steps),
    b1=config.beta1,
    b2=config.beta2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=lambda params: decayed(params, config.decay),
  )
  if config.clip_norm is None:
    return optax.chain(adamw)
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
