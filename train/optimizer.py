"""AdamW with the run's schedule, decay mask and clipping, from optax."""

import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import optax

from train.config import OptimizerConfig


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
