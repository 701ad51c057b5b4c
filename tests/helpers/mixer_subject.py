"""A mixer under test: small, with moved parameters and compiled calls."""

import functools

import chex
from flax import nnx
import jax
import jax.numpy as jnp
from mixer_registry import LENGTH, MIXERS, WIDTH
import numpy as np

from rebased_jax import Mixer, Site

# Few shapes: an operation that is not jitted compiles once for all the mixers.
# Whole rows have 12 tokens, parts of them 6 or, in steps, 1.
B, T, HALF, D = 2, LENGTH, LENGTH // 2, WIDTH
# Two float32 ways to the same sums of a few dozen terms of size 1: roundings
# of 6e-8 each, times the condition of a quotient by Σ sim + eps.
CLOSE = dict(rtol=2e-5, atol=2e-5)


def split(make, change=lambda params: params):
  """Return (graph, params) of a module, made and changed in one program."""
  graph, _ = nnx.split(nnx.eval_shape(make))
  return graph, jax.jit(lambda: change(nnx.split(make())[1]))()


def moved(params, *, seed: int, by: float):
  """Return parameters away from where they start: 0, 1 and N(0, 0.02²)."""
  leaves, tree = jax.tree.flatten(params)
  power = lambda count: 1 << (count - 1).bit_length()
  noise = _noise(seed, power(len(leaves)), power(max(p.size for p in leaves)))
  new = [
    p + np.float32(by) * row[: p.size].reshape(p.shape)
    for p, row in zip(leaves, noise, strict=False)
  ]
  return jax.tree.unflatten(tree, new)


@functools.cache
def _noise(seed: int, rows: int, size: int) -> np.ndarray:
  """Draw for many modules in one program: one draw a parameter takes longer."""
  draw = jax.vmap(lambda key: jax.random.normal(key, (size,), jnp.float32))
  with jax.ensure_compile_time_eval():
    keys = jax.random.split(jax.random.key(seed), rows)
    return jax.device_get(jax.jit(draw)(keys))


class Subject:
  """A mixer whose parameters have moved, and its compiled calls.

  The calls return NumPy arrays: a slice of one compiles nothing.
  """

  def __init__(self, name: str, dtype: str = "float32"):
    site = Site(D, layer=1, layers=2, dtype=dtype)
    fresh = lambda: MIXERS[name].config.make(site, rngs=nnx.Rngs(0))
    change = lambda params: moved(params, seed=1, by=0.4)
    if dtype == "float32":
      self.graph, self.params = split(fresh, change)
    else:  # the same parameters
      self.graph, shapes = nnx.split(nnx.eval_shape(fresh))
      self.params = make(name).params
      kind = lambda params: [
        (x.shape, x.dtype) for x in jax.tree.leaves(params)
      ]
      assert kind(shapes) == kind(self.params)
    self.mixer = nnx.merge(self.graph, self.params)
    self._gradients = jax.jit(self._gradients)
    self._prefill = jax.jit(
      lambda p, *args: self.of(p).prefill(*args[:2], segment_ids=args[2])
    )
    self._step = jax.jit(lambda p, *args: self.of(p).step(*args))
    self.zero = self.mixer.init_state(B)

  def of(self, params) -> Mixer:
    return nnx.merge(self.graph, params)

  def prefill(self, x_BTD, state, ids_BT=None):
    return jax.device_get(self._prefill(self.params, x_BTD, state, ids_BT))

  def step(self, x_BD, state):
    return jax.device_get(self._step(self.params, x_BD, state))

  def steps(self, x_BTD, state):
    ys = []
    for t in range(x_BTD.shape[1]):
      y_BD, state = self.step(x_BTD[:, t], state)
      ys.append(y_BD)
    return np.stack(ys, axis=1), state

  def gradients(self, x_BTD, w_BMD, ids_BT=None, positions_BM=None):
    """Return (dparams, dx_BTD) of Σ w y where w is not 0, and y."""
    found = self._gradients(self.params, x_BTD, w_BMD, ids_BT, positions_BM)
    return jax.device_get(found)

  def _gradients(self, params, x_BTD, w_BMD, ids_BT, positions_BM):
    def loss(params, x_BTD):
      y_BMD = self.of(params)(
        x_BTD, segment_ids=ids_BT, query_positions=positions_BM
      )
      return jnp.where(w_BMD == 0, 0, w_BMD * y_BMD).sum(), y_BMD

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x_BTD)

  def __call__(self, x_BTD, ids_BT=None):
    return self.gradients(x_BTD, tokens(13), ids_BT)[1]


_made = functools.cache(Subject)


def make(name: str, dtype: str = "float32") -> Subject:
  """Return the one subject of a name and a dtype, however they are given."""
  return _made(name, dtype)


@functools.cache
def tokens(seed: int = 12) -> np.ndarray:
  return np.asarray(jax.random.normal(jax.random.key(seed), (B, T, D)))


def assert_close(found, wanted, **tolerance) -> None:
  """Assert that two trees have the same structure and close arrays."""
  chex.assert_trees_all_close(found, wanted, **(tolerance or CLOSE))
