"""The costs of chosen positions, alone and by the operator."""

import bisect
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import REBASED
from pallas_kernels.polynomial import position_cost
from pallas_kernels.polynomial.position_cost import (
  BY_KERNELS,
  ON_CPU,
  ON_GPU,
  PositionCall,
  cost_alone,
  cost_whole,
  expected_form,
  is_cheaper_alone,
)

PAPER = PositionCall(
  rows=64,
  length=2048,
  positions=1,
  width=64,
  heads=12,
  features=16,
  value_features=5,
  coefficients=REBASED,
  itemsize=4,
)


def _most_alone(call: PositionCall, form) -> int:
  """Return the most positions that are computed alone; the cost rises."""

  def is_whole(M: int) -> bool:
    return not is_cheaper_alone(dataclasses.replace(call, positions=M), form)

  return bisect.bisect_left(range(1, 4097), True, key=is_whole)


# (F, P, T, dtype's bytes): the most positions alone. On the CPU the two ways
# took equal time, forward and backward, at 110 to 120, 220 to 250 and more than
# 300 positions for the first three, with 512 tokens and jax 0.10.2.
@pytest.mark.parametrize(
  ("form", "F", "P", "itemsize", "most"),
  [
    (ON_CPU, 8, 16, 4, (110, 190)),
    (ON_CPU, 16, 16, 4, (220, 290)),
    (ON_CPU, 16, 64, 4, (300, 420)),
    (ON_GPU, 16, 5, 4, (400, 450)),
    (BY_KERNELS, 16, 5, 2, (55, 70)),
    (BY_KERNELS, 16, 64, 2, (10, 30)),
  ],
)
def test_where_the_ways_cross(form, F, P, itemsize, most) -> None:
  call = dataclasses.replace(
    PAPER, rows=1, features=F, value_features=P, itemsize=itemsize
  )
  found = _most_alone(call, form)
  assert most[0] <= found <= most[1]
  at = dataclasses.replace(call, positions=found)
  beyond = dataclasses.replace(call, positions=found + 1)
  assert cost_alone(at, form) < cost_whole(at, form)
  assert cost_alone(beyond, form) >= cost_whole(beyond, form)


def _bytes(cost, call: PositionCall, form) -> float:
  """Return the bytes in a cost of the operator, without the queries'."""
  call = dataclasses.replace(call, width=0, itemsize=0)
  with_bytes = dataclasses.replace(form, operations_per_byte=13)
  return cost(call, with_bytes) - cost(call, form)


# Bytes a token and head, of a forward and backward pass in float32, counted in
# XLA's program for an H200 (jax 0.12.0.1): (F, P, T, M, alone, whole).
@pytest.mark.parametrize(
  ("F", "P", "T", "M", "alone", "whole"),
  [
    (16, 5, 128, 16, 1593, 7883),
    (16, 5, 256, 64, 3804, 20954),
    (16, 5, 512, 128, 6622, 20813),
    (8, 64, 512, 128, 8588, 19804),
    (16, 64, 512, 128, 8972, 30806),
    (32, 64, 512, 128, 9740, 73886),
  ],
)
def test_the_bytes_are_those_of_the_programs(F, P, T, M, alone, whole) -> None:
  call = dataclasses.replace(
    PAPER, length=T, positions=M, features=F, value_features=P
  )
  assert abs(_bytes(cost_alone, call, ON_GPU) / alone - 1) < 0.05
  assert abs(_bytes(cost_whole, call, ON_GPU) / whole - 1) < 0.05


def test_a_row_of_one_chunk_is_quadratic_either_way() -> None:
  for form in (ON_CPU, ON_GPU, BY_KERNELS):
    for T in (1, 32):
      call = dataclasses.replace(PAPER, length=T, positions=T)
      assert is_cheaper_alone(call, form)
    # A row without tokens has a cost too.
    is_cheaper_alone(dataclasses.replace(call, length=0), form)


def test_similarities_must_fit() -> None:
  call = dataclasses.replace(PAPER, positions=256, rows=85)
  assert is_cheaper_alone(call, ON_GPU)
  assert not is_cheaper_alone(dataclasses.replace(call, rows=86), ON_GPU)


def test_open_sizes() -> None:
  (length,) = jax.export.symbolic_shape("t")
  for M in (64, 65):
    call = dataclasses.replace(PAPER, length=length, positions=M)
    assert is_cheaper_alone(call, ON_CPU) == (M == 64)
  call = dataclasses.replace(PAPER, positions=length)
  assert not is_cheaper_alone(call, ON_CPU)


def test_the_form_is_that_of_the_device(monkeypatch) -> None:
  assert expected_form("bfloat16") == ON_CPU
  devices = position_cost.devices
  monkeypatch.setattr(devices, "platform", lambda: "gpu")
  found = ["gpu"]
  monkeypatch.setattr(
    position_cost, "which_implementation", lambda: (found[0], "")
  )
  assert expected_form(jnp.bfloat16) == BY_KERNELS
  assert expected_form("float32") == ON_GPU
  found[0] = "xla"
  assert expected_form("bfloat16") == ON_GPU
