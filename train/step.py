"""One step of training, and of evaluation: pure functions of arrays.

    loss = Σ w_t · (−log softmax(logits_t)[target_t]) / Σ w_t

over the positions of the whole batch that carry a target, however many
micro-batches it is cut into.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp
import optax

from pallas_kernels.cross_entropy.xla import cross_entropy
from rebased_jax import ShardAxes
from train import affine
from train.data import recall
from train.data.recall import Recall

Batch = dict[str, Array]
State = dict[str, Any]  # step, ok, params, opt_state


class Program(NamedTuple):
  """The static part of a step."""

  graph: nnx.GraphDef  # of the model
  tx: optax.GradientTransformation
  accumulate: int
  axes: ShardAxes | None
  placed: Any = None  # shardings of the parameters, and so of their gradient
  loss_chunks: int = 1
  skip: bool = False  # a step that is not finite stops no later one
  recall: Recall | None = None  # what of text is told apart in evaluation


def init_state(params: Any, tx: optax.GradientTransformation) -> State:
  """The state before step 0."""
  return dict(
    step=jnp.zeros((), jnp.int32),
    ok=jnp.ones((), bool),
    params=params,
    opt_state=tx.init(params),
  )


def loss_sums(
  params: Any,
  batch: Batch,
  program: Program,
  dropout_key: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
  """Σ of the loss over the targets, and {tokens, correct} summed likewise."""
  loss, tokens = _losses(params, batch, program, dropout_key)
  weights_BM = batch["weights"]
  right = (weights_BM * tokens.right_BM).sum()
  return loss, dict(tokens=weights_BM.sum(), correct=right)


def _losses(params, batch: Batch, program: Program, dropout_key=None):
  """Σ w nll, and what is known of each target."""
  model, axes = nnx.merge(program.graph, params), program.axes
  positions_BM = batch.get("positions")
  x_BMD = model.features(
    batch["tokens"],
    segment_ids=batch.get("segment_ids"),
    positions_to_predict=positions_BM,
    axes=axes,
    dropout_key=dropout_key,
  )
  if axes is not None and positions_BM is not None:
    axes = dataclasses.replace(axes, time=None)  # of positions, not of tokens
  return cross_entropy(
    x_BMD,
    model.token_embedding[...],
    batch["targets"],
    batch["weights"],
    chunks=program.loss_chunks,
    axes=axes,
  )


def train_step(
  state: State, batch: Batch, key: Array, program: Program
) -> tuple[State, dict[str, Array]]:
  """The state after one update, and the step's metrics.

  A step whose loss, gradient or update is not finite changes only `ok`, which
  becomes False and stops every later update; with `program.skip` it changes
  the step number alone.

  Args:
    state: of `init_state`.
    batch: tokens (B, T), targets and weights (B, M), positions (B, M).
    key: the run's PRNG key.
    program: model, optimiser and layout.
  """
  dropout_key = jax.random.fold_in(key, state["step"])
  loss, grads, sums = _gradient(state["params"], batch, dropout_key, program)
  grad_norm = optax.tree.norm(grads)
  updates, opt_state = program.tx.update(
    grads, state["opt_state"], state["params"]
  )
  new = dict(
    step=state["step"] + 1,
    params=optax.apply_updates(state["params"], updates),
    opt_state=opt_state,
  )
  update_norm = optax.tree.norm(updates)
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm + update_norm)
  ok = finite if program.skip else state["ok"] & finite
  old = {name: state[name] for name in new}
  if program.skip:
    old["step"] = new["step"]
  kept = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
  metrics = dict(
    loss=loss,
    accuracy=sums["correct"] / sums["tokens"],
    grad_norm=grad_norm,
    update_norm=update_norm,
    param_norm=optax.tree.norm(state["params"]),
    **affine.statistics(state["params"]),
  )
  return dict(kept, ok=ok | program.skip), metrics


def eval_step(params: Any, batch: Batch, program: Program) -> dict[str, Array]:
  """{loss, tokens, correct}, each summed over the targets of the batch.

  With `program.recall`, ar_loss and ar_tokens too: those of AR targets.
  """
  loss, tokens = _losses(params, batch, program)
  weights_BM = batch["weights"]
  total = lambda *x_BM: math.prod(x_BM, start=weights_BM).sum()
  sums = dict(loss=loss, tokens=total(), correct=total(tokens.right_BM))
  if program.recall is not None:
    ar_BM = recall.recalled(batch, program.recall).astype(jnp.float32)
    sums |= dict(ar_loss=total(ar_BM, tokens.nll_BM), ar_tokens=total(ar_BM))
  return sums


def _gradient(params, batch, dropout_key, program):
  """The mean loss, its gradient and the sums, over all micro-batches."""
  value_and_grad = jax.value_and_grad(
    functools.partial(loss_sums, program=program), has_aux=True
  )
  if program.accumulate == 1:
    (loss, sums), grads = value_and_grad(params, batch, dropout_key=dropout_key)
    grads = _place(grads, program)
  else:
    A = program.accumulate
    # Row b is in micro-batch b mod A, so that each device keeps its rows.
    split = lambda x_B: jnp.moveaxis(x_B.reshape(-1, A, *x_B.shape[1:]), 1, 0)
    micro = jax.tree.map(split, batch)
    keys = jax.random.split(dropout_key, A)

    def run(x):
      result, grads = value_and_grad(params, x[0], dropout_key=x[1])
      return result, _place(grads, program)

    first = jax.tree.map(lambda x: x[0], (micro, keys))
    shapes = jax.eval_shape(run, first)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda total, x: (jax.tree.map(jnp.add, total, run(x)), None)
    ((loss, sums), grads), _ = jax.lax.scan(add, zero, (micro, keys))
  scale = 1 / sums["tokens"]
  return loss * scale, jax.tree.map(lambda g: g * scale, grads), sums


def _place(grads: Any, program: Program) -> Any:
  """The gradient where its parameters are, before anything is made of it."""
  if program.placed is None:
    return grads
  return jax.lax.with_sharding_constraint(grads, program.placed)
