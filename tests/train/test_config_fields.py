"""Each number and choice of a config: the outermost right values, and beyond.

A right value is kept as it is. A wrong one is refused by its name. The tables
name every number and every choice of the classes.
"""

from collections.abc import Callable
import dataclasses
import inspect
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_cases import tiny

from rebased_jax import (
  AttentionConfig,
  BaseConvConfig,
  BasedConfig,
  HyenaConfig,
  MambaConfig,
  MixerConfig,
  ModelConfig,
  ReBasedConfig,
  RWKVConfig,
  Site,
)
from train.config import MeshConfig, OptimizerConfig, ProfileConfig, RunConfig
from train.data.batches import Batches
from train.data.config import (
  DataConfig,
  MQARPaperData,
  MQARStreamData,
  Recall,
  TextData,
)
from train.data.mqar import MQARConfig, MQARStream
from train.data.mqar_paper import MQARPaper
from train.data.prepare.prepare_dataset import PrepareConfig
from train.data.text.lm_batches import LMBatches
from train.data.text.rows import Layout
from train.experiments.sweep import Cell
from train.text_completion import Sampling

_INF, _NAN = math.inf, math.nan
_TINY = 5e-324  # the smallest number above 0
_BELOW_1 = math.nextafter(1.0, 0.0)
_LONGEST = 2**31 - 1

#: The right and the wrong values of a field.
Values = tuple[tuple[Any, ...], tuple[Any, ...]]

_COUNT: Values = (1, 2, 7), (0, -1, 1.5, True)
_AXIS: Values = (1, _LONGEST), (0, -1, 1.5, True, 2**31)
_OPTIONAL_AXIS: Values = (None, *_AXIS[0]), _AXIS[1]
_POSITIVE: Values = (_TINY, 1, 1e300), (0.0, -_TINY, _INF, _NAN)
_DECAY: Values = (0.0, _BELOW_1), (-_TINY, 1.0, _NAN)
_NOT_NEGATIVE: Values = (0.0, 1e300), (-_TINY, _INF, _NAN)
_FRACTION: Values = (0.0, 1.0), (-_TINY, 1.0000001, _NAN)
_SECONDS: Values = (None, _TINY, _INF), (0.0, -1.0, _NAN)
_WHOLE: Values = (0, 1), (-1, 1.5, True)
_SEED: Values = (0, _LONGEST), (-1, 2**31, 1.5, True)
_WIDE_SEED: Values = (0, 2**63 - 1), (-1, 2**63)
_AT_LEAST_1: Values = (1,), (0, -1)
_NO_NUMBER = None, "0.5", True
_DTYPE: Values = ("float32", "bfloat16", "float16"), ("int8", "float")
_PRECISION: Values = (None, "default", "high", "highest"), ("tf32",)
_IMPLEMENTATION: Values = (None, "gpu", "tpu", "xla", "reference"), ("cuda",)
_RECALL: Values = (None, "unigram", "bigram", "trigram"), ("4-gram",)
_PACKING: Values = ("stream", "documents", "rows"), ("fit", None)
_HELD_OUT: Values = ("documents", "end"), ("start", None)
_INITIALIZATION: Values = ("published", "intended"), ("paper", None)
_RECURRENCE: Values = (None, "gpu", "xla"), ("tpu", "reference")


def _model(**changes: Any) -> ModelConfig:
  fields = dict(first=BaseConvConfig(), second=BaseConvConfig(), vocab_size=8)
  return ModelConfig(**fields | dict(width=8) | changes)


@dataclasses.dataclass(frozen=True)
class _OwnData(DataConfig):
  """The data of a user, without batches."""

  length: int = 16
  vocab_size: int | None = 32
  workers: int = 0
  timeout: float | None = None
  recall: Recall | None = None

  def train_batches(self, rows: int, seed: int) -> Batches:
    raise NotImplementedError

  def eval_batches(self, rows: int, seed: int) -> Batches:
    raise NotImplementedError


_LIMITED = dataclasses.replace(
  tiny(steps=4), data=MQARPaperData(32, 16, 2, examples=12, epochs=2)
)
_POLYNOMIAL: dict[str, Values] = {
  "heads": _AXIS,
  "features": _AXIS,
  "value_features": _OPTIONAL_AXIS,
  "eps": _NOT_NEGATIVE,
  "implementation": _IMPLEMENTATION,
}

_TABLES: dict[str, tuple[type, Callable[..., Any], dict[str, Values]]] = {
  "run": (
    RunConfig,
    tiny,
    {
      **dict.fromkeys(("steps", "batch"), ((4, 8), _COUNT[1])),
      "accumulate": ((1, 2, 8), (*_COUNT[1], 3)),
      "loss_chunks": ((1, 2), (*_COUNT[1], 3)),
      "seed": _SEED,
      **dict.fromkeys(("eval_every", "save_every", "log_every"), _COUNT),
      "keep": _COUNT,
      "keep_every": ((None, 2, 4), (*_COUNT[1], 1, 3, 5)),
      "stop_accuracy": ((None, _TINY, 1.0), (0.0, 1.0000001, _NAN, "0.5")),
      "init_weights": (("trained",), ("ema", "best")),
      "nan": (("abort", "skip"), ("stop",)),
      "z_loss": (_NOT_NEGATIVE[0], (*_NOT_NEGATIVE[1], *_NO_NUMBER)),
      "ema": ((None, _TINY, _BELOW_1), (0.0, 1.0, _NAN, "0.5")),
    },
  ),
  "run that saves each step": (
    RunConfig,
    lambda **x: tiny(save_every=1, **x),
    {"keep_every": ((None, 1, 2), _COUNT[1])},
  ),
  "profile": (
    ProfileConfig,
    ProfileConfig,
    dict.fromkeys(("start", "steps"), _WHOLE),
  ),
  "mesh": (
    MeshConfig,
    MeshConfig,
    {
      "data": ((None, 1, 8), (0, -1, 1.5, True)),
      **dict.fromkeys(
        ("fsdp", "tensor", "context"), ((1, 8), (0, -1, 1.5, True, None))
      ),
    },
  ),
  "optimizer": (
    OptimizerConfig,
    OptimizerConfig,
    {
      "name": (("adamw", "lion", "muon", "sgd"), ("adam", None)),
      "learning_rate": (_POSITIVE[0], (*_POSITIVE[1], *_NO_NUMBER)),
      "schedule": (("cosine", "linear", "constant", "wsd"), ("cos", None)),
      "warmup_steps": _WHOLE,
      "cooldown_steps": ((None,), (1,)),
      "final_fraction": (_FRACTION[0], (*_FRACTION[1], *_NO_NUMBER)),
      "epoch_steps": ((None, 1), (0, -1, 1.5, True)),
      "beta1": (_DECAY[0], (*_DECAY[1], *_NO_NUMBER)),
      "beta2": (_DECAY[0], (*_DECAY[1], *_NO_NUMBER)),
      "momentum": ((None,), (0.9,)),
      "eps": (_POSITIVE[0], (*_POSITIVE[1], *_NO_NUMBER)),
      "weight_decay": (_NOT_NEGATIVE[0], (*_NOT_NEGATIVE[1], *_NO_NUMBER)),
      "decay": (("all", "matrices"), ("none",)),
      "frozen": (((), ("pairs/*",)), (("",), ["pairs/*"], "pairs/*")),
      "clip_norm": ((None, *_POSITIVE[0]), (*_POSITIVE[1], "1")),
    },
  ),
  "wsd": (
    OptimizerConfig,
    lambda **x: OptimizerConfig(schedule="wsd", **x),
    {"cooldown_steps": ((None, 1), (0, -1, 1.5, True))},
  ),
  "sgd": (
    OptimizerConfig,
    lambda **x: OptimizerConfig(name="sgd", **x),
    {"momentum": ((None, *_DECAY[0]), _DECAY[1])},
  ),
  "sweep": (
    Cell,
    lambda **x: Cell(_LIMITED, **dict(rates=(0.1,), seeds=(0,)) | x),
    {
      "rates": (((_TINY, 1.0),), ((), (0.0,), (1.0, 1.0), (_INF,), (_NAN,))),
      "seeds": (((0, _LONGEST),), ((), (-1,), (2**31,), (3, 3))),
      "attention_examples": ((0, 250, 500), (1, 251)),
    },
  ),
  "MQAR rows": (
    MQARConfig,
    lambda **x: MQARConfig(**dict(vocab_size=64, length=16, pairs=2) | x),
    {
      "vocab_size": ((17, 18), (16, 0, -1, 32.0)),
      "length": ((8, 62), (15, 64, 0, -2, 16.0)),
      "pairs": ((1, 4), (5, 0, -1, 2.0)),
      "power": _POSITIVE,
    },
  ),
  "MQAR stream": (
    MQARStreamData,
    MQARStreamData,
    {
      "vocab_size": ((33,), (32, 0)),
      "length": ((16,), (15, 0)),
      "pairs": ((8,), (9, 0)),
      "power": _POSITIVE,
      "test_examples": ((1,), (0,)),
    },
  ),
  "MQAR paper": (
    MQARPaperData,
    MQARPaperData,
    {
      "vocab_size": ((129,), (128, 0)),
      "length": ((64,), (65, 0)),
      "pairs": ((32,), (33, 0)),
      "power": _POSITIVE,
      "examples": ((1,), (0,)),
      "epochs": ((1,), (0,)),
    },
  ),
  "text": (
    TextData,
    lambda **x: TextData(("a-folder",), **x),
    {
      "length": _COUNT,
      "eval_path": (((),), (["b"], "b")),
      "verify": ((True, False), (1, "no")),
      "packing": _PACKING,
      "validation": ((_TINY, _BELOW_1), (0.0, -_TINY, 1.0, _NAN)),
      "test": ((0.0, 0.98), (-_TINY, 0.99, 1.0, _NAN)),
      "held_out": _HELD_OUT,
      "eval_rows": ((None, 1), (0, -1)),
      "workers": _WHOLE,
      "timeout": _SECONDS,
      "recall": _RECALL,
      "recall_limit": ((None, 0, 1), (-1, 1.5, True)),
    },
  ),
  "text batches": (
    LMBatches,
    lambda **x: LMBatches(("a-folder",), Layout(16), **dict(rows=8) | x),
    {
      "rows": _AT_LEAST_1,
      "seed": _WIDE_SEED,
      "limit": ((None, 1), (0, -1)),
      "weights": (((), (_TINY,)), ((1.0, 2.0), (0.0,), (_INF,))),
    },
  ),
  "text rows": (
    Layout,
    lambda **x: Layout(**dict(length=16) | x),
    {
      "length": ((1,), (0, -1, 1.5)),
      "packing": _PACKING,
      "validation": ((0.0, _BELOW_1), (-_TINY, 1.0, _NAN)),
      "test": ((0.0, 0.98), (-_TINY, 0.99, 1.0, _NAN)),
      "held_out": _HELD_OUT,
    },
  ),
  "packed text rows": (
    Layout,
    lambda **x: Layout(16, "documents", **x),
    {"held_out": (("documents",), ("end",))},
  ),
  "batches of unlimited MQAR": (
    MQARStream,
    lambda **x: MQARStream(MQARConfig(32, 16, 2), **dict(seed=0, rows=8) | x),
    {
      "rows": _AT_LEAST_1,
      "seed": _WIDE_SEED,
      "split": (("train", "test"), ("dev",)),
      "examples": ((None, 1), (0, -1)),
    },
  ),
  "batches of the paper's MQAR": (
    MQARPaper,
    lambda **x: MQARPaper(MQARConfig(32, 16, 2), **x),
    {
      "rows": _AT_LEAST_1,
      "epochs": _AT_LEAST_1,
      "examples": _AT_LEAST_1,
      "seed": _WIDE_SEED,
      "data_seed": ((0, 2**32 - 1), (-1, 2**32)),
    },
  ),
  "text of two folders": (
    TextData,
    lambda **x: TextData(("a-folder", "another"), **x),
    {
      "weights": (
        ((), (_TINY, 1.0)),
        ((1.0,), (0.0, 1.0), (1.0, _INF), [1.0, 1.0]),
      )
    },
  ),
  "text with a held-out folder": (
    TextData,
    lambda **x: TextData(("a-folder",), eval_path=("b",), **x),
    {"validation": ((0.0,), (_TINY, 0.01))},
  ),
  "text without associative recall": (
    TextData,
    lambda **x: TextData(("a-folder",), recall="unigram", **x),
    {"recall_limit": ((None,), (0,))},
  ),
  "own data": (
    _OwnData,
    _OwnData,
    {
      "length": _COUNT,
      "vocab_size": ((None, 1), _COUNT[1]),
      "workers": _WHOLE,
      "timeout": _SECONDS,
      "recall": _RECALL,
    },
  ),
  "prepare": (
    PrepareConfig,
    lambda **x: PrepareConfig(**dict(out="out") | x),
    {
      "out": (("out",), ("",)),
      "corpus": ((None, "stdlib"), ()),
      "on_error": (("fail", "skip"), ("ignore",)),
      "row_length": ((None, 1), _COUNT[1]),
      "max_document_mb": (_COUNT[0], (*_COUNT[1], None)),
      "part_mb": (_COUNT[0], (*_COUNT[1], None)),
      "workers": _WHOLE,
      "timeout": _SECONDS,
      "runner": (("pool", "beam"), ("spark",)),
    },
  ),
  "sampling": (
    Sampling,
    Sampling,
    {
      "tokens": _COUNT,
      "temperature": _NOT_NEGATIVE,
      "top_k": ((None, 1), _COUNT[1]),
      "top_p": ((None, _TINY, 1.0), (0.0, 1.0000001, _NAN)),
      "seed": _SEED,
    },
  ),
  "greedy sampling": (
    Sampling,
    lambda **x: Sampling(temperature=0.0, **x),
    {
      "top_k": ((None,), (1,)),
      "top_p": ((None,), (0.5,)),
      "stop": (((), ("a", "b")), (("a", ""),)),
    },
  ),
  "site": (
    Site,
    lambda **x: Site(**dict(width=8, layers=4) | x),
    {
      "width": _AXIS,
      "layer": ((0, 3), (-1, 4)),
      "layers": _AXIS,
      "dtype": (_DTYPE[0], (*_DTYPE[1], "float64")),  # x64 is not set
      "length": _OPTIONAL_AXIS,
      "precision": _PRECISION,
      "param_dtype": (_DTYPE[0], (*_DTYPE[1], "float64")),
    },
  ),
  "model": (
    ModelConfig,
    _model,
    {
      "vocab_size": _AXIS,
      "width": _AXIS,
      "pairs": ((1, 10_000), (0, -1, 1.5, True, 10_001)),
      "positions": _OPTIONAL_AXIS,
      "mlp_width": _OPTIONAL_AXIS,
      "dropout": _DECAY,
      "dtype": _DTYPE,
      "precision": _PRECISION,
      "block": (("pre-norm", "mamba"), ("post-norm", None)),
      "remat": (("none", "dots", "full"), ("all", None)),
      "param_dtype": _DTYPE,
    },
  ),
  "ReBased": (
    ReBasedConfig,
    ReBasedConfig,
    {**_POLYNOMIAL, "norm_scope": (("joint", "head"), ("all", None))},
  ),
  "Based": (BasedConfig, BasedConfig, _POLYNOMIAL),
  "BaseConv": (BaseConvConfig, BaseConvConfig, {"taps": _AXIS}),
  "attention": (
    AttentionConfig,
    AttentionConfig,
    {
      "heads": _AXIS,
      "length": _OPTIONAL_AXIS,
      "implementation": ((None, "xla", "cudnn"), ("gpu",)),
      "dropout": _DECAY,
    },
  ),
  "Hyena": (
    HyenaConfig,
    HyenaConfig,
    {"length": _OPTIONAL_AXIS, "taps": _AXIS, "filter_width": _AXIS},
  ),
  "Mamba": (
    MambaConfig,
    MambaConfig,
    {
      **dict.fromkeys(("state", "taps", "expand"), _AXIS),
      "initialization": _INITIALIZATION,
      "implementation": _RECURRENCE,
    },
  ),
  "RWKV": (
    RWKVConfig,
    RWKVConfig,
    {
      "initialization": _INITIALIZATION,
      "wkv_dtype": (("bfloat16", "float32"), ("float16", None)),
      "implementation": _RECURRENCE,
    },
  ),
}


@pytest.mark.parametrize("table", _TABLES)
def test_right_values_are_kept(table: str) -> None:
  _, make, fields = _TABLES[table]
  for field, (right, _) in fields.items():
    for value in right:
      assert getattr(make(**{field: value}), field) == value, (field, value)


@pytest.mark.parametrize(
  ("table", "field"),
  [(table, field) for table, (_, _, f) in _TABLES.items() for field in f],
)
def test_wrong_values_are_refused_by_name(table: str, field: str) -> None:
  _, make, fields = _TABLES[table]
  for value in fields[field][1]:
    with pytest.raises(ValueError) as error:
      make(**{field: value})
    message = str(error.value)
    assert f"{field}={value!r}" in message and ": expected " in message


@pytest.mark.parametrize(
  "config_class",
  dict.fromkeys(x for x, _, _ in _TABLES.values()),  # in the same order always
  ids=lambda x: x.__name__,
)
def test_the_tables_are_complete_and_no_config_changes(
  config_class: type,
) -> None:
  tables = [x for x in _TABLES.values() if x[0] is config_class]
  named = {field for _, _, fields in tables for field in fields}
  hints = get_type_hints(config_class, localns={"nnx": nnx})
  arguments = inspect.signature(config_class).parameters
  assert {x for x in arguments if _has_bounds(hints[x])} <= named
  config = tables[0][1]()
  with pytest.raises(dataclasses.FrozenInstanceError):
    setattr(config, next(iter(named)), None)


def _has_bounds(hint: Any) -> bool:
  """Whether a field is a number or a choice, or one of these or None."""
  parts = [x for x in get_args(hint) or (hint,) if x is not type(None)]
  return get_origin(hint) is Literal or any(
    x in (int, float) or get_origin(x) is Literal for x in parts
  )


def _is_float32(x: Any) -> bool:
  """Whether x is a float that float32 holds."""
  return type(x) is float and float(np.float32(x)) == x


_WITH_PLAIN_SCALARS = (
  *(RunConfig, ProfileConfig, MeshConfig, OptimizerConfig, DataConfig),
  *(Site, ModelConfig, MixerConfig),
)


@pytest.mark.parametrize(
  "table",
  [x for x in _TABLES if issubclass(_TABLES[x][0], _WITH_PLAIN_SCALARS)],
)
def test_a_scalar_of_numpy_or_jax_becomes_a_plain_number(table: str) -> None:
  _, make, fields = _TABLES[table]
  kinds = {int: (np.int64, jnp.int32), float: (np.float64, jnp.float32)}
  for field, (right, _) in fields.items():
    exact = (x for x in right if type(x) is int or _is_float32(x))
    value = next(exact, None)
    for kind in kinds.get(type(value), ()):
      given = kind(value)
      found = getattr(make(**{field: given}), field)
      assert type(found) is type(value) and found == given


@pytest.mark.parametrize("table", ["site", "model"])
def test_dtypes_and_precisions_become_names(table: str) -> None:
  make = _TABLES[table][1]
  for dtype in (jnp.bfloat16, np.dtype("float32"), np.float16):
    found = make(dtype=dtype, param_dtype=dtype)
    assert found.dtype == found.param_dtype == jnp.dtype(dtype).name
  assert make(precision=jax.lax.Precision.HIGHEST).precision == "highest"
