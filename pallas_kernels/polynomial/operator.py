"""The differentiable operator, on one device or over the axes of a mesh.

Batch and heads are independent. Over time each device holds a slice: it sums
its own keys, all devices exchange these sums (a state a head), and each starts
from the sum of the states to its left that belong to its first document. The
backward does the same from the right with the state's cotangents.
"""

import functools
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import documents as documents_lib
from pallas_kernels.polynomial.passes import Kernel, Passes
from pallas_kernels.polynomial.spec import State
from pallas_kernels.sharding import Axis, ShardAxes


class Call(NamedTuple):
  """The static part of `attend`."""

  passes: Passes
  kernel: Kernel
  axes: ShardAxes | None
  return_state: bool

  @property
  def time(self) -> Axis:
    return None if self.axes is None else self.axes.time


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
  call: Call,
  q_BTHF: Array,
  k_BTHF: Array,
  v_BTHP: Array,
  segment_ids_BT: Array | None,
  state: State | None,
) -> tuple[Array, State | None]:
  """o_BTHP and, where it is asked for, the state after the last token."""
  arrays = (q_BTHF, k_BTHF, v_BTHP, segment_ids_BT, state)
  local = functools.partial(_forward, call)
  o, after, _ = _over_mesh(local, call.axes, "qkvis", "osb")(*arrays)
  return o, after


def _attend_forward(call, *arrays):
  local = functools.partial(_forward, call)
  o, after, before = _over_mesh(local, call.axes, "qkvis", "osb")(*arrays)
  return (o, after), (arrays, before)


def _attend_backward(call, kept, cotangents):
  arrays, before = kept
  local = functools.partial(_backward, call)
  dq, dk, dv, dstate = _over_mesh(local, call.axes, "qkvisbos", "qkvs")(
    *arrays, before, *cotangents
  )
  return dq, dk, dv, None, dstate


attend.defvjp(_attend_forward, _attend_backward)


def _over_mesh(local, axes: ShardAxes | None, inputs: str, outputs: str):
  """`local` on each device's part.

  One letter an argument: q k v o; ids, states, and what is before.
  """
  if axes is None:
    return local
  specs = {letter: axes.btx() for letter in "qkvo"}
  specs |= {"i": axes.bt(), "s": axes.state(), "b": axes.before()}
  return jax.shard_map(
    local,
    in_specs=tuple(specs[letter] for letter in inputs),
    out_specs=tuple(specs[letter] for letter in outputs),
    check_vma=False,  # implementations start their scans from plain zeros
  )


def _forward(call: Call, q, k, v, ids_BT, state):
  runs_BT = None if ids_BT is None else documents_lib.document_runs(ids_BT)
  if call.time is not None:
    state = _state_before(call, k, v, runs_BT, ids_BT, state)
  o, after, before = call.passes.forward(
    q, k, v, runs_BT, state, call.kernel, return_state=call.return_state
  )
  if call.return_state and call.time is not None:
    after = _of_device(after, call.time, jax.lax.axis_size(call.time) - 1)
  return o, after, before


def _backward(call: Call, q, k, v, ids_BT, state, before, do, dafter):
  passes, kernel, time = call.passes, call.kernel, call.time
  runs_BT = None if ids_BT is None else documents_lib.document_runs(ids_BT)
  has_state = state is not None
  dq, r, dz = passes.backward_queries(q, k, v, do, runs_BT, before, kernel)
  if time is not None:
    part = passes.query_cotangent(q, do, r, dz, runs_BT, kernel)
    first_DB, last_DB = _document_numbers(ids_BT, runs_BT, time)
    here = jax.lax.axis_index(time)
    after_D = jnp.arange(first_DB.shape[0]) > here
    joined_DB = (first_DB == last_DB[here][None]) & after_D[:, None]
    dafter = _joined(
      part, joined_DB, dafter, last_DB[here] == last_DB[-1], time
    )
  dk, dv, dbefore = passes.backward_keys(
    q, k, v, do, r, dz, runs_BT, dafter, kernel, return_state=has_state
  )
  if has_state and time is not None:
    dbefore = _of_device(dbefore, time, 0)
  return dq, dk, dv, dbefore


def _state_before(call: Call, k, v, runs_BT, ids_BT, state) -> State:
  """The state that this device's slice of time starts from."""
  part = call.passes.key_state(k, v, runs_BT, call.kernel)
  first_DB, last_DB = _document_numbers(ids_BT, runs_BT, call.time)
  here = jax.lax.axis_index(call.time)
  before_D = jnp.arange(first_DB.shape[0]) < here
  joined_DB = (last_DB == first_DB[here][None]) & before_D[:, None]
  return _joined(part, joined_DB, state, first_DB[here] == 0, call.time)


def _joined(part, joined_DB, outer, outer_B, time) -> State:
  """The states of the devices that are joined to this one, and the outer."""

  def total(x_BH, outer_BH):
    x_DBH = jax.lax.all_gather(x_BH, time)
    x_BH = jnp.where(joined_DB[:, :, None, None, None], x_DBH, 0).sum(axis=0)
    if outer_BH is None:
      return x_BH
    return x_BH + jnp.where(outer_B[:, None, None, None], outer_BH, 0)

  return State(*map(total, part, outer or (None, None)))


def _document_numbers(ids_BT, runs_BT, time) -> tuple[Array, Array]:
  """Over the whole row, the number of each device's first and last document.

  Without ids a single document, of a batch of 1 that broadcasts.
  """
  if ids_BT is None:
    zero_DB = jnp.zeros((jax.lax.axis_size(time), 1), jnp.int32)
    return zero_DB, zero_DB
  ends_B3 = jnp.stack([ids_BT[:, 0], ids_BT[:, -1], runs_BT[:, -1]], axis=-1)
  ends_DB3 = jax.lax.all_gather(ends_B3, time)
  first_id, last_id, borders_DB = (ends_DB3[..., i] for i in range(3))
  link_DB = (first_id[1:] != last_id[:-1]).astype(jnp.int32)
  steps_DB = borders_DB[:-1] + link_DB
  first_DB = jnp.pad(jnp.cumsum(steps_DB, axis=0), ((1, 0), (0, 0)))
  return first_DB, first_DB + borders_DB


def _of_device(state: State, time, index: int) -> State:
  """One device's state, on all."""
  mine = jax.lax.axis_index(time) == index
  pick = lambda x: jax.lax.psum(jnp.where(mine, x, 0), time)
  return jax.tree.map(pick, state)
