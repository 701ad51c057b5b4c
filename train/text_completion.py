"""Complete a prompt with a run's language model.

tokens = tokenizer(prompt)        the tokenizer of the run's data set
tokens ← tokens, token            one by one, by `rebased_jax.generation`
text   = the decoded tokens, up to the end of the document or a stop string
"""

from collections.abc import Iterator
import dataclasses
from pathlib import Path
from typing import Any

from etils import epath
import jax
import numpy as np

from rebased_jax import LM, ModelConfig, generation, model_files
from rebased_jax.config_checks import is_positive_integer
from rebased_jax.field_types import fits
from rebased_jax.which_weights import Weights
from train.checkpoint.checkpoints import NoCheckpointError, read_meta
from train.config import RunConfig, TextData
from train.data.batches import Fingerprint
from train.data.checks import require
from train.data.prepare import tokenizer as tokenizer_lib
from train.data.prepare.tokenizer import (
  ByteTokenizer,
  FileTokenizer,
  Tokenizer,
)
from train.data.text.prepared_source import read_sidecar
from train.records.run_folder import RunFolder, RunFolderError

#: New tokens between two parts of a text that is shown as it is made.
_BLOCK = 4
#: How bytes are decoded that are no UTF-8, or not yet.
_REPLACEMENT = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the tokens of a completion are chosen.

  Attributes:
    tokens: the largest number of new tokens, 1 or more.
    temperature: 0 takes the most likely token; above 0, sample from
      softmax(logits / temperature).
    top_k: sample from this many of the most likely tokens; None for all.
    top_p: sample from the fewest likeliest tokens with at least this
      probability; None for all.
    seed: the seed of the samples; the same seed gives the same tokens.
    stop: strings that end the text. The text does not have them.

  Raises:
    ValueError: a field is outside its range.
  """

  tokens: int = 200
  temperature: float = 0.8
  top_k: int | None = None
  top_p: float | None = None
  seed: int = 0
  stop: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    some = is_positive_integer(self.tokens)
    require(some, "tokens", self.tokens, "an integer ≥ 1")
    known = 0 <= self.temperature < float("inf")
    require(known, "temperature", self.temperature, "a number ≥ 0")
    some = self.top_k is None or is_positive_integer(self.top_k)
    require(some, "top_k", self.top_k, "None or an integer ≥ 1")
    most = self.top_p is None or 0 < self.top_p <= 1
    require(most, "top_p", self.top_p, "None or a probability in (0, 1]")
    for name, value in (("top_k", self.top_k), ("top_p", self.top_p)):
      samples = self.temperature > 0 or value is None
      require(samples, name, value, "None with temperature=0")
    require("" not in self.stop, "stop", self.stop, "strings that have text")
    seed = fits(self.seed, int) and 0 <= self.seed < 2**31
    require(seed, "seed", self.seed, "an integer, 0 to 2³¹ − 1")


@dataclasses.dataclass(frozen=True)
class ModelSource:
  """Which checkpoint and which tokenizer of a run are used.

  Attributes:
    step: the step of the checkpoint; None for the newest.
    tokenizer: for `tokenizer.load`; None for the copy in the data set.
    eos: for `tokenizer.load`, with a `tokenizer`.
    weights: "trained", or "ema" for the average of a run that keeps one.

  Raises:
    ValueError: `eos` is given without a tokenizer.
  """

  step: int | None = None
  tokenizer: str | None = None
  eos: str = "auto"
  weights: Weights = "trained"

  def __post_init__(self) -> None:
    known = self.eos == "auto" or self.tokenizer is not None
    require(known, "eos", self.eos, "'auto', or a tokenizer that has the token")


def complete(
  run_dir: epath.PathLike,
  prompt: str,
  sampling: Sampling,
  source: ModelSource = ModelSource(),
) -> str:
  """Return a prompt and its completion; see `stream`."""
  return "".join(stream(run_dir, prompt, sampling, source))


def stream(
  run_dir: epath.PathLike,
  prompt: str,
  sampling: Sampling,
  source: ModelSource = ModelSource(),
) -> Iterator[str]:
  """Yield a prompt and its completion in parts, as the model makes it.

  A part never ends inside a character, nor in what may become a stop string.

  Args:
    run_dir: the folder of a run on text, or an exported model.
    prompt: the text to complete.
    sampling: how tokens are chosen.
    source: which checkpoint and tokenizer are used.

  Raises:
    ValueError: the folder is not that of a language model's run on text, its
      tokenizer is missing or has changed, or the prompt is empty or too long.
    CheckpointError: there is no such checkpoint, or it is unreadable.
  """
  require(bool(prompt), "prompt", prompt, "some text")
  config, tokenizer, eos = read_text_model(run_dir, source)
  V = config.vocab_size
  if sampling.top_k is not None:
    k = sampling.top_k
    require(k <= V, "top_k", k, f"at most the {V} tokens")
  prompt_T = encode(tokenizer, prompt)
  _check_length(config, len(prompt_T), sampling.tokens)
  model = model_files.load(run_dir, source.step, weights=source.weights)
  before = len(tokenizer.decode(prompt_T))
  tokens, text, shown, ended = list(prompt_T), "", 0, False
  for new in sample(model, prompt_T, sampling, eos):
    ended = eos in new
    tokens += new[: new.index(eos)] if ended else new
    text = tokenizer.decode(np.array(tokens))
    ends = [text.find(stop, before) for stop in sampling.stop]
    if found := [end for end in ends if end >= 0]:
      text, ended = text[: min(found)], True
    part = text if ended else _settled(text, sampling.stop)
    if len(part) > shown:
      yield part[shown:]
      shown = len(part)
    if ended:
      return
  if len(text) > shown:
    yield text[shown:]


def read_text_model(
  run_dir: epath.PathLike, source: ModelSource = ModelSource()
) -> tuple[ModelConfig, Tokenizer, int | None]:
  """Return a model's config, its tokenizer, and the token that ends a document.

  Args:
    run_dir: the folder of a run on text, or an exported model.
    source: which checkpoint and tokenizer are used.

  Raises:
    ValueError: the folder is not that of a language model's run on text, its
      tokenizer is missing or has changed, or the model lacks tokens of it.
    CheckpointError: there is no such checkpoint, or it is unreadable.
  """
  if model_files.is_exported(run_dir):
    config, tokenizer, eos = _read_export(run_dir, source)
  else:
    run, data, meta = read_run(run_dir, source.step)
    config = run.model
    tokenizer, eos = find_tokenizer(data, meta["data"], source)
  V, needed = config.vocab_size, tokenizer.spec.vocab_size
  expected = f"at least {needed}, the tokens of {tokenizer.spec.name}"
  require(needed <= V, "model.vocab_size", V, expected)
  return config, tokenizer, eos


def sample(
  model: LM, prompt_T: np.ndarray, sampling: Sampling, eos: int | None
) -> Iterator[list[int]]:
  """Yield the tokens that a model adds to a prompt, some at a time.

  Args:
    model: the language model.
    prompt_T: the tokens of the prompt (T,).
    sampling: how tokens are chosen.
    eos: the token that ends the text, which is yielded too. None: no token.
  """
  blocks = generation.stream(
    model,
    [prompt_T.astype(np.int32)],
    steps=sampling.tokens,
    temperature=sampling.temperature,
    top_k=sampling.top_k,
    top_p=sampling.top_p,
    key=jax.random.key(sampling.seed),
    stop_tokens=() if eos is None else (eos,),
    block=_BLOCK,
  )
  for tokens_1S in blocks:
    yield tokens_1S[0].tolist()


def _settled(text: str, stops: tuple[str, ...]) -> str:
  """Return the beginning of a text that no later token can change."""
  text = text.rstrip(_REPLACEMENT)
  held = [
    length
    for stop in stops
    for length in range(1, len(stop))
    if text.endswith(stop[:length])
  ]
  return text[: len(text) - max(held, default=0)]


def encode(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
  """Return the tokens of a prompt (T,); ValueError if it has none."""
  try:
    (tokens_T,) = tokenizer.encode([prompt])
  except ValueError as error:
    raise ValueError(f"prompt={prompt!r}: {error}") from error
  expected = f"text that {tokenizer.spec.name} has tokens for"
  require(len(tokens_T) > 0, "prompt", prompt, expected)
  return tokens_T


def find_tokenizer(
  data: TextData,
  fingerprint: Fingerprint,
  source: ModelSource = ModelSource(),
) -> tuple[Tokenizer, int | None]:
  """Return a run's tokenizer, and the token that ends a document, if any.

  Args:
    data: the data of the run.
    fingerprint: the fingerprint of its data, from its checkpoint.
    source: may name another copy of the tokenizer.

  Raises:
    ValueError: the data set or its tokenizer is missing or has changed; or the
      format of the data has no tokenizer, and `source` names none.
  """
  recorded = recorded_tokenizers(fingerprint)
  if source.tokenizer is not None:
    tokenizer = tokenizer_lib.load(source.tokenizer, source.eos)
    for sha256 in recorded:
      tokenizer_lib.check_same(tokenizer, sha256, source.tokenizer)
    return tokenizer, tokenizer.spec.eos
  tokenizer = ByteTokenizer()
  if recorded == {tokenizer.spec.sha256}:
    return tokenizer, tokenizer.spec.eos
  if not recorded:
    raise ValueError(
      f"{', '.join(data.path)}: Megatron's format names no tokenizer: expected "
      "--tokenizer, the tokenizer.json that made the tokens"
    )
  # All data sets of a run have the same tokenizer: take the first copy.
  folder = next(Path(x) for x in data.path if not x.endswith(".idx"))
  try:
    sidecar = read_sidecar(folder)
    tokenizer = tokenizer_lib.load_recorded(folder, sidecar["tokenizer"])
    for sha256 in recorded:
      tokenizer_lib.check_same(tokenizer, sha256, str(folder))
  except ValueError as error:
    hint = "; --tokenizer names one that lies elsewhere"
    raise ValueError(f"{error}{hint}") from error
  return tokenizer, sidecar.get("eos")


def recorded_tokenizers(fingerprint: Fingerprint) -> set[str]:
  """Return the SHA-256 of the tokenizers that made a run's data.

  It is empty where the format of the data names no tokenizer.
  """
  return {
    str(value)
    for field, value in fingerprint.items()
    if field.rpartition(".")[2] == "tokenizer"
  }


def read_run(
  run_dir: epath.PathLike, step: int | None = None
) -> tuple[RunConfig, TextData, dict[str, Any]]:
  """Return a run's config, its data, and the record of a checkpoint.

  Args:
    run_dir: the run's folder.
    step: the checkpoint's step. None: the newest.

  Raises:
    ValueError: the folder is not that of a run on text.
    CheckpointError: there is no such checkpoint, or it is unreadable.
  """
  folder = RunFolder(run_dir)
  config = folder.read_config()
  if not isinstance(config.data, TextData):
    raise ValueError(
      f"{run_dir}: its data is {type(config.data).__name__}: expected a "
      "language model's run, trained on text"
    )
  folder.check_checkpoints()
  try:
    _, meta = read_meta(folder.checkpoints, step, run=folder.run_id())
    return config, config.data, meta
  except NoCheckpointError as error:
    raise RunFolderError(f"{run_dir}: no checkpoint yet") from error


def _read_export(
  folder: epath.PathLike, source: ModelSource
) -> tuple[ModelConfig, Tokenizer, int | None]:
  """Return an exported model's config, its tokenizer, and the end of a text."""
  info = model_files.read_info(folder)
  if source.tokenizer is not None:
    tokenizer = tokenizer_lib.load(source.tokenizer, source.eos)
    if info.tokenizer is not None and info.tokenizer.sha256 is not None:
      sha256, name = info.tokenizer.sha256, source.tokenizer
      tokenizer_lib.check_same(tokenizer, sha256, name)
    return info.config, tokenizer, tokenizer.spec.eos
  if info.tokenizer is None:
    raise ValueError(
      f"{folder} has no tokenizer: expected --tokenizer, 'bytes' or the "
      "tokenizer.json that made the model's tokens"
    )
  if info.tokenizer.type == "bytes":
    return info.config, ByteTokenizer(), info.tokenizer.eos
  model_files.read_tokenizer(folder)  # checks that it is the one exported
  path = epath.Path(folder) / model_files.TOKENIZER
  return info.config, FileTokenizer(str(path), "none"), info.tokenizer.eos


def _check_length(config: ModelConfig, prompt: int, tokens: int) -> None:
  """Raise ValueError if the text is longer than the learned positions."""
  P = config.positions
  # The last new token is predicted, but never read.
  if P is not None and prompt + tokens - 1 > P:
    raise ValueError(
      f"the prompt has {prompt} tokens, and tokens={tokens} more: expected at "
      f"most {P} tokens with its completion (model.positions={P})"
    )
