"""Compare a model's gradient with that of float32 in plain XLA."""

import dataclasses
import functools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from rebased_jax import LM, ModelConfig
from train import step

CHECKED = 512  # tokens of the row whose gradient is compared
# The largest ‖g − g₃₂‖ / ‖g₃₂‖ over all mixers' parameters. Rounding (2⁻⁹ an
# operation) gives a few hundredths; a wrong kernel gives about 1.
TOLERANCE = 0.15


def make_model(config: ModelConfig) -> LM:
  return LM(config, rngs=nnx.Rngs(0))


def lower(model: ModelConfig, length: int) -> dict[str, Any]:
  """Lower the gradient of one row: "trained", and "plain" in float32."""
  model = dataclasses.replace(model, scan_layers=True)  # compiles faster
  plain = dataclasses.replace(model, dtype="float32", remat="none")
  mixer = dataclasses.replace(plain.second, implementation="xla")
  first = mixer if type(plain.first) is type(mixer) else plain.first
  plain = dataclasses.replace(plain, second=mixer, first=first)
  params = jax.eval_shape(
    lambda: nnx.to_pure_dict(nnx.state(make_model(model), nnx.Param))
  )
  tokens = jax.ShapeDtypeStruct((1, min(length, CHECKED) + 1), "int32")

  def gradient(config: ModelConfig, chunks: int, params, tokens_1W):
    graph, _ = nnx.split(nnx.eval_shape(lambda: make_model(config)))
    batch = {"tokens": tokens_1W[:, :-1], "targets": tokens_1W[:, 1:]}
    batch["weights"] = jnp.ones(batch["tokens"].shape)
    program = step.Program(graph, None, 1, None, loss_chunks=chunks)
    loss = lambda params: step.loss_sums(params, batch, program)[0]
    return jax.grad(loss)(params)["pairs"]["second"]["mixer"]

  lowered = {}
  for name, config, chunks in (("trained", model, 2), ("plain", plain, 1)):
    run = functools.partial(gradient, config, chunks)
    with jax.default_matmul_precision("highest" if name == "plain" else None):
      lowered[name] = jax.jit(run).lower(params, tokens)
  return lowered


def error(checks: dict[str, Any], params: Any, vocab_size: int) -> float:
  """Return the relative error of the mixers' gradient."""
  shape = checks["plain"].in_avals[0][1].shape
  tokens = np.random.default_rng(1).integers(0, vocab_size, shape, np.int32)
  found, wanted = (
    jax.device_get(checks[name](params, tokens))
    for name in ("trained", "plain")
  )
  squares = lambda tree: sum(
    float(np.square(x.astype(np.float64)).sum()) for x in jax.tree.leaves(tree)
  )
  difference = squares(jax.tree.map(np.subtract, found, wanted))
  return math.sqrt(difference / squares(wanted))
