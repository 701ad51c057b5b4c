"""`rebased lm-eval RUN`: run lm-evaluation-harness on a run's model."""

import importlib
import importlib.util
import re
import sys

from train.commands.arguments import check_model_is_there
from train.records.run_folder import RunFolder

_HELP = """\
usage: rebased lm-eval MODEL --tasks TASK … [options of lm-eval run]

Evaluate MODEL, the folder of a run on text or an exported model, by
lm-evaluation-harness. All options are those of its command `lm-eval run`:

  --tasks TASK …        the tasks; `lm-eval ls tasks` lists them
  --include_path DIR    a folder of your own tasks
  --batch_size N        texts that run at a time; here 8 if it is not given
  --limit N             examples of each task
  --output_path DIR     where the results go
  --model_args KEY=VALUE …
                        piece=N, the most tokens that run at a time; max_length,
                        max_gen_toks, tokenizer, eos, seed

Two options are those of `rebased evaluate`:

  --step N              the run's checkpoint, or best
  --weights ema         the average of a run with --ema

`lm-eval run --help` shows all of them.
It needs: pip install 'rebased-jax[eval]'"""

#: Options of the harness that have no meaning here, and why.
_INSTEAD = {
  "-M": "MODEL comes first",
  "--model": "MODEL comes first",
  "--device": "JAX_PLATFORMS chooses the devices",
}

#: Options of ours: the pattern of a value, and what it should be.
_OURS = {
  "--step": (r"\d+|best", "an integer or best"),
  "--weights": ("trained|ema", "one of ('trained', 'ema')"),
}


def run(args: list[str]) -> int:
  """Run the verb and return the exit code.

  Args:
    args: the arguments after the verb.

  Raises:
    ValueError: an argument is wrong, or the harness is not installed.
    CheckpointError: there is no such checkpoint, or it is unreadable.
  """
  if not args or args[0].startswith("-"):
    print(_HELP)
    return 0 if args[:1] in (["-h"], ["--help"]) else 2
  run_dir, *rest = args
  chosen, rest = _take_options(rest)
  model_args = ",".join([f"run={run_dir}", *chosen])
  _check_arguments(run_dir, rest)
  check_model_is_there(run_dir)
  # Imported when the arguments are right: jax takes seconds.
  from rebased_jax import model_files
  from train.devices import backend

  # The harness would look for its tasks first.
  if not model_files.is_exported(run_dir):
    RunFolder(run_dir).read_config()
  backend.devices()  # says so if there are none
  from lm_eval.__main__ import cli_evaluate

  importlib.import_module("train.harness")  # registers the model
  before = sys.argv
  words = ["run", "--model", "rebased", "--model_args", model_args]
  if not any(x.split("=")[0] in ("-b", "--batch_size") for x in rest):
    words += ["--batch_size", "8"]
  sys.argv = ["rebased lm-eval", *words, *rest]
  try:
    cli_evaluate()
  finally:
    sys.argv = before
  return 0


def _take_options(rest: list[str]) -> tuple[list[str], list[str]]:
  """Return our options as NAME=VALUE, and the arguments of the harness.

  Raises:
    ValueError: an option has no value, or a wrong one.
  """
  found, others, words = [], [], iter(rest)
  for word in words:
    option, equals, value = word.partition("=")
    if option not in _OURS:
      others.append(word)
      continue
    value = value if equals else next(words, "")
    pattern, expected = _OURS[option]
    if not re.fullmatch(pattern, value):
      raise ValueError(f"{option}={value!r}: expected {expected}")
    found.append(f"{option.removeprefix('--')}={value}")
  return found, others


def _check_arguments(run_dir: str, rest: list[str]) -> None:
  """Raise ValueError for what the harness would misread or not find."""
  if set(run_dir) & set(",="):
    raise ValueError(
      f"{run_dir}: expected a path without a comma or an equals sign, which "
      "the harness takes for the end of an argument"
    )
  for option in (x.split("=")[0] for x in rest):
    if option in _INSTEAD:
      raise ValueError(f"{option}: expected no such option: {_INSTEAD[option]}")
  if importlib.util.find_spec("lm_eval") is None:
    raise ValueError(
      "lm-evaluation-harness is not installed: expected the package lm_eval; "
      "pip install 'rebased-jax[eval]'"
    )
