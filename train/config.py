"""What a run is: frozen dataclasses, written to and read from JSON.

A preset is a `RunConfig`; the command line changes its fields; the resolved
one is in the run folder and in every checkpoint. Nothing rewrites it.
"""

import dataclasses
import hashlib
import json
from typing import Any, Literal

from rebased_jax import MIXER_CONFIGS, ModelConfig
from train.data import batches
from train.data.config import (
  DataConfig as DataConfig,
  MQARData as MQARData,
  MQARPaperData as MQARPaperData,
  MQARStreamData as MQARStreamData,
  TextData as TextData,
)
from train.devices.mesh import MeshConfig as MeshConfig
from train.optimizer import OptimizerConfig as OptimizerConfig

VERSION = 1  # of the JSON form


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  """Which steps the profiler watches; its trace is in the run folder."""

  start: int = 10  # the first
  steps: int = 0  # how many; 0: none

  def __post_init__(self):
    for name in ("start", "steps"):
      value = getattr(self, name)
      ok = isinstance(value, int) and value >= 0
      batches.require(ok, f"profile.{name}", value, "an integer ≥ 0")

  def check(self, steps: int) -> None:
    """Raises ValueError where a run of so many steps has not all of these."""
    stop = self.start + self.steps
    batches.require(
      self.steps == 0 or stop <= steps,
      "profile",
      f"steps {self.start} to {stop - 1}",
      f"steps of 0 to {steps - 1} (--profile.start, --profile.steps)",
    )


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """One training run.

  A row of the global batch is one example; steps are updates of the optimiser.
  """

  model: ModelConfig
  data: DataConfig
  optimizer: OptimizerConfig
  steps: int  # updates of the optimiser
  batch: int  # rows of the global batch
  accumulate: int = 1  # micro-batches that a batch is cut into
  loss_chunks: int = 1  # parts of a row whose logits exist at a time
  seed: int = 0  # of parameters, dropout and data
  eval_every: int = 100  # steps between evaluations on held-out rows
  save_every: int = 500  # steps between checkpoints
  log_every: int = 10  # steps between records and lines
  keep: int = 3  # checkpoints
  stop_accuracy: float | None = None  # held out: above it the run ends early
  init_from: str | None = None  # a run folder: its weights, a fresh optimiser
  tensorboard: bool = False  # event files too
  mesh: MeshConfig = MeshConfig()  # of the devices; free to change
  wandb: str | None = None  # a project of Weights & Biases, for records too
  profile: ProfileConfig = ProfileConfig()  # a trace of some steps
  nan: Literal["abort", "skip"] = "abort"  # of a step that is not finite

  def __post_init__(self):
    batches.require(
      self.nan in ("abort", "skip"), "nan", self.nan, "'abort' or 'skip'"
    )
    integers = ("steps", "batch", "accumulate", "eval_every", "save_every")
    for name in (*integers, "log_every", "keep", "loss_chunks"):
      value = getattr(self, name)
      batches.require(
        isinstance(value, int) and value >= 1, name, value, "an integer ≥ 1"
      )
    batches.require(
      self.batch % self.accumulate == 0,
      "batch",
      self.batch,
      f"a multiple of accumulate={self.accumulate}",
    )
    batches.require(
      self.data.targets % self.loss_chunks == 0,
      "loss_chunks",
      self.loss_chunks,
      f"a divisor of the {self.data.targets} targets of a row",
    )
    batches.require(0 <= self.seed < 2**31, "seed", self.seed, "0 to 2³¹ − 1")
    batches.require(
      self.optimizer.warmup_steps < self.steps,
      "optimizer.warmup_steps",
      self.optimizer.warmup_steps,
      f"below steps={self.steps} (change --optimizer.warmup-steps too)",
    )
    self.profile.check(self.steps)
    accuracy = self.stop_accuracy
    batches.require(
      accuracy is None or 0 < accuracy <= 1,
      "stop_accuracy",
      accuracy,
      "None or a number above 0, at most 1",
    )
    positions = self.model.positions
    batches.require(
      positions is None or positions >= self.data.length,
      "model.positions",
      positions,
      f"None or at least data.length={self.data.length}",
    )
    batches.require(
      self.model.vocab_size >= (self.data.vocab_size or 0),
      "model.vocab_size",
      self.model.vocab_size,
      f"at least data.vocab_size={self.data.vocab_size}",
    )
    limit = self.data.train_batches(self.batch, self.seed).num_batches
    batches.require(
      limit is None or self.steps <= limit,
      "steps",
      self.steps,
      f"at most the {limit} batches of the data",
    )

  @property
  def micro_batch(self) -> int:
    """Rows that are on the devices at a time."""
    return self.batch // self.accumulate


_CLASSES: dict[str, type] = {
  cls.__name__: cls
  for cls in (
    *MIXER_CONFIGS,
    MeshConfig,
    ModelConfig,
    MQARPaperData,
    MQARStreamData,
    OptimizerConfig,
    ProfileConfig,
    RunConfig,
    TextData,
  )
}


class ConfigError(ValueError):
  """A stored config cannot be read."""


def to_dict(config: Any) -> Any:
  """Plain JSON data; each dataclass carries its type."""
  if isinstance(config, tuple):
    return [to_dict(item) for item in config]
  if not dataclasses.is_dataclass(config):
    return config
  fields = {
    field.name: to_dict(getattr(config, field.name))
    for field in dataclasses.fields(config)
  }
  return {"type": type(config).__name__, **fields}


def from_dict(data: Any, where: str = "config") -> Any:
  """The inverse of `to_dict`; ConfigError names the place that is wrong."""
  if isinstance(data, list):
    return tuple(from_dict(x, f"{where}[{i}]") for i, x in enumerate(data))
  if not isinstance(data, dict):
    return data
  fields = dict(data)
  name = fields.pop("type", None)
  if name not in _CLASSES:
    raise ConfigError(
      f"{where}.type={name!r}: expected one of {', '.join(sorted(_CLASSES))}"
    )
  values = {key: from_dict(x, f"{where}.{key}") for key, x in fields.items()}
  try:
    return _CLASSES[name](**values)
  except (TypeError, ValueError) as error:
    raise ConfigError(f"{where}: {error}") from error


def to_json(config: RunConfig) -> str:
  """The text of config.json."""
  return json.dumps(
    {"version": VERSION, "run": to_dict(config)}, indent=2, allow_nan=False
  )


def from_json(text: str) -> RunConfig:
  """The run of a config.json.

  Raises:
    ConfigError: it is no JSON, of another version, or does not fit.
  """
  try:
    data = json.loads(text)
  except json.JSONDecodeError as error:
    raise ConfigError(f"not JSON: {error}") from error
  version = data.get("version") if isinstance(data, dict) else None
  if version != VERSION:
    raise ConfigError(f"version={version!r}: expected {VERSION}")
  config = from_dict(data.get("run"), "run")
  if not isinstance(config, RunConfig):
    raise ConfigError("run: expected a RunConfig")
  return config


def fingerprint(config: RunConfig) -> str:
  """Names the config: 16 hexadecimal digits of its JSON's SHA-256."""
  return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]


def differences(old: RunConfig, new: RunConfig) -> list[str]:
  """Every field in which two runs differ, as `model.width: 64 → 32`."""

  def walk(a: Any, b: Any, path: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
      keys = [*a, *(key for key in b if key not in a)]
      rows = (
        walk(a.get(k), b.get(k), f"{path}.{k}" if path else k) for k in keys
      )
      return [row for found in rows for row in found]
    return [] if a == b else [f"{path}: {a!r} → {b!r}"]

  return walk(to_dict(old), to_dict(new), "")


def of_mesh(difference: str) -> bool:
  """Whether one of `differences` is of where the run computes, not of what."""
  return difference.startswith("mesh.")


def of_data(difference: str) -> bool:
  """Whether one of `differences` is of the batches alone.

  The seed is among them: past step 0 it is that of data and dropout.
  """
  field = difference.partition(":")[0]
  return field in ("batch", "accumulate", "seed") or field.startswith("data.")
