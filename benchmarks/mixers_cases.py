"""Every system of `mixers.py` at a length, and its programs."""

from concurrent import futures
import dataclasses
import itertools
import os
import sys
from typing import Any

from environment import ROOT
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(ROOT))

from pallas_kernels.measure import UNTIMED  # noqa: E402
import rebased_jax as rj  # noqa: E402
from rebased_jax.mixers import base  # noqa: E402

MODES = ("forward", "both")
WIDER = {"bfloat16": "float32", "float32": "float64"}
CHECKED = 33  # positions


@dataclasses.dataclass(frozen=True)
class Sizes:
  width: int  # D
  heads: int  # of Attention, Based and ReBased
  features: int  # F of Based and ReBased
  tokens: int  # B · T
  lengths: tuple[int, ...]  # T
  dtype: str


# The lengths in the order in which they are measured, and written down.
GPU = Sizes(1024, 16, 16, 65536, (2048, 32768, 512, 8192), "bfloat16")
CPU = Sizes(128, 4, 16, 4096, (256, 1024, 4096), "float32")


def systems(sizes: Sizes, T: int) -> dict[str, rj.MixerConfig]:
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
  """A system at a length: what is compiled, and its row of the table."""

  row: dict[str, Any]
  params: nnx.State
  programs: dict[str, Any]  # lowered, later compiled
  positions: np.ndarray
  wide: str  # the dtype of the reference


def make_case(name: str, T: int, sizes: Sizes) -> Case:
  """Everything lowered, nothing compiled."""
  config, wide = systems(sizes, T)[name], WIDER[sizes.dtype]
  site = base.Site(sizes.width, dtype=sizes.dtype)
  mixer = config.make(site, rngs=nnx.Rngs(0))
  if name == "Hyena":  # or its filter is too near 0 to count
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
  """(params, x, dy) → y and the gradients of both."""

  def both(params, x, dy):
    y, pull = jax.vjp(call, params, x)
    return y, pull(dy)

  return both


def prepare(sizes: Sizes, names: list[str]) -> list[Case]:
  """All cases compiled; on a GPU one by one, but for the references.

  There XLA chooses worse kernels beside other work.
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
