"""Make data sets of every format, and batches of them."""

import dataclasses
from pathlib import Path

from data_cases import documents, write_megatron, write_prepared
import numpy as np
import pytest

from train.data.prefetch import iterate
from train.data.text.lm_batches import LMBatches
from train.data.text.rows import Layout

ROOT = Path(__file__).parents[2]
TEXTS = documents(120, seed=11, most=40)
LAYOUT = Layout(16, validation=0.2)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
  folder = tmp_path_factory.mktemp("sets")
  rows = [x[:17] for x in np.arange(17 * 50).reshape(50, 17)]
  return {
    "prepared": str(write_prepared(folder / "set", (TEXTS[:50], TEXTS[50:]))),
    "megatron": str(write_megatron(folder / "d", TEXTS, cuts=(1001, 2000))),
    "rows": str(write_megatron(folder / "r", rows, cuts=(501,))),
    "cache": str(folder / "plans"),
  }


def make(paths, *names: str, packing="stream", rows=8, **changes) -> LMBatches:
  layout = dataclasses.replace(LAYOUT, packing=packing)
  return LMBatches(
    **{
      **dict(paths=tuple(paths[name] for name in names), layout=layout),
      **dict(rows=rows, seed=3, cache_dir=Path(paths["cache"])),
      **changes,
    }
  )


CASES = {
  "prepared stream": (("prepared",), "stream"),
  "prepared documents": (("prepared",), "documents"),
  "megatron stream": (("megatron",), "stream"),
  "megatron documents": (("megatron",), "documents"),
  "megatron rows": (("rows",), "rows"),
  "mixture": (("prepared", "megatron"), "stream"),
  "packed mixture": (("prepared", "megatron"), "documents"),
}


@pytest.fixture(params=CASES)
def batches(request, paths) -> LMBatches:
  names, packing = CASES[request.param]
  return make(paths, *names, packing=packing)


def take(batches: LMBatches, start: int, stop: int, **options) -> list[dict]:
  with iterate(batches, start=start, stop=stop, **options) as iterator:
    return list(iterator)
