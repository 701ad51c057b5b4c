"""Memories of documents: recurrent states that are added and subtracted.

    state(A) = Σ_{s in A} φ(k_s) v_sᵀ        of ReBased and Based
    merge:   state(A) + state(B)             both documents are known
    forget:  state(A ∪ B) − state(B)         B was never read

Read each document once, each from its beginning. A query then continues from
the sum of any of the states, as if it came after those documents, which do not
see each other:

    memories = memory.read(model, documents)
    about = memory.merge(model, [memories[0], memories[2]])
    answer = generate(model, question, steps=20, state=about)

Only a state that is a sum over tokens has such a sum. The states of mixers
have one of these rules (`Mixer.state_rule`):

    "sum"      ReBased, Based: added and subtracted
    "window"   short convolutions: the last tokens of one text. A result has
               the window of a text's beginning, so that a query starts anew
    None       RWKV, Mamba, Hyena, attention: refused

`LMState.position_B` counts the tokens that a memory holds. A learned position
says where in one text a token is, so that a model with a position table is
refused.

The sums are float32. Each merge or forget rounds to 6e-8 of the largest terms.
After a forget the error is relative to the sum before it: to forget nearly all
of a memory, merge what is left instead. A forgotten document with an Inf or NaN
leaves a NaN.
"""

from collections.abc import Callable, Iterable, Sequence
import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from pallas_kernels.arguments import name_type
from pallas_kernels.compile_once import keep_programs
from rebased_jax import tensor_files
from rebased_jax.config_checks import is_positive_integer
from rebased_jax.decoding import LMState
from rebased_jax.integers import check_vocabulary, power_of_two
from rebased_jax.mixers.base import Mixer
from rebased_jax.model import LM
from rebased_jax.model_files import by_name
from rebased_jax.tensor_files import WeightsError

#: The fewest tokens of a batch: shorter documents share one program.
_SHORTEST = 16


def read(
  model: LM,
  documents: Iterable[Any],
  *,
  rows: int = 8,
  piece: int = 1024,
) -> list[LMState]:
  """Return the state after each document, a row each.

  Documents of about one length run together. A document is padded on the left,
  as an earlier document that it does not see.

  Args:
    model: the language model.
    documents: integers (length,) each, in [0, V), of any lengths ≥ 1; or one
      array (N, length).
    rows: documents that run at a time.
    piece: the most tokens of a document that run at a time.

  Raises:
    ValueError: a document or an argument does not fit.
    NotImplementedError: states of the model cannot be added.
  """
  _check_model(model)
  for name, value in (("rows", rows), ("piece", piece)):
    if not is_positive_integer(value):
      raise ValueError(f"{name}={value!r}: expected an integer ≥ 1")
  checked = [_document(model, i, x) for i, x in enumerate(documents)]
  groups: dict[int, list[int]] = {}
  for i, tokens in enumerate(checked):
    groups.setdefault(_padded(len(tokens), piece), []).append(i)
  graph, params = nnx.split(model)
  start, run = _programs(graph, rows)
  found: list[LMState | None] = [None] * len(checked)
  for length, members in groups.items():
    for first in range(0, len(members), rows):
      batch = members[first : first + rows]
      tokens_BT = np.zeros((rows, length), np.int32)
      is_own_BT = np.zeros((rows, length), np.int32)
      for row, i in enumerate(batch):
        own = length - len(checked[i])
        tokens_BT[row, own:] = checked[i]
        is_own_BT[row, own:] = 1
      state = start(params)
      for at in range(0, length, piece):
        part = slice(at, at + piece)
        state = run(params, tokens_BT[:, part], is_own_BT[:, part], state)
      for row, i in enumerate(batch):
        pairs = jax.tree.map(lambda x, r=row: x[:, r : r + 1], state.pairs)
        count_1 = jnp.full(1, len(checked[i]), jnp.int32)
        found[i] = LMState(count_1, pairs)
  return [state for state in found if state is not None]


def merge(model: LM | Mixer, states: Sequence[Any]) -> Any:
  """Return the state that knows the documents of all states.

  Args:
    model: the language model, or the mixer, that made the states.
    states: states of `read`, `LM.prefill` or `Mixer.prefill`, of equal shapes.

  Raises:
    ValueError: there is no state, or a state is not one of the model.
    NotImplementedError: states of the model cannot be added.
  """
  if not states:
    raise ValueError("states is empty: expected at least one state")
  return _combine(model, jnp.add, list(states))


def forget(model: LM | Mixer, state: Any, *others: Any) -> Any:
  """Return a state without the documents of other states.

  Args:
    model: the language model, or the mixer, that made the states.
    state: a state of `merge`.
    *others: states that were merged into it.

  Raises:
    ValueError: a state is not one of the model.
    NotImplementedError: states of the model cannot be subtracted.
  """
  return _combine(model, jnp.subtract, [state, *others])


def save(model: LM | Mixer, state: Any, path: str | os.PathLike[str]) -> None:
  """Write a state to a safetensors file, which appears whole or not at all.

  The file has a checksum of the model's parameters. An existing file is
  replaced.

  Args:
    model: the language model, or the mixer, that made the state.
    state: any state of it, also of mixers whose states cannot be added.
    path: the file.

  Raises:
    WeightsError: a value is not finite.
    ValueError: the state is not one of the model.
    OSError: the file cannot be written.
  """
  rows = _check_states(model, [state])
  notes = {"rows": str(rows), "parameters": _checksum(model)}
  tensor_files.write_file(Path(path), by_name(state), notes)


def load(model: LM | Mixer, path: str | os.PathLike[str]) -> Any:
  """Return a state of a file that `save` wrote.

  Args:
    model: the language model, or the mixer, with the same parameters.
    path: the file.

  Raises:
    WeightsError: the file cannot be read, is none of `save`, has other arrays
      than a state of the model, or was made with other parameters.
  """
  notes = tensor_files.read_notes(Path(path))
  rows = notes.get("rows", "")
  if not (rows.isdecimal() and int(rows) >= 1 and "parameters" in notes):
    raise WeightsError(f"{path}: expected a file of `rebased_jax.memory.save`")
  if notes["parameters"] != _checksum(model):
    raise WeightsError(
      f"{path} was made with other parameters: expected a state of this model; "
      "read the documents again"
    )
  wanted = jax.eval_shape(lambda: model.init_state(int(rows)))
  found = tensor_files.read_file(Path(path), by_name(wanted))
  leaves = [found[name] for name in by_name(wanted)]
  return jax.tree.unflatten(jax.tree.structure(wanted), leaves)


def _document(model: LM, i: int, document: Any) -> np.ndarray:
  """Return a document's tokens as int32; ValueError if they do not fit."""
  tokens = np.asarray(jax.device_get(document))
  if tokens.ndim != 1 or tokens.size == 0 or tokens.dtype.kind not in "iu":
    raise ValueError(
      f"documents[{i}] is {tokens.dtype}{list(tokens.shape)}: expected "
      "integers (length,), length ≥ 1"
    )
  check_vocabulary(f"documents[{i}]", tokens, model.config.vocab_size)
  return tokens.astype(np.int32)


def _padded(length: int, piece: int) -> int:
  """Return the length that a document is padded to.

  Padding is shorter than a piece: each document begins in its first piece.
  """
  if length > piece:
    return -(-length // piece) * piece
  return min(piece, max(_SHORTEST, power_of_two(length)))


@keep_programs(most=32)
def _programs(
  graph: nnx.GraphDef, rows: int
) -> tuple[Callable[..., LMState], Callable[..., LMState]]:
  """Return the programs that make the first state, and the state after tokens.

  The second takes the parameters, tokens (B, T), 1 for a document's tokens and
  0 for padding before it (B, T), and the state before.
  """

  @jax.jit
  def start(params: nnx.State) -> LMState:
    return nnx.merge(graph, params).init_state(rows)

  @functools.partial(jax.jit, donate_argnums=3)
  def run(
    params: nnx.State, tokens_BT: Array, is_own_BT: Array, state: LMState
  ) -> LMState:
    model = nnx.merge(graph, params)
    return model.prefill(tokens_BT, state, segment_ids=is_own_BT)[1]

  return start, run


def _check_model(model: LM | Mixer) -> None:
  """Raise an error if states of the model cannot be added."""
  for mixer in model.mixers if isinstance(model, LM) else [model]:
    if mixer.state_rule is None:
      raise NotImplementedError(
        f"{type(mixer).__name__}: its state is not a sum over tokens: expected "
        "ReBased or Based, and short convolutions beside them"
      )
  if isinstance(model, LM) and model.config.positions is not None:
    raise NotImplementedError(
      f"ModelConfig.positions={model.config.positions}: learned positions say "
      "where in one text a token is: expected a model with positions=None"
    )


def _check_states(model: LM | Mixer, states: Sequence[Any]) -> int:
  """Return the number of rows; ValueError if a state is not of the model."""
  for i, state in enumerate(states):
    if isinstance(model, LM) and not isinstance(state, LMState):
      raise ValueError(f"state {i} is {name_type(state)}: expected an LMState")
  # Leaves of an LMState begin with position_B, those of a mixer have rows too.
  rows = len(jax.tree.leaves(states[0])[0])
  wanted = jax.eval_shape(lambda: model.init_state(rows))
  for i, state in enumerate(states):
    if jax.tree.structure(state) != jax.tree.structure(wanted):
      raise ValueError(
        f"state {i} has the structure {jax.tree.structure(state)}: expected "
        f"{jax.tree.structure(wanted)}, as the model's init_state has"
      )
    for (name, found), expected in zip(
      by_name(state).items(), jax.tree.leaves(wanted), strict=True
    ):
      if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise ValueError(
          f"state {i} has {name} of {found.dtype}{list(found.shape)}: expected "
          f"{expected.dtype}{list(expected.shape)}, as the model and the first "
          "state have"
        )
  return rows


def _combine(
  model: LM | Mixer,
  operation: Callable[[Array, Array], Array],
  states: list[Any],
) -> Any:
  """Combine states from the left, array by array, by the rule of each mixer."""
  _check_model(model)
  first = model.init_state(_check_states(model, states))

  def join(*arrays: Array) -> Array:
    return functools.reduce(operation, arrays)

  def apply(mixer: Mixer, parts: list[Any], beginning: Any) -> Any:
    if mixer.state_rule == "window":
      return beginning
    return jax.tree.map(join, *parts)

  if isinstance(model, Mixer):
    return apply(model, states, first)
  position_B = join(*(state.position_B for state in states))
  if not isinstance(position_B, jax.core.Tracer) and (position_B < 0).any():
    raise ValueError(
      f"the memory would have {position_B.min()} tokens: expected to forget "
      "states that were merged into it"
    )
  pairs = tuple(
    apply(mixer, [state.pairs[i] for state in states], first.pairs[i])
    for i, mixer in enumerate(model.mixers)
  )
  return LMState(position_B, pairs)


def _checksum(model: nnx.Module) -> str:
  """Return a checksum of a model's parameters, wherever they lie."""
  parameters = by_name(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  sums = jax.device_get(_bit_sums(parameters))
  shapes = {name: list(x.shape) for name, x in parameters.items()}
  lines = [f"{name} {shapes[name]} {sums[name]}" for name in sorted(sums)]
  return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@jax.jit
def _bit_sums(parameters: dict[str, Array]) -> dict[str, Array]:
  """Return the sum of each array's bits, modulo 2³²: the order is no matter."""

  def bit_sum(x: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return bits.astype(jnp.uint32).sum(dtype=jnp.uint32)

  return jax.tree.map(bit_sum, parameters)
