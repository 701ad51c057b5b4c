"""What an implementation of polynomial attention provides.

One device's part of the operator is five passes over (B, T, H, ·) arrays. In
all of them `runs_BT` numbers the documents (None: a single one), the incoming
`state` belongs to the document of the first token and a state that is returned
to the document of the last. With g = r·do and r = 1 / (Σ sim + eps), the
backward of the numerator, and dz = −r·(do·o), that of the denominator:

  forward          o, the state after the last token, and `before`
  key_state        that state alone, from a zero state
  backward_queries dq, r and dz
  backward_keys    dk, dv and the cotangent of the incoming state
  query_cotangent  that cotangent alone, from a zero cotangent

`before`, which is what the queries saw of earlier tokens, r and dz go from pass
to pass only, in a form of the implementation's own; `before` is a tree of
arrays (anything, B, heads, …), and is kept from the forward for the backward.
A state is made where `return_state` asks for it.

`sharded.py` joins them, on one device and over the devices of a mesh.
"""

from collections.abc import Iterable
import dataclasses
from typing import Any, Protocol

import jax
from jax import Array

from pallas_kernels.polynomial import spec


@dataclasses.dataclass(frozen=True)
class Kernel:
  """The static part of a call; the scale is folded into the coefficients.

  `by_shared` sends the Hopper kernels' operands to the tensor core through
  shared memory instead of registers: slower, and what interpret mode can run.
  """

  coefficients: spec.Coefficients
  eps: float
  by_shared: bool = False


def keep(state: spec.State | None) -> spec.State | None:
  """A state as the `before` of the passes."""
  return jax.tree.map(lambda x: x[None], state)


def kept(before: spec.State | None) -> spec.State | None:
  """The inverse of `keep`."""
  return jax.tree.map(lambda x: x[0], before)


def refuse(implementation: str, reasons: Iterable[tuple[bool, str]]) -> None:
  """Raises NotImplementedError with the first reason that holds."""
  for holds, reason in reasons:
    if holds:
      raise NotImplementedError(
        f"implementation={implementation!r} does not do {reason}; 'xla' does"
      )


class Passes(Protocol):
  """The five passes; a module that defines them is an implementation."""

  def forward(
    self,
    q_BTHF: Array,
    k_BTHF: Array,
    v_BTHP: Array,
    runs_BT: Array | None,
    state: spec.State | None,
    kernel: Kernel,
    *,
    return_state: bool,
  ) -> tuple[Array, spec.State | None, Any]: ...

  def key_state(
    self,
    k_BTHF: Array,
    v_BTHP: Array,
    runs_BT: Array | None,
    kernel: Kernel,
  ) -> spec.State: ...

  def backward_queries(
    self,
    q_BTHF: Array,
    k_BTHF: Array,
    v_BTHP: Array,
    do_BTHP: Array,
    runs_BT: Array | None,
    before: Any,
    kernel: Kernel,
  ) -> tuple[Array, Array, Array]: ...

  def backward_keys(
    self,
    q_BTHF: Array,
    k_BTHF: Array,
    v_BTHP: Array,
    do_BTHP: Array,
    r: Array,
    dz: Array,
    runs_BT: Array | None,
    dstate: spec.State | None,
    kernel: Kernel,
    *,
    return_state: bool,
  ) -> tuple[Array, Array, spec.State | None]: ...

  def query_cotangent(
    self,
    q_BTHF: Array,
    do_BTHP: Array,
    r: Array,
    dz: Array,
    runs_BT: Array | None,
    kernel: Kernel,
  ) -> spec.State: ...
