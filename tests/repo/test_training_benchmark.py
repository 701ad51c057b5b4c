"""How the benchmarks of training through the kernels judge what they see."""

import dataclasses
import importlib

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.training import gradient_error, paired_runs, variants
from train.experiments import text_corpus

SEEDS, STEPS = 6, 200
# What rounding changes in a step at the start, and in the end by chaos; nats.
ROUNDING, CHAOS = 1e-4, 2e-3


def make_runs(
  *, shift: float = 0.0, one_seed: float = 0.0, start: float = 1.0
) -> paired_runs.Runs:
  """Return runs whose "kernels" differ from XLA by more than noise.

  Args:
    shift: nats that are added to the end of every seed.
    one_seed: nats that are added to the end of one seed.
    start: factor of the rounding at the start.
  """
  rng = np.random.default_rng(0)
  runs: paired_runs.Runs = {}
  for name in paired_runs.BY_DEFAULT:
    runs[name] = {}
    for seed in range(SEEDS):
      curve = 4 * np.exp(-np.arange(STEPS) / 80) + 1 + 0.1 * seed
      size = 0 if name.startswith("float32") else ROUNDING
      more = start if name == paired_runs.RIGHT else 1.0
      noise = more * size * rng.standard_normal(STEPS)
      end = CHAOS * rng.standard_normal()
      if name == paired_runs.RIGHT:
        end += shift + one_seed * (seed == 2)
      elif name == paired_runs.WRONG:
        end += 0.05
      losses = curve + noise + end * (np.arange(STEPS) > 100)
      runs[name][str(seed)] = {
        "start": losses[: paired_runs.START].tolist(),
        "losses": losses.reshape(-1, paired_runs.KEPT).mean(axis=1).tolist(),
      }
  return runs


@pytest.mark.parametrize(
  ("changes", "failed"),
  [
    ({}, set()),
    ({"shift": 0.01}, {"end"}),
    ({"shift": -0.01}, {"end"}),
    ({"one_seed": 0.3}, {"end", "seed"}),
    ({"start": 2.0}, {"start"}),
  ],
)
def test_a_wrong_kernel_fails_where_seeds_differ_more(changes, failed) -> None:
  verdict = paired_runs.judge(make_runs(**changes))
  row = verdict["variants"][paired_runs.RIGHT]
  assert {key for key, passes in row["passes"].items() if not passes} == failed
  assert verdict["passed"] == (not failed)
  assert "end" in paired_runs.table(verdict)  # of the wrong kernel


def test_a_criterion_that_finds_no_wrong_kernel_does_not_pass() -> None:
  runs = make_runs()
  runs[paired_runs.WRONG] = runs["xla"]
  assert not paired_runs.judge(runs)["passed"]
  del runs[paired_runs.WRONG]
  assert not paired_runs.judge(runs)["passed"]
  assert paired_runs.judge({"xla": runs["xla"]}) is None


def test_only_seeds_of_both_variants_are_paired() -> None:
  runs = make_runs()
  del runs["xla"]["0"]
  assert len(paired_runs.differences(runs, "kernels", "xla")) == SEEDS - 1
  assert paired_runs.judge(runs)["variants"]["kernels"]["seeds"] == SEEDS - 1


def test_the_gate_of_gradients_finds_wrong_kernels() -> None:
  def row(error: float = 1, mixers: float = 1, parameter: float = 1) -> dict:
    parameters = {"a": parameter, "b": 1, "exact": 0}
    return {"error": error, "mixers": mixers, "parameters": parameters}

  def judge(kernels: dict, wrong: dict) -> dict:
    xla = {"kernels": row(), "xla": row(), "wrong": row()}
    rows = {"kernels": kernels, "xla": row(), "wrong": wrong}
    return gradient_error.judge({"initial": rows, "trained": xla})

  for wrong in (row(error=1.2), row(mixers=1.2), row(parameter=1.6)):
    assert judge(row(1.05, 1.05, 1.4), wrong)["passes"]
    assert not judge(wrong, wrong)["passes"]
  assert not judge(row(), row())["passes"]
  found = judge(row(), row(parameter=3))
  assert found["ratios"]["wrong"]["initial"]["worst"] == 3


def test_relative_errors_are_of_sums_of_squares() -> None:
  each_NL2 = np.array([[[1.0, 16.0], [8.0, 9.0]], [[0.0, 16.0], [0.0, 9.0]]])
  names = ["a", "pairs/second/mixer/b"]
  row = gradient_error._row(each_NL2, each_NL2[0], names)
  assert row["error"] == pytest.approx(0.3)  # of 3/5 and 0
  assert row["of_mean"] == pytest.approx(0.6)
  assert row["mixers"] == pytest.approx(np.sqrt(8 / 9) / 2, abs=1e-5)
  assert row["parameters"]["a"] == pytest.approx(np.sqrt(1 / 32), abs=1e-5)


def test_defects_are_of_a_hundredth() -> None:
  o_BTHP = jnp.asarray(np.random.default_rng(1).normal(size=(2, 300, 2, 3)))
  o_BTHP = o_BTHP.astype(jnp.float32)
  change = lambda name: variants.VARIANTS[name].defect(o_BTHP) - o_BTHP
  wrong_T = jnp.abs(change("wrong-tokens")).max(axis=(0, 2, 3)) > 0
  assert list(np.flatnonzero(wrong_T)) == [50, 150, 250]
  size = jnp.linalg.norm(change("wrong-values")) / jnp.linalg.norm(o_BTHP)
  assert 0.005 < size < 0.02
  assert not change("wrong-gradient").any()


def test_every_switch_reaches_a_kernel(monkeypatch) -> None:
  for name, modules in variants.ASKED.items():
    found = [importlib.import_module(x) for x in modules]
    with variants.traced_as(variants.Variant(without=(name,))):
      assert not any(module.has_kernel(None) for module in found)
    assert all(module.has_kernel.__doc__ for module in found)


def test_tokens_are_the_most_common_pairs_of_bytes(monkeypatch) -> None:
  text = "aabbaa" * 10 + "é" + "zz"  # the é is two bytes
  # The odd byte is left out.
  document = text_corpus.Document("a", "0", text + "c")
  monkeypatch.setattr(text_corpus, "gather", lambda packages, most: [document])
  sizes = dataclasses.replace(variants.QUICK, vocab_size=3)
  tokens, found = variants.make_tokens(sizes)
  assert found["bytes"] == 2 * len(tokens) == len(text.encode())
  assert list(tokens) == [0, 1, 0] * 10 + [2, 2]  # "aa", "bb" and all others
