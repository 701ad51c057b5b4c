"""Models for lm-evaluation-harness, under its name "rebased".

    import lm_eval
    from train.harness import RebasedLM

    lm_eval.simple_evaluate(model=RebasedLM("runs/mine"), tasks=["lambada"])

The harness asks for three things, which `rebased_jax` computes:

    loglikelihood          log p(continuation | context), and whether it is
                           greedy
    loglikelihood_rolling  log p(text), after the end-of-text token
    generate_until         tokens after a context, up to a stop string

A model with a recurrent state reads a text of any length at once. One with
learned positions reads windows of its length, as the harness does for
Transformers. `rebased lm-eval` runs the harness's command with this class.
"""

from collections.abc import Iterator, Sequence
import itertools
import logging
from typing import Any, NamedTuple

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
  normalize_gen_kwargs,
  postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
import numpy as np
from tqdm import tqdm

from rebased_jax import evaluate, generation, model_files
from rebased_jax.config_checks import is_positive_integer
from rebased_jax.which_weights import Weights
from train import best_checkpoint, text_completion
from train.best_checkpoint import Step
from train.data.checks import require
from train.text_completion import ModelSource

_log = logging.getLogger(__name__)

#: Batches between two updates of the progress bar and of the harness's cache.
_BATCHES = 32
#: New tokens between two looks for a stop string.
_BLOCK = 16
#: What generation reads of a task's options, beside its length and stops.
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p")


class _Scored(NamedTuple):
  """Tokens whose log-likelihood is asked for."""

  context: list[int]  # one or more
  continuation: list[int]


@register_model("rebased")
class RebasedLM(TemplateLM):
  """A run's language model, or an exported one, for the harness.

  Args:
    run: the folder of a run on text, or of an exported model.
    step: the step of the run's checkpoint, or "best". None: the newest.
    tokenizer: "bytes", or a tokenizer.json. None: the copy in the data set or
      the exported model.
    eos: the token of `tokenizer` that ends a document.
    batch_size: texts that run at a time. "auto" means 8.
    piece: the most tokens of a text that run at a time.
    max_length: the most tokens of a text, with the predicted ones. None: as
      many as the model can read.
    max_gen_toks: new tokens, where a task does not say how many.
    seed: the seed of sampled tokens.
    weights: "trained", or "ema" for the average of a run that keeps one.
    max_batch_size: not used; the harness passes it on.
    device: not used: JAX_PLATFORMS chooses the devices.

  Raises:
    ValueError: an argument does not fit, or the folder has no language model.
    CheckpointError: there is no such checkpoint, or it is unreadable.
  """

  def __init__(
    self,
    run: str,
    step: Step = None,
    tokenizer: str | None = None,
    eos: str = "auto",
    batch_size: int | str = 8,
    piece: int = 1024,
    max_length: int | None = None,
    max_gen_toks: int = 256,
    seed: int = 0,
    weights: Weights = "trained",
    max_batch_size: int | None = None,
    device: str | None = None,
  ) -> None:
    super().__init__()
    rows = 8 if batch_size == "auto" else batch_size
    if isinstance(rows, str) and rows.isdecimal():
      rows = int(rows)
    expected = "a number of texts, or 'auto'"
    require(is_positive_integer(rows), "batch_size", batch_size, expected)
    # The harness always gives a device, "cuda:0" by default.
    del device, max_batch_size
    step = best_checkpoint.find(run, step)
    source = ModelSource(step, tokenizer, eos)
    _, self._tokens, self._eos = text_completion.read_text_model(run, source)
    self.model = model_files.load(run, step, weights=weights)
    self.batch_size, self.piece = int(rows), piece
    limits = (max_length, evaluate.longest_text(self.model))
    self.max_length = min((x for x in limits if x is not None), default=None)
    self.max_gen_toks, self.seed = max_gen_toks, seed
    self._generated = 0  # texts, each of which has its own key

  @property
  def eot_token_id(self) -> int:
    """The token that ends a document, and comes before an empty context."""
    if self._eos is None:
      raise ValueError(
        "the model's tokenizer has no token that ends a document: expected "
        "one, because the harness predicts text that nothing comes before"
      )
    return self._eos

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """Return the tokens of a text, without any that are added around it."""
    del add_special_tokens, kwargs
    return self._tokens.encode([string])[0].tolist()

  def loglikelihood_rolling(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Return log p of each text, after the end-of-text token."""
    windows: list[_Scored] = []
    owners: list[int] = []
    for i, request in enumerate(requests):
      tokens = self.tok_encode(request.args[0])
      found = get_rolling_token_windows(
        tokens,
        prefix_token=self.eot_token_id,
        max_seq_len=(self.max_length or len(tokens) + 1) - 1,
        context_len=1,
      )
      windows += [_Scored(*make_disjoint_window(x)) for x in found]
      owners += [i] * (len(windows) - len(owners))
    totals = [0.0] * len(requests)
    for i, (total, _) in self._score(windows, disable_tqdm):
      totals[owners[i]] += total
    for request, total in zip(requests, totals, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
    return totals

  def _loglikelihood_tokens(
    self,
    requests: list[tuple[tuple[str, str], list[int], list[int]]],
    disable_tqdm: bool = False,
    **kwargs: Any,
  ) -> list[tuple[float, bool]]:
    del kwargs
    texts = [
      self._fit(_Scored(context or [self.eot_token_id], continuation))
      for _, context, continuation in requests
    ]
    found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
    for i, result in self._score(texts, disable_tqdm):
      found[i] = result
      self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
    return found

  def generate_until(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[str]:
    """Return the text after each context, up to a stop string."""
    options = [
      normalize_gen_kwargs(dict(x.args[1]), self.max_gen_toks) for x in requests
    ]
    groups: dict[str, list[int]] = {}
    for i, option in enumerate(options):
      groups.setdefault(repr(sorted(option.items())), []).append(i)
    found = [""] * len(requests)
    with tqdm(total=len(requests), disable=disable_tqdm) as bar:
      for group in groups.values():
        # The contexts of a batch then have about one length.
        group.sort(key=lambda i: len(requests[i].args[0]), reverse=True)
        for first in range(0, len(group), self.batch_size):
          batch = group[first : first + self.batch_size]
          contexts = {i: requests[i].args[0] for i in batch}
          texts = self._generate(contexts, dict(options[batch[0]]))
          for i, text in zip(batch, texts, strict=True):
            found[i] = text
            self.cache_hook.add_partial(
              "generate_until", requests[i].args, text
            )
          bar.update(len(batch))
    self._generated += len(requests)
    return found

  def _score(
    self, texts: Sequence[_Scored], disable_tqdm: bool
  ) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Yield the number of each text, its log-likelihood, and if it is greedy.

    Long texts come first, so that texts of a batch have about one length.
    """

    def length(i: int) -> int:
      return len(texts[i].context) + len(texts[i].continuation)

    order = iter(sorted(range(len(texts)), key=length, reverse=True))
    with tqdm(total=len(texts), disable=disable_tqdm) as bar:
      while part := list(itertools.islice(order, self.batch_size * _BATCHES)):
        results = evaluate.loglikelihood(
          self.model,
          [np.array([*texts[i].context, *texts[i].continuation]) for i in part],
          starts=[len(texts[i].context) for i in part],
          rows=self.batch_size,
          piece=self.piece,
        )
        for i, result in zip(part, results, strict=True):
          yield i, (result.total, result.is_greedy)
        bar.update(len(part))

  def _fit(self, text: _Scored) -> _Scored:
    """Return a text whose context is cut on the left to what the model reads.

    Raises:
      ValueError: the continuation alone is too long.
    """
    if self.max_length is None:
      return text
    room = self.max_length - len(text.continuation)
    if room < 1:
      raise ValueError(
        f"a continuation of {len(text.continuation)} tokens: expected at most "
        f"{self.max_length - 1}, because the model reads {self.max_length} "
        "tokens with a context"
      )
    if len(text.context) > room:
      _log.warning(
        "a context of %d tokens is cut to its last %d", len(text.context), room
      )
    return text._replace(context=text.context[-room:])

  def _generate(
    self, contexts: dict[int, str], options: dict[str, Any]
  ) -> list[str]:
    """Return the texts after some contexts.

    Args:
      contexts: the texts before, by the numbers of their requests.
      options: `max_gen_toks`, `until`, and how tokens are chosen.

    Raises:
      ValueError: an option is unknown, or there is no room for new tokens.
    """
    steps, stops = options.pop("max_gen_toks"), options.pop("until")
    for name, value in options.items():
      expected = f"only max_gen_toks, until, {', '.join(_SAMPLING)}"
      require(name in _SAMPLING, name, value, expected)
    temperature = float(options.get("temperature", 0.0))
    samples = bool(options.get("do_sample")) and temperature > 0
    prompts = [self._prompt(context, steps) for context in contexts.values()]
    keys = None
    if samples:
      numbers = np.array(list(contexts)) + self._generated
      keys = jax.vmap(lambda i: jax.random.fold_in(self._key, i))(numbers)
    blocks = generation.stream(
      self.model,
      prompts,
      steps=steps,
      temperature=temperature if samples else 0.0,
      top_k=options.get("top_k") if samples else None,
      top_p=options.get("top_p") if samples else None,
      key=keys,
      block=_BLOCK,
    )
    tokens: list[list[int]] = [[] for _ in prompts]
    texts = [""] * len(prompts)
    ended = [False] * len(prompts)
    for tokens_BS in blocks:
      for row, new in enumerate(tokens_BS.tolist()):
        if not ended[row]:
          tokens[row] += new
          texts[row], ended[row] = self._text(tokens[row], stops)
      if all(ended):
        break
    return texts

  def _text(self, tokens: list[int], stops: list[str]) -> tuple[str, bool]:
    """Return the text of new tokens up to its end, and whether it has one."""
    ends = self._eos in tokens
    if ends:
      tokens = tokens[: tokens.index(self._eos)]
    whole = self._tokens.decode(tokens)
    text = postprocess_generated_text(whole, stops, None)
    return text, ends or text != whole

  def _prompt(self, context: str, steps: int) -> np.ndarray:
    """Return the tokens of a context, with room for new tokens after it."""
    tokens = self.tok_encode(context) or [self.eot_token_id]
    if self.max_length is not None:
      room = self.max_length - steps
      expected = f"at most {self.max_length - 1}, so that a context fits"
      require(room >= 1, "max_gen_toks", steps, expected)
      if len(tokens) > room:
        _log.warning(
          "a context of %d tokens is cut to its last %d", len(tokens), room
        )
      tokens = tokens[-room:]
    return np.array(tokens, np.int32)

  @property
  def _key(self) -> jax.Array:
    return jax.random.key(self.seed)
