"""Each check of a run's config: the nearest wrong value is refused by name."""

import dataclasses
from pathlib import Path

import pytest
from train_cases import tiny

from train.config import ProfileConfig
from train.data.config import MQARPaperData

_INTEGERS = (
  *("steps", "batch", "accumulate", "eval_every", "save_every"),
  *("log_every", "keep", "loss_chunks"),
)


@pytest.mark.parametrize("name", _INTEGERS)
@pytest.mark.parametrize("value", [0, 1.5, True])
def test_counts_are_positive_integers(name: str, value: object) -> None:
  with pytest.raises(ValueError, match=rf"{name}={value}: expected an integer"):
    tiny(**{name: value})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(nan="stop"), "nan='stop': expected one of"),
    (dict(init_weights="best"), "init_weights='best': expected one of"),
    (dict(init_weights="ema"), "init_weights='ema': expected 'trained'"),
    (dict(accumulate=3), "batch=8: expected a multiple of accumulate=3"),
    (dict(loss_chunks=3), "loss_chunks=3: expected a divisor of the 2 targets"),
    (dict(seed=-1), "seed=-1: expected an integer"),
    (dict(seed=2**31), "seed=2147483648: expected an integer"),
    (dict(tensorboard=1), "tensorboard=1: expected True or False"),
    (dict(z_loss=-1e-9), "z_loss=-1e-09: expected a finite number"),
    (dict(z_loss=float("inf")), "z_loss=inf: expected a finite number"),
    (dict(ema=0.0), "ema=0.0: expected None or a number above 0"),
    (dict(ema=1.0), "ema=1.0: expected None or a number above 0"),
    (dict(stop_accuracy=0.0), "stop_accuracy=0.0: expected None"),
    (dict(stop_accuracy=1.01), "stop_accuracy=1.01: expected None"),
    (
      dict(ema=0.5, model=dict(param_dtype="bfloat16")),
      "ema=0.5: expected None with model.param_dtype=bfloat16",
    ),
    (dict(keep_best=1), "keep_best=1: expected None or the name of"),
    (
      dict(keep_best="loss", save_every=3),
      "save_every=3: expected a multiple of eval_every=2",
    ),
    (dict(keep_every=3), "keep_every=3: expected a multiple of save_every=2"),
    (
      dict(profile=ProfileConfig(start=5, steps=2)),
      "profile='steps 5 to 6': expected steps of 0 to 5",
    ),
    (
      dict(optimizer=dict(warmup_steps=6)),
      "optimizer.warmup_steps=6: expected below steps=6",
    ),
    (dict(model=dict(positions=15)), "model.positions=15: expected None"),
    (dict(model=dict(vocab_size=31)), "model.vocab_size=31: expected at least"),
  ],
)
def test_wrong_values_are_named(changes: dict, message: str) -> None:
  with pytest.raises(ValueError) as error:
    tiny(**changes)
  assert message in str(error.value)


@pytest.mark.parametrize(
  "changes",
  [
    dict(accumulate=4),
    dict(loss_chunks=2),
    dict(seed=0),
    dict(seed=2**31 - 1),
    dict(z_loss=0.0),
    dict(ema=0.5),
    dict(model=dict(param_dtype="bfloat16")),
    dict(save_every=3),
    dict(keep_best="loss", save_every=4),
    dict(keep_every=4),
    dict(profile=ProfileConfig(start=4, steps=2)),
    dict(profile=ProfileConfig(start=9, steps=0)),
    dict(optimizer=dict(warmup_steps=5)),
    dict(stop_accuracy=1.0),
    dict(model=dict(positions=17, vocab_size=33)),
  ],
)
def test_the_last_right_values_are_taken(changes: dict) -> None:
  tiny(**changes)


def test_limited_data_limits_the_steps() -> None:
  data = MQARPaperData(32, 16, 2, examples=12, epochs=2)  # 4 batches
  run = dataclasses.replace(tiny(steps=4), data=data)
  with pytest.raises(ValueError, match="steps=5: expected at most the 4 batc"):
    dataclasses.replace(run, steps=5)


@pytest.mark.parametrize(
  ("batch", "accumulate", "nearest"),
  [(6, 4, 3), (8, 5, 4), (8, 7, 8), (12, 5, 6)],  # 4 would be as near to 5
)
def test_the_nearest_number_of_micro_batches_is_named(
  batch: int, accumulate: int, nearest: int
) -> None:
  """The smaller one of two that are equally near would need more memory."""
  with pytest.raises(ValueError, match=f"; --accumulate {nearest} would fit"):
    tiny(batch=batch, accumulate=accumulate)
  tiny(batch=batch, accumulate=nearest)


def test_paths_are_absolute_for_any_directory() -> None:
  """A path of a bucket stays as it is."""
  run = tiny(init_from="other").with_absolute_paths()
  assert run.init_from == str(Path.cwd() / "other")
  remote = tiny(init_from="gs://bucket/other").with_absolute_paths()
  assert remote.init_from == "gs://bucket/other"
