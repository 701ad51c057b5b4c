"""Say our name for an argument that other libraries name differently.

Python alone would say that `num_heads` is unexpected. A message here says that
it is `heads`, and where it goes. This module imports no jax.
"""

from collections.abc import Callable, Iterable
import dataclasses
import difflib
import functools
import inspect
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

#: Names of Flax, Hugging Face and others, by our name for the same thing.
_OURS = {
  "batch": ("batch_size",),
  "dropout": ("dropout_rate", "dropout_p", "attention_dropout"),
  "eps": ("epsilon",),
  "expand": ("expand_factor",),
  "features": ("head_dim", "qk_dim", "key_dim", "feature_dim", "d_k"),
  "heads": (
    "num_heads",
    "n_heads",
    "n_head",
    "nhead",
    "num_attention_heads",
  ),
  "key": ("rng", "rngs", "seed", "prng_key"),
  "length": ("max_length", "max_len", "max_seq_len", "cache_length"),
  "mlp_width": ("mlp_dim", "d_ff", "ffn_dim", "intermediate_size"),
  "pairs": ("num_layers", "n_layers", "layers", "num_hidden_layers", "depth"),
  "param_dtype": ("weight_dtype", "params_dtype"),
  "positions": (
    "max_length",
    "max_len",
    "max_seq_len",
    "n_positions",
    "max_position_embeddings",
  ),
  "prompt": ("input_ids", "inputs", "tokens", "prompts"),
  "remat": ("gradient_checkpointing", "use_remat", "remat_policy"),
  "rngs": ("rng", "key", "seed"),
  "scan_layers": ("scan", "use_scan"),
  "segment_ids": ("segments", "document_ids", "segment_positions"),
  "state": ("d_state", "state_size", "cache", "carry"),
  "steps": ("max_new_tokens", "max_tokens", "num_tokens"),
  "stop_tokens": ("eos_token_id", "eos_id", "eos", "stop"),
  "taps": ("kernel_size", "conv_size", "d_conv"),
  "use_bias": ("bias",),
  "value_features": ("value_dim", "v_dim", "d_v"),
  "vocab_size": ("num_embeddings", "n_vocab", "vocab"),
  "width": (
    "in_features",
    "qkv_features",
    "out_features",
    "d_model",
    "dim",
    "hidden_size",
    "embed_dim",
    "emb_dim",
  ),
}
#: What to do instead, where another name alone does not say it.
_INSTEAD = {
  **dict.fromkeys(
    ("deterministic", "train", "training", "is_training"),
    "dropout is on in a call that gets a dropout_key; without one the train() "
    "and eval() of an NNX module decide",
  ),
  **dict.fromkeys(
    ("rng", "rngs", "key", "dropout_rng"),
    "pass a PRNG key as dropout_key, such as rngs.dropout()",
  ),
  **dict.fromkeys(
    ("mask", "attention_mask", "attn_mask"),
    "every mixer is causal by itself; packed documents go into segment_ids, "
    "and padding at the end of a row needs no mask",
  ),
  "is_causal": "every mixer is causal",
  **dict.fromkeys(
    ("decode", "use_cache", "init_cache"),
    "init_state, prefill and step decode",
  ),
}


#: What our name means, where another library's name means something else.
_MEANS = {"pairs": ", half the number of layers"}


def explain_unknown_names(function: Callable[_P, _R]) -> Callable[_P, _R]:
  """Return the function with a helpful TypeError for an unknown argument.

  Args:
    function: a function or method without a parameter `**options`. If it is the
      `__init__` of a module that is made from a config, the message looks at
      the config's fields too.
  """
  parameters = inspect.signature(function).parameters

  @functools.wraps(function)
  def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
    if not kwargs.keys() <= parameters.keys():
      owner, config = function.__qualname__, None
      if function.__name__ == "__init__":
        made = type(args[0])
        owner, config = made.__name__, getattr(made, "config_type", None)
      check_names(owner, kwargs, parameters, config)
    return function(*args, **kwargs)

  return call


def check_names(
  owner: str,
  given: Iterable[str],
  known: Iterable[str],
  config: type | None = None,
) -> None:
  """Check the names of keyword arguments.

  Args:
    owner: the name of the function or class.
    given: the names.
    known: the names of the function's parameters.
    config: the dataclass that the class is made from. None: there is none.

  Raises:
    TypeError: a name is unknown. The message says what to write instead.
  """
  known = [name for name in known if name != "self"]
  for name in given:
    if name not in known:
      raise TypeError(
        f"{owner} has no argument {name!r}: {_advice(name, known, config)}"
      )


def _advice(name: str, known: list[str], config: type | None) -> str:
  """Return what to write instead of an unknown name."""
  ours = [x for x, others in _OURS.items() if name in others]
  for candidate in ours:
    if candidate in known:
      return f"write {candidate}=…{_MEANS.get(candidate, '')}"
  if config is not None and dataclasses.is_dataclass(config):
    fields = {field.name for field in dataclasses.fields(config)}
    for candidate in [*ours, name]:
      if candidate in fields:
        return (
          f"write {config.__name__}({candidate}=…){_MEANS.get(candidate, '')}, "
          "and pass that as config"
        )
  if name in _INSTEAD:
    return _INSTEAD[name]
  near = difflib.get_close_matches(name, known, n=1)
  if near:
    return f"did you mean {near[0]!r}?"
  return f"expected one of {', '.join(known)}"
