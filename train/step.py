"""One step of training and one of evaluation: pure functions of arrays.

    nll_t  = −log softmax(logits_t)[target_t]
    loss   = Σ w_t · nll_t / Σ w_t           w_t is 1 at a target, 0 at padding
    params ← params + update(∂loss/∂params)

target_t is the token after t in text, and the answer at t in recall tasks.
optimizer.py makes the update: clipping, AdamW and its learning-rate schedule.
With micro-batches both sums run over all of them before the division, so that a
micro-batch with few targets weighs less. compiled_steps.py compiles the steps,
and loop.py calls them and stops when a state is no longer `ok`.
"""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp
import optax

from pallas_kernels import ShardAxes, cross_entropy
from train import metrics
from train.data import recall
from train.data.recall import Recall

Batch = dict[str, Array]
State = dict[str, Any]  # step, ok, params, opt_state


@dataclasses.dataclass(frozen=True)
class Program:
  """The static part of a step: what is compiled into it."""

  #: The model without its parameters.
  graph: nnx.GraphDef
  #: The update rule.
  tx: optax.GradientTransformation
  #: Micro-batches of a batch. Their number divides the rows of the batch.
  accumulate: int
  #: Mesh axes that split batch, heads and time. None: there is no mesh.
  axes: ShardAxes | None
  #: Shardings of the parameters, and so of their gradient. None: no mesh.
  placed: Any = None
  #: Parts that the targets of a row are cut into. The logits of one part exist
  #: at a time.
  loss_chunks: int = 1
  #: Whether training continues after a step whose loss, gradient or update has
  #: an Inf or NaN.
  skip: bool = False
  #: Which targets the evaluation of text counts separately. None: none.
  recall: Recall | None = None


def init_state(params: Any, tx: optax.GradientTransformation) -> State:
  """Return the state before step 0.

  Its `step` is int32. Its `ok` is a bool: no step so far had an Inf or NaN.
  """
  return dict(
    step=jnp.zeros((), jnp.int32),
    ok=jnp.ones((), bool),
    params=params,
    opt_state=tx.init(params),
  )


def train_step(
  state: State, batch: Batch, key: Array, program: Program
) -> tuple[State, dict[str, Array]]:
  """Return the state after one update, and the step's metrics.

  A step whose loss, gradient or update is not finite changes only `ok`, which
  becomes False and stops every later update. With `program.skip` such a step
  changes only the step number.

  Args:
    state: as `init_state` returns it.
    batch: tokens (B, T), targets and weights (B, M), positions (B, M) of the
      targets unless every token has one, and segment_ids (B, T) of packed rows.
    key: the run's PRNG key for dropout.
    program: the model, the update rule and the layout.
  """
  params = state["params"]
  dropout_key = jax.random.fold_in(key, state["step"])
  loss, grads, sums = _mean_gradient(params, batch, dropout_key, program)
  updates, opt_state = program.tx.update(grads, state["opt_state"], params)
  found = metrics.target_means(sums) | {"loss": loss}
  found |= metrics.update_metrics(metrics.Update(params, grads, updates))

  norms = found["grad_norm"] + found["update_norm"]
  finite = jnp.isfinite(loss) & jnp.isfinite(norms)
  ok = finite if program.skip else state["ok"] & finite
  new = dict(
    step=state["step"] + 1,
    params=optax.apply_updates(params, updates),
    opt_state=opt_state,
  )
  old = {name: state[name] for name in new}
  if program.skip:
    old["step"] = new["step"]
  kept = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
  # With `skip`, `ok` stays True and later steps go on.
  return dict(kept, ok=ok | program.skip), found


def eval_step(params: Any, batch: Batch, program: Program) -> dict[str, Array]:
  """Return `metrics.target_sums` of a batch, without dropout.

  Args:
    params: the parameters.
    batch: as in `train_step`; also `rare` (B, T) if `recall` has a limit.
    program: the model and its layout.
  """
  recalled_BM = None
  if program.recall is not None:
    # Text has a target at every token, so M = T.
    recalled_BM = recall.recalled(batch, program.recall).astype(jnp.float32)
  return loss_sums(params, batch, program, recalled_BM=recalled_BM)[1]


def loss_sums(
  params: Any,
  batch: Batch,
  program: Program,
  dropout_key: Array | None = None,
  recalled_BM: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
  """Return Σ w · nll over the batch, and `metrics.target_sums` of it.

  Args:
    params: the parameters.
    batch: as in `train_step`.
    program: the model and its layout.
    dropout_key: a PRNG key. None: no dropout.
    recalled_BM: float32, 1 at the targets that recall counts. None: none.
  """
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
    # Positions are not split over the devices that split the tokens of a row.
    axes = dataclasses.replace(axes, time=None)
  loss, tokens = cross_entropy(
    x_BMD,
    model.token_embedding[...],
    batch["targets"],
    batch["weights"],
    parts=program.loss_chunks,
    axes=axes,
  )
  targets = metrics.Targets(tokens.nll_BM, tokens.correct_BM, recalled_BM)
  return loss, metrics.target_sums(loss, batch["weights"], targets)


def _mean_gradient(
  params: Any, batch: Batch, dropout_key: Array, program: Program
) -> tuple[Array, Any, dict[str, Array]]:
  """Return the mean loss, its gradient, and the sums over all micro-batches."""
  value_and_grad = jax.value_and_grad(
    functools.partial(loss_sums, program=program), has_aux=True
  )

  def gradient(batch: Batch, key: Array):
    result, grads = value_and_grad(params, batch, dropout_key=key)
    return result, _place(grads, program)

  if program.accumulate == 1:
    (loss, sums), grads = gradient(batch, dropout_key)
  else:
    A = program.accumulate
    # Row b is in micro-batch b mod A. A device holds neighbouring rows, so that
    # each micro-batch has some rows of every device.
    micro = jax.tree.map(
      lambda x_B: jnp.moveaxis(x_B.reshape(-1, A, *x_B.shape[1:]), 1, 0), batch
    )
    inputs = (micro, jax.random.split(dropout_key, A))
    shapes = jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], inputs))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total, x):
      return jax.tree.map(jnp.add, total, gradient(*x)), None

    ((loss, sums), grads), _ = jax.lax.scan(add, zero, inputs)
  scale = 1 / sums["tokens"]
  return loss * scale, jax.tree.map(lambda g: g * scale, grads), sums


def _place(grads: Any, program: Program) -> Any:
  """Put the gradient where its parameters are, before anything uses it.

  XLA would otherwise gather whole gradients and only then split them.
  """
  if program.placed is None:
    return grads
  return jax.lax.with_sharding_constraint(grads, program.placed)
