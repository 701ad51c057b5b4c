"""Call the operator on packed documents: values, gradients and the state."""

import jax
import jax.numpy as jnp

from pallas_kernels import polynomial_attention, which_implementation

attend = jax.jit(polynomial_attention, static_argnames="return_state")

B, T, H, F, P = 2, 96, 4, 16, 32  # rows, tokens, heads, features, value width
keys = jax.random.split(jax.random.key(0), 3)
q = jax.random.normal(keys[0], (B, T, H, F))
k = jax.random.normal(keys[1], (B, T, H, F))
v = jax.random.normal(keys[2], (B, T, H, P))
name, reason = which_implementation()
print(f"implementation here: {name} ({reason})")

# A row holds several documents. Tokens attend within their document only.
first, second = slice(0, 40), slice(40, T)
segment_ids = jnp.zeros((B, T), jnp.int32).at[:, second].set(1)
o = attend(q, k, v, segment_ids=segment_ids)

alone = attend(q[:, second], k[:, second], v[:, second])
print("largest difference:", jnp.abs(o[:, second] - alone).max())
assert jnp.allclose(o[:, second], alone, rtol=1e-4, atol=1e-4)


# The operator is differentiable. The first document gets no gradient from the
# second one's loss.
@jax.jit
def loss(k):
  o = attend(q, k, v, segment_ids=segment_ids)
  return jnp.sum(o[:, second] ** 2)


dk = jax.grad(loss)(k)
assert not dk[:, first].any() and dk[:, second].any()

# A row can be processed in pieces: the recurrent state summarises the past.
o1, state = attend(q[:, first], k[:, first], v[:, first], return_state=True)
o2 = attend(q[:, second], k[:, second], v[:, second], initial_state=state)
whole = attend(q, k, v)
pieces = jnp.concatenate([o1, o2], axis=1)
assert jnp.allclose(whole, pieces, rtol=1e-3, atol=1e-3)
size = sum(x.size for x in jax.tree.leaves(state)) // (B * H)
print("floats of state per head and row, whatever T is:", size)
