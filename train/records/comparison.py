"""Compare runs by what their folders hold: configs and records, no checkpoint.

The comparison reads no checkpoint and imports no jax, so that it answers at
once, also while the runs train.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import math
import statistics
from typing import Any

from etils import epath

from train import metrics
from train.config import RunConfig
from train.console import number
from train.records.run_folder import RunFolder, RunFolderError

_NONE = "–"  # in a table, where a run has no value
#: Fields that say nothing about what a run computes.
_APART = ("wandb", "tensorboard", "data.cache_dir")


@dataclasses.dataclass(frozen=True)
class Run:
  """A run as its folder describes it.

  Attributes:
    name: short, and unlike those of the other runs.
    path: its folder.
    config: its config.
    records: those of metrics.jsonl, of which there may be none.
  """

  name: str
  path: str
  config: RunConfig
  records: list[dict[str, Any]]

  def of_kind(self, kind: str) -> list[dict[str, Any]]:
    """Return its records of a kind: "train" or "eval"."""
    return [x for x in self.records if x["kind"] == kind]

  @property
  def tokens_per_step(self) -> int:
    """Input tokens of a step."""
    return self.config.batch * self.config.data.length


def find_folders(paths: Iterable[str]) -> list[str]:
  """Return the folders of runs: those given, and those inside the others.

  Args:
    paths: folders of runs, or folders that hold such folders.

  Raises:
    RunFolderError: one is neither.
  """
  found = []
  for path in paths:
    folder = epath.Path(path)
    if RunFolder(path).config_file.exists():
      found.append(path)
      continue
    inside = []
    if folder.is_dir():
      inside = [
        str(x) for x in sorted(folder.iterdir()) if (x / "config.json").exists()
      ]
    if not inside:
      raise RunFolderError(
        f"{path}: expected the folder of a run, or one that holds such folders"
      )
    found += inside
  return list(dict.fromkeys(found))


def read(paths: Sequence[str]) -> list[Run]:
  """Return the runs of some folders.

  Raises:
    RunFolderError: a folder is none of a run, or its files cannot be read.
  """
  runs = []
  for path, name in zip(paths, _short_names(paths), strict=True):
    folder = RunFolder(path)
    runs.append(Run(name, path, folder.read_config(), folder.read_metrics()))
  return runs


def _short_names(paths: Sequence[str]) -> list[str]:
  """Return the ends of paths, as long as they must be to differ."""
  parts = [epath.Path(path).parts for path in paths]
  for length in range(1, max(map(len, parts)) + 1):
    names = ["/".join(x[-length:]) for x in parts]
    if len(set(names)) == len(names):
      return names
  return list(paths)


def table(runs: Sequence[Run]) -> dict[str, list[str]]:
  """Return the rows of a table of runs: a label, and a value for each run.

  First come the fields of the configs that differ. Then come the steps, the
  last and the best held-out metrics, and the speed.
  """
  rows = config_differences(runs)
  rows["step"] = [_progress(run) for run in runs]
  rows["training loss"] = [_last(run.of_kind("train"), "loss") for run in runs]
  for name, label in metrics.table_labels().items():
    rows[f"held-out {label}"] = [
      _last(run.of_kind("eval"), name) for run in runs
    ]
    if metrics.better(name) is not None:
      rows[f"  best {label}"] = [_best(run, name) for run in runs]
  for name, label in (
    ("tokens_per_second", "tokens/s, median"),
    ("step_seconds", "seconds a step, median"),
    ("data_wait_fraction", "fraction waiting for data"),
    ("mfu", "MFU, median"),
  ):
    rows[label] = [_median(run, name) for run in runs]
  return {
    label: values for label, values in rows.items() if set(values) != {_NONE}
  }


def config_differences(runs: Sequence[Run]) -> dict[str, list[str]]:
  """Return the fields in which the configs differ, with each run's value.

  Where runs have configs of different classes, such as two mixers, the value is
  the class with the fields that are not its defaults.
  """
  found = _differences([run.config for run in runs], "")
  return {k: x for k, x in found.items() if not k.startswith(_APART)}


def _differences(values: list[Any], name: str) -> dict[str, list[str]]:
  if len(set(values)) == 1:
    return {}
  kinds = {type(x) for x in values}
  if len(kinds) > 1 or not dataclasses.is_dataclass(values[0]):
    return {name: [shown(x) for x in values]}
  found = {}
  for field in dataclasses.fields(values[0]):
    inner = f"{name}.{field.name}" if name else field.name
    found |= _differences([getattr(x, field.name) for x in values], inner)
  return found


def shown(value: Any) -> str:
  """Return a field's value in a form that is short enough for a table."""
  if isinstance(value, float):
    return number(value)
  if isinstance(value, tuple):
    return ", ".join(map(shown, value)) or "none"
  if not dataclasses.is_dataclass(value):
    return str(value)
  changed = [
    f"{field.name}={shown(getattr(value, field.name))}"
    for field in dataclasses.fields(value)
    if getattr(value, field.name) != field.default
  ]
  name = type(value).__name__.removesuffix("Config")
  return f"{name}({', '.join(changed)})" if changed else name


def _progress(run: Run) -> str:
  """Return how far a run is, as "300 of 2,000"."""
  step = max((x["step"] for x in run.records), default=0)
  total = run.config.steps
  limit = run.config.stop_accuracy
  reached = limit is not None and any(
    x.get("accuracy", 0) > limit for x in run.of_kind("eval")
  )
  if step >= total:
    return f"{total:,}, finished"
  end = ", accuracy reached" if reached else ""
  return f"{step:,} of {total:,}{end}"


def _last(records: list[dict[str, Any]], name: str) -> str:
  values = [x[name] for x in records if name in x]
  return number(values[-1]) if values else _NONE


def _best(run: Run, name: str) -> str:
  """Return the best held-out value of a metric and its step."""
  found = [
    (x[name], x["step"])
    for x in run.of_kind("eval")
    if name in x and math.isfinite(x[name])
  ]
  if not found:
    return _NONE
  sign = -1 if metrics.better(name) == "higher" else 1
  value, step = min(found, key=lambda x: (sign * x[0], x[1]))
  return f"{number(value)} at {step:,}"


def _median(run: Run, name: str) -> str:
  values = [
    x[name]
    for x in run.of_kind("train")
    if name in x and math.isfinite(x[name])
  ]
  return number(float(statistics.median(values))) if values else _NONE
