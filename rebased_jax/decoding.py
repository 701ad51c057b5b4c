"""Read and write tokens part by part, with a state for the tokens before.

    logits, state = model.prefill(tokens, model.init_state(B))    T tokens
    logits, state = model.step(token, state)                      one more token

The state has the mixers' states. Its size does not depend on the number of
tokens, except in mixers that say so, such as softmax attention.
"""

import abc
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import ShardAxes
from pallas_kernels.arguments import check_integers
from rebased_jax import blocks
from rebased_jax.dropout import DropsInTraining
from rebased_jax.explicit_mesh import layouts, method_on_any_mesh
from rebased_jax.integers import integer_rows, power_of_two, to_int32
from rebased_jax.layer_norm import LayerNorm
from rebased_jax.mixers.attention import Attention
from rebased_jax.mixers.base import Mixer


class LMState(NamedTuple):
  """The past of each row of an `LM`."""

  position_B: Array  # int32, the position of the next token
  pairs: Any  # the mixers' states, stacked over the pairs


def _state_outputs(state: LMState) -> LMState:
  """Return the axes of a state: rows split as the tokens' rows are."""
  pairs = jax.tree.map(lambda x: "NB"[: x.ndim], state.pairs)
  return LMState("B", pairs)  # pyrefly: ignore[bad-argument-type] a tree of str


def _prefill_outputs(arguments: dict[str, Any]) -> tuple[str, LMState]:
  """Return the axes of what `prefill` returns."""
  logits = "BT" if arguments.get("all_positions") else "B"
  return logits, _state_outputs(arguments["state"])


class Decoder(DropsInTraining):
  """Abstract: what a language model does with a state.

  A subclass sets `pairs` and `norm`, and defines `_embed`, `_positions` and
  `head`.
  """

  pairs: blocks.Pair
  norm: LayerNorm

  @abc.abstractmethod
  def _embed(self, tokens_BT: Array, position_BT: Array | None = None) -> Array:
    """Return the residual stream before the first block, (B, T, D).

    Args:
      tokens_BT: int32.
      position_BT: int32. None: 0 to T − 1.
    """

  @abc.abstractmethod
  def _positions(
    self,
    tokens_BT: Array,
    segment_ids: Array | None,
    start_B: Array | None = None,
  ) -> Array:
    """Return the position of each token.

    Args:
      tokens_BT: int32.
      segment_ids: integers (B, T). None: one document a row.
      start_B: int32, the position of each row's first token. None: 0.
    """

  @abc.abstractmethod
  def head(self, x_D: Array) -> Array:
    """Return logits (…, V) of LN(x) (…, D)."""

  @property
  def mixers(self) -> tuple[Mixer, Mixer]:
    """The two mixers, whose parameters are stacked over the pairs."""
    return self.pairs.first.mixer, self.pairs.second.mixer

  def init_state(self, batch: int) -> LMState:
    """Return the state of `batch` rows before their first token."""
    states = blocks.init_states(self.pairs, batch)
    return LMState(jnp.zeros(batch, jnp.int32), states)

  @method_on_any_mesh("BT", _prefill_outputs)
  def prefill(
    self,
    tokens: Array,
    state: LMState,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
    all_positions: bool = False,
  ) -> tuple[Array, LMState]:
    """Return the logits (B, V) after T more tokens, and the state there.

    A text of any length can so be read in parts, each with the state of the
    part before.

    Args:
      tokens: integers (B, T).
      state: the state after the tokens before, or `init_state(B)`.
      segment_ids: integers (B, T), as in a call.
      axes: the mesh axes. None: no mesh.
      all_positions: return the logits (B, T, V) after each of the tokens.

    Raises:
      ValueError: T is larger than the position table, or a shape does not fit.
    """
    x_BTD, state = self._prefill(tokens, state, segment_ids, axes)
    x = x_BTD if all_positions else x_BTD[:, -1]
    return self.head(self.norm(x)), state

  @method_on_any_mesh(
    "BT", lambda given: ("BT", _state_outputs(given["state"]))
  )
  def prefill_features(
    self,
    tokens: Array,
    state: LMState,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
  ) -> tuple[Array, LMState]:
    """Return LN(x), (B, T, D), of T more tokens, and the state there.

    `head`, or a loss that makes few logits at a time, takes LN(x). The
    arguments are those of `prefill`.
    """
    x_BTD, state = self._prefill(tokens, state, segment_ids, axes)
    return self.norm(x_BTD), state

  @method_on_any_mesh("B", lambda given: ("B", layouts(given["state"])))
  def step(self, tokens: Array, state: LMState) -> tuple[Array, LMState]:
    """Return the logits (B, V) after one more token in each row, and the state.

    Logits of a token past the position table are NaN.

    Args:
      tokens: integers (B,).
      state: the state after the tokens before, or `init_state(B)`.
    """
    check_integers("tokens", tokens)
    if tokens.ndim != 1 or tokens.shape[0] == 0:
      raise ValueError(f"tokens has shape {tokens.shape}: expected (B,), B > 0")
    x_B1D = self._embed(to_int32(tokens)[:, None], state.position_B[:, None])
    x_BD, states = blocks.step_pairs(self.pairs, x_B1D[:, 0], state.pairs)
    return self.head(self.norm(x_BD)), LMState(state.position_B + 1, states)

  def state_size(self, length: int) -> int:
    """Return the bytes of state that a row of `length` tokens holds."""
    position = jnp.dtype(jnp.int32).itemsize
    return position + blocks.state_size(self.pairs, length)

  def _prefill(
    self,
    tokens: Array,
    state: LMState,
    segment_ids: Array | None,
    axes: ShardAxes | None,
  ) -> tuple[Array, LMState]:
    """Return the residual stream of T more tokens, and the state there."""
    tokens = integer_rows("tokens", tokens)
    position_BT = self._positions(tokens, segment_ids, state.position_B)
    x_BTD, states = blocks.prefill_pairs(
      self.pairs,
      self._embed(tokens, position_BT),
      state.pairs,
      segment_ids=segment_ids,
      axes=axes,
    )
    return x_BTD, LMState(position_BT[:, -1] + 1, states)


def enlarge_caches(model: Decoder, tokens: int) -> None:
  """Give the caches of a model's attention room for rows of so many tokens.

  States that exist already do not fit the model after that. A cache that is
  made longer has a power of two of tokens.

  Args:
    model: the language model, which is changed.
    tokens: tokens of the longest row.
  """
  for mixer in model.mixers:
    if not isinstance(mixer, Attention):
      continue
    if mixer.length is None or mixer.length < tokens:
      mixer.length = power_of_two(tokens)
