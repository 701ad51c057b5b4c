"""The differentiable operator: `attend` and its `custom_vjp`.

An implementation ("gpu", "tpu", "xla") is a module with five passes over
(B, T, H, ·) arrays, which `Passes` describes. `attend` joins them to a function
with a derivative, on one device or over the axes of a mesh.

Over a mesh, batch and heads are independent. Time is not: each device holds a
shard of the tokens of a row.

  forward   Every device sums the state of its keys (`key_state`). An all-gather
            gives these sums to all devices. Each device adds those of earlier
            shards that belong to its first document, and starts from the total.
  backward  The same for cotangents of the state (`query_cotangent`), with the
            later shards that belong to its last document.

The states are small: their size does not depend on T.
"""

from collections.abc import Callable, Iterable
import dataclasses
import functools
from typing import Any, Literal, NamedTuple, Protocol

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import documents as documents_lib
from pallas_kernels.by_platform import (
  Kernels,
  by_platform,
  forward_by_platform,
)
from pallas_kernels.compile_once import compiled_backward
from pallas_kernels.partitioning import over_rows_and_heads
from pallas_kernels.polynomial.coefficients import Coefficients
from pallas_kernels.polynomial.state import State
from pallas_kernels.sharding import Axis, ShardAxes


@dataclasses.dataclass(frozen=True)
class Kernel:
  """The static numbers of a call that every implementation takes.

  Attributes:
    coefficients: of sim as a polynomial in q·k; the scale is folded in.
    eps: added to the denominator Σ sim.
    by_shared: whether the Hopper kernels pass the tensor core's operands
      through shared memory instead of registers. That is slower. Tests set it,
      because Pallas's interpret mode can run no other way; no caller does.
  """

  coefficients: Coefficients
  eps: float
  by_shared: bool = False


class Passes(Protocol):
  """The five passes; a module that defines them is an implementation.

  In all of them `runs_BT` numbers the documents of each row 0, 1, …; None says
  that each row is one document. The incoming state belongs to the document of
  the first token, the returned state to the document of the last token.

  Three values go from pass to pass only, in a form that the implementation
  chooses:

    before   what the queries saw of earlier tokens; a tree of arrays
             (slices, B, heads, …), kept from the forward for the backward
    r        1 / (Σ sim + eps), one a query
    dz       −r · (do·o), the cotangent of the denominator, one a query

  With them g = r·do is the cotangent of the numerator.
  """

  def forward(
    self,
    q_BTHF: Array,
    k_BTHF: Array,
    v_BTHP: Array,
    runs_BT: Array | None,
    state: State | None,
    kernel: Kernel,
    /,
    *,
    return_state: bool,
  ) -> tuple[Array, State | None, Any]:
    """Return o_BTHP, the state after the last token and `before`.

    The state is None unless `return_state` asks for it.
    """
    ...

  def key_state(
    self,
    k_BTHF: Array,
    v_BTHP: Array,
    runs_BT: Array | None,
    kernel: Kernel,
    /,
  ) -> State:
    """Return the state after the last token, from a zero state."""
    ...

  def backward_queries(
    self,
    q_BTHF: Array,
    k_BTHF: Array,
    v_BTHP: Array,
    do_BTHP: Array,
    runs_BT: Array | None,
    before: Any,
    kernel: Kernel,
    /,
  ) -> tuple[Array, Array, Array]:
    """Return dq_BTHF, r and dz."""
    ...

  def backward_keys(
    self,
    q_BTHF: Array,
    k_BTHF: Array,
    v_BTHP: Array,
    do_BTHP: Array,
    r: Array,
    dz: Array,
    runs_BT: Array | None,
    dstate: State | None,
    kernel: Kernel,
    /,
    *,
    return_state: bool,
  ) -> tuple[Array, Array, State | None]:
    """Return dk_BTHF, dv_BTHP and the cotangent of the incoming state.

    `dstate` is the cotangent of the returned state. The cotangent of the
    incoming state is None unless `return_state` asks for it.
    """
    ...

  def query_cotangent(
    self,
    q_BTHF: Array,
    do_BTHP: Array,
    r: Array,
    dz: Array,
    runs_BT: Array | None,
    kernel: Kernel,
    /,
  ) -> State:
    """Return the incoming state's cotangent, if the returned state's is 0."""
    ...


def add_slice_axis(state: State | None) -> State | None:
  """Give a state the leading axis that `before` has; here a single slice."""
  return jax.tree.map(lambda x: x[None], state)


def drop_slice_axis(before: State | None) -> State | None:
  """Undo `add_slice_axis`."""
  return jax.tree.map(lambda x: x[0], before)


def raise_if_unsupported(
  implementation: str, reasons: Iterable[tuple[bool, str]]
) -> None:
  """Raise NotImplementedError with the first reason that holds.

  Args:
    implementation: its name.
    reasons: pairs of whether a reason holds, and what cannot be done.
  """
  for holds, reason in reasons:
    if holds:
      raise NotImplementedError(
        f"implementation={implementation!r} does not do {reason}; 'xla' does"
      )


class StaticArguments(NamedTuple):
  """The static arguments of `attend`.

  Attributes:
    passes: the implementation.
    kernel: its static numbers.
    axes: the mesh axes that split the arrays; None on one device.
    return_state: whether to make the state after the last token.
    kernels: where `passes` run; None: on every platform.
    elsewhere: the implementation on other platforms. None: lowering for them
      raises NotImplementedError.
    by_xla: whether XLA splits rows and heads over a mesh, as it likes.
    is_plain: whether `passes` are plain jax, which XLA splits by itself.
  """

  passes: Passes
  kernel: Kernel
  axes: ShardAxes | None
  return_state: bool
  kernels: Kernels | None = None
  elsewhere: Passes | None = None
  by_xla: bool = False
  is_plain: bool = False

  @property
  def time(self) -> Axis:
    """The mesh axes that split time, or None."""
    return None if self.axes is None else self.axes.time

  @property
  def is_split(self) -> bool:
    """Whether the devices of a mesh share the work."""
    return self.axes is not None or self.by_xla or self.is_plain


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
  static: StaticArguments,
  q_BTHF: Array,
  k_BTHF: Array,
  v_BTHP: Array,
  segment_ids_BT: Array | None,
  state: State | None,
) -> tuple[Array, State | None]:
  """Compute o_BTHP and the state after the last token.

  Args:
    static: the implementation, its numbers and the mesh axes.
    q_BTHF: queries.
    k_BTHF: keys.
    v_BTHP: values.
    segment_ids_BT: integers; None for one document a row.
    state: the initial state, of token 0's document; None for zeros.

  Returns:
    (o_BTHP, state). The state is None unless `static.return_state` asks for it.
  """
  outputs, _ = _attend_forward(
    static, q_BTHF, k_BTHF, v_BTHP, segment_ids_BT, state
  )
  return outputs


def _attend_forward(static: StaticArguments, q, k, v, ids_BT, state):
  arrays = q, k, v, ids_BT, state
  if static.kernels is None:
    outputs, before = _forward(static, *arrays)
  else:
    other = _elsewhere(static)
    outputs, before = forward_by_platform(
      static.kernels,
      functools.partial(_forward, static),
      other and (lambda *arrays: _forward(other, *arrays)[0]),
      *arrays,
      is_split=static.is_split,
    )
  return outputs, (*arrays, before)


def _attend_backward(static: StaticArguments, residuals, cotangents):
  if static.kernels is None:
    grads = _backward(static, residuals, cotangents)
  else:
    other = _elsewhere(static)
    grads = by_platform(
      static.kernels,
      functools.partial(_backward, static),
      other and functools.partial(_backward_afresh, other),
      residuals,
      cotangents,
      is_split=static.is_split,
    )
  dq, dk, dv, dstate = grads
  return dq, dk, dv, None, dstate


def _elsewhere(static: StaticArguments) -> StaticArguments | None:
  """Return the static arguments on platforms without kernels."""
  if static.elsewhere is None:
    return None
  return static._replace(
    passes=static.elsewhere, kernels=None, elsewhere=None, by_xla=False
  )


def _forward(static: StaticArguments, *arrays):
  """Return ((o, the last state), `before`) by `static.passes`.

  `before` is None where XLA splits the arrays: its form follows from the part
  of one device, which only XLA knows.
  """
  if static.by_xla:
    part = static._replace(by_xla=False)
    run = over_rows_and_heads(lambda *x: _forward(part, *x)[0], _patterns)
    return run(*arrays), None
  forward = _over_mesh(
    functools.partial(_shard_forward, static),
    static.axes,
    inputs=(*_QKV, "ids", "state"),
    outputs=("tokens", "state", "before"),
  )
  o, after, before = forward(*arrays)
  return (o, after), before


def _backward(static: StaticArguments, residuals, cotangents):
  """Return the gradients of q, k, v and the state by `static.passes`."""
  if static.by_xla:
    part = static._replace(by_xla=False)
    run = functools.partial(_backward_afresh, part)
    return over_rows_and_heads(run, _patterns)(residuals, cotangents)
  backward = _over_mesh(
    functools.partial(_shard_backward, static),
    static.axes,
    inputs=(*_QKV, "ids", "state", "before", "tokens", "state"),
    outputs=(*_QKV, "state"),
  )
  return backward(*residuals, *cotangents)


def _backward_afresh(static: StaticArguments, residuals, cotangents):
  """Return `_backward`, where the forward kept no `before` of these passes.

  The forward runs again for it.
  """
  *arrays, _ = residuals
  _, before = _forward(static, *arrays)
  return _backward(static, (*arrays, before), cotangents)


def _patterns(tree: Any) -> list[str]:
  """Return each array's axes, as `over_rows_and_heads` takes them."""
  patterns = []
  for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, State)):
    if isinstance(x, State):
      patterns += ["BH.."] * len(x)
    else:
      patterns.append("B." if x.ndim == 2 else "B.H.")  # ids, or tokens
  return patterns


attend.defvjp(_attend_forward, compiled_backward(_attend_backward))


# What an argument is, which says how the mesh axes split it.
_Kind = Literal["tokens", "ids", "state", "before"]
_QKV: tuple[_Kind, ...] = ("tokens", "tokens", "tokens")


def _over_mesh(
  shard: Callable[..., Any],
  axes: ShardAxes | None,
  *,
  inputs: tuple[_Kind, ...],
  outputs: tuple[_Kind, ...],
) -> Callable[..., Any]:
  """Map a function of one device's shards over the ambient mesh."""
  if axes is None:
    return shard
  specs: dict[_Kind, PartitionSpec] = {
    "tokens": axes.btx(),
    "ids": axes.bt(),
    "state": axes.state(),
    "before": axes.before(),
  }
  return jax.shard_map(
    shard,
    in_specs=tuple(specs[kind] for kind in inputs),
    out_specs=tuple(specs[kind] for kind in outputs),
    # Implementations start their scans from plain zeros, which vary over no
    # axis, and jax does not know what a Pallas kernel's results vary over.
    check_vma=False,
  )


def _shard_forward(static: StaticArguments, q, k, v, ids_BT, state):
  """Run the forward on one device's shards."""
  runs_BT = None if ids_BT is None else documents_lib.document_runs(ids_BT)
  if static.time is not None:
    state = _state_before_shard(static, k, v, runs_BT, ids_BT, state)
  o, after, before = static.passes.forward(
    q, k, v, runs_BT, state, static.kernel, return_state=static.return_state
  )
  if after is not None and static.time is not None:
    last = jax.lax.axis_size(static.time) - 1
    after = _broadcast_from_shard(after, static.time, last)
  return o, after, before


def _shard_backward(
  static: StaticArguments, q, k, v, ids_BT, state, before, do, dafter
):
  """Run the backward on one device's shards."""
  passes, kernel, time = static.passes, static.kernel, static.time
  runs_BT = None if ids_BT is None else documents_lib.document_runs(ids_BT)
  dq, r, dz = passes.backward_queries(q, k, v, do, runs_BT, before, kernel)
  if time is not None:
    own = passes.query_cotangent(q, do, r, dz, runs_BT, kernel)
    first_DB, last_DB = _shard_documents(ids_BT, runs_BT, time)
    here = jax.lax.axis_index(time)
    later_D = jnp.arange(first_DB.shape[0], dtype=jnp.int32) > here
    joined_DB = (first_DB == last_DB[here][None]) & later_D[:, None]
    dafter = _sum_joined(
      own, joined_DB, dafter, last_DB[here] == last_DB[-1], time
    )
  dk, dv, dbefore = passes.backward_keys(
    q,
    k,
    v,
    do,
    r,
    dz,
    runs_BT,
    dafter,
    kernel,
    return_state=state is not None,
  )
  if dbefore is not None and time is not None:
    dbefore = _broadcast_from_shard(dbefore, time, 0)
  return dq, dk, dv, dbefore


def _state_before_shard(
  static: StaticArguments, k, v, runs_BT, ids_BT, state
) -> State:
  """Compute the state that this device's shard of time starts from."""
  own = static.passes.key_state(k, v, runs_BT, static.kernel)
  first_DB, last_DB = _shard_documents(ids_BT, runs_BT, static.time)
  here = jax.lax.axis_index(static.time)
  earlier_D = jnp.arange(first_DB.shape[0], dtype=jnp.int32) < here
  joined_DB = (last_DB == first_DB[here][None]) & earlier_D[:, None]
  return _sum_joined(own, joined_DB, state, first_DB[here] == 0, static.time)


def _sum_joined(
  own: State, joined_DB: Array, outer: State | None, outer_B: Array, time: Axis
) -> State:
  """Sum the states of the D shards that share a document with this one.

  Args:
    own: the state of this shard's tokens alone.
    joined_DB: which shards' states count here.
    outer: the state from outside the row; None for zeros.
    outer_B: in which rows the outer state counts here.
    time: the mesh axes that split time.
  """

  def total(own_BH, outer_BH):
    all_DBH = jax.lax.all_gather(own_BH, time)
    sum_BH = jnp.where(joined_DB[:, :, None, None, None], all_DBH, 0).sum(
      axis=0
    )
    if outer_BH is None:
      return sum_BH
    return sum_BH + jnp.where(outer_B[:, None, None, None], outer_BH, 0)

  return State(*map(total, own, outer or (None, None)))


def _shard_documents(ids_BT, runs_BT, time: Axis) -> tuple[Array, Array]:
  """Number each shard's first and last document, counted over the whole row.

  Returns:
    (first_DB, last_DB), for the D shards of time. Without ids there is a single
    document, and B is 1, which broadcasts.
  """
  if ids_BT is None:
    zero_DB = jnp.zeros((jax.lax.axis_size(time), 1), jnp.int32)
    return zero_DB, zero_DB
  # The ids have 32 bits or more, which hold every document's number.
  boundaries_B = runs_BT[:, -1].astype(ids_BT.dtype)
  ends_B3 = jnp.stack([ids_BT[:, 0], ids_BT[:, -1], boundaries_B], axis=-1)
  ends_DB3 = jax.lax.all_gather(ends_B3, time)
  first_id_DB, last_id_DB, boundaries_DB = (ends_DB3[..., i] for i in range(3))
  boundaries_DB = boundaries_DB.astype(jnp.int32)
  # A document boundary may also lie between two shards.
  between_DB = (first_id_DB[1:] != last_id_DB[:-1]).astype(jnp.int32)
  steps_DB = boundaries_DB[:-1] + between_DB
  first_DB = jnp.pad(jnp.cumsum(steps_DB, axis=0), ((1, 0), (0, 0)))
  return first_DB, first_DB + boundaries_DB


def _broadcast_from_shard(state: State, time: Axis, index: int) -> State:
  """Return the state that one shard of time holds, on all of them."""
  mine = jax.lax.axis_index(time) == index

  def pick(x: Array) -> Array:
    return jax.lax.psum(jnp.where(mine, x, 0), time)

  return jax.tree.map(pick, state)
