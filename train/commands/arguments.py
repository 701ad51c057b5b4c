"""The arguments of the commands about runs, apart: only they need jax."""

import dataclasses
from typing import Annotated, TypeVar

import tyro

from train.config import RunConfig, TextData
from train.data.recall import Recall
from train.devices.mesh import MeshConfig
from train.records.run_folder import RunFolder

_Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
_Path = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
_What = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WHAT")]


@dataclasses.dataclass(frozen=True)
class TrainArgs:
  """Trains the preset, with these fields changed."""

  run: Annotated[RunConfig, tyro.conf.arg(name="")]
  run_dir: str | None = None  # new, or this run's own; default runs/PRESET-TIME
  allow_data_change: bool = False  # go on with other data, batch or seed
  distributed: str = "off"  # off, auto or HOST:PORT,N,I: process I of N


@dataclasses.dataclass(frozen=True)
class CompileArgs:
  """Compiles the preset's training step, with these fields changed."""

  run: Annotated[RunConfig, tyro.conf.arg(name="")]
  topology: str = "v5e:4x4"  # of the TPU slice


@dataclasses.dataclass(frozen=True)
class ResumeArgs:
  """Goes on with a run, as it was configured."""

  run_dir: _Run  # the run's folder
  mesh: MeshConfig = MeshConfig()  # default: as the run had it
  allow_data_change: bool = False  # go on although the data has changed
  distributed: str = "off"  # off, auto or HOST:PORT,N,I: process I of N


@dataclasses.dataclass(frozen=True)
class EvaluateArgs:
  """Held-out loss and accuracy of a run's weights."""

  run_dir: _Run  # the run's folder
  step: int | None = None  # of the checkpoint; default the newest
  test: bool = False  # the test split in place of the validation split
  recall: Recall | None = None  # of text: what makes a target AR
  recall_limit: int | None = None  # an AR bigram's most counts in training
  allow_data_change: bool = False  # evaluate although the data has changed
  mesh: MeshConfig = MeshConfig()  # default: as the run had it
  distributed: str = "off"  # off, auto or HOST:PORT,N,I: process I of N


@dataclasses.dataclass(frozen=True)
class GenerateArgs:
  """Prints a prompt and what a run's language model writes behind it."""

  run_dir: _Run  # the run's folder
  prompt: str  # the text to go on with; --prompt=-x where it begins with -
  tokens: int = 200  # at most; the end of a document ends it before
  temperature: float = 0.8  # 0 takes the likeliest token
  top_k: int | None = None  # sample from the likeliest alone
  seed: int = 0  # the same seed, the same text
  step: int | None = None  # of the checkpoint; default the newest
  tokenizer: str | None = None  # default the data set's; bytes or a file
  eos: str = "auto"  # with --tokenizer: the token that ends a document


@dataclasses.dataclass(frozen=True)
class InspectDataArgs:
  """Shows a data set: counts, lengths, domains, and a decoded sample."""

  path: _Path  # a prepared folder, or a Megatron index NAME.idx
  length: int = 256  # of the sample
  verify: bool = False  # read every byte and compare its checksums


@dataclasses.dataclass(frozen=True)
class InspectArgs:
  """Shows a preset, a run, a checkpoint RUN/checkpoints/STEP, or a model.

  Models are those whose parameters the paper counts, as table-4-mamba-64.
  """

  what: _What  # a preset's or a model's name, or a folder
  mesh: MeshConfig = MeshConfig()  # what parameters would get of it


_Args = TypeVar("_Args", ResumeArgs, EvaluateArgs)


def of_run(
  kind: type[_Args], prog: str, args: list[str]
) -> tuple[_Args, RunConfig]:
  """The arguments, and the config of their run on the mesh that they name.

  Raises:
    RunFolderError: there is no such run.
  """
  run_dir = tyro.cli(kind, prog=prog, args=args).run_dir
  config = RunFolder(run_dir).read_config()
  # Again, so that what the command leaves out is as the run had it.
  default = kind(run_dir, mesh=config.mesh)
  parsed = tyro.cli(kind, prog=prog, args=args, default=default)
  return parsed, dataclasses.replace(config, mesh=parsed.mesh)


def with_recall(
  config: RunConfig, recall: Recall | None, limit: int | None
) -> RunConfig:
  """The run, with this definition of AR targets in evaluation, if it is one.

  A definition without a limit has none, whatever the run had.

  Raises:
    ValueError: it is not of text, or no definition.
  """
  if recall is None and limit is None:
    return config
  if not isinstance(config.data, TextData):
    kind = type(config.data).__name__
    name, value = "recall_limit", limit
    if recall is not None:
      name, value = "recall", recall
    raise ValueError(f"{name}={value!r}: expected none with {kind}")
  recall = recall or config.data.recall
  data = dataclasses.replace(config.data, recall=recall, recall_limit=limit)
  return dataclasses.replace(config, data=data)
