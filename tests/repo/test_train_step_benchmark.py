"""The training-step benchmark: its PyTorch peer and its ratio of devices."""

import argparse

import pytest
from train_cases import trainer as trainer

from benchmarks.train_step import (
  cases as cases_lib,
  devices,
  runner,
  torch_peer,
)


def make_args(**changes) -> argparse.Namespace:
  values = dict(
    cases=["attention-127m", "rebased-145m"],
    lengths=None,
    tiny=True,
    tokens=128,
    chunk=64,
    remat="none",
    scan=False,
    seconds=0.01,
    rounds=1,
    devices=2,
  )
  return argparse.Namespace(**{**values, **changes})


def test_lengths_choose_rows() -> None:
  args = make_args(cases=["rebased-145m-long"], lengths=[131072], tiny=False)
  (case,) = cases_lib.make_cases(args)
  assert (case.rows, case.length) == (1, 131072)


def test_idle_time_is_between_the_first_kernel_and_the_last() -> None:
  spans = [
    (90.0, 100.0, True),
    (50.0, 60.0, True),
    (0.0, 10.0, False),  # a batch, before any step
    (55.0, 65.0, False),  # a copy beside a kernel, and beyond it
    (70.0, 75.0, False),
    (170.0, 180.0, False),  # the last results
  ]
  # 65 to 70 and 75 to 90, of 50 to 100.
  assert runner.idle_between_kernels(spans) == 0.4
  assert runner.idle_between_kernels(spans[2:5]) is None


def test_the_peer_is_asked_for_our_attention_model(monkeypatch) -> None:
  args = make_args(cases=list(cases_lib.make_models()), tiny=False)
  wanted = torch_peer.request(cases_lib.make_cases(args), args, 3)
  sizes = ("width", "layers", "heads", "hidden", "vocab_size")
  assert [wanted[x] for x in sizes] == [768, 12, 12, 3072, 50304]
  places = [(x["length"], x["positions"]) for x in wanted["cases"]]
  assert places == [(4096, 4096), (16384, 16384)]
  assert wanted["compile"] and wanted["warmup_steps"] == 200
  args = make_args(cases=["rebased-145m"])
  cases = cases_lib.make_cases(args)
  assert torch_peer.request(cases, args, 3) is None


@pytest.mark.parametrize(
  "command, failed",
  [
    ("import sys; sys.exit(3)", "exit code 3"),
    ("import time; time.sleep(60)", "not done after 1 s"),
  ],
)
def test_a_peer_that_fails_says_so(monkeypatch, command, failed) -> None:
  args = make_args()
  wanted = torch_peer.request(cases_lib.make_cases(args), args, 3)
  popen = torch_peer.subprocess.Popen
  other = lambda words, **how: popen([words[0], "-c", command], **how)
  monkeypatch.setattr(torch_peer.subprocess, "Popen", other)
  (row,) = torch_peer.measure(wanted, "cpu", 1)
  assert row["failed"] == failed and row["case"] == "attention-127m"


def test_a_peer_of_another_size_is_refused() -> None:
  place = {"case": "a", "length": 4}
  ours = [place | {"parameters": 5}]
  torch_peer.check([place | {"parameters": 5}], ours)
  torch_peer.check([place | {"failed": "no torch"}], ours)
  with pytest.raises(SystemExit, match="another model"):
    torch_peer.check([place | {"parameters": 6}], ours)


def test_one_device_against_two() -> None:
  args = make_args(cases=["rebased-145m"])
  cases = cases_lib.make_cases(args)
  (row,) = devices.measure(cases, args, 1)
  assert row["one"]["parameters"] == row["all"]["parameters"] > 50_000
  rates = [row[x]["tokens_per_second"] for x in ("all", "one")]
  assert row["ratio"] == pytest.approx(rates[0] / rates[1], abs=1e-3)
  with pytest.raises(SystemExit, match="--devices 99: expected at most"):
    devices.require(99)
