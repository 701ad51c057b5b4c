"""The compiled training and evaluation step of a run, and its first state.

Everything that touches devices is built here, under the mesh of the caller's
`jax.set_mesh`. The loop only calls what this module returns.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
from jax.sharding import Mesh
import optax

from rebased_jax import LM, ModelConfig
from train import optimizer, step
from train.config import RunConfig
from train.devices import (
  batch_sharding,
  mesh as mesh_lib,
  parameter_sharding,
)

_DROPOUT = 1  # folded into the run's key; parameters use the key itself


@dataclasses.dataclass(frozen=True)
class Steps:
  """The compiled functions of a run, on devices that may be described only."""

  mesh: Mesh
  #: The static part of both steps.
  program: step.Program
  #: Shapes, dtypes and shardings of the state.
  abstract: step.State
  #: (state, batch, key) → (state, metrics). It donates the state.
  train_step: Any
  #: (params, batch) → sums over the targets.
  eval_step: Any


@dataclasses.dataclass(frozen=True)
class Built(Steps):
  """The parts of a run that live on devices."""

  #: The PRNG key of dropout, on every device.
  key: jax.Array


def build(config: RunConfig, mesh: Mesh) -> Built:
  """Prepare both steps; they are traced and compiled at their first call.

  Raises:
    ValueError: the batch does not fit the devices.
  """
  steps = make_steps(config, mesh)
  key = dropout_key(config.seed)
  return Built(
    mesh=steps.mesh,
    program=steps.program,
    abstract=steps.abstract,
    train_step=steps.train_step,
    eval_step=steps.eval_step,
    key=jax.device_put(key, mesh_lib.replicated(mesh)),
  )


def make_steps(config: RunConfig, mesh: Mesh) -> Steps:
  """Do what `build` does, for devices that need not be attached.

  Raises:
    ValueError: the batch does not fit the devices.
  """
  mesh_lib.check_batch(
    config.batch, config.accumulate, config.data.length, mesh
  )
  tx = optimizer.make(config.optimizer, config.steps)
  graph, _ = nnx.split(abstract_model(config))
  ema = config.ema is not None
  shapes = jax.eval_shape(
    lambda: new_state(config.model, config.seed, tx, ema=ema)
  )
  placed = parameter_sharding.named_shardings(shapes, mesh)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    placed,
  )
  program = step.Program(
    graph,
    tx,
    config.accumulate,
    mesh_lib.shard_axes(mesh, getattr(config.model.second, "heads", None)),
    placed.params,
    loss_chunks=config.loss_chunks,
    skip=config.nan == "skip",
    recall=config.data.recall,
    z_loss=config.z_loss,
    ema=config.ema,
  )
  batch = batch_sharding.field_shardings(
    tuple(config.data.fields(config.batch)), mesh
  )
  eval_batch = batch_sharding.field_shardings(
    tuple(config.data.eval_fields(config.micro_batch)), mesh
  )
  everywhere = mesh_lib.replicated(mesh)
  # A state stays where it is, rows and tokens are split, and the metrics are on
  # every device, so that each process can read them.
  train_step = jax.jit(
    _with_program(step.train_step, program),
    in_shardings=(placed, batch, everywhere),
    out_shardings=(placed, everywhere),
    donate_argnums=0,
  )
  eval_step = jax.jit(
    _with_program(step.eval_step, program),
    in_shardings=(placed.params, eval_batch),
    out_shardings=everywhere,
  )
  return Steps(mesh, program, abstract, train_step, eval_step)


def step_inputs(config: RunConfig, steps: Steps) -> tuple[Any, Any, Any]:
  """Return what a training step takes, as shapes, dtypes and shardings."""
  fields = config.data.fields(config.batch)
  placed = batch_sharding.field_shardings(tuple(fields), steps.mesh)
  batch = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed[name])
    for name, x in fields.items()
  }
  key = jax.ShapeDtypeStruct(
    (),
    jax.eval_shape(lambda: jax.random.key(0)).dtype,
    sharding=mesh_lib.replicated(steps.mesh),
  )
  return steps.abstract, batch, key


def abstract_model(config: RunConfig) -> LM:
  """Return the run's model with shapes instead of parameters."""
  return abstract_lm(config.model)


def abstract_lm(config: ModelConfig) -> LM:
  """Return a model with shapes instead of parameters."""
  return nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))


def fresh_state(config: RunConfig, built: Built) -> step.State:
  """Return the state before step 0, computed on the devices that hold it.

  The optimiser's part is made after the parameters. The memory that drawing
  them takes is free by then, so that the state itself is the peak.
  """

  def draw() -> Any:
    return new_parameters(config.model, config.seed)

  params = jax.jit(draw, out_shardings=_shardings(built).params)()
  return warm_state(params, built)


def warm_state(params: Any, built: Built) -> step.State:
  """Return the state before step 0 with given parameters.

  Args:
    params: placed as the state has them. They are donated.
    built: the run on its devices.
  """

  def make(params: Any) -> step.State:
    program = built.program
    return step.init_state(params, program.tx, ema=program.ema is not None)

  placed = _shardings(built)
  return jax.jit(make, out_shardings=placed, donate_argnums=0)(params)


def new_state(
  config: ModelConfig,
  seed: int | jax.Array,
  tx: optax.GradientTransformation,
  *,
  ema: bool = False,
) -> step.State:
  """Return the state before step 0, with parameters drawn from the seed.

  Args:
    config: the model.
    seed: the seed.
    tx: the update rule.
    ema: whether to keep an average of the parameters.
  """
  return step.init_state(new_parameters(config, seed), tx, ema=ema)


def new_parameters(config: ModelConfig, seed: int | jax.Array) -> Any:
  """Return parameters drawn from the seed, as nested dicts."""
  model = LM(config, rngs=nnx.Rngs(jax.random.key(seed)))
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def dropout_key(seed: int | jax.Array) -> jax.Array:
  """Return the PRNG key of a run's dropout; parameters use the seed's own."""
  return jax.random.fold_in(jax.random.key(seed), _DROPOUT)


def to_dicts(tree: Any) -> Any:
  """Return any tree of arrays as nested dicts, by the names of its paths."""
  result: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    *parents, name = _names(path)
    inner = result
    for parent in parents:
      inner = inner.setdefault(parent, {})
    inner[name] = leaf
  return result


def from_dicts(dicts: Any, like: Any) -> Any:
  """Return the tree that `to_dicts` made `dicts` of, shaped as `like`."""

  def find(path, _):
    inner = dicts
    for name in _names(path):
      inner = inner[name]
    return inner

  return jax.tree_util.tree_map_with_path(find, like)


def _shardings(built: Built) -> Any:
  return jax.tree.map(lambda x: x.sharding, built.abstract)


def _with_program(
  function: Callable[..., Any], program: step.Program
) -> Callable[..., Any]:
  # The name stands in profiles and in compiled modules.
  bound = functools.partial(function, program=program)
  return functools.wraps(function)(bound)


def _names(path: Any) -> list[str]:
  return [jax.tree_util.keystr((key,), simple=True) for key in path]
