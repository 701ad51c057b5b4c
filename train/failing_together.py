"""Let several processes of a run save together although one of them fails.

Training cannot just end where one process has no batch: the others have begun
the step, to which their state is donated, and wait for the part of this one.
So it takes part with a *stand-in*, a batch whose weights are NaN. Such a step
is not finite, and so changes no parameter in any process. The process also
votes that it has failed. When all have read that vote, each of them has the
state before the first stand-in, and they save it.

    step        4       5           6
    process 0   batch   batch       batch       reads the vote of step 5: saves
    process 1   batch   stand-in    stand-in    reads the vote of step 5: saves
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from train.data.batches import Batch
from train.devices import batch_sharding, processes
from train.step import State

# Process i votes for this + i where it fails. Signals have numbers up to 64.
_FAILED = 1000


class OtherFailed(processes.PeerLost):
  """Another process has failed, and all have the state that they can save."""


class FailingTogether:
  """Record what one of several processes knows about failures.

  Attributes:
    error: why this process cannot continue; None while it can.
    told: whether every process knows that one has failed.
  """

  def __init__(self) -> None:
    self.error: Exception | None = None
    self.told = False

  def vote(self, signal: int) -> int:
    """Return the number to vote for: that of the signal, or of a failure."""
    if self.error is None:
      return signal
    return _FAILED + jax.process_index()

  def read_vote(self, number: int) -> int:
    """Return the signal that all processes have voted for.

    Raises:
      Exception: this process has failed, and every process knows it.
      OtherFailed: another process has failed.
    """
    if number < _FAILED:
      return number
    self.told = True
    if self.error is not None:
      raise self.error
    raise OtherFailed(
      f"process {number - _FAILED} of {jax.process_count()} has failed, and "
      "its own output says why; this process ends too"
    )

  def with_stand_ins(
    self, batches: Iterator[Batch], stand_in: Batch
  ) -> Iterator[Batch]:
    """Yield batches and, once this process has failed, stand-ins for ever.

    Args:
      batches: where an error is a failure of this process.
      stand_in: as `make_stand_in` returns it.
    """
    while self.error is None:
      try:
        batch = next(batches)
      except StopIteration:
        return
      except Exception as error:  # noqa: BLE001  # raised by `read_vote`
        self.error = error
      else:
        yield batch
    while True:
      yield stand_in


def make_stand_in(
  fields: dict[str, jax.ShapeDtypeStruct], rows: int, mesh: Mesh
) -> Batch:
  """Return this process's rows of a batch that changes no parameter.

  Args:
    fields: shape and dtype of each array of a batch.
    rows: rows of a batch.
    mesh: the mesh of the run.
  """
  local = batch_sharding.local_rows(rows, mesh)
  count = local.stop - local.start
  zeros = {
    name: np.zeros((count, *x.shape[1:]), x.dtype) for name, x in fields.items()
  }
  return zeros | {"weights": np.full_like(zeros["weights"], np.nan)}


def before_stand_ins(state: State, step: int) -> State:
  """Return the state before a step whose batch was a stand-in.

  Args:
    state: the state after it, or after more such steps.
    step: the first of them.
  """

  def put(value: Any, like: jax.Array) -> jax.Array:
    fill = jax.jit(
      lambda x: jnp.full_like(x, value), out_shardings=like.sharding
    )
    return fill(like)

  return state._replace(step=put(step, state.step), ok=put(True, state.ok))
