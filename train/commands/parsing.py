"""Parse the options of a verb, and say what is wrong in one line.

tyro makes the options of a verb from a dataclass. A wrong option is a
ValueError here, as every other wrong argument of the command: the message names
the option as it is typed, and the nearest options that exist. This module
imports no jax.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import difflib
import io
import re
from typing import Any, TypeVar

import tyro

from train.console import near

#: Names that other trainers have for an option, by our name for it.
_SYNONYMS = {
  "batch": ("bs", "batch-size", "global-batch-size", "train-batch-size"),
  "accumulate": ("grad-accum", "gradient-accumulation-steps"),
  "steps": ("max-steps", "num-steps", "train-steps", "epochs"),
  "run-dir": (
    *("output-dir", "out-dir", "workdir", "logdir"),
    *("resume", "resume-from", "resume-from-checkpoint"),
  ),
  "eval-every": ("eval-steps", "eval-interval"),
  "save-every": ("save-steps", "save-interval", "checkpoint-period"),
  "keep": ("save-total-limit", "max-to-keep"),
  "keep-best": ("metric-for-best-model", "load-best-model-at-end"),
  "wandb": ("report-to", "wandb-project"),
  "log-every": ("logging-steps", "log-interval", "log-period"),
  "learning-rate": ("lr", "max-lr"),
  "final-fraction": ("min-lr", "min-lr-ratio"),
  "weight-decay": ("wd",),
  "warmup-steps": ("warmup",),
  "clip-norm": ("grad-clip", "max-grad-norm", "clip"),
  "model.mixer": ("system", "arch", "model"),
  "model.dtype": ("bf16", "fp16", "mixed-precision"),
  "model.width": ("d-model", "dim", "hidden-size", "embed-dim"),
  "model.pairs": ("layers", "num-layers", "n-layer", "num-hidden-layers"),
  "heads": ("num-heads", "n-head", "num-attention-heads"),
  "features": ("feature-dim", "head-dim", "d-head"),
  "data.length": ("seq-len", "seq-length", "context-length", "block-size"),
  "data.path": ("dataset", "data-path", "train-file"),
}
_SHOWN = 3  # suggestions in a message

# tyro's messages: a value that is no choice, and values of a wrong kind.
_CHOICE = re.compile(
  r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of (\(.*?\))"
)
_KINDS = (
  (r"invalid literal for int\(\) .*?: (?P<value>'.*')", "an integer"),
  (r"could not convert string to float: (?P<value>'.*')", "a number"),
  (
    r"Could not find valid parse for arguments: \[(?P<value>.*?)\]",
    "values of the kind that --help shows",
  ),
  (
    r"no type matching (?P<kinds>.+?) could be .* from \[(?P<value>.*?)\]\.",
    "",
  ),
)

_Args = TypeVar("_Args", bound=Any)


def parse(
  kind: type[_Args],
  prog: str,
  args: list[str],
  default: _Args | None = None,
  elsewhere: Callable[[str], str] = lambda _: "",
) -> _Args:
  """Return the arguments of a verb, parsed. `--help` prints and exits.

  Args:
    kind: a dataclass.
    prog: the words of the command before the arguments.
    args: the arguments.
    default: an instance, whose values the options change. None: `kind` has
      the defaults.
    elsewhere: is called with an unknown option, and returns where it does
      exist, as a clause of the message, or nothing.

  Raises:
    ValueError: an option is unknown or missing, or its value is wrong.
  """
  given = {} if default is None else {"default": default}
  boxed = io.StringIO()
  try:
    with contextlib.redirect_stderr(boxed):
      parsed, unknown = tyro.cli(
        kind, prog=prog, args=args, return_unknown_args=True, **given
      )
  except SystemExit as stop:
    if not stop.code:  # --help
      raise
    message = _wrong_value(boxed.getvalue())
    raise ValueError(as_options(message, _options(kind, prog, given))) from stop
  except ValueError as error:
    message = as_options(str(error), _options(kind, prog, given))
    raise ValueError(message) from error
  if unknown:
    options = _options(kind, prog, given)
    raise ValueError(_unknown(unknown, args, options, prog, elsewhere))
  return parsed


def as_options(message: str, options: list[str]) -> str:
  """Return a message with the names of options instead of those of fields.

  `data.vocab_size=64` becomes `--data.vocab-size=64` if there is that option,
  and so does the field of a change, as `data.vocab_size: 64 → 32`.

  Args:
    message: of an error.
    options: as they are typed, such as "--steps".
  """
  known = set(options)

  def name(match: re.Match[str]) -> str:
    option = f"--{match[1].replace('_', '-')}"
    return option if option in known else match[0]

  value = r"(?==|: [^;:]* → )"
  return re.sub(rf"(?<![\w.-])([A-Za-z_][\w.]*){value}", name, message)


@contextlib.contextmanager
def naming_options(config: Any) -> Iterator[None]:
  """Name options instead of fields in a ValueError from inside the context.

  Args:
    config: an instance of the dataclass that the options are made from.

  Raises:
    ValueError: one was raised inside.
  """
  try:
    yield
  except ValueError as error:
    raise ValueError(as_options(str(error), option_names(config))) from error


def option_names(config: Any, prefix: str = "--") -> list[str]:
  """Return the options of a dataclass and of the dataclasses in it.

  Args:
    config: an instance.
    prefix: stands before each name.
  """
  found = []
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    name = prefix + field.name.replace("_", "-")
    if dataclasses.is_dataclass(value):
      found += option_names(value, f"{name}.")
    else:
      found.append(name)
  return found


def nearest(option: str, options: list[str]) -> list[str]:
  """Return the options that are most like an unknown one, the best first.

  Args:
    option: the unknown one, as it is typed.
    options: those that exist.
  """
  typed = option.lstrip("-").replace("_", "-")
  last = typed.rpartition(".")[2]
  ours = {last, *(x for x, names in _SYNONYMS.items() if last in names)}
  same = [
    x for x in options if any(f".{x[2:]}".endswith(f".{y}") for y in ours)
  ]
  alike = difflib.get_close_matches(f"--{typed}", options, _SHOWN, 0.7)
  return list(dict.fromkeys(same + alike))[:_SHOWN]


def _unknown(
  words: list[str],
  args: list[str],
  options: list[str],
  prog: str,
  elsewhere: Callable[[str], str],
) -> str:
  """Return the message about words that are no options of a verb."""
  names = [x.partition("=")[0] for x in words if x.startswith("-")]
  if not names:
    hint = _hint_about_value(words[0], args, options)
    return (
      f"{words[0]!r} is one argument too many{hint}; `{prog} --help` shows "
      "what is expected"
    )
  lines = []
  for name in names:
    hint = elsewhere(name)
    near = nearest(name, options)
    if near and not hint:
      hint = f"; did you mean {' or '.join(near)}?"
    lines.append(f"there is no option {name}{hint}")
  return "\n".join([*lines, f"`{prog} --help` shows the options"])


def _hint_about_value(word: str, args: list[str], options: list[str]) -> str:
  """Return how a word is written that belongs to no option, or nothing."""
  name, equals, _ = word.partition("=")
  if equals and (near_names := nearest(f"--{name}", options)):
    return f"; did you mean {near_names[0]}{word[len(name) :]}?"
  before = args[args.index(word) - 1] if word in args[1:] else ""
  place, _, last = before.removeprefix("--").rpartition(".")
  opposite = f"--{place}.no-{last}" if place else f"--no-{last}"
  if opposite in options:
    return f": {before} takes no value, and {opposite} is its opposite"
  return ""


def _wrong_choice(value: str, option: str, listed: str) -> str:
  """Return the message about a value that is none of an option's choices."""
  # tyro lists them in no order.
  choices = sorted(re.findall(r"'([^']*)'", listed))
  hint = near(value, choices)
  shown = ", ".join(repr(x) for x in choices if x != "None")
  unset = "None or " if "None" in choices else ""
  return f"{option}={value!r}: expected {unset}one of ({shown}){hint}"


def _name_kinds(text: str) -> str:
  """Return tyro's `{None}|INT|{best}` as `None, an integer or best`."""
  names = {
    "INT": "an integer",
    "FLOAT": "a number",
    "STR": "a text",
    "[INT [INT ...]]": "integers",
    "[STR [STR ...]]": "texts",
  }
  plain = [x.strip("{}") for x in text.split("|")]
  kinds = [names.get(x, x) for x in plain]
  return " or ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]]))


def _options(kind: type, prog: str, given: dict[str, Any]) -> list[str]:
  """Return the options of a verb as its help names them."""
  text = io.StringIO()
  with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
    tyro.cli(kind, prog=prog, args=["--help"], **given)
  # An option is followed by the kind of its value, or by its opposite. One that
  # a description names is not.
  kind_of_value = r"(?= \{| \[| [A-Z]{3}|, --\S*no-)"
  names = re.findall(
    rf"(?<![\w-])--[A-Za-z][\w.-]+{kind_of_value}|(?<=, )--\S*no-[\w-]+",
    text.getvalue(),
  )
  return list(dict.fromkeys(names))


def _wrong_value(text: str) -> str:
  """Return tyro's message about a wrong or missing value in one line."""
  plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
  rows = [row.strip("│ ") for row in plain.splitlines()]
  # A title, a message, an explanation. In ASCII a line parts the first two, and
  # otherwise the title is in the frame.
  if rows and rows[0].startswith("╭"):
    rows[0] = "─" * 10
  parts = re.split(r"[─-]{10,}", " ".join(rows))
  words = " ".join(parts[min(1, len(parts) - 1)].split())
  if words.startswith("Missing from"):
    named = words.partition(": ")[2].split(" (required)")
    return "missing: " + "; ".join(x.strip() for x in named if x.strip())
  if missing := re.match(r"Missing value for argument '(\S+)'", words):
    return f"{missing[1]}: expected a value after it"
  if choice := _CHOICE.match(words):
    return _wrong_choice(*choice.groups())
  if not words.startswith("Error parsing"):
    return words
  where, _, message = words.removeprefix("Error parsing ").partition(": ")
  if where.startswith("-"):
    for pattern, kind in _KINDS:
      if found := re.match(pattern, message):
        value, expected = found["value"], kind or _name_kinds(found["kinds"])
        return f"{where}={value}: expected {expected}"
    return f"{where}: {message}"
  # A nested config names its class, not its place: ModelConfig.dtype='x'.
  place = re.sub(r"^run\.?", "", where)
  return re.sub(
    r"^(?:[A-Z]\w*\.)?(?=\w+=)", f"{place}." if place else "", message
  )
