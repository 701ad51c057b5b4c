"""Train one config at many learning rates and seeds, as one program.

A *cell* is one architecture on one data set at a grid of rates and seeds. Its
runs differ in numbers only, so one compiled program trains all of them:

    epoch: state_R, order_RSB → state_R, metrics_SR      R runs, S steps, B rows

Each run is `step.train_step` under `vmap`, with its own parameters, optimiser
state, dropout key and order of the examples. The data set lies on the device,
and an epoch is one `scan` over its steps. AdamW is linear in the learning rate,
so the update rule is made for rate 1 and each run multiplies its updates by its
own rate. A run that reached the stop accuracy no longer changes: its `ok` flag
is cleared, which stops every later update.

A run of a cell sees the same parameters, batches and dropout as `rebased train`
with its rate and seed; the two differ by rounding alone.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import optax

from train import compiled_steps, optimizer, step
from train.config import MQARPaperData, RunConfig
from train.data import mqar, mqar_paper

_EVAL_ROWS = 500  # of the test set, at a time


@dataclasses.dataclass(frozen=True)
class Cell:
  """One architecture on one data set at a grid of learning rates and seeds."""

  #: The run that is repeated. Its learning rate and seed are not used.
  run: RunConfig
  #: Highest learning rates.
  rates: tuple[float, ...]
  #: Seeds of parameters, dropout and the order of the examples.
  seeds: tuple[int, ...]
  #: Precision of float32 products, as `jax.default_matmul_precision` names it.
  precision: str = "highest"

  def __post_init__(self) -> None:
    if not isinstance(self.run.data, MQARPaperData):
      raise ValueError(
        f"Cell.run.data is a {type(self.run.data).__name__}: expected "
        "MQARPaperData, whose examples fit on the device"
      )
    for name in ("rates", "seeds"):
      if not getattr(self, name):
        raise ValueError(f"Cell.{name}=(): expected at least one")

  @property
  def runs(self) -> list[tuple[float, int]]:
    """The rate and the seed of each run, in the order of the run axis."""
    return [(rate, seed) for rate in self.rates for seed in self.seeds]

  @property
  def epoch_steps(self) -> int:
    """Updates of the parameters in one epoch."""
    return self.batches.steps_per_epoch

  @property
  def epochs(self) -> int:
    """Epochs of a run that does not stop early."""
    return self.run.steps // self.epoch_steps

  def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which examples each run sees in an epoch.

    Args:
      epoch: the epoch, from 0.

    Returns:
      (order_RSB, weights_SB): int32 indices of examples, the same as in
      `MQARPaper`; float32 weights, 0 where the last batch is filled up.
    """
    S, B = self.epoch_steps, self.run.batch
    examples = self.batches.examples
    place_SB = np.arange(S * B).reshape(S, B)
    filled_SB = np.minimum(place_SB, examples - 1)
    by_seed = {
      seed: mqar_paper.epoch_order(seed, epoch, examples)[filled_SB]
      for seed in self.seeds
    }
    order_RSB = np.stack([by_seed[seed] for _, seed in self.runs])
    weights_SB = (place_SB < examples).astype(np.float32)
    return order_RSB.astype(np.int32), weights_SB

  @functools.cached_property
  def batches(self) -> mqar_paper.MQARPaper:
    """The batches of a run, for their sizes; the seed does not matter."""
    found = self.run.data.train_batches(self.run.batch, 0)
    assert isinstance(found, mqar_paper.MQARPaper)
    return found


class Epoch(NamedTuple):
  """Results of one epoch of a cell; each array has one number per run."""

  number: int  # from 0
  accuracy_R: np.ndarray  # held-out, of all targets
  loss_R: np.ndarray  # held-out
  train_loss_R: np.ndarray  # mean over the steps
  active_R: np.ndarray  # bool: the run was still training in this epoch
  metrics_SR: dict[str, np.ndarray]  # every metric of every step
  seconds: float  # of training and evaluation together


class RunRate(NamedTuple):
  """State of `scale_by_run_rate`."""

  rate: Array  # float32 scalar, one a run under vmap


def scale_by_run_rate() -> optax.GradientTransformation:
  """Multiply updates by a rate that lies in the optimiser's state."""

  def init(params: Any) -> RunRate:
    del params
    return RunRate(jnp.ones((), jnp.float32))

  def update(updates: Any, state: RunRate, params: Any = None):
    del params
    return jax.tree.map(lambda x: x * state.rate, updates), state

  return optax.GradientTransformation(init, update)


class Sweep:
  """A cell on the devices of this process: its state and compiled programs."""

  def __init__(self, cell: Cell):
    """Draw the parameters of every run and put the data on the device.

    Args:
      cell: the runs.
    """
    run = cell.run
    self.cell = cell
    unit_rate = dataclasses.replace(run.optimizer, learning_rate=1.0)
    self.tx = optax.chain(
      optimizer.make(unit_rate, run.steps), scale_by_run_rate()
    )
    graph, _ = nnx.split(compiled_steps.abstract_lm(run.model))
    self.program = step.Program(
      graph, self.tx, run.accumulate, None, loss_chunks=run.loss_chunks
    )
    self.train_N = _examples(cell.batches)
    test = mqar_paper.paper_test_batches(cell.batches.config)
    self.test_N = _examples(test)
    rates_R = jnp.asarray([rate for rate, _ in cell.runs], jnp.float32)
    seeds_R = jnp.asarray([seed for _, seed in cell.runs], jnp.int32)
    self.state_R = jax.jit(jax.vmap(self._first_state))(rates_R, seeds_R)
    self.keys_R = jax.vmap(compiled_steps.dropout_key)(seeds_R)
    self.active_R = np.ones(len(cell.runs), bool)
    self.epoch = 0  # the next one
    self._train = jax.jit(self._train_epoch, donate_argnums=0)
    self._evaluate = jax.jit(self._test)

  def epochs(self) -> Iterator[Epoch]:
    """Train epoch after epoch until all runs have stopped or are finished."""
    stop = self.cell.run.stop_accuracy
    while self.epoch < self.cell.epochs and self.active_R.any():
      begin = time.perf_counter()
      order_RSB, weights_SB = self.cell.order(self.epoch)
      with jax.default_matmul_precision(self.cell.precision):
        self.state_R, metrics_SR = self._train(
          self.state_R, self.keys_R, order_RSB, weights_SB, self.train_N
        )
        sums_R = self._evaluate(self.state_R["params"], self.test_N)
      metrics_SR, sums_R = jax.device_get((metrics_SR, sums_R))
      accuracy_R = sums_R["accuracy"] / sums_R["tokens"]
      found = Epoch(
        self.epoch,
        accuracy_R,
        sums_R["loss"] / sums_R["tokens"],
        metrics_SR["loss"].mean(axis=0),
        self.active_R.copy(),
        metrics_SR,
        time.perf_counter() - begin,
      )
      self.epoch += 1
      if stop is not None:
        self.active_R = self.active_R & ~(accuracy_R > stop)
        self.state_R = dict(
          self.state_R, ok=self.state_R["ok"] & jnp.asarray(self.active_R)
        )
      yield found

  def _first_state(self, rate: Array, seed: Array) -> step.State:
    state = compiled_steps.new_state(self.cell.run.model, seed, self.tx)
    *rest, _ = state["opt_state"]
    return dict(state, opt_state=(*rest, RunRate(rate)))

  def _train_epoch(self, state_R, keys_R, order_RSB, weights_SB, train_N):
    """Run one epoch: (state_R, metrics_SR)."""
    one = functools.partial(step.train_step, program=self.program)

    def train(state, key, index_B, weights_B):
      batch = {name: x_N[index_B] for name, x_N in train_N.items()}
      batch["weights"] = batch["weights"] * weights_B[:, None]
      return one(state, batch, key)

    def body(state_R, inputs):
      index_RB, weights_B = inputs
      every = jax.vmap(train, in_axes=(0, 0, 0, None))
      return every(state_R, keys_R, index_RB, weights_B)

    steps = jnp.moveaxis(order_RSB, 1, 0), weights_SB
    return jax.lax.scan(body, state_R, steps)

  def _test(self, params_R, test_N):
    """Return `metrics.target_sums` of the test set, one number a run."""

    def sums(params):
      parts = jax.tree.map(
        lambda x: x.reshape(-1, _EVAL_ROWS, *x.shape[1:]), test_N
      )
      run = lambda batch: step.eval_step(params, batch, self.program)  # noqa: E731
      found = jax.lax.map(run, parts)
      return jax.tree.map(lambda x: x.sum(axis=0), found)

    return jax.vmap(sums)(params_R)


def _examples(batches: mqar_paper.MQARPaper) -> dict[str, Array]:
  """Return all examples of a data set, in its own order, on the device."""
  parts = mqar_paper.load_paper_examples(
    batches.config, batches.examples, batches.data_seed, batches.cache_dir
  )
  rows = mqar.mqar_rows(batches.config, *parts)
  return {name: jnp.asarray(x) for name, x in rows.items()}


def train_cell(
  cell: Cell, report: Callable[[Epoch], None] | None = None
) -> list[Epoch]:
  """Train a cell to its end.

  Args:
    cell: the runs.
    report: called after every epoch. None: nothing is called.

  Returns:
    Every epoch.
  """
  found = []
  for epoch in Sweep(cell).epochs():
    found.append(epoch)
    if report is not None:
      report(epoch)
  return found
