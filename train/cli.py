"""The command `rebased`.

    rebased train PRESET [--options]   train, or go on in --run-dir
    rebased resume RUN                 go on with a run, as it was configured
    rebased evaluate RUN               held-out loss and accuracy of a run
    rebased generate RUN --prompt ...  text from a run's language model
    rebased inspect WHAT               a preset, a run, a checkpoint, a model
    rebased compile PRESET             the step, for TPUs that are not attached
    rebased prepare INPUT ...          text to tokens, for training
    rebased tokenizer train INPUT ...  a BPE tokenizer from text
    rebased count PATH                 pairs of tokens of a data set, for AR
    rebased inspect data PATH          a data set: counts, lengths, a sample
    rebased doctor                     devices, versions, implementations

`rebased COMMAND --help` shows the options. Exit codes: 0 done; 2 a wrong
argument or config, nothing was changed; 1 the run failed; 143 (SIGTERM) or 130
(SIGINT) it was stopped, saved, and can be resumed.
"""

from collections.abc import Callable, Sequence
import dataclasses
import datetime
import multiprocessing
import os
import shlex
import signal
import sys
from types import FrameType
import typing

from rich.console import Console
import tyro

from train import console

if typing.TYPE_CHECKING:
  from train.config import RunConfig


_COMPILE_ONLY = dict(
  JAX_PLATFORMS="cpu",
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",
  TPU_SKIP_MDS_QUERY="1",
  TPU_WORKER_HOSTNAMES="localhost",
)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs one command and exits with its code."""
  args = list(sys.argv[1:] if argv is None else argv)
  if not args or args[0] in ("-h", "--help"):
    print(__doc__.strip())
    sys.exit(0 if args else 2)
  commands: dict[str, Callable[[list[str]], int]] = dict(
    train=_train,
    resume=_resume,
    evaluate=_evaluate,
    generate=_generate,
    inspect=_inspect,
    compile=_compile,
    prepare=_prepare,
    tokenizer=_tokenizer,
    count=_count,
    doctor=_doctor,
  )
  command = commands.get(args[0])
  if command is None:
    _refuse(console.unknown("command", args[0], commands))
  if args[0] in ("prepare", "tokenizer", "count"):  # their workers need no jax
    sys.exit(_without_jax(command, args[1:]))
  if args[0] == "compile":  # libtpu is not to look for TPUs, nor to lock them
    for name, value in _COMPILE_ONLY.items():
      os.environ.setdefault(name, value)
  # Not at the top: jax and orbax take seconds that a wrong word need not wait.
  from train.checkpoint.checkpoints import CheckpointError
  from train.data.timeout import DataTimeout
  from train.loop import TrainingFailed

  try:
    code = command(args[1:])
  except DataTimeout as error:
    _leave(str(error))
  except (ValueError, NotImplementedError) as error:
    _refuse(str(error))
  except (CheckpointError, TrainingFailed, OSError) as error:
    print(f"rebased: {error}", file=sys.stderr)
    code = 1
  sys.exit(code)


def _refuse(message: str) -> None:
  print(f"rebased: {message}", file=sys.stderr)
  sys.exit(2)


def _leave(message: str) -> typing.NoReturn:
  """Ends the process although a thread of it hangs."""
  print(f"rebased: {message}", file=sys.stderr, flush=True)
  sys.stdout.flush()
  for child in multiprocessing.active_children():
    child.terminate()
  os._exit(1)


def _preset(args: list[str], command: str = "train") -> tuple[str, "RunConfig"]:
  from train.presets import make_presets

  presets = make_presets()
  if not args or args[0].startswith("-"):
    print(f"usage: rebased {command} PRESET [--options]\n\npresets:")
    print("\n".join(f"  {name}" for name in presets))
    sys.exit(0 if args else 2)
  if args[0] not in presets:
    raise ValueError(console.unknown("preset", args[0], presets))
  return args[0], presets[args[0]]


def _train(args: list[str]) -> int:
  from train.commands.arguments import TrainArgs
  from train.devices import processes

  name, preset = _preset(args)
  parsed = tyro.cli(
    TrainArgs,
    prog=f"rebased train {name}",
    args=args[1:],
    default=TrainArgs(preset),
  )
  processes.start(parsed.distributed)
  if parsed.run_dir is None and parsed.distributed != "off":
    raise ValueError(
      "--run-dir: expected a folder that all processes share, with "
      f"--processes {parsed.distributed}"
    )
  time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
  default = f"runs/{name}-{time}"
  run_dir = default if parsed.run_dir is None else parsed.run_dir
  return _run(parsed.run, run_dir, parsed.allow_data_change)


def _resume(args: list[str]) -> int:
  from train.commands.arguments import ResumeArgs, of_run
  from train.devices import processes

  parsed, config = of_run(ResumeArgs, "rebased resume", args)
  processes.start(parsed.distributed)
  return _run(config, parsed.run_dir, parsed.allow_data_change)


def _run(config: "RunConfig", run_dir: str, allow_data_change: bool) -> int:
  import jax

  from train import loop
  from train.records import report
  from train.records.run_folder import RunFolder

  console = Console(quiet=jax.process_index() != 0)
  folder = RunFolder(run_dir)
  outcome = loop.train(
    config, folder, console, allow_data_change=allow_data_change
  )
  if outcome.reason == "signal":
    console.print(
      f"stopped at step {outcome.step}, saved; go on with\n"
      f"  rebased resume {shlex.quote(run_dir)}",
      highlight=False,
      soft_wrap=True,
    )
    return outcome.exit_code
  report.finish(config, folder, outcome, console)
  return 0


def _evaluate(args: list[str]) -> int:
  from train.commands.arguments import EvaluateArgs, of_run, with_recall
  from train.devices import processes
  from train.records import report
  from train.records.run_folder import RunFolder

  parsed, config = of_run(EvaluateArgs, "rebased evaluate", args)
  config = with_recall(config, parsed.recall, parsed.recall_limit)
  processes.start(parsed.distributed)
  folder = RunFolder(parsed.run_dir)
  return report.evaluate_run(
    config,
    folder,
    parsed.step,
    Console(),
    test=parsed.test,
    allow_data_change=parsed.allow_data_change,
  )


def _generate(args: list[str]) -> int:
  from train.commands import generate
  from train.commands.arguments import GenerateArgs

  parsed = tyro.cli(GenerateArgs, prog="rebased generate", args=args)
  how = generate.Sampling(
    parsed.tokens, parsed.temperature, parsed.top_k, parsed.seed
  )
  named = generate.Named(parsed.step, parsed.tokenizer, parsed.eos)
  print(generate.complete(parsed.run_dir, parsed.prompt, how, named))
  return 0


def _inspect(args: list[str]) -> int:
  from rebased_jax.presets import make_models
  from train.commands import inspect_data, inspect_run
  from train.commands.arguments import InspectArgs, InspectDataArgs
  from train.presets import make_presets

  if args[:1] == ["data"] and (len(args) > 1 or not os.path.isdir("data")):
    parsed = tyro.cli(
      InspectDataArgs, prog="rebased inspect data", args=args[1:]
    )
    return inspect_data.show(
      parsed.path, Console(), length=parsed.length, verify=parsed.verify
    )
  parsed = tyro.cli(InspectArgs, prog="rebased inspect", args=args)
  what, mesh, console = parsed.what, parsed.mesh, Console()
  presets, models = make_presets(), make_models()
  if what in presets:
    config = dataclasses.replace(presets[what], mesh=mesh)
    inspect_run.show_config(config, what, console)
    return 0
  if what in models:
    inspect_run.show_model(models[what], what, console)
    return 0
  return inspect_run.show_folder(what, (*presets, *models), console, mesh)


def _compile(args: list[str]) -> int:
  from train.commands.arguments import CompileArgs
  from train.compile import report as aot

  name, preset = _preset(args, "compile")
  parsed = tyro.cli(
    CompileArgs,
    prog=f"rebased compile {name}",
    args=args[1:],
    default=CompileArgs(preset),
  )
  return aot.show(parsed.run, parsed.topology, Console())


def _prepare(args: list[str]) -> int:
  from train.commands import prepare

  before = signal.signal(signal.SIGTERM, _terminate)
  try:
    return prepare.run_prepare(args)
  finally:
    signal.signal(signal.SIGTERM, before)


def _tokenizer(args: list[str]) -> int:
  from train.commands import prepare

  return prepare.run_tokenizer(args)


def _count(args: list[str]) -> int:
  from train.commands import count

  return count.run_count(args)


def _without_jax(command: Callable[[list[str]], int], args: list[str]) -> int:
  try:
    return command(args)
  except ValueError as error:
    _refuse(str(error))
  except OSError as error:
    print(f"rebased: {error}", file=sys.stderr)
  except KeyboardInterrupt as error:
    print("rebased: stopped; the same command goes on", file=sys.stderr)
    return 128 + (signal.SIGTERM if error.args else signal.SIGINT)
  return 1


def _terminate(number: int, frame: FrameType | None) -> None:
  raise KeyboardInterrupt(number)


def _doctor(args: list[str]) -> int:
  from train.commands import doctor

  if args in (["-h"], ["--help"]):
    print("usage: rebased doctor\n\n" + doctor.__doc__)
    return 0
  if args:
    raise ValueError(f"doctor takes no options, not {args[0]!r}")
  return doctor.show(Console())


if __name__ == "__main__":
  main()
