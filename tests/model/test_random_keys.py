"""The keys of parameters are those of `nnx.Rngs`, drawn in linear time."""

from flax import nnx
import jax
import numpy as np
import pytest

from rebased_jax import LM, BaseConvConfig, ModelConfig
from rebased_jax.random_keys import in_linear_time

CONFIG = ModelConfig(BaseConvConfig(), BaseConvConfig(), vocab_size=5, width=4)


def _draw(rngs: nnx.Rngs) -> list[jax.Array]:
  parts = rngs.fork(), nnx.vmap(lambda x: x.params())(rngs.split(2))
  found = [rngs.params(), rngs.noise(), rngs(), parts[0].params(), parts[1]]
  return [jax.random.key_data(key) for key in found]


@pytest.mark.parametrize("trace", [jax.jit, lambda function: function])
def test_keys_and_counts_are_those_of_rngs(trace):
  def run(own: bool):
    rngs = nnx.Rngs(3, params=4)
    found = _draw(in_linear_time(rngs) if own else rngs)
    return found, [stream.count[...] for _, stream in rngs.items()]

  wanted, found = trace(lambda: (run(False), run(True)))()
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_model_does_not_call_the_streams_of_flax(monkeypatch):
  """Each such call walks through all that was traced before."""
  wanted = nnx.state(LM(CONFIG, rngs=nnx.Rngs(0)))

  def call(self):
    raise AssertionError("a stream of Flax was called")

  monkeypatch.setattr(nnx.RngStream, "__call__", call)
  found = nnx.state(LM(CONFIG, rngs=nnx.Rngs(0)))
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
