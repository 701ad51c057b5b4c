"""From a config to the model, its state and the compiled steps.

Everything that touches devices is built here, under the mesh of the caller's
`jax.set_mesh`; `loop.py` only calls it.
"""

import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.sharding import Mesh

from rebased_jax import LM, ModelConfig
from train import optimizer, step
from train.config import RunConfig
from train.devices import mesh as mesh_lib, sharding

_DROPOUT = 1  # folded into the run's key; parameters use the key itself


class Steps(NamedTuple):
  """The compiled functions of a run, and what they take."""

  mesh: Mesh
  program: step.Program
  abstract: step.State  # shapes, dtypes and shardings of the state
  train_step: Any  # (state, batch, key) → (state, metrics); donates the state
  eval_step: Any  # (params, batch) → sums


class Built(NamedTuple):
  """The parts of a run that live on devices: `Steps`, and the run's key."""

  mesh: Mesh
  program: step.Program
  abstract: step.State
  train_step: Any
  eval_step: Any
  key: jax.Array


def build(config: RunConfig, mesh: Mesh) -> Built:
  """Traces the model and prepares both steps; nothing is computed yet.

  Raises:
    ValueError: the batch does not fit the devices.
  """
  key = jax.random.fold_in(jax.random.key(config.seed), _DROPOUT)
  return Built(
    *steps(config, mesh), jax.device_put(key, sharding.replicated(mesh))
  )


def steps(config: RunConfig, mesh: Mesh) -> Steps:
  """`build`, on devices that need not be there.

  Raises:
    ValueError: the batch does not fit the devices.
  """
  mesh_lib.check_batch(
    config.batch, config.accumulate, config.data.length, mesh
  )
  tx = optimizer.make(config.optimizer, config.steps)
  graph, _ = nnx.split(abstract_model(config))
  shapes = jax.eval_shape(lambda: _init(config, tx))
  placed = sharding.of_tree(shapes, mesh)
  axes = mesh_lib.shard_axes(mesh, getattr(config.model.second, "heads", None))
  program = step.Program(
    graph,
    tx,
    config.accumulate,
    axes,
    placed["params"],
    loss_chunks=config.loss_chunks,
    skip=config.nan == "skip",
    recall=config.data.recall,
  )
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    placed,
  )
  fields = tuple(config.data.fields(config.batch))
  batch = sharding.of_batch(fields, mesh)
  held_out = sharding.of_batch(
    tuple(config.data.eval_fields(config.micro_batch)), mesh
  )
  everywhere = sharding.replicated(mesh)
  train_step = functools.partial(step.train_step, program=program)
  eval_step = functools.partial(step.eval_step, program=program)
  return Steps(
    mesh,
    program,
    abstract,
    jax.jit(
      _named(train_step, "train_step"),
      in_shardings=(placed, batch, everywhere),
      out_shardings=(placed, everywhere),
      donate_argnums=0,
    ),
    jax.jit(
      _named(eval_step, "eval_step"),
      in_shardings=(placed["params"], held_out),
      out_shardings=everywhere,
    ),
  )


def inputs(config: RunConfig, steps: Steps | Built) -> tuple[Any, Any, Any]:
  """What a training step takes: shapes, dtypes and shardings, no arrays."""
  fields = config.data.fields(config.batch)
  placed = sharding.of_batch(tuple(fields), steps.mesh)
  batch = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed[name])
    for name, x in fields.items()
  }
  key = jax.eval_shape(lambda: jax.random.key(0)).dtype
  everywhere = sharding.replicated(steps.mesh)
  return (
    steps.abstract,
    batch,
    jax.ShapeDtypeStruct((), key, sharding=everywhere),
  )


def abstract_model(config: RunConfig) -> LM:
  """The run's model with shapes in place of parameters."""
  return abstract_lm(config.model)


def abstract_lm(config: ModelConfig) -> LM:
  """The model with shapes in place of parameters."""
  return nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))


def fresh_state(config: RunConfig, built: Built) -> step.State:
  """The state before step 0, made where it lies."""
  shardings = jax.tree.map(lambda x: x.sharding, built.abstract)
  make = lambda: _init(config, built.program.tx)
  return jax.jit(make, out_shardings=shardings)()


def warm_state(params: Any, built: Built) -> step.State:
  """The state before step 0, from other weights."""
  shardings = jax.tree.map(lambda x: x.sharding, built.abstract)
  make = lambda params: step.init_state(params, built.program.tx)
  return jax.jit(make, out_shardings=shardings)(params)


def _init(config: RunConfig, tx) -> step.State:
  model = LM(config.model, rngs=nnx.Rngs(config.seed))
  return step.init_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), tx)


def _named(function, name: str):
  function.__name__ = name
  return function


def to_dicts(tree: Any) -> Any:
  """Any tree of arrays as nested dicts, by the names of its paths."""
  result: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    *parents, name = _names(path)
    inner = result
    for parent in parents:
      inner = inner.setdefault(parent, {})
    inner[name] = leaf
  return result


def from_dicts(dicts: Any, like: Any) -> Any:
  """The inverse of `to_dicts`, for a tree of the same structure."""

  def find(path, _):
    inner = dicts
    for name in _names(path):
      inner = inner[name]
    return inner

  return jax.tree_util.tree_map_with_path(find, like)


def _names(path) -> list[str]:
  return [jax.tree_util.keystr((key,), simple=True) for key in path]
