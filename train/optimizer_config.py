"""The config of the optimiser; `train.optimizer` has the update rules."""

import dataclasses
import math
from typing import Literal, Self, get_args

from rebased_jax.config_checks import make_scalars_plain
from rebased_jax.config_help import with_help
from rebased_jax.field_types import fits
from train.data.checks import require

Rule = Literal["adamw", "lion", "muon", "sgd"]
Shape = Literal["cosine", "linear", "wsd", "constant"]

#: The momentum of a rule that has one, if the config does not say it.
MOMENTUM = {"muon": 0.95, "sgd": 0.9}

#: Fields that a rule or a schedule does not use.
_UNUSED = {
  "adamw": ("momentum", "nesterov"),
  "lion": ("momentum", "nesterov", "eps"),
  "muon": (),
  "sgd": ("beta1", "beta2", "eps"),
  "cosine": ("cooldown_steps",),
  "linear": ("cooldown_steps",),
  "wsd": (),
  "constant": ("cooldown_steps", "final_fraction", "epoch_steps"),
}


@with_help
@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The update rule. The defaults are those of the paper's MQAR experiments.

  The learning rate rises linearly over `warmup_steps`. Then it falls from
  `learning_rate` to `final_fraction` of it at the run's last step, in the shape
  of `schedule`. With warm-up the first step has `learning_rate` /
  `warmup_steps`, not 0.
  """

  #: The update rule, from optax. muon is for the kernels of projections; other
  #: parameters get adamw.
  name: Rule = "adamw"
  #: The highest learning rate.
  learning_rate: float = 1e-3
  #: How the learning rate falls after the warm-up: as a half cosine, linearly,
  #: not at all (constant), or linearly in the last steps only (wsd: warm-up,
  #: stable, decay).
  schedule: Shape = "cosine"
  #: Steps over which the learning rate rises.
  warmup_steps: int = 0
  #: The last steps, over which wsd's learning rate falls. None: a tenth of the
  #: run.
  cooldown_steps: int | None = None
  #: The learning rate at the last step, as a fraction of the highest. A
  #: constant one does not fall.
  final_fraction: float = 0.0
  #: Hold the learning rate for that many steps, as a schedule that changes once
  #: an epoch. None: it changes every step.
  epoch_steps: int | None = None
  #: adamw: decay of the average gradient. lion: the share of the average
  #: gradient in the update.
  beta1: float = 0.9
  #: adamw: decay of the average squared gradient. lion: of the average
  #: gradient.
  beta2: float = 0.999
  #: Decay of the average gradient of sgd and muon. None: 0.9 and 0.95.
  momentum: float | None = None
  #: Whether sgd and muon look one step ahead along their momentum. None: muon
  #: does.
  nesterov: bool | None = None
  #: Added to the root of adamw's average squared gradient.
  eps: float = 1e-8
  #: Weight decay, times the learning rate.
  weight_decay: float = 0.1
  #: Which parameters decay: all, or only the kernels of projections.
  decay: Literal["all", "matrices"] = "all"
  #: Largest norm of the gradient over all parameters that are trained. None: no
  #: clipping.
  clip_norm: float | None = None
  #: Parameters that keep their first values: patterns of their paths, such as
  #: "pairs/first/*" or "token_embedding". `rebased inspect PRESET --all` lists
  #: the paths.
  frozen: tuple[str, ...] = ()

  def __post_init__(self):
    make_scalars_plain(self)

    def check(ok: bool, name: str, expected: str) -> None:
      require(ok, f"optimizer.{name}", getattr(self, name), expected)

    rules, shapes = get_args(Rule), get_args(Shape)
    check(self.name in rules, "name", f"one of {rules}")
    check(self.schedule in shapes, "schedule", f"one of {shapes}")
    for name in ("learning_rate", "eps", "clip_norm"):
      value = getattr(self, name)
      unset = name == "clip_norm" and value is None
      number = fits(value, float) and 0 < value < math.inf
      check(unset or number, name, "a number above 0")
    for name in ("beta1", "beta2", "momentum"):
      value = getattr(self, name)
      unset = name == "momentum" and value is None
      number = fits(value, float) and 0 <= value < 1
      check(unset or number, name, "a number in [0, 1)")
    for name in ("momentum", "nesterov"):
      unused = self.name not in MOMENTUM and getattr(self, name) is not None
      check(not unused, name, f"None, its default: {self.name} does not use it")
    check(
      not self.nesterov or self.momentum != 0,
      "nesterov",
      "False without momentum",
    )
    weight_decay, final_fraction = self.weight_decay, self.final_fraction
    number = fits(weight_decay, float) and 0 <= weight_decay < math.inf
    check(number, "weight_decay", "a finite number ≥ 0")
    for name in ("warmup_steps", "epoch_steps", "cooldown_steps"):
      check(fits(getattr(self, name), int | None), name, "an integer")
    check(self.warmup_steps >= 0, "warmup_steps", "an integer ≥ 0")
    check(
      self.cooldown_steps is None or self.schedule == "wsd",
      "cooldown_steps",
      f"None, its default: {self.schedule} does not use it",
    )
    for name in ("epoch_steps", "cooldown_steps"):
      value = getattr(self, name)
      check(value is None or value >= 1, name, "≥ 1")
    number = fits(final_fraction, float) and 0 <= final_fraction <= 1
    check(number, "final_fraction", "a number, 0 to 1")
    decays = "all", "matrices"
    check(self.decay in decays, "decay", f"one of {decays}")
    patterns = fits(self.frozen, tuple[str, ...]) and all(self.frozen)
    check(patterns, "frozen", "a tuple of patterns of parameter paths")

  def check_unused(self, stored: Self | None = None) -> None:
    """Check that fields have their defaults where nothing uses them.

    Args:
      stored: the optimiser of a run that is resumed, whose values may stay.
        None: the run is new.

    Raises:
      ValueError: a field has another value, which would change nothing.
    """
    for owner in (self.name, self.schedule):
      for field in _UNUSED[owner]:
        value, default = getattr(self, field), getattr(OptimizerConfig, field)
        stays = stored is not None and value == getattr(stored, field)
        require(
          stays or value == default,
          f"optimizer.{field}",
          value,
          f"{default}, its default: {owner} does not use it",
        )

  def switched_to(self, name: str | None, schedule: str | None) -> Self:
    """Return this optimiser with another rule or schedule.

    Fields that these do not use get their defaults.

    Args:
      name: the rule. None, or no rule: this one's.
      schedule: the schedule. None, or no schedule: this one's.
    """
    chosen = (
      name if name in get_args(Rule) else self.name,
      schedule if schedule in get_args(Shape) else self.schedule,
    )
    unused = {
      field: getattr(OptimizerConfig, field)
      for owner in chosen
      for field in _UNUSED[owner]
    }
    return dataclasses.replace(
      self, name=chosen[0], schedule=chosen[1], **unused
    )

  def check(self, steps: int) -> None:
    """Check that the schedule fits into a run.

    Args:
      steps: the steps of the run.

    Raises:
      ValueError: the warm-up or the cooldown is too long.
    """
    require(
      self.warmup_steps < steps,
      "optimizer.warmup_steps",
      self.warmup_steps,
      f"below steps={steps} (change --optimizer.warmup-steps too)",
    )
    if self.cooldown_steps is not None:
      most = steps - self.warmup_steps
      require(
        self.cooldown_steps <= most,
        "optimizer.cooldown_steps",
        self.cooldown_steps,
        f"at most {most}, the steps after the warm-up",
      )
