"""The GPU benchmarks: what they read and write where no GPU is needed."""

import pytest

from benchmarks.kernels import floors, kernel_times, peers, report
from pallas_kernels.polynomial import arg_specs
from tools import sanitize

pytestmark = pytest.mark.quick

_SPECS = {spec.name: spec for spec in arg_specs.SPECS}
_PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'polynomial_forward' for 'sm_90a'
ptxas info    : Function properties for polynomial_forward
    104 bytes stack frame, 96 bytes spill stores, 100 bytes spill loads
ptxas info    : Used 255 registers, used 17 barriers, 104 bytes cumulative
ptxas info    : Compiling entry function 'plain' for 'sm_90a'
ptxas info    : Used 40 registers, used 0 barriers
"""


def test_registers_and_spills_are_read(tmp_path):
  for name in ("a", "b"):  # the same kernel, compiled for two calls
    (tmp_path / f"{name}.ptxas").write_text(_PTXAS)
  values = [tuple(row.values()) for row in kernel_times.registers(tmp_path)]
  assert values == [("plain", 40, 0, 0), ("polynomial_forward", 255, 96, 100)]


def test_floors():
  # 65,536 tokens of 12 heads, F = 16, P = 64: 320 bytes and 47,104 operations
  # a token and head forward, 640 bytes with the backward.
  tokens = 65536 * 12
  work = floors.least(_SPECS["lm-1k"])
  assert work["forward"] == (320 * tokens, 47104 * tokens)
  assert work["both"] == (640 * tokens, (47104 + 49152 + 75776) * tokens)
  h100 = "NVIDIA H100 80GB HBM3"
  share = floors.shares(work["forward"], 0.1502, h100)
  assert share["floor_ms"] == pytest.approx(0.0751, abs=1e-4)
  assert share["of_dram"] == pytest.approx(0.5, abs=1e-3)
  assert share["of_tensor"] == pytest.approx(0.249, abs=1e-3)
  unknown = floors.shares(work["forward"], 0.1502, "a card")
  assert "of_dram" not in unknown and "not known" in unknown["shares"]


def test_peers_that_do_not_fit_say_why():
  quadratic = lambda name: peers.peer("quadratic", _SPECS[name])
  assert quadratic("lm-32k") == "T > 4096"
  assert quadratic("lm-4k").note == "5 of 16 rows"
  assert quadratic("lm-4k").qk == (5, 4096, 12, 16)
  assert quadratic("lm-1k").note == ""
  assert quadratic("pile-157m").note == "1 of 8 rows"
  wide = arg_specs.ArgSpec("wide", 8, 4096, 128, 16, 12)
  reason = peers.peer("quadratic", wide)
  assert reason == "a row alone needs 48 GiB"
  softmax = peers.peer("cudnn", _SPECS["pile-157m"])
  assert softmax.qk == (8, 4096, 12, 64) and not softmax.checked


def test_the_table_shows_only_what_was_timed():
  times = {"forward_ms": 0.25, "both_ms": 1.5}
  row = {"name": "a", "B": 4, "T": 8, "H": 2, "P": 3, "gpu": times}
  row |= {"xla": {"skipped": "wrong values"}}
  row |= {"quadratic": times | {"note": "2 of 4 rows"}}
  lines = report.table({"rows": [row]}).splitlines()
  assert "xla" not in lines[0]
  cells = "| 0.25 / 1.5 | ~0.5 / ~3 | – / – | – / – |"
  assert lines[2] == f"| a (B=4, T=8, H=2, P=3) {cells}"


@pytest.mark.parametrize(
  "summary, code, missing, clean",
  [
    ("ERROR SUMMARY: 0 errors", 0, 0, True),
    ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, 0, 1),
    ("ERROR SUMMARY: 10 errors", 7, 0, False),
    ("ERROR SUMMARY: 10 errors", 0, 0, False),
    ("RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", 0, 0, 0),
    ("ERROR SUMMARY: 0 errors", 0, 1, False),  # the values were wrong
    ("ERROR SUMMARY: 0 errors", 1, 0, False),
    ("", 0, 0, False),  # the tool did not run
  ],
)
def test_a_run_is_clean_only_if_all_of_it_is(summary, code, missing, clean):
  values = "errors of o, dq, dk, dv: [0.1] " + ("wrong" if missing else "right")
  text = f"{values}\n========= {summary}\n"
  assert sanitize.judge(text, code)["clean"] == bool(clean)


@pytest.mark.parametrize(
  "operator", ["selective_scan", pytest.param("wkv", marks=pytest.mark.slow)]
)
def test_the_case_of_a_recurrence_compares_every_array(operator):
  """XLA stands in for the kernels; it differs from float32 by roundings."""
  case = sanitize.Recurrence(operator, 1, 4, 2, (2,), "bfloat16", N=2)
  errors = sanitize.recurrence_errors(case, "xla")
  assert len(errors) == {"selective_scan": 8, "wkv": 9}[operator]
  assert 0 < max(errors.values()) < 3e-2
