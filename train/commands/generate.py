"""`rebased generate RUN`: complete a prompt with a run's language model.

The text is printed as the model makes it.
"""

import dataclasses

from rebased_jax.which_weights import Weights
from train.commands.arguments import (
  RunArg,
  StepArg,
  check_model_is_there,
)
from train.commands.parsing import parse
from train.data.checks import require


@dataclasses.dataclass(frozen=True)
class GenerateArgs:
  """Print a prompt and its completion by a run's language model."""

  #: The run's folder, or an exported model.
  run_dir: RunArg
  #: The text to complete. Write --prompt=-x if it begins with a dash.
  prompt: str
  #: The largest number of new tokens. The end of a document ends the text
  #: earlier.
  tokens: int = 200
  #: Sample from softmax(logits / temperature); 0 takes the most likely token.
  temperature: float = 0.8
  #: Sample from this many of the most likely tokens. None: from all.
  top_k: int | None = None
  #: Sample from the fewest most likely tokens that together have at least this
  #: probability. None: from all.
  top_p: float | None = None
  #: The seed of the samples; the same seed gives the same text.
  seed: int = 0
  #: Strings that end the text. They are not printed.
  stop: tuple[str, ...] = ()
  #: The step of the checkpoint. "best": the best by the run's --keep-best, or
  #: by the held-out loss if it has none. None: the newest.
  step: StepArg = None
  #: The weights: trained, or ema for the average of a run with --ema.
  weights: Weights = "trained"
  #: "bytes", a tokenizer.json, or a folder that holds one. None: the copy in
  #: the data set or the exported model.
  tokenizer: str | None = None
  #: The token of --tokenizer that ends a document.
  eos: str = "auto"


def run(args: list[str]) -> int:
  """Run the verb and return the exit code.

  Args:
    args: the arguments after the verb.

  Raises:
    ValueError: an argument is wrong, or the run is not a language model's.
    CheckpointError: there is no such checkpoint, or it is unreadable.
  """
  parsed = parse(GenerateArgs, "rebased generate", args)
  require(bool(parsed.prompt), "prompt", parsed.prompt, "some text")
  check_model_is_there(parsed.run_dir)
  # Imported when the options are right: jax takes seconds.
  from train import best_checkpoint, text_completion
  from train.devices import backend
  from train.heartbeat import on_stderr
  from train.watchdog import Watchdog

  backend.devices()  # says so if there are none
  sampling = text_completion.Sampling(
    tokens=parsed.tokens,
    temperature=parsed.temperature,
    top_k=parsed.top_k,
    top_p=parsed.top_p,
    seed=parsed.seed,
    stop=parsed.stop,
  )
  step = best_checkpoint.find(parsed.run_dir, parsed.step)
  source = text_completion.ModelSource(
    step, parsed.tokenizer, parsed.eos, parsed.weights
  )
  parts = text_completion.stream(
    parsed.run_dir, parsed.prompt, sampling, source
  )
  watch = Watchdog()
  watch.beat("reading the model and compiling")
  with on_stderr(watch.doing):
    first = next(parts, "")
  print(first, end="", flush=True)
  for part in parts:
    print(part, end="", flush=True)
  print()
  return 0
