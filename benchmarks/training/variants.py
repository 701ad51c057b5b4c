"""Variants of one small language model: which kernels run, and a wrong one.

A variant differs from the others in its dtype, in the operations that leave
their Hopper kernel for plain XLA, or in a defect that is put into the operator.
Everything else is equal: parameters, batches, optimiser.

On a CPU there are no Hopper kernels, so that "kernels" and "xla" are equal.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import hashlib
import importlib
from typing import Any
from unittest import mock

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from rebased_jax import LM, BaseConvConfig, ModelConfig, ReBasedConfig
from rebased_jax.mixers import polynomial
from train import optimizer, step
from train.experiments import text_corpus

#: Operations with a Hopper kernel: the modules that ask whether it runs. The
#: operator is not among them, because its config names the implementation.
ASKED = {
  "norm": ("pallas_kernels.layer_norm.operator",),
  "gelu": ("pallas_kernels.gelu.operator",),
  "loss": ("pallas_kernels.cross_entropy.operator",),
  "convolution": (
    "pallas_kernels.gated_conv.operator",
    "rebased_jax.mixers.conv",
  ),
}
KERNELS = ("operator", *ASKED)
DEFECT = 0.01  # the share of a value, or of the tokens, that is wrong

OPTIMIZER = optimizer.OptimizerConfig(
  learning_rate=1e-3,
  warmup_steps=20,
  beta2=0.95,
  clip_norm=1.0,
  decay="matrices",
)


def _wrong_values(o_BTHP: Array) -> Array:
  """Return o with a fixed error of 1 % in each number, forward and backward."""
  return o_BTHP * _around_one(o_BTHP)


def _wrong_size(o_BTHP: Array) -> Array:
  """Return o with each number 1 % too large, forward and backward."""
  return (o_BTHP.astype(jnp.float32) * (1 + DEFECT)).astype(o_BTHP.dtype)


def _wrong_tokens(o_BTHP: Array, *, share: float = DEFECT) -> Array:
  """Return o with the output of the token before at a share of the tokens."""
  T, period = o_BTHP.shape[1], round(1 / share)
  is_wrong_T = np.arange(T) % period == period // 2
  source_T = np.arange(T) - is_wrong_T
  return o_BTHP[:, source_T]


@jax.custom_vjp
def _wrong_gradient(o_BTHP: Array) -> Array:
  """Return o; its gradient has a fixed error of 1 % in each number."""
  return o_BTHP


_wrong_gradient.defvjp(
  lambda o_BTHP: (o_BTHP, None), lambda _, do_BTHP: (_wrong_values(do_BTHP),)
)


def _around_one(x: Array) -> Array:
  noise = np.random.default_rng(0).standard_normal(x.shape[1:], np.float32)
  return jnp.asarray(1 + DEFECT * noise[None], x.dtype)


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to compute the same training."""

  #: Compute dtype of the model.
  dtype: str = "bfloat16"
  #: Members of `KERNELS` that plain XLA computes instead.
  without: tuple[str, ...] = ()
  #: What is done to the operator's output. None: nothing.
  defect: Callable[[Array], Array] | None = None
  #: Whether each initial parameter is changed by the last of its bits.
  ulp: bool = False


_FLOAT32 = Variant("float32", KERNELS)
_XLA = Variant(without=KERNELS)
VARIANTS = {
  "kernels": Variant(),
  "xla": _XLA,
  "xla-ulp": dataclasses.replace(_XLA, ulp=True),
  "float32": _FLOAT32,
  "float32-ulp": dataclasses.replace(_FLOAT32, ulp=True),
  "wrong-values": Variant(defect=_wrong_values),
  "wrong-gradient": Variant(defect=_wrong_gradient),
  "wrong-size": Variant(defect=_wrong_size),
  "wrong-tokens": Variant(defect=_wrong_tokens),
  "wrong-tokens-3": Variant(
    defect=functools.partial(_wrong_tokens, share=0.03)
  ),
  "wrong-tokens-10": Variant(
    defect=functools.partial(_wrong_tokens, share=0.1)
  ),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of the model and its batches."""

  vocab_size: int = 2048  # at least 1024, so that the loss has a kernel
  width: int = 256
  heads: int = 4
  pairs: int = 3
  rows: int = 8
  length: int = 1024
  #: Bytes of the text that tokens are made of.
  text_bytes: int = 32_000_000

  def model(self) -> ModelConfig:
    """Return the config: ReBased with F = 16, without learned positions."""
    return ModelConfig(
      first=BaseConvConfig(),
      second=ReBasedConfig(heads=self.heads),
      vocab_size=self.vocab_size,
      width=self.width,
      pairs=self.pairs,
      mlp_width=4 * self.width,
    )


QUICK = Sizes(
  vocab_size=64,
  width=32,
  heads=2,
  pairs=1,
  rows=2,
  length=128,
  text_bytes=200_000,
)


@contextlib.contextmanager
def traced_as(variant: Variant) -> Iterator[None]:
  """Trace what is inside as a variant says.

  jax keeps what it traced before under keys that know nothing of variants.
  Its caches are therefore emptied before and after.
  """
  jax.clear_caches()
  with contextlib.ExitStack() as stack:
    for name in variant.without:
      for module in ASKED.get(name, ()):
        no = lambda *_, **__: False
        where = importlib.import_module(module)
        stack.enter_context(mock.patch.object(where, "has_kernel", no))
    if variant.defect is not None:
      name, right = "polynomial_attention", polynomial.polynomial_attention
      wrong = lambda *a, **k: variant.defect(right(*a, **k))
      stack.enter_context(mock.patch.object(polynomial, name, wrong))
    yield
  jax.clear_caches()


def config_of(model: ModelConfig, variant: Variant) -> ModelConfig:
  """Return a model's config as a variant computes it."""
  implementation = "xla" if "operator" in variant.without else None
  second = dataclasses.replace(model.second, implementation=implementation)
  return dataclasses.replace(
    model, second=second, dtype=variant.dtype, precision="highest"
  )


def program(config: ModelConfig, steps: int, *, loss_chunks: int = 2) -> Any:
  """Return the trainer's `Program` of a model, for a run of `steps`."""
  graph, _ = nnx.split(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))))
  tx = optimizer.make(OPTIMIZER, steps)
  return step.Program(graph, tx, 1, None, loss_chunks=loss_chunks)


def init_params(sizes: Sizes, seed: Array) -> Any:
  """Return the parameters of a seed; they are equal in all variants."""
  rngs = nnx.Rngs(jax.random.key(seed))
  model = LM(sizes.model(), rngs=rngs)
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def init_state(sizes: Sizes, seed: Array, total: int) -> step.State:
  """Return the state of a seed before step 0 of `total`."""
  tx = optimizer.make(OPTIMIZER, total)
  return step.init_state(init_params(sizes, seed), tx)


def change_last_bits(state: step.State) -> step.State:
  """Return the state with the last bit of each parameter changed."""
  up = lambda x: jnp.nextafter(x, jnp.full_like(x, jnp.inf))
  return state._replace(params=jax.tree.map(up, state.params))


def make_tokens(sizes: Sizes) -> tuple[np.ndarray, dict[str, Any]]:
  """Return tokens of Python's standard library, and their description.

  A token is a pair of bytes: the V − 1 most common ones, and one for the rest.
  The first hundredth is held out. Documents are those of `benchmarks/text`.
  """
  documents = text_corpus.gather(False, sizes.text_bytes)
  text = "".join(document.text for document in documents).encode()
  text = text[: len(text) // 2 * 2]
  pairs = np.frombuffer(text, np.uint16)
  counts = np.bincount(pairs, minlength=2**16)
  common = np.argsort(-counts, kind="stable")[: sizes.vocab_size - 1]
  ids = np.full(2**16, sizes.vocab_size - 1, np.int32)
  ids[common] = np.arange(len(common), dtype=np.int32)
  return ids[pairs], {
    "bytes": len(text),
    "sha256": hashlib.sha256(text).hexdigest(),
    "other": round(float(1 - counts[common].sum() / counts.sum()), 4),
  }


def batch_at(
  tokens: Array, key: Array, sizes: Sizes, *, held_out: bool = False
) -> step.Batch:
  """Return a batch of rows that begin at random tokens, equal for all variants.

  Args:
    tokens: all tokens of the text.
    key: a PRNG key; the batch is a function of it.
    sizes: rows and length.
    held_out: take the rows of the first hundredth, which training leaves out.
  """
  first = tokens.shape[0] // 100
  low, high = (0, first) if held_out else (first, tokens.shape[0])
  start_B1 = jax.random.randint(
    key, (sizes.rows, 1), low, high - sizes.length - 1
  )
  x_BW = tokens[start_B1 + jnp.arange(sizes.length + 1)[None]]
  weights = jnp.ones((sizes.rows, sizes.length), jnp.float32)
  return dict(tokens=x_BW[:, :-1], targets=x_BW[:, 1:], weights=weights)


def scan_steps(
  state: step.State,
  tokens: Array,
  seed: Array,
  *,
  program: step.Program,
  sizes: Sizes,
  steps: int,
) -> tuple[step.State, Array]:
  """Take `steps` training steps; return the state and the losses (steps,)."""

  def body(state, _):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    batch = batch_at(tokens, key, sizes)
    state, found = step.train_step(state, batch, key, program)
    return state, found["loss"]

  return jax.lax.scan(body, state, length=steps)


def held_out_loss(
  params: Any, tokens: Array, *, program: step.Program, sizes: Sizes
) -> Array:
  """Return the mean loss of 16 held-out batches."""

  def body(total, index):
    key = jax.random.fold_in(jax.random.key(2**31 - 1), index)
    batch = batch_at(tokens, key, sizes, held_out=True)
    loss, _ = step.loss_sums(params, batch, program)
    return total + loss / batch["weights"].size, None

  total, _ = jax.lax.scan(body, jnp.zeros(()), jnp.arange(16))
  return total / 16


def lower_advance(
  variant: Variant,
  sizes: Sizes,
  text_length: int,
  *,
  total: int,
  at_once: int,
) -> Any:
  """Lower a variant's training: (state, tokens, seed) → (state, losses).

  Args:
    variant: the variant.
    sizes: the sizes.
    text_length: how many tokens the text has.
    total: steps of a run, for the learning-rate schedule.
    at_once: steps of one call.
  """
  with traced_as(variant):
    run = program(config_of(sizes.model(), variant), total)
    advance = functools.partial(
      scan_steps, program=run, sizes=sizes, steps=at_once
    )
    state = jax.eval_shape(lambda: init_state(sizes, np.int32(0), total))
    tokens = jax.ShapeDtypeStruct((text_length,), "int32")
    seed = jax.ShapeDtypeStruct((), "int32")
    return jax.jit(advance, donate_argnums=0).lower(state, tokens, seed)


def lower_evaluate(sizes: Sizes, text_length: int) -> Any:
  """Lower (parameters, tokens) → held-out loss, in float32 by plain XLA.

  All variants are measured with it.
  """
  variant = VARIANTS["float32"]
  with traced_as(variant):
    run = program(config_of(sizes.model(), variant), 1000)
    evaluate = functools.partial(held_out_loss, program=run, sizes=sizes)
    params = jax.eval_shape(lambda: init_params(sizes, np.int32(0)))
    tokens = jax.ShapeDtypeStruct((text_length,), "int32")
    return jax.jit(evaluate).lower(params, tokens)
