"""One step of training and one of evaluation: pure functions of arrays.

    nll_t  = −log softmax(logits_t)[target_t]
    loss   = Σ w_t · nll_t / Σ w_t           w_t is 1 at a target, 0 at padding
    params ← params + update(∂loss/∂params)

target_t is the token after t in text, and the answer at t in recall tasks.
optimizer.py makes the update: clipping, AdamW and its learning-rate schedule.
Gradient accumulation splits the rows of a batch into micro-batches, which run
one after another. Their Σ w·nll, its gradient and Σ w are added up, and divided
once, at the end. So every target weighs the same in whichever micro-batch.
compiled_steps.py compiles the steps. loop.py calls them, and stops when a state
is no longer `ok`.
"""

import dataclasses
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
  """Return the state before step 0."""
  zero, true = jnp.zeros((), jnp.int32), jnp.ones((), bool)
  return State(zero, true, params, tx.init(params))


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
  found |= metrics.update_metrics(metrics.Update(params, grads, updates))

  norms = found["grad_norm"] + found["update_norm"]
  finite = jnp.isfinite(loss) & jnp.isfinite(norms)
  applies = finite if program.skip else state.ok & finite
  updated = State(
    step=state.step + 1,
    ok=applies | program.skip,
    params=optax.apply_updates(params, updates),
    opt_state=opt_state,
  )
  step = updated.step if program.skip else state.step
  refused = state._replace(ok=updated.ok, step=step)
  kept = jax.tree.map(lambda a, b: jnp.where(applies, a, b), updated, refused)
  return kept, found


def _mean_gradient(
  params: Any, batch: Batch, key: Array, program: Program
) -> tuple[Array, Any, dict[str, Array]]:
  """Return the mean loss, its gradient, and `metrics.target_sums`."""

  def sum_gradient(batch: Batch, key: Array) -> Any:
    value_and_grad = jax.value_and_grad(loss_sums, has_aux=True)
    sums, grads = value_and_grad(params, batch, program, key)
    if program.placed is not None:
      # XLA would otherwise gather whole gradients and only then split them.
      grads = jax.lax.with_sharding_constraint(grads, program.placed)
    return sums, grads

  (loss, sums), grads = sum_over_micro_batches(
    sum_gradient, batch, key, program.accumulate
  )
  scale = 1 / sums["tokens"]  # 1 / Σ w
  return loss * scale, jax.tree.map(lambda g: g * scale, grads), sums


def loss_sums(
  params: Any, batch: Batch, program: Program, dropout_key: Array | None = None
) -> tuple[Array, dict[str, Array]]:
  """Return Σ w · nll over the batch, and `metrics.target_sums` of it.

  Args:
    params: the parameters.
    batch: as in `train_step`; also `recalled` (B, M), float32, 1 at the targets
      that recall counts, where they are told apart.
    program: the model and its layout.
    dropout_key: a PRNG key. None: no dropout.
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
  )
  targets = metrics.Targets(
    losses.nll_BM, losses.correct_BM, batch.get("recalled")
  )
  return loss, metrics.target_sums(loss, batch["weights"], targets)


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
