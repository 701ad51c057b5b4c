"""The config of a run: frozen dataclasses, from the model to saving.

A preset is a `RunConfig`. The command line changes its fields, and the result
is stored in the run folder and in every checkpoint (stored_config.py). Nothing
else changes a config.
"""

import dataclasses
import math
from typing import Literal, Self, get_args

from rebased_jax import ModelConfig
from rebased_jax.config_checks import make_scalars_plain
from rebased_jax.config_help import with_help
from rebased_jax.field_types import fits
from rebased_jax.which_weights import Weights
from train.data.checks import absolute, require
from train.data.config import (
  DataConfig as DataConfig,
  MQARData as MQARData,
  MQARPaperData as MQARPaperData,
  MQARStreamData as MQARStreamData,
  TextData as TextData,
)
from train.devices.mesh_config import MeshConfig as MeshConfig
from train.optimizer_config import OptimizerConfig as OptimizerConfig


@with_help
@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  """The steps that JAX's profiler traces; the trace is in the run folder."""

  #: The first traced step.
  start: int = 10
  #: How many steps are traced. 0 traces none.
  steps: int = 0

  def __post_init__(self):
    make_scalars_plain(self)
    for name in ("start", "steps"):
      value = getattr(self, name)
      ok = fits(value, int) and value >= 0
      require(ok, f"profile.{name}", value, "an integer ≥ 0")

  def check(self, steps: int) -> None:
    """Check that a run has all of the traced steps.

    Args:
      steps: the steps of the run.

    Raises:
      ValueError: it has not.
    """
    stop = self.start + self.steps
    require(
      self.steps == 0 or stop <= steps,
      "profile",
      f"steps {self.start} to {stop - 1}",
      f"steps of 0 to {steps - 1} (--profile.start, --profile.steps)",
    )


@with_help
@dataclasses.dataclass(frozen=True)
class RunConfig:
  """One training run."""

  #: The model.
  model: ModelConfig
  #: Where the batches come from.
  data: DataConfig
  #: The update rule and its learning-rate schedule.
  optimizer: OptimizerConfig
  #: Updates of the parameters.
  steps: int
  #: Rows of the global batch, over all devices and micro-batches.
  batch: int
  #: Micro-batches that a batch is cut into, to save memory.
  accumulate: int = 1
  #: Parts that the targets of a row are cut into. The logits of one part exist
  #: at a time, which saves memory.
  loss_chunks: int = 1
  #: Seed of parameters, dropout and data.
  seed: int = 0
  #: Steps between evaluations on held-out rows.
  eval_every: int = 100
  #: Steps between checkpoints.
  save_every: int = 500
  #: Steps between records of metrics.
  log_every: int = 10
  #: How many of the newest checkpoints stay.
  keep: int = 3
  #: Checkpoints at multiples of that many steps stay too. None: no others.
  keep_every: int | None = None
  #: The checkpoint that is best by this held-out metric stays too, such as
  #: "loss" or "accuracy". None: the best one does not.
  keep_best: str | None = None
  #: Held-out accuracy above which the run ends early. None: never.
  stop_accuracy: float | None = None
  #: A run folder or an exported model: start from its weights, with a fresh
  #: optimiser. The model must be the same.
  init_from: str | None = None
  #: Which weights of the run in `init_from`: "trained", or "ema" for the
  #: average that it keeps.
  init_weights: Weights = "trained"
  #: Write TensorBoard event files too.
  tensorboard: bool = False
  #: How devices share the work. A resumed run may change it.
  mesh: MeshConfig = MeshConfig()
  #: A project of Weights & Biases that gets the records too.
  wandb: str | None = None
  #: Which steps the profiler traces.
  profile: ProfileConfig = ProfileConfig()
  #: What to do when a step is not finite: end the run, or skip the step.
  nan: Literal["abort", "skip"] = "abort"
  #: Weight of the z-loss, (log Σ exp logits)², which training adds to the loss
  #: of each target. 0: none; 1e-4 is usual.
  z_loss: float = 0.0
  #: Decay a step of an average of the weights, such as 0.999. It is evaluated
  #: and saved beside them. None: no average.
  ema: float | None = None

  def __post_init__(self):
    make_scalars_plain(self)
    choices = "abort", "skip"
    require(self.nan in choices, "nan", self.nan, f"one of {choices}")
    weights = self.init_weights
    choices = get_args(Weights)
    require(weights in choices, "init_weights", weights, f"one of {choices}")
    require(
      weights == "trained" or self.init_from is not None,
      "init_weights",
      weights,
      "'trained' without init_from; set init_from to a run that keeps an "
      "average",
    )
    integers = ("steps", "batch", "accumulate", "eval_every", "save_every")
    for name in (*integers, "log_every", "keep", "loss_chunks"):
      value = getattr(self, name)
      require(fits(value, int) and value >= 1, name, value, "an integer ≥ 1")
    every = self.keep_every
    whole = every is None or (fits(every, int) and every >= 1)
    require(whole, "keep_every", every, "None or an integer ≥ 1")
    require(
      every is None or every % self.save_every == 0,
      "keep_every",
      every,
      f"a multiple of save_every={self.save_every}",
    )
    best = self.keep_best
    name = best is None or isinstance(best, str)
    require(name, "keep_best", best, "None or the name of a held-out metric")
    require(
      best is None or self.save_every % self.eval_every == 0,
      "save_every",
      self.save_every,
      f"a multiple of eval_every={self.eval_every} with keep_best={best!r}, so "
      "that an evaluation comes before each save",
    )
    divisors = (n for n in range(1, self.batch + 1) if self.batch % n == 0)
    nearest = min(divisors, key=lambda n: (abs(n - self.accumulate), -n))
    require(
      self.batch % self.accumulate == 0,
      "batch",
      self.batch,
      f"a multiple of accumulate={self.accumulate}; --accumulate {nearest} "
      "would fit",
    )
    require(
      self.data.targets % self.loss_chunks == 0,
      "loss_chunks",
      self.loss_chunks,
      f"a divisor of the {self.data.targets} targets of a row",
    )
    seed = fits(self.seed, int) and 0 <= self.seed < 2**31
    require(seed, "seed", self.seed, "an integer, 0 to 2³¹ − 1")
    is_bool = isinstance(self.tensorboard, bool)
    require(is_bool, "tensorboard", self.tensorboard, "True or False")
    z_loss, ema = self.z_loss, self.ema
    number = fits(z_loss, float) and 0 <= z_loss < math.inf
    require(number, "z_loss", z_loss, "a finite number ≥ 0")
    averages = ema is None or (fits(ema, float) and 0 < ema < 1)
    require(averages, "ema", ema, "None or a number above 0, below 1")
    # Each step moves the average by less than a 16-bit number can show.
    wide = self.model.param_dtype in ("float32", "float64")
    require(
      ema is None or wide,
      "ema",
      ema,
      f"None with model.param_dtype={self.model.param_dtype}, which is too "
      "coarse for an average; set model.param_dtype to float32",
    )
    self.optimizer.check(self.steps)
    self.profile.check(self.steps)
    accuracy = self.stop_accuracy
    require(
      accuracy is None or (fits(accuracy, float) and 0 < accuracy <= 1),
      "stop_accuracy",
      accuracy,
      "None or a number above 0, at most 1",
    )
    positions = self.model.positions
    require(
      positions is None or positions >= self.data.length,
      "model.positions",
      positions,
      f"None or at least data.length={self.data.length}",
    )
    require(
      self.model.vocab_size >= (self.data.vocab_size or 0),
      "model.vocab_size",
      self.model.vocab_size,
      f"at least data.vocab_size={self.data.vocab_size}",
    )
    limit = self.data.train_batches(self.batch, self.seed).num_batches
    require(
      limit is None or self.steps <= limit,
      "steps",
      self.steps,
      f"at most the {limit} batches of the data",
    )

  def with_absolute_paths(self) -> Self:
    """Return this run with paths for any working directory."""
    source = self.init_from
    return dataclasses.replace(
      self,
      data=self.data.with_absolute_paths(),
      init_from=None if source is None else absolute(source),
    )

  @property
  def micro_batch(self) -> int:
    """Rows that are on the devices at a time, over all devices."""
    return self.batch // self.accumulate
