"""One step of training and one of evaluation: pure functions of arrays.

    nll_t  = −log softmax(logits_t)[target_t]
    loss   = Σ w_t · nll_t / Σ w_t           w_t is 1 at a target, 0 at padding
    params ← params + update(∂loss/∂params)
    ema    ← d · ema + (1 − d) · params      if the run keeps this average

target_t is the token after t in text, and the answer at t in recall tasks.
optimizer.py makes the update: clipping, the rule and its learning rate. With a
z-loss the gradient is that of loss + Σ w_t · c · l_t² / Σ w_t, where
l_t = log Σ exp logits_t.
Gradient accumulation splits the rows of a batch into micro-batches, which run
one after another. Their Σ w·nll, its gradient and Σ w are added up, and divided
once, at the end. So every target weighs the same in whichever micro-batch.
compiled_steps.py compiles the steps. loop.py calls them, and stops when a state
is no longer `ok`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp
import optax

from pallas_kernels import ShardAxes
from rebased_jax.evaluate import row_losses
from train import metrics
from train.data.recall import Recall, recalled
from train.micro_batches import sum_over_micro_batches

Batch = dict[str, Array]


class State(NamedTuple):
  """The state that a training step hands to the next one."""

  step: Array  # int32, the number of steps so far
  ok: Array  # bool, whether no step so far had an Inf or NaN
  params: Any
  opt_state: Any
  ema: Any = None  # an average of the params so far; None if the run keeps none


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
  #: The weight of the z-loss in training. 0: there is none.
  z_loss: float = 0.0
  #: Decay of the average of the parameters. None: none is kept.
  ema: float | None = None


def init_state(
  params: Any, tx: optax.GradientTransformation, *, ema: bool = False
) -> State:
  """Return the state before step 0.

  Args:
    params: the parameters.
    tx: the update rule.
    ema: whether to keep an average of the parameters, which begins with them.
  """
  zero, true = jnp.zeros((), jnp.int32), jnp.ones((), bool)
  # A copy, because a step donates each array of the state.
  average = jax.tree.map(jnp.copy, params) if ema else None
  return State(zero, true, params, tx.init(params), average)


def train_step(
  state: State, batch: Batch, key: Array, program: Program
) -> tuple[State, dict[str, Array]]:
  """Return the state after one update, and the step's metrics.

  A step whose loss, gradient or update is not finite changes only `ok`, which
  becomes False and stops every later update. With `program.skip` such a step
  changes only the step number.

  Args:
    state: the state before the step.
    batch: tokens (B, T), targets and weights (B, M), positions (B, M) of the
      targets unless every token has one, and segment_ids (B, T) of packed rows.
    key: the run's PRNG key for dropout.
    program: the model, the update rule and the layout.
  """
  params = state.params
  dropout_key = jax.random.fold_in(key, state.step)
  loss, grads, sums = _mean_gradient(params, batch, dropout_key, program)
  updates, opt_state = program.tx.update(grads, state.opt_state, params)
  found = metrics.target_means(sums) | {"loss": loss}
  if program.z_loss:
    # The loss of records is that of the targets alone, as in an evaluation.
    found["loss"] = sums["loss"] / sums["tokens"]
    found["z_loss"] = loss - found["loss"]
  found |= metrics.update_metrics(metrics.Update(params, grads, updates))

  norms = found["grad_norm"] + found["update_norm"]
  finite = jnp.isfinite(loss) & jnp.isfinite(norms)
  applies = finite if program.skip else state.ok & finite
  new_params = optax.apply_updates(params, updates)
  updated = State(
    step=state.step + 1,
    ok=applies | program.skip,
    params=new_params,
    opt_state=opt_state,
    ema=_average(state.ema, new_params, program.ema),
  )
  step = updated.step if program.skip else state.step
  refused = state._replace(ok=updated.ok, step=step)
  kept = jax.tree.map(lambda a, b: jnp.where(applies, a, b), updated, refused)
  return kept, found


def _average(average: Any, params: Any, decay: float | None) -> Any:
  """Return the average of the parameters after a step; None if none is kept."""
  if decay is None:
    return None
  return optax.incremental_update(params, average, 1 - decay)


def _mean_gradient(
  params: Any, batch: Batch, key: Array, program: Program
) -> tuple[Array, Any, dict[str, Array]]:
  """Return the mean loss, its gradient, and `metrics.target_sums`."""
  loss_fn = functools.partial(loss_sums, z_loss=program.z_loss)

  def sum_gradient(batch: Batch, key: Array) -> Any:
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    sums, grads = value_and_grad(params, batch, program, key)
    if program.placed is not None:
      # XLA would otherwise gather whole gradients and only then split them.
      grads = jax.lax.with_sharding_constraint(grads, program.placed)
    return sums, grads

  (loss, sums), grads = sum_over_micro_batches(
    sum_gradient, batch, key, program.accumulate
  )
  scale = 1 / sums["tokens"]  # 1 / Σ w
  # A gradient has the dtype of its parameter.
  grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
  return loss * scale, grads, sums


def loss_sums(
  params: Any,
  batch: Batch,
  program: Program,
  dropout_key: Array | None = None,
  *,
  z_loss: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
  """Return Σ w · (nll + z-loss) over a batch, and its `metrics.target_sums`.

  The sums do not contain the z-loss.

  Args:
    params: the parameters.
    batch: as in `train_step`; also `recalled` (B, M), float32, 1 at the targets
      that recall counts, where they are told apart.
    program: the model and its layout.
    dropout_key: a PRNG key. None: no dropout.
    z_loss: the weight of the z-loss. An evaluation has none.
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
  # The tied head makes logits of features here, one part of a row at a time.
  loss, losses = row_losses(
    model,
    x_BMD,
    batch["targets"],
    batch["weights"],
    parts=program.loss_chunks,
    axes=axes,
    z_loss=z_loss,
  )
  targets = metrics.Targets(
    losses.nll_BM, losses.correct_BM, batch.get("recalled")
  )
  nll = (batch["weights"] * losses.nll_BM).sum() if z_loss else loss
  return loss, metrics.target_sums(nll, batch["weights"], targets)


def eval_step(params: Any, batch: Batch, program: Program) -> dict[str, Array]:
  """Return `metrics.target_sums` of a batch, without dropout.

  Args:
    params: the parameters.
    batch: as in `train_step`; also `rare` (B, T) if `recall` has a limit.
    program: the model and its layout.
  """
  if program.recall is not None:
    # Text has a target at every token, so M = T.
    recalled_BM = recalled(batch, program.recall).astype(jnp.float32)
    batch = batch | {"recalled": recalled_BM}
  return loss_sums(params, batch, program)[1]
