"""Dropout that train() and eval() switch, as in Flax's NNX modules.

    model(tokens, dropout_key=key)                       the pure way

    model = LM(config, rngs=nnx.Rngs(0, dropout=1))      the way of NNX
    model.train()
    model(tokens)                                        draws a key by itself

A call with a `dropout_key` has dropout in every mode. Without one the mode
decides. A new module has no dropout until train(), and holds no random state
unless its `rngs` have a stream of the name "dropout".
"""

import abc
from collections.abc import Callable
import functools
from typing import Concatenate, ParamSpec, TypeVar

from flax import nnx
import jax

_Self = TypeVar("_Self", bound="DropsInTraining")
_P = ParamSpec("_P")
_R = TypeVar("_R")


class DropsInTraining(nnx.Module):
  """Abstract: a module with a mode that decides whether a call has dropout.

  The attribute has the name that `nnx.Module.train` and `eval` set. They reach
  it in modules inside of modules too.
  """

  #: Whether calls without a `dropout_key` have no dropout.
  deterministic: bool = True
  #: Where such calls get their keys from in training. None: they need a
  #: `dropout_key`.
  dropout_stream: nnx.RngStream | None = None

  @property
  @abc.abstractmethod
  def has_dropout(self) -> bool:
    """Whether a key changes what a call returns."""

  def keep_dropout_stream(self, rngs: nnx.Rngs) -> None:
    """Keep a stream of keys for training, if there is one for dropout.

    Args:
      rngs: those that the module is made with. Their default stream is not
        used, so that parameters alone are drawn from it.
    """
    if self.has_dropout and "dropout" in rngs:
      self.dropout_stream = rngs.dropout.fork()

  def set_view(self, deterministic: bool | None = None) -> None:
    """Set the mode of a view; `nnx.view` calls this.

    Args:
      deterministic: the mode. None: it stays.
    """
    if deterministic is not None:
      self.deterministic = deterministic

  def _own_key(self) -> jax.Array | None:
    """Return the key of a call that gets none, or None for no dropout."""
    if self.deterministic or not self.has_dropout:
      return None
    if self.dropout_stream is None:
      name = type(self).__name__
      raise ValueError(
        f"{name} is in training mode, and the call has no dropout_key: "
        f"expected one, or a {name} made with a stream of keys, as "
        "rngs=nnx.Rngs(0, dropout=1); eval() switches dropout off"
      )
    return self.dropout_stream()


def draws_own_key(
  method: Callable[Concatenate[_Self, _P], _R],
) -> Callable[Concatenate[_Self, _P], _R]:
  """Return a method that gets a `dropout_key` in training mode.

  It stands outside of what compiles or copies the module: drawing a key changes
  the module's stream.

  Args:
    method: of a `DropsInTraining`, with a keyword argument `dropout_key`.
  """

  @functools.wraps(method)
  def call(self: _Self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
    if kwargs.get("dropout_key") is None:
      kwargs["dropout_key"] = self._own_key()
    return method(self, *args, **kwargs)

  return call
