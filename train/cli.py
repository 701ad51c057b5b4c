"""The command `rebased`: find the verb and run it.

Each verb is a module of `train.commands` with a function `run(args)`, which
returns the exit code. A module is imported only when its verb is run, because
importing jax takes seconds: a misspelt verb is answered at once, and the verbs
that only read and write tokens never import it.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import importlib
import io
import multiprocessing
import os
import signal
import sys
from typing import Any, NoReturn

import rebased_jax
from train import console
from train.data.cache_folder import home_cache_folder
from train.presets import catalogue
from train.stop_signals import leaving_at_signals

# The table in docs/training.md says more.
_EXIT_CODES = """\
Exit codes: 0 done; 2 a wrong argument or config, nothing was changed; 1 failed;
3 another process of the run ended; 4 nothing moved for --step-timeout;
128 + N signal N stopped it: a run is saved and can be resumed; 141 nobody reads
the output."""
_PEER_LOST = 3


@dataclasses.dataclass(frozen=True)
class Verb:
  """A verb of the command.

  Attributes:
    usage: what follows the verb on the command line.
    summary: what it does, in a few words.
    module: the module that holds its `run`.
    uses_jax: whether it imports jax.
    takes_preset: whether its first argument is the name of a preset.
    environment: environment variables to set, unless they are set. jax and
      libtpu read them when they are imported.
  """

  usage: str
  summary: str
  module: str
  uses_jax: bool = True
  takes_preset: bool = False
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


VERBS = {
  "train": Verb(
    "PRESET [--options]",
    "train a preset, or resume its --run-dir",
    "train.commands.train",
    takes_preset=True,
  ),
  "presets": Verb(
    "",
    "list the presets: size, needs, time",
    "train.commands.presets",
    uses_jax=False,
  ),
  "resume": Verb(
    "RUN", "resume a run with the config it has", "train.commands.resume"
  ),
  "evaluate": Verb(
    "RUN",
    "print the held-out loss and accuracy",
    "train.commands.evaluate",
  ),
  "generate": Verb(
    "RUN --prompt TEXT",
    "complete a prompt with a run's model",
    "train.commands.generate",
  ),
  "export": Verb(
    "RUN --out DIR",
    "write a run's model for any program",
    "train.commands.export",
    environment={"JAX_PLATFORMS": "cpu"},  # nothing is computed
  ),
  "import": Verb(
    "FILE --out DIR",
    "turn a PyTorch checkpoint into a model",
    "train.commands.import_model",
    environment={"JAX_PLATFORMS": "cpu"},
  ),
  "lm-eval": Verb(
    "MODEL --tasks TASK …",
    "run lm-evaluation-harness on a model",
    "train.commands.lm_eval",
  ),
  "inspect": Verb(
    "WHAT",
    "show a preset, model, run or checkpoint;\n"
    "`inspect data PATH` shows a data set",
    "train.commands.inspect",
  ),
  "checkpoints": Verb(
    "RUN",
    "list a run's checkpoints; delete some",
    "train.commands.checkpoints",
    environment={"JAX_PLATFORMS": "cpu"},  # nothing is computed
  ),
  "compare": Verb(
    "RUN RUN …",
    "show several runs: a table and a plot",
    "train.commands.compare",
    uses_jax=False,
  ),
  "compile": Verb(
    "PRESET",
    "compile the step for TPUs not attached",
    "train.commands.compile",
    takes_preset=True,
    # libtpu must neither look for TPUs nor lock them; jax computes on the CPU.
    environment={
      "JAX_PLATFORMS": "cpu",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
      "TPU_SKIP_MDS_QUERY": "1",
      "TPU_WORKER_HOSTNAMES": "localhost",
    },
  ),
  "prepare": Verb(
    "INPUT … --out OUT",
    "turn text into tokens for training",
    "train.commands.prepare",
    uses_jax=False,
  ),
  "tokenizer": Verb(
    "train INPUT …",
    "train a BPE tokenizer on text",
    "train.commands.tokenizer",
    uses_jax=False,
  ),
  "count": Verb(
    "PATH",
    "count token pairs, for --recall-limit",
    "train.commands.count",
    uses_jax=False,
  ),
  "experiment": Verb(
    "NAME",
    "run an experiment of the paper;\n`list` shows all",
    "train.commands.experiment",
  ),
  "sweep": Verb(
    "PRESET --rates R …",
    "train at many rates, seeds and widths",
    "train.commands.sweep",
    takes_preset=True,
  ),
  "doctor": Verb(
    "",
    "show devices, versions, implementations",
    "train.commands.doctor",
  ),
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
  """Run one verb and exit with its code.

  Args:
    argv: the arguments of the command; None takes those of the process.
  """
  args = list(sys.argv[1:] if argv is None else argv)
  if isinstance(sys.stdout, io.TextIOWrapper):
    # An ASCII terminal gets an escape instead of a character that it lacks.
    sys.stdout.reconfigure(errors="backslashreplace")
  output: Any = console.Output(sys.stdout, _raise)
  with contextlib.redirect_stdout(output):
    try:
      try:
        code = _find_and_run(args)
      finally:
        output.flush()
    except console.OutputLost as error:
      code = _exit_code_of_lost_output(error)
  sys.exit(code)


def _raise(error: Exception) -> NoReturn:
  raise error


def _exit_code_of_lost_output(error: console.OutputLost) -> int:
  """Return the exit code after lost output; say why, unless it is usual."""
  cause = error.cause
  while isinstance(cause, console.OutputLost):
    cause = cause.cause
  if isinstance(cause, BrokenPipeError):  # as after `| head`
    return 128 + signal.SIGPIPE
  _print_error(str(error))
  return 1


def _find_and_run(args: list[str]) -> int:
  """Run the verb that the arguments begin with, and return the exit code."""
  if args[:1] == ["help"] and args[1:2] and args[1] in VERBS:
    args = [args[1], "--help"]
  if not args or args[0] in ("-h", "--help", "help"):
    print(_help())
    return 0 if args else 2
  if args[0] in ("--version", "-V", "version"):
    print(f"rebased {rebased_jax.__version__}")
    return 0
  verb = VERBS.get(args[0])
  if verb is None:
    _print_error(console.unknown("command", args[0], VERBS))
    return 2
  if verb.takes_preset:
    code = _check_preset(args[0], args[1:])
    if code is not None:
      return code
  return _run_among_peers(verb, args[1:])


def _check_preset(verb: str, args: list[str]) -> int | None:
  """Return the exit code if the arguments name no preset, None if they do.

  The catalogue needs no jax, so that a wrong name is answered at once.
  """
  if args and args[0] in ("-h", "--help", "help"):
    print(f"usage: rebased {verb} PRESET [--options]")
    print(f"       rebased {verb} --config RUN/config.json [--options]\n")
    print("presets:")
    print("\n".join(f"  {name}" for name in catalogue.PRESETS))
    print(f"\n`rebased {verb} PRESET --help` shows the options of a preset.")
    return 0
  if args and args[0].partition("=")[0] == "--config":
    return None  # a file stands instead of the preset
  if not args or args[0].startswith("-"):
    found = f", not {args[0]!r}" if args else ""
    _print_error(
      f"expected a preset after `rebased {verb}`{found}: as in `rebased {verb} "
      "mqar`. `rebased presets` lists all"
    )
    return 2
  try:
    catalogue.check_name(args[0])
  except ValueError as error:
    _print_error(str(error))
    return 2
  return None


def _help() -> str:
  """Return the text of `rebased --help`."""
  lines = [
    "Train, evaluate and use models with linear attention.",
    "",
    "usage: rebased VERB …",
    "",
  ]
  for name, verb in VERBS.items():
    summary = verb.summary.replace("\n", "\n" + " " * 38)
    lines.append(f"  {f'rebased {name} {verb.usage}':<36}{summary}")
  lines += ["", "`rebased VERB --help` shows the options.", _EXIT_CODES]
  return "\n".join(lines)


def _run_among_peers(verb: Verb, args: list[str]) -> int:
  """Run a verb, and tell the other processes of the run how it ended."""
  code = 1  # of an exception that is a bug
  try:
    code = _run(verb, args)
  finally:
    # Not imported here: a verb that never imported it has no peers.
    processes = sys.modules.get("train.devices.processes")
    if processes is not None:
      processes.leave(code)
  return code


def _run(verb: Verb, args: list[str]) -> int:
  """Run a verb; print errors that a user can cause, and return the exit code.

  Any other exception is a bug, and keeps its traceback.
  """
  kept = _compilation_cache() if verb.uses_jax else {}
  for name, value in {**verb.environment, **kept}.items():
    os.environ.setdefault(name, value)
  interrupts = (
    leaving_at_signals(_before_leaving)
    if verb.uses_jax
    else contextlib.nullcontext()
  )
  try:
    with interrupts:
      return importlib.import_module(verb.module).run(args)
  except (ValueError, NotImplementedError) as error:
    _print_error(str(error))
    return 2
  except MemoryError as error:
    _print_error(f"out of memory: {error}")
    return 1
  except _failures() as error:
    _exit_if_hung(error)
    _print_error(str(error))
    return 1
  except _peer_lost() as error:
    _print_error(str(error))
    return _PEER_LOST
  except KeyboardInterrupt as error:
    _print_error("stopped; repeat the same command to continue")
    return 128 + (error.args[0] if error.args else signal.SIGINT)


def _compilation_cache() -> dict[str, str]:
  """Return variables with which jax keeps compiled programs for later commands.

  Only a folder in the user's own home will do: what it holds is run. Variables
  that are set already win.
  """
  folder = home_cache_folder("compiled")
  if folder is None:
    return {}
  return {
    "JAX_COMPILATION_CACHE_DIR": str(folder),
    # Small models have many programs that take less than jax's limit of 1 s.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
  }


def _before_leaving(code: int) -> None:
  """End the children, remove an empty folder, and tell the other processes."""
  for child in multiprocessing.active_children():
    child.kill()  # a stopped one does not hear SIGTERM
  run_folder = sys.modules.get("train.records.run_folder")
  if run_folder is not None:
    run_folder.remove_default_folders()
  processes = sys.modules.get("train.devices.processes")
  if processes is not None:
    processes.say_end(code)


#: Exceptions that mean that a verb failed, exit code 1, by their modules.
_FAILURES = {
  "train.data.prepare.shard": "PrepareError",
  "train.checkpoint.checkpoints": "CheckpointError",
  "train.nonfinite_steps": "TrainingFailed",
  "train.records.wandb": "WandbError",
}


def _failures() -> tuple[type[Exception], ...]:
  """Return the errors that mean that a verb failed."""
  return OSError, *_imported(_FAILURES)


def _peer_lost() -> tuple[type[Exception], ...]:
  """Return the error of a run that lost a process."""
  return _imported({"train.devices.processes": "PeerLost"})


def _imported(names: Mapping[str, str]) -> tuple[type[Exception], ...]:
  """Return exceptions of the modules that are imported; no other is raised.

  Importing the rest here would import jax after `--help`.
  """
  return tuple(
    getattr(sys.modules[module], name)
    for module, name in names.items()
    if module in sys.modules
  )


def _exit_if_hung(error: Exception) -> None:
  """End the process at once if a thread of it hangs, waiting for data.

  `sys.exit` would wait for that thread.
  """
  timeout = _imported({"train.data.prefetch": "DataTimeout"})
  if not isinstance(error, timeout):
    return
  _print_error(str(error))
  sys.stdout.flush()
  sys.stderr.flush()
  for child in multiprocessing.active_children():
    child.kill()
  sys.modules["train.devices.processes"].leave(error.exit_code)
  os._exit(error.exit_code)


def _print_error(message: str) -> None:
  """Print a message as an error of the command."""
  with contextlib.suppress(OSError):  # it may have lost its reader, too
    print(f"rebased: {message}", file=sys.stderr)


if __name__ == "__main__":
  main()
