"""Build the systems of `run.py` at a length T, and compile their programs."""

from concurrent import futures
import dataclasses
import itertools
import os
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.measure import UNTIMED
import rebased_jax as rj
from rebased_jax.mixers import base

MODES = ("forward", "both")
WIDER = {"bfloat16": "float32", "float32": "float64"}
CHECKED = 33  # positions of a row whose values are compared


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes that all systems of a result share."""

  width: int  # D
  heads: int  # of Attention, Based and ReBased
  features: int  # F of Based and ReBased
  tokens: int  # B · T
  lengths: tuple[int, ...]  # T
  dtype: str


# Lengths are measured and recorded in this order.
GPU = Sizes(1024, 16, 16, 65536, (2048, 32768, 512, 8192), "bfloat16")
CPU = Sizes(128, 4, 16, 4096, (256, 1024, 4096), "float32")


def systems(sizes: Sizes, T: int) -> dict[str, rj.MixerConfig]:
  """Return the config of each system's mixer, by the system's name."""
  shape = dict(heads=sizes.heads, features=sizes.features)
  return {
    "ReBased": rj.ReBasedConfig(**shape),
    "Based": rj.BasedConfig(**shape),
    "Attention": rj.AttentionConfig(heads=sizes.heads),
    "Mamba": rj.MambaConfig(),
    "RWKV": rj.RWKVConfig(wkv_dtype="float32"),
    "Hyena": rj.HyenaConfig(length=T),
    "BaseConv": rj.BaseConvConfig(),
  }


@dataclasses.dataclass
class Case:
  """A system at a length: its programs, and its row of the result."""

  row: dict[str, Any]
  params: nnx.State
  programs: dict[str, Any]  # lowered at first, then compiled
  positions: np.ndarray
  wide: str  # the dtype of the reference


def make_case(name: str, T: int, sizes: Sizes) -> Case:
  """Return a case whose programs are lowered and not yet compiled."""
  config, wide = systems(sizes, T)[name], WIDER[sizes.dtype]
  site = base.Site(sizes.width, dtype=sizes.dtype)
  mixer = config.make(site, rngs=nnx.Rngs(0))
  if name == "Hyena":  # at its initial values the filter hardly contributes
    for layer in mixer.filter.layers:
      layer.kernel[...] = 10 * layer.kernel[...]
  graph, params = nnx.split(mixer)
  positions = np.unique(np.linspace(0, T - 1, CHECKED).astype(np.int32))
  call = lambda p, x: nnx.merge(graph, p)(x)
  shape = jax.ShapeDtypeStruct(
    (sizes.tokens // T, T, sizes.width), jnp.dtype(sizes.dtype)
  )
  lowered = {
    "forward": jax.jit(call).lower(params, shape),
    "both": jax.jit(_with_gradients(call)).lower(params, shape, shape),
  }
  with jax.enable_x64(wide == "float64"):
    wide_site = dataclasses.replace(site, dtype=wide)
    make = lambda: config.make(wide_site, rngs=nnx.Rngs(0))
    wide_graph, _ = nnx.split(nnx.eval_shape(make))
    chosen = dict(query_positions=positions[None])
    at = lambda p, x: nnx.merge(wide_graph, p)(x, **chosen)
    row = lambda n: jax.ShapeDtypeStruct((1, n, sizes.width), jnp.dtype(wide))
    with jax.default_matmul_precision("highest"):
      lowered["reference"] = jax.jit(_with_gradients(at)).lower(
        params, row(T), row(len(positions))
      )
  text = lowered["forward"].as_text()
  kernels = [x for x in ("cudnn", "mosaic_gpu") if x in text]
  row = {"system": name, "T": T, "kernel": kernels[0] if kernels else "xla"}
  return Case(row, params, lowered, positions, wide)


def _with_gradients(call):
  """Return a function (params, x, dy) → y and the gradients of params and x."""

  def both(params, x, dy):
    y, pull = jax.vjp(call, params, x)
    return y, pull(dy)

  return both


def prepare(sizes: Sizes, names: list[str]) -> list[Case]:
  """Return all cases, compiled.

  On a GPU the timed programs are compiled one at a time: XLA measures candidate
  kernels while it compiles, and other work would disturb it.
  """
  cases = [make_case(n, T, sizes) for T in sizes.lengths for n in names]

  def compile_all(modes, jobs, options=None):
    pairs = list(itertools.product(cases, modes))
    with futures.ThreadPoolExecutor(jobs) as pool:
      lowered = [case.programs[mode] for case, mode in pairs]
      found = list(pool.map(lambda x: x.compile(options), lowered))
    for (case, mode), program in zip(pairs, found, strict=True):
      case.programs[mode] = program

  on_gpu = jax.devices()[0].platform == "gpu"
  compile_all(["reference"], os.cpu_count(), UNTIMED)
  compile_all(MODES, 1 if on_gpu else os.cpu_count())
  return cases
