"""Optax's update rules, with learning-rate schedule, decay mask and clipping.

    adamw   params ← params − η (m̂ / (√v̂ + ε) + λ params)
    lion    params ← params − η (sign(β1 m + (1 − β1) g) + λ params)
    sgd     m ← μ m + g;  params ← params − η (m + λ params)
    muon    m ← μ m + (1 − μ) g;  params ← params − η (s · NS(m̂) + λ params)

η is the learning rate of the step, g the clipped gradient and λ the weight
decay of the parameters that decay. NS is Newton-Schulz iteration, which brings
all singular values of a matrix near 1. It acts on the kernels of projections,
and muon gives every other parameter to adamw. The factor
s = 0.2 · √max(rows, columns) makes the size of an update that of adamw's
(arXiv 2502.16982), so that both take one learning rate and one weight decay.

Frozen parameters have no update, no weight decay and no state. The clipped norm
is that of the other gradients.
"""

import fnmatch
import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from train.devices import parameter_sharding
from train.optimizer_config import MOMENTUM, OptimizerConfig

#: Muon's root mean square of an update, which AdamW's updates usually have.
_MUON_RMS = 0.2
# Names in the optimiser's state, and so in checkpoints.
_TRAINED, _FROZEN = "trained", "frozen"


def schedule(
  config: OptimizerConfig, steps: int, numpy: ModuleType = jnp
) -> optax.Schedule:
  """Return the learning rate as a function of the step.

  With `epoch_steps` it is evaluated at the first step of each epoch. A cosine
  is then learning_rate · (1 + cos(π e / E)) / 2 in epoch e of E.

  Args:
    config: the optimiser.
    steps: the steps of the run, where the learning rate is at its end.
    numpy: what computes it: `jax.numpy`, or NumPy on the host.
  """
  warmup, epoch = config.warmup_steps, config.epoch_steps
  last = float(steps if epoch is None else epoch * math.ceil(steps / epoch))
  begin = warmup  # of the fall
  if config.schedule == "wsd":
    cooldown = config.cooldown_steps or math.ceil(steps / 10)
    begin = max(last - cooldown, warmup)

  def rate(step: Any) -> Any:
    step = numpy.asarray(step, numpy.float32)
    at = step if epoch is None else numpy.floor(step / epoch) * epoch
    done = numpy.clip((at - begin) / (last - begin), 0, 1)
    if config.schedule == "cosine":
      left = (1 + numpy.cos(numpy.pi * done)) / 2
    elif config.schedule == "constant":
      left = numpy.ones_like(done)
    else:
      left = 1 - done
    factor = config.final_fraction + (1 - config.final_fraction) * left
    if warmup:
      factor = numpy.where(step < warmup, (step + 1) / warmup, factor)
    return config.learning_rate * factor

  return rate


def decayed(params: Any, which: str) -> Any:
  """Return a tree with True at the parameters that weight decay acts on.

  Args:
    params: nested dicts of arrays.
    which: "all", or "matrices" for the projections' kernels alone: no bias,
      norm, γ, β, embedding or convolution, and not Mamba's A_log and D.
  """

  def matrix(path, _) -> bool:
    names = [str(key.key) for key in path]
    # The taps of a convolution are in the mixer itself, or under conv.
    return names[-1] == "kernel" and names[-2] not in ("mixer", "conv")

  if which == "all":
    return jax.tree.map(lambda _: True, params)
  return jax.tree_util.tree_map_with_path(matrix, params)


def make(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """Return the update rule of a run.

  Args:
    config: the optimiser.
    steps: the steps of the run.
  """
  rule = _rule(config, schedule(config, steps))
  if config.clip_norm is None:
    rule = optax.chain(rule)
  else:
    rule = optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)
  if not config.frozen:
    return rule
  return optax.partition(
    {_TRAINED: rule, _FROZEN: optax.set_to_zero()},
    lambda params: parts(params, config.frozen),
  )


def parts(params: Any, frozen: tuple[str, ...]) -> Any:
  """Return a tree that says of each parameter "trained" or "frozen".

  Args:
    params: nested dicts of arrays.
    frozen: patterns of paths with slashes, as `fnmatch` has them: "*" stands
      for any text.

  Raises:
    ValueError: a pattern matches no parameter, or no parameter is trained.
  """
  paths = jax.tree_util.tree_map_with_path(
    lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"),
    params,
  )
  known = jax.tree.leaves(paths)
  for pattern in frozen:
    if not any(fnmatch.fnmatchcase(path, pattern) for path in known):
      raise ValueError(
        f"optimizer.frozen={frozen}: {pattern!r} matches no parameter: "
        f"expected a pattern of the paths {', '.join(known)}"
      )

  def part(path: str) -> str:
    matches = any(fnmatch.fnmatchcase(path, pattern) for pattern in frozen)
    return _FROZEN if matches else _TRAINED

  found = jax.tree.map(part, paths)
  if _TRAINED not in jax.tree.leaves(found):
    raise ValueError(
      f"optimizer.frozen={frozen} matches every parameter: expected patterns "
      "that leave some to be trained"
    )
  return found


def _rule(
  config: OptimizerConfig, rate: optax.Schedule
) -> optax.GradientTransformation:
  """Return the update rule, without clipping."""
  decay = config.weight_decay

  def mask(params: Any) -> Any:
    return decayed(params, config.decay)

  momentum = config.momentum
  if momentum is None:
    momentum = MOMENTUM.get(config.name)
  if config.name == "lion":
    return optax.lion(
      rate, config.beta1, config.beta2, weight_decay=decay, mask=mask
    )
  if config.name == "sgd":
    return optax.chain(
      optax.trace(momentum, nesterov=bool(config.nesterov)),
      optax.add_decayed_weights(decay, mask),
      optax.scale_by_learning_rate(rate),
    )
  if config.name == "muon":
    muon = contrib.muon(
      rate,
      beta=momentum,
      eps=config.eps,
      weight_decay=decay,
      nesterov=config.nesterov is not False,
      adam_b1=config.beta1,
      adam_b2=config.beta2,
      # Matrices decay in either case, and no other parameter is a matrix.
      adam_weight_decay=decay if config.decay == "all" else 0.0,
      muon_weight_dimension_numbers=_matrix_axes,
      consistent_rms=_MUON_RMS,
    )
    return _with_whole_matrices(muon)
  return optax.adamw(
    rate,
    b1=config.beta1,
    b2=config.beta2,
    eps=config.eps,
    weight_decay=decay,
    mask=mask,
  )


def _with_whole_matrices(
  muon: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Return Muon's rule, computed with whole matrices on each device.

  Newton-Schulz iteration is many products of a matrix with itself. Where a
  matrix is split over devices, each product would exchange its result. So the
  layers are shared out before, and the results go back once.
  """

  def update(updates: Any, state: Any, params: Any) -> Any:
    inner = state.inner_states
    # What is no momentum has no axis of layers.
    is_momentum = jax.tree.map(lambda x: x.ndim > 1, inner["muon"])
    is_matrix = decayed(updates, "matrices")
    whole = dict(inner, muon=_share_layers(inner["muon"], is_momentum))
    updates, state = muon.update(
      _share_layers(updates, is_matrix),
      state._replace(inner_states=whole),
      _share_layers(params, is_matrix),
    )
    inner = state.inner_states
    split = dict(inner, muon=_share_layers(inner["muon"], is_momentum, True))
    updates = _share_layers(updates, is_matrix, True)
    return updates, state._replace(inner_states=split)

  return optax.GradientTransformation(muon.init, update)


def _share_layers(tree: Any, which: Any, back: bool = False) -> Any:
  """Return a tree whose stacked matrices (N, …) are split over N alone.

  Args:
    tree: arrays, split as `parameter_sharding` places them.
    which: a tree with True at the stacks of matrices.
    back: whether to go back to that split instead.
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  if max(sizes.get("fsdp", 1), sizes.get("tensor", 1)) == 1:
    return tree

  def lay_out(path: Any, x: jax.Array, is_stack: bool) -> jax.Array:
    if not is_stack:
      return x
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = parameter_sharding.place(name, x.shape, sizes).spec
    layers = "fsdp" if x.shape[0] % sizes["fsdp"] == 0 else None
    # One axis of the mesh moves at a time, which XLA knows how to do.
    rest = (*(None if y == "fsdp" else y for y in spec[1:]),)
    steps = [spec, jax.P(layers, *rest), jax.P(layers)]
    for step in reversed(steps) if back else steps:
      x = jax.lax.with_sharding_constraint(x, step)
    return x

  return jax.tree_util.tree_map_with_path(lay_out, tree, which)


def _matrix_axes(params: Any) -> Any:
  """Return the axes of each matrix that Muon updates; None for the rest.

  Kernels are stacked over the pairs of layers; each matrix is updated alone.
  """
  axes = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
  return jax.tree.map(
    lambda is_matrix: axes if is_matrix else None, decayed(params, "matrices")
  )
