"""Calls of mixers outside `jax.jit` compile once."""

from compilations import compilations
from flax import nnx
import jax
import jax.numpy as jnp
from mixer_registry import ONE_OF_EACH
from mixer_subject import B, make, tokens
import pytest


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_mixer_compiles_nothing_anew(name) -> None:
  subject = make(name)
  mixer = nnx.merge(subject.graph, jax.tree.map(jnp.asarray, subject.params))
  x_BTD, state = jnp.asarray(tokens()), mixer.init_state(B)
  loss = lambda x_BTD: mixer(x_BTD).sum()
  for call in (
    lambda: mixer(x_BTD),
    lambda: mixer.prefill(x_BTD, state),
    lambda: mixer.step(x_BTD[:, 0], state),
    lambda: mixer.init_state(B),
    lambda: jax.grad(loss)(x_BTD),
  ):
    jax.block_until_ready(call())
    with compilations() as count:
      jax.block_until_ready(call())
    assert not count
