"""AdamW from optax, with learning-rate schedule, decay mask and clipping."""

import dataclasses
import math
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from rebased_jax.config_checks import make_scalars_plain
from rebased_jax.field_types import fits
from train.data.checks import require


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW. The defaults are those of the paper's MQAR experiments.

  The learning rate rises linearly over `warmup_steps`. Then it falls as a half
  cosine from `learning_rate` to `final_fraction` of it at the run's last step.
  With warm-up the first step has `learning_rate` / `warmup_steps`, not 0.
  """

  #: The highest learning rate.
  learning_rate: float = 1e-3
  #: Steps over which the learning rate rises.
  warmup_steps: int = 0
  #: The learning rate at the last step, as a fraction of the highest.
  final_fraction: float = 0.0
  #: Hold the learning rate for that many steps, as a schedule that changes once
  #: an epoch. None: it changes every step.
  epoch_steps: int | None = None
  #: Decay of the average gradient.
  beta1: float = 0.9
  #: Decay of the average squared gradient.
  beta2: float = 0.999
  #: Added to the root of the average squared gradient.
  eps: float = 1e-8
  #: Weight decay, times the learning rate.
  weight_decay: float = 0.1
  #: Which parameters decay: all, or only the kernels of projections.
  decay: Literal["all", "matrices"] = "all"
  #: Largest norm of the gradient over all parameters. None: no clipping.
  clip_norm: float | None = None

  def __post_init__(self):
    make_scalars_plain(self)

    def check(ok: bool, name: str, expected: str) -> None:
      require(ok, f"optimizer.{name}", getattr(self, name), expected)

    for name in ("learning_rate", "eps", "clip_norm"):
      value = getattr(self, name)
      unset = name == "clip_norm" and value is None
      check(unset or 0 < value < math.inf, name, "a number above 0")
    for name in ("beta1", "beta2"):
      check(0 <= getattr(self, name) < 1, name, "a number in [0, 1)")
    check(0 <= self.weight_decay < math.inf, "weight_decay", "finite, ≥ 0")
    for name in ("warmup_steps", "epoch_steps"):
      check(fits(getattr(self, name), int | None), name, "an integer")
    check(self.warmup_steps >= 0, "warmup_steps", "an integer ≥ 0")
    check(0 <= self.final_fraction <= 1, "final_fraction", "0 to 1")
    check(
      self.epoch_steps is None or self.epoch_steps >= 1, "epoch_steps", "≥ 1"
    )
    check(self.decay in ("all", "matrices"), "decay", "'all' or 'matrices'")


def schedule(
  config: OptimizerConfig, steps: int, numpy: ModuleType = jnp
) -> optax.Schedule:
  """Return the learning rate as a function of the step.

  With `epoch_steps` the cosine is evaluated at the first step of each epoch:
  learning_rate · (1 + cos(π e / E)) / 2 in epoch e of E.

  Args:
    config: the optimiser.
    steps: the steps of the run, where the cosine ends.
    numpy: what computes it: `jax.numpy`, or NumPy on the host.
  """
  warmup, epoch = config.warmup_steps, config.epoch_steps
  last = float(steps if epoch is None else epoch * math.ceil(steps / epoch))

  def rate(step: Any) -> Any:
    step = numpy.asarray(step, numpy.float32)
    at = step if epoch is None else numpy.floor(step / epoch) * epoch
    done = numpy.clip((at - warmup) / (last - warmup), 0, 1)
    cosine = (1 + numpy.cos(numpy.pi * done)) / 2
    factor = config.final_fraction + (1 - config.final_fraction) * cosine
    if warmup:
      factor = numpy.where(step < warmup, (step + 1) / warmup, factor)
    return config.learning_rate * factor

  return rate


def decayed(params: Any, which: str) -> Any:
  """Return a tree with True at the parameters that weight decay acts on.

  Args:
    params: nested dicts of arrays.
    which: "all", or "matrices" for the projections' kernels alone: no bias,
      norm, γ, β, embedding or convolution, and not Mamba's A_log and D.
  """

  def matrix(path, _) -> bool:
    names = [str(key.key) for key in path]
    # The taps of a convolution are in the mixer itself, or under conv.
    return names[-1] == "kernel" and names[-2] not in ("mixer", "conv")

  if which == "all":
    return jax.tree.map(lambda _: True, params)
  return jax.tree_util.tree_map_with_path(matrix, params)


def make(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """Return the update rule of a run.

  Args:
    config: the optimiser.
    steps: the steps of the run.
  """
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
