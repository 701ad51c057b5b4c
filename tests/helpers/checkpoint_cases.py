"""A small state with every kind of array, and its checkpoints."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from train.checkpoint.checkpoints import Checkpoints

ROOT = Path(__file__).parents[2]
META = {"config": {"lr": 1e-3, "layers": [1, 2]}, "data": "f00d", "x": None}


def make_state(seed: int) -> dict:
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  odd = np.array([0x7F800001, 0xFF800000, 1, 0x80000000], np.uint32)
  return {
    "step": jnp.int32(seed),
    "params": {
      "embed": {"kernel": jnp.asarray(normal(64, 8))},
      "mixer": {
        "half": jnp.asarray(normal(40)).astype(jnp.bfloat16),
        "zeros": jnp.zeros((8, 3)),
        "nans": jax.lax.bitcast_convert_type(jnp.asarray(odd), jnp.float32),
      },
    },
    "opt_state": {
      "mu": {"embed": {"kernel": jnp.asarray(normal(64, 8))}},
      "count": jnp.int32(-seed),
      "scale": jnp.float32(0.1),
      "mask": jnp.asarray(normal(9) > 0),
      "empty": {},
    },
    "rng": jax.random.key_data(jax.random.key(seed)),
  }


def abstract(state, sharding=None):
  spec = lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=sharding(x) if sharding else x.sharding
  )
  return jax.tree.map(spec, state)


def bits(tree) -> dict:
  flat, structure = jax.tree.flatten_with_path(tree)
  leaves = {
    jax.tree_util.keystr(path): (
      leaf.dtype,
      leaf.shape,
      np.asarray(leaf).tobytes(),
    )
    for path, leaf in flat
  }
  return {"structure": structure, **leaves}


def fill(directory: Path, steps=(1, 2)) -> None:
  with Checkpoints(directory) as checkpoints:
    for step in steps:
      checkpoints.save(step, make_state(step), {**META, "saved": step})


def names(directory: Path) -> set[str]:
  return {path.name for path in directory.iterdir()}


def sharded(count: int, shape: tuple[int, int]):
  mesh = Mesh(np.array(jax.devices()[:count]).reshape(shape), ("a", "b"))

  def place(leaf):
    if leaf.ndim == 2:
      return NamedSharding(mesh, P("a", "b" if leaf.shape[1] == 8 else None))
    return NamedSharding(mesh, P())

  return place
