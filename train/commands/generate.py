"""`rebased generate`: a prompt, and what a run's language model adds to it.

tokens = tokenizer(prompt)        as the run's data set was made
tokens ← tokens, token            one by one, `rebased_jax.generate`
text   = decoded up to the end of the document, where one is sampled
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from rebased_jax import LM, generate
from train import restore
from train.checkpoint.checkpoints import NoCheckpointError, read_meta
from train.config import RunConfig, TextData
from train.data.batches import Fingerprint
from train.data.checks import require
from train.data.prepare import tokenizer as tokenize
from train.data.prepare.tokenizer import ByteTokenizer, Tokenizer
from train.data.text.prepared_source import read_sidecar
from train.records.run_folder import RunFolder, RunFolderError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are chosen; ValueError where a field does not fit.

  Attributes:
    tokens: how many at most.
    temperature: 0 takes the likeliest; above, of softmax(logits / temperature).
    top_k: of the k likeliest alone.
    seed: the same seed, the same tokens.
  """

  tokens: int = 200
  temperature: float = 0.8
  top_k: int | None = None
  seed: int = 0

  def __post_init__(self) -> None:
    require(self.tokens >= 1, "tokens", self.tokens, "1 or more")
    known = 0 <= self.temperature < float("inf")
    require(known, "temperature", self.temperature, "a number ≥ 0")
    some = self.top_k is None or self.top_k >= 1
    require(some, "top_k", self.top_k, "1 or more, or None")
    greedy = self.top_k is not None and self.temperature == 0
    require(not greedy, "top_k", self.top_k, "None with temperature=0")
    require(0 <= self.seed < 2**31, "seed", self.seed, "0 to 2³¹ − 1")


@dataclasses.dataclass(frozen=True)
class Named:
  """What is taken in place of the run's newest and own.

  Attributes:
    step: of the checkpoint.
    tokenizer: a name for `tokenize.load`.
    eos: as `tokenize.load` takes it; of that tokenizer.
  """

  step: int | None = None
  tokenizer: str | None = None
  eos: str = "auto"

  def __post_init__(self) -> None:
    known = self.eos == "auto" or self.tokenizer is not None
    require(known, "eos", self.eos, "'auto', or a tokenizer with it")


def complete(
  run_dir: str, prompt: str, how: Sampling, named: Named = Named()
) -> str:
  """The prompt and its completion.

  Raises:
    ValueError: the folder is no run of a language model on text, its tokenizer
      is missing or has changed, or the prompt is empty or too long.
    CheckpointError: there is no such checkpoint, or it is unreadable.
  """
  require(bool(prompt), "prompt", prompt, "some text")
  config, meta = _read(run_dir, named.step)
  tokenizer, eos = find_tokenizer(config.data, meta["data"], named)
  V, found = config.model.vocab_size, tokenizer.spec.vocab_size
  expected = f"at least {found}, the tokens of {tokenizer.spec.name}"
  require(found <= V, "model.vocab_size", V, expected)
  if how.top_k is not None:
    require(how.top_k <= V, "top_k", how.top_k, f"at most the {V} tokens")
  prompt_T = encode(tokenizer, prompt)
  _check_length(config, len(prompt_T), how.tokens)
  model = restore.model(run_dir, named.step)
  completion_T = sample(model, prompt_T, how)
  if eos is not None:
    ends = np.flatnonzero(completion_T == eos)
    completion_T = completion_T[: ends[0]] if ends.size else completion_T
  return tokenizer.decode(np.concatenate([prompt_T, completion_T]))


def sample(model: LM, prompt_T: np.ndarray, how: Sampling) -> np.ndarray:
  """`how.tokens` tokens behind those of a prompt: int32."""
  return np.asarray(
    generate(
      model,
      prompt_T[None].astype(np.int32),
      steps=how.tokens,
      temperature=how.temperature,
      top_k=how.top_k,
      key=jax.random.key(how.seed),
    )[0]
  )


def encode(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
  """The tokens of a prompt; ValueError where it has none."""
  try:
    (tokens_T,) = tokenizer.encode([prompt])
  except ValueError as error:
    raise ValueError(f"prompt={prompt!r}: {error}") from error
  expected = f"text that {tokenizer.spec.name} has tokens for"
  require(len(tokens_T) > 0, "prompt", prompt, expected)
  return tokens_T


def find_tokenizer(
  data: TextData, fingerprint: Fingerprint, named: Named = Named()
) -> tuple[Tokenizer, int | None]:
  """The tokenizer of a run's data, and the token that ends a document.

  Args:
    data: of the run.
    fingerprint: of its data, as its checkpoint holds it.
    named: a tokenizer in place of the data set's own copy.

  Raises:
    ValueError: the data set or its tokenizer is gone, or is another one; or
      the data is of a format without tokenizers and none is named.
  """
  fields = fingerprint.items()
  recorded = {x for k, x in fields if k.rpartition(".")[2] == "tokenizer"}
  if named.tokenizer is not None:
    tokenizer = tokenize.load(named.tokenizer, named.eos)
    for sha256 in recorded:
      tokenize.check_same(tokenizer, sha256, named.tokenizer)
    return tokenizer, tokenizer.spec.eos
  if recorded == {(tokenizer := ByteTokenizer()).spec.sha256}:
    return tokenizer, tokenizer.spec.eos
  if not recorded:
    raise ValueError(
      f"{', '.join(data.path)}: Megatron's format names no tokenizer: expected "
      "--tokenizer, the tokenizer.json that made the tokens"
    )
  folder = next(Path(x) for x in data.path if not x.endswith(".idx"))
  try:
    sidecar = read_sidecar(folder)
    tokenizer = tokenize.load_recorded(folder, sidecar["tokenizer"])
    tokenize.check_same(tokenizer, *recorded, str(folder))
  except ValueError as error:
    hint = "; --tokenizer names one that lies elsewhere"
    raise ValueError(f"{error}{hint}") from error
  return tokenizer, sidecar.get("eos")


def _read(run_dir: str, step: int | None) -> tuple[RunConfig, dict]:
  """The config, and what a checkpoint says of itself."""
  folder = RunFolder(run_dir)
  config = folder.read_config()
  if not isinstance(config.data, TextData):
    raise ValueError(
      f"{run_dir}: its data is {type(config.data).__name__}: expected a "
      "language model's, trained on text"
    )
  try:
    return config, read_meta(folder.checkpoints, step)[1]
  except NoCheckpointError as error:
    raise RunFolderError(f"{run_dir}: no checkpoint yet") from error


def _check_length(config: RunConfig, prompt: int, tokens: int) -> None:
  """ValueError where the row is longer than the learned positions."""
  P = config.model.positions
  expected = f"at most {P} tokens with its completion (model.positions={P})"
  fits = P is None or prompt + tokens - 1 <= P
  size = f"{prompt} tokens, and tokens={tokens} more"
  if not fits:
    raise ValueError(f"the prompt has {size}: expected {expected}")
