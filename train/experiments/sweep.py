"""Train one config at many learning rates and seeds, as one program.

A *cell* is one architecture on one data set at a grid of rates and seeds. Its
runs differ in numbers only, so one compiled program trains all of them:

    epoch: state_R, order_RSB → state_R, metrics_SR      R runs, S steps, B rows

Each run is `step.train_step` under `vmap`, with separate parameters, optimiser
state, dropout key and order of the examples. The data set lies on the device,
and an epoch is one `scan` over its steps. Unlimited MQAR has no epochs: there
an epoch is the steps between two evaluations, with the rows of these steps on
the device, those of each seed. Every update rule is linear in the
learning rate, so it is made for rate 1 and each run multiplies its updates by
its rate. Where there are several devices, each trains other runs.

A run that reached the stop accuracy no longer changes: its `ok` flag is
cleared, which stops every later update. Once half of the runs have stopped, the
others continue in a smaller program.

A run of a cell sees the same parameters, batches and dropout as `rebased train`
with its rate and seed; the two differ by rounding alone.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import optax

from train import compiled_steps, optimizer, step
from train.config import MQARPaperData, MQARStreamData, RunConfig
from train.data import mqar, mqar_paper
from train.data.batches import Batch, Batches
from train.experiments import attention_iou

_EVAL_ROWS = 500  # of the test set, at a time
_ATTENTION_ROWS = 250  # whose attention matrices are in memory at a time
ATTENTION_SHOWN = 3  # of these examples, whose weights are kept
_ATTENTION_SEED = 62  # of examples that are in neither data set
# A smaller program takes a compilation, which few epochs do not earn.
_EPOCHS_WORTH_COMPILING = 8
# Fields of a run that a sweep cannot follow, and so takes at their defaults.
_WITHOUT = (
  *("ema", "init_from", "nan", "mesh", "profile"),
  *("keep_every", "keep_best", "tensorboard", "wandb"),
)


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
  #: Examples on which attention is compared with the right tokens after each
  #: epoch, as `attention_iou` does; a multiple of 250. 0: none.
  attention_examples: int = 0

  def __post_init__(self) -> None:
    if not isinstance(self.run.data, MQARPaperData | MQARStreamData):
      raise ValueError(
        f"the data is {type(self.run.data).__name__}: expected MQAR, whose "
        "rows fit on a device: take a preset such as mqar or "
        "mqar-paper-rebased-128"
      )
    if self.run.steps % self.epoch_steps:
      field = " (eval_every)" if self.is_stream else ""
      raise ValueError(
        f"steps={self.run.steps}: expected a multiple of the steps of an "
        f"epoch, {self.epoch_steps}{field}"
      )
    for field in dataclasses.fields(self.run):
      value = getattr(self.run, field.name)
      if field.name in _WITHOUT and value != field.default:
        raise ValueError(
          f"{field.name}={value!r}: expected {field.default!r}, because a "
          "sweep has no such setting: `rebased train` has it, for one run"
        )
    if self.attention_examples % _ATTENTION_ROWS:
      raise ValueError(
        f"attention_examples={self.attention_examples}: expected a multiple of "
        f"{_ATTENTION_ROWS}"
      )
    if self.attention_examples and self.is_stream:
      raise ValueError(
        f"attention_examples={self.attention_examples}: expected 0 with "
        "unlimited data"
      )
    for name in ("rates", "seeds"):
      if not getattr(self, name):
        raise ValueError(f"{name}=(): expected at least one")
      values = getattr(self, name)
      if len(set(values)) < len(values):
        raise ValueError(f"{name}={values}: expected different values")
    for rate in self.rates:
      if not 0 < rate < float("inf"):
        raise ValueError(f"rates={self.rates}: expected positive numbers")
    for seed in self.seeds:
      if not 0 <= seed < 2**31:
        raise ValueError(f"seeds={self.seeds}: expected integers, 0 to 2³¹ − 1")

  @property
  def runs(self) -> list[tuple[float, int]]:
    """The rate and the seed of each run, in the order of the run axis."""
    return [(rate, seed) for rate in self.rates for seed in self.seeds]

  @property
  def is_stream(self) -> bool:
    """Whether each seed has other rows, without an end."""
    return isinstance(self.run.data, MQARStreamData)

  @property
  def epoch_steps(self) -> int:
    """Updates of the parameters in one epoch."""
    if isinstance(self.batches, mqar_paper.MQARPaper):
      return self.batches.steps_per_epoch
    return self.run.eval_every

  @property
  def epochs(self) -> int:
    """Epochs of a run that does not stop early."""
    return self.run.steps // self.epoch_steps

  def order(
    self, epoch: int, seeds: Sequence[int]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Return which examples each run sees in an epoch.

    Args:
      epoch: the epoch, from 0.
      seeds: the seed of each run.

    Returns:
      (order_RSB, weights_SB): int32 indices of `examples`, so that a run sees
      what `rebased train` shows it; float32 weights, 0 where the last batch is
      filled up.
    """
    S, B = self.epoch_steps, self.run.batch
    if not isinstance(self.batches, mqar_paper.MQARPaper):
      first_R = [S * B * _unique(seeds).index(seed) for seed in seeds]
      order_RSB = np.add.outer(first_R, np.arange(S * B)).reshape(-1, S, B)
      return order_RSB.astype(np.int32), np.ones((S, B), np.float32)
    examples = self.batches.examples
    place_SB = np.arange(S * B).reshape(S, B)
    filled_SB = np.minimum(place_SB, examples - 1)
    by_seed = {
      seed: mqar_paper.epoch_order(seed, epoch, examples)[filled_SB]
      for seed in set(seeds)
    }
    order_RSB = np.stack([by_seed[seed] for seed in seeds])
    weights_SB = (place_SB < examples).astype(np.float32)
    return order_RSB.astype(np.int32), weights_SB

  def examples(self, epoch: int, seeds: Sequence[int]) -> Batch:
    """Return the examples that the runs see in an epoch, which `order` counts.

    Args:
      epoch: the epoch, from 0. The paper's data is the same in each.
      seeds: the seed of each run.

    Returns:
      Arrays by name, (N, …). Those of unlimited data are the rows of each seed
      in turn.
    """
    if isinstance(self.batches, mqar_paper.MQARPaper):
      return _examples(self.batches)
    first = epoch * self.epoch_steps
    steps = range(first, first + self.epoch_steps)
    return _concatenated(
      [
        self.run.data.train_batches(self.run.batch, seed).read_rows(
          step, 0, self.run.batch
        )
        for seed in _unique(seeds)
        for step in steps
      ]
    )

  def held_out(self, seeds: Sequence[int]) -> Batch:
    """Return the held-out rows, the last ones of weight 0 where filled up.

    Args:
      seeds: the seed of each run.

    Returns:
      Arrays by name: (N, …) of the paper's data, which is the same for all, or
      (R, N, …) of unlimited data.
    """
    if isinstance(self.batches, mqar_paper.MQARPaper):
      return _examples(mqar_paper.paper_test_batches(self.batches.config))
    by_seed = {
      seed: _all_rows(self.run.data.eval_batches(_EVAL_ROWS, seed))
      for seed in _unique(seeds)
    }
    parts = [by_seed[seed] for seed in seeds]
    return {name: np.stack([x[name] for x in parts]) for name in parts[0]}

  @functools.cached_property
  def batches(self) -> mqar_paper.MQARPaper | mqar.MQARStream:
    """The batches of a run, for their sizes; the seed does not matter."""
    found = self.run.data.train_batches(self.run.batch, 0)
    assert isinstance(found, mqar_paper.MQARPaper | mqar.MQARStream)
    return found


class Epoch(NamedTuple):
  """Results of one epoch of a sweep; each array has one number per run."""

  number: int  # from 0
  runs: tuple[int, ...]  # which runs of the cell the numbers are of
  active_R: np.ndarray  # bool: the run was still training in this epoch
  finite_R: np.ndarray  # bool: no step of the run had an Inf or NaN
  accuracy_R: np.ndarray  # held-out, of all targets
  loss_R: np.ndarray  # held-out
  train_loss_R: np.ndarray  # mean over the steps
  metrics_SR: dict[str, np.ndarray]  # every metric of every step
  affine_R2: dict[str, np.ndarray]  # as `affine_moments`, after the epoch
  iou_R: dict[str, np.ndarray]  # as `attention_iou.ious`, after the epoch
  # Weights (X, N, 2 N) of each run on the first examples, as the mean over
  # heads, after the epoch. None: the cell does not want them.
  attention_R: np.ndarray | None
  seconds: float  # of training and evaluation together


class _HostInputs(NamedTuple):
  """The inputs of an epoch on the host, made while the one before is computed.

  They are of use as long as the sweep has the same runs.
  """

  epoch: int
  runs: tuple[int, ...]
  order_RSB: np.ndarray
  weights_SB: np.ndarray
  rows_N: dict[str, np.ndarray] | None  # None: the data lie on the devices


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
  """Runs of a cell on the devices of this process.

  Attributes:
    cell: the cell.
    runs: which runs of the cell are trained, by their place in `cell.runs`.
    epoch: the next epoch.
    active_R: which of `runs` have not stopped.
    state_R: the state of each run, stacked.
    compile_seconds: the time of each compilation so far.
  """

  def __init__(
    self,
    cell: Cell,
    runs: Sequence[int] | None = None,
    devices: Sequence[jax.Device] | None = None,
  ):
    """Draw the parameters of every run and put the data on the devices.

    Args:
      cell: the cell.
      runs: which of its runs. None: all.
      devices: the devices to share the runs. None: all of this process.
    """
    run = cell.run
    self.cell = cell
    self.runs = tuple(range(len(cell.runs)) if runs is None else runs)
    self.epoch = 0
    self.active_R = np.ones(len(self.runs), bool)
    self.compile_seconds: list[float] = []
    self._devices = list(jax.local_devices() if devices is None else devices)
    unit_rate = dataclasses.replace(run.optimizer, learning_rate=1.0)
    self._tx = optax.chain(
      optimizer.make(unit_rate, run.steps), scale_by_run_rate()
    )
    graph, _ = nnx.split(compiled_steps.abstract_lm(run.model))
    self._program = step.Program(
      graph,
      self._tx,
      run.accumulate,
      None,
      loss_chunks=run.loss_chunks,
      z_loss=run.z_loss,
    )
    seeds = [cell.runs[index][1] for index in self.runs]
    # Rows of unlimited data come with each epoch.
    self._train_N = None if cell.is_stream else cell.examples(0, seeds)
    self._test_N = {"test": cell.held_out(seeds)}
    if cell.attention_examples:
      self._test_N["attention"] = _examples(_attention_batches(cell))
    chosen = [cell.runs[index] for index in self.runs]
    rates_R = jnp.asarray([rate for rate, _ in chosen], jnp.float32)
    seeds_R = jnp.asarray([seed for _, seed in chosen], jnp.int32)
    self.state_R = jax.jit(jax.vmap(self._first_state))(rates_R, seeds_R)
    self._keys_R = jax.vmap(compiled_steps.dropout_key)(seeds_R)
    self._ahead = self._prepare(self.epoch)
    self._place()

  def epochs(self) -> Iterator[Epoch]:
    """Train epoch after epoch until all runs have stopped or are finished."""
    while self.epoch < self.cell.epochs and self.active_R.any():
      yield self._run_epoch()

  def compile(self) -> None:
    """Compile both programs, unless they are compiled.

    Raises:
      MemoryError: a program needs more memory than a device has.
    """
    if self._compiled is not None:
      return
    begin = time.perf_counter()
    with jax.default_matmul_precision(self.cell.precision):
      train = jax.jit(self._on_devices(_train_epoch), donate_argnums=0).lower(
        self.state_R, self._keys_R, *self._inputs()
      )
      evaluate = jax.jit(self._on_devices(_test)).lower(
        self.state_R.params, self._test_N
      )
    self._compiled = train.compile(), evaluate.compile()
    self.compile_seconds.append(time.perf_counter() - begin)
    for program in self._compiled:
      _check_memory(program, self._devices[0], len(self.runs))

  def keep(self, runs: Sequence[int]) -> None:
    """Drop the other runs; the rest continues in a smaller program.

    Args:
      runs: the runs to keep, of `self.runs`.
    """
    places = np.asarray([self.runs.index(run) for run in runs])
    self.runs = tuple(runs)
    self.active_R = self.active_R[places]
    self.state_R = jax.tree.map(lambda x_R: x_R[places], self.state_R)
    self._keys_R = self._keys_R[places]
    if self.cell.is_stream:
      self._test_N = jax.tree.map(lambda x_R: x_R[places], self._test_N)
    self._place()

  def arrays(self) -> dict[str, Any]:
    """Return the state as nested dicts of arrays, to be saved."""
    return compiled_steps.to_dicts(self.state_R)

  def load(self, arrays: dict[str, Any], epoch: int) -> None:
    """Continue at an epoch from the `arrays` of a sweep of the same runs.

    Args:
      arrays: what `arrays` returned.
      epoch: the epoch that is next.
    """
    self.state_R = compiled_steps.from_dicts(arrays, self.state_R)
    self.active_R = np.asarray(jax.device_get(self.state_R.ok))
    self.epoch = epoch
    self._place()

  def _run_epoch(self) -> Epoch:
    self.compile()
    train, evaluate = self._compiled
    begin = time.perf_counter()
    self.state_R, metrics_SR = train(
      self.state_R, self._keys_R, *self._inputs()
    )
    tested_R = evaluate(self.state_R.params, self._test_N)
    if self.epoch + 1 < self.cell.epochs:
      # While the devices compute.
      self._ahead = self._prepare(self.epoch + 1)
    metrics_SR, tested_R, ok_R = jax.device_get(
      (metrics_SR, tested_R, self.state_R.ok)
    )
    sums_R = tested_R.sums
    accuracy_R = sums_R["accuracy"] / sums_R["tokens"]
    found = Epoch(
      number=self.epoch,
      runs=self.runs,
      active_R=self.active_R,
      finite_R=ok_R,
      accuracy_R=accuracy_R,
      loss_R=sums_R["loss"] / sums_R["tokens"],
      train_loss_R=metrics_SR["loss"].mean(axis=0),
      metrics_SR=metrics_SR,
      affine_R2=tested_R.affine,
      iou_R=tested_R.iou,
      attention_R=tested_R.attention,
      seconds=time.perf_counter() - begin,
    )
    self.epoch += 1
    self._stop(found)
    return found

  def _stop(self, found: Epoch) -> None:
    """Stop the runs above the stop accuracy, and those that left the finite."""
    active_R = found.active_R & found.finite_R
    if self.cell.run.stop_accuracy is not None:
      active_R &= ~(found.accuracy_R > self.cell.run.stop_accuracy)
    if not (active_R == self.active_R).all():
      self.active_R = active_R
      ok_R = jax.device_put(active_R, self.state_R.ok.sharding)
      self.state_R = self.state_R._replace(ok=ok_R)
    left = [run for run, on in zip(self.runs, active_R, strict=True) if on]
    enough = self.cell.epochs - self.epoch >= _EPOCHS_WORTH_COMPILING
    if enough and 0 < 2 * len(left) <= len(self.runs):
      self.keep(left)

  def _place(self) -> None:
    """Share the runs among as many devices as divide their number."""
    count = next(
      n for n in range(len(self._devices), 0, -1) if len(self.runs) % n == 0
    )
    self._mesh = Mesh(np.asarray(self._devices[:count]), ("runs",))
    runs = NamedSharding(self._mesh, P("runs"))
    everywhere = NamedSharding(self._mesh, P())
    self.state_R, self._keys_R = jax.device_put(
      (self.state_R, self._keys_R), runs
    )
    if self._train_N is not None:
      self._train_N = jax.device_put(self._train_N, everywhere)
    place = runs if self.cell.is_stream else everywhere
    self._test_N = jax.device_put(self._test_N, place)
    self._compiled = None

  def _inputs(self) -> tuple[Array, Array, dict[str, Array]]:
    """Return order_RSB, weights_SB and train_N of this epoch on the devices."""
    if (self._ahead.epoch, self._ahead.runs) != (self.epoch, self.runs):
      self._ahead = self._prepare(self.epoch)
    _, _, order_RSB, weights_SB, rows_N = self._ahead
    everywhere = NamedSharding(self._mesh, P())
    train_N = self._train_N
    if rows_N is not None:
      train_N = jax.device_put(rows_N, everywhere)
    return (
      jax.device_put(order_RSB, NamedSharding(self._mesh, P("runs"))),
      jax.device_put(weights_SB, everywhere),
      train_N,
    )

  def _prepare(self, epoch: int) -> _HostInputs:
    """Make the inputs of an epoch on the host."""
    seeds = [self.cell.runs[run][1] for run in self.runs]
    rows_N = self.cell.examples(epoch, seeds) if self.cell.is_stream else None
    return _HostInputs(epoch, self.runs, *self.cell.order(epoch, seeds), rows_N)

  def _on_devices(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """Bind the program to a function, and give each device its own runs."""
    bound = functools.partial(function, program=self._program)
    if function is _test:
      bound = functools.partial(bound, own_rows=self.cell.is_stream)
    if self._mesh.size == 1:
      return bound
    if function is _test:
      test = P("runs") if self.cell.is_stream else P()
      return jax.shard_map(
        bound, mesh=self._mesh, in_specs=(P("runs"), test), out_specs=P("runs")
      )
    return jax.shard_map(
      bound,
      mesh=self._mesh,
      in_specs=(P("runs"), P("runs"), P("runs"), P(), P()),
      out_specs=(P("runs"), P(None, "runs")),
    )

  def _first_state(self, rate: Array, seed: Array) -> step.State:
    state = compiled_steps.new_state(self.cell.run.model, seed, self._tx)
    *rest, _ = state.opt_state
    return state._replace(opt_state=(*rest, RunRate(rate)))


def _train_epoch(
  state_R: Any,
  keys_R: Array,
  order_RSB: Array,
  weights_SB: Array,
  train_N: dict[str, Array],
  *,
  program: step.Program,
) -> tuple[Any, dict[str, Array]]:
  """Run one epoch: (state_R, metrics_SR)."""

  def train(state, key, index_B, weights_B):
    batch = {name: x_N[index_B] for name, x_N in train_N.items()}
    batch["weights"] = batch["weights"] * weights_B[:, None]
    return step.train_step(state, batch, key, program)

  def body(state_R, inputs):
    index_RB, weights_B = inputs
    every = jax.vmap(train, in_axes=(0, 0, 0, None))
    return every(state_R, keys_R, index_RB, weights_B)

  steps = jnp.moveaxis(order_RSB, 1, 0), weights_SB
  return jax.lax.scan(body, state_R, steps)


def affine_moments(params: Any) -> dict[str, Array]:
  """Return mean and standard deviation of each γ and β of ReBased's norms.

  Figure 10 of the paper shows them during training.

  Args:
    params: of an `LM`.

  Returns:
    (2,) by name: "layer1.query_affine.gamma" is γ of the queries in the second
    layer. Models without γ and β have none.
  """
  found = {}
  for path, x_PF in jax.tree.leaves_with_path(params):
    words = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    if words[0] != "pairs" or words[-1] not in ("gamma", "beta"):
      continue
    place = ("first", "second").index(words[1])
    for pair, x_F in enumerate(x_PF):
      name = ".".join((f"layer{2 * pair + place}", *words[-2:]))
      found[name] = jnp.stack([x_F.mean(), x_F.std()])
  return found


class _Tested(NamedTuple):
  """Results of an evaluation; each array has one entry a run."""

  sums: dict[str, Array]  # `metrics.target_sums` of the test set
  affine: dict[str, Array]  # `affine_moments`
  iou: dict[str, Array]  # `attention_iou.ious`, if the cell wants them
  attention: Array | None  # (X, N, 2 N), weights on the first examples, or None


def _test(
  params_R: Any,
  test_N: dict[str, Any],
  *,
  program: step.Program,
  own_rows: bool,
) -> _Tested:
  """Evaluate the runs; `own_rows`: `test_N` has an axis of runs in front."""

  def total(function, examples_N, rows):
    """Sum a function of batches over all examples."""
    parts = jax.tree.map(
      lambda x: x.reshape(-1, rows, *x.shape[1:]), examples_N
    )
    return jax.tree.map(lambda x: x.sum(axis=0), jax.lax.map(function, parts))

  def results(params, test_N):
    def evaluate(batch):
      return step.eval_step(params, batch, program)

    def look(batch):
      model = nnx.merge(program.graph, params)
      return attention_iou.overlaps(model, batch["tokens"], batch["positions"])

    sums = total(evaluate, test_N["test"], _EVAL_ROWS)
    iou, attention = {}, None
    if "attention" in test_N:
      overlaps = total(look, test_N["attention"], _ATTENTION_ROWS)
      iou = attention_iou.ious(overlaps)
      weights_XHNS = attention_iou.query_weights(
        nnx.merge(program.graph, params),
        test_N["attention"]["tokens"][:ATTENTION_SHOWN],
        test_N["attention"]["positions"][:ATTENTION_SHOWN],
      )
      attention = weights_XHNS.mean(axis=1)
    return _Tested(sums, affine_moments(params), iou, attention)

  axis = 0 if own_rows else None
  return jax.vmap(results, in_axes=(0, axis))(params_R, test_N)


def _check_memory(program: Any, device: jax.Device, runs: int) -> None:
  """Raise MemoryError if a compiled program does not fit on its device."""
  limit = (device.memory_stats() or {}).get("bytes_limit")
  memory = program.memory_analysis()
  if limit is None or memory is None:
    return  # a CPU, whose memory jax does not know
  needed = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )
  if needed > limit:
    raise MemoryError(
      f"{runs} runs in one program take {needed / 2**30:.1f} GiB, and a device "
      f"has {limit / 2**30:.1f} GiB"
    )


def attention_columns(cell: Cell) -> np.ndarray:
  """Return the right column of each query that `Epoch.attention_R` shows.

  Args:
    cell: a cell with `attention_examples`.

  Returns:
    Integers (X, N), in 0 … 2 N − 1.
  """
  examples = _examples(_attention_batches(cell))
  G_XNS = attention_iou.right_columns(
    jnp.asarray(examples["tokens"][:ATTENTION_SHOWN]),
    jnp.asarray(examples["positions"][:ATTENTION_SHOWN]),
  )
  return np.asarray(G_XNS.argmax(axis=-1))


def _attention_batches(cell: Cell) -> mqar_paper.MQARPaper:
  """Return the examples on which attention is compared."""
  batches = mqar_paper.paper_test_batches(cell.batches.config)
  return dataclasses.replace(
    batches, examples=cell.attention_examples, data_seed=_ATTENTION_SEED
  )


def _unique(seeds: Sequence[int]) -> list[int]:
  """Return the seeds without repetitions, in their order."""
  return list(dict.fromkeys(seeds))


def _concatenated(parts: Sequence[Batch]) -> Batch:
  return {name: np.concatenate([x[name] for x in parts]) for name in parts[0]}


def _all_rows(batches: Batches) -> Batch:
  """Return the rows of all batches, of which there are finitely many."""
  count = batches.num_batches
  assert count is not None
  return _concatenated(
    [batches.read_rows(step, 0, _EVAL_ROWS) for step in range(count)]
  )


def _examples(batches: mqar_paper.MQARPaper) -> Batch:
  """Return all examples of a data set, in its own order."""
  parts = mqar_paper.load_paper_examples(
    batches.config, batches.examples, batches.data_seed, batches.cache_dir
  )
  return mqar.mqar_rows(batches.config, *parts.astype(np.int32))
