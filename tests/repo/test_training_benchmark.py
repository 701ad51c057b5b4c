"""How the benchmarks of training through the kernels judge what they see."""

import dataclasses
import importlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.training import gradient_error, paired_runs, variants
from train.experiments import text_corpus

SEEDS, STEPS = 6, 200
# What rounding changes in a step at the start, and in the end by chaos; nats.
ROUNDING, CHAOS = 1e-4, 2e-3


def make_runs(
  *,
  shift: float = 0.0,
  one_seed: float = 0.0,
  start: float = 1.0,
  bias: float = 0.0,
) -> paired_runs.Runs:
  """Return runs whose "kernels" differ from XLA by more than noise.

  Args:
    shift: nats that are added to the end of every seed.
    one_seed: nats that are added to the end of one seed.
    start: factor of the rounding at the start.
    bias: nats that are added to every step of every seed.
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
        curve = curve + bias
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
    # Half of what rounding changes in a step, but with one sign.
    ({"bias": ROUNDING / 2}, {"bias"}),
    ({"bias": -ROUNDING / 2}, {"bias"}),
  ],
)
def test_a_wrong_kernel_fails_where_seeds_differ_more(changes, failed) -> None:
  verdict = paired_runs.judge(make_runs(**changes))
  row = verdict["variants"][paired_runs.RIGHT]
  assert {key for key, passes in row["passes"].items() if not passes} == failed
  assert verdict["passed"] == (not failed)
  assert "end" in paired_runs.table(verdict)  # of the wrong kernel
  assert verdict["noticed"] == [paired_runs.WRONG]


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


def make_gradients(
  *, error: float = 1, parameter: float = 1, bias: float = 0, loss: float = 0
) -> dict:
  """Return a variant's errors in 16 batches, whose roundings are shared.

  Args:
    error: of the whole gradient and of the mixers'.
    parameter: the error of one parameter.
    bias: what is added along the gradient of another one, in each batch.
    loss: nats that are added to the loss in each batch.
  """
  rng = np.random.default_rng(0)
  noise = lambda size: size * rng.standard_normal(16)
  return {
    "error": error,
    "mixers": error,
    "parameters": {"a": parameter, "b": 1, "exact": 0},
    "along": {
      "a": noise(0.05).tolist(),
      "b": (noise(0.05) + bias).tolist(),
      "exact": [0.0] * 16,
    },
    "loss_minus_float32": (noise(1e-4) + loss).tolist(),
  }


def judge_gradients(kernels: dict, *wrong: dict) -> dict:
  names = (*gradient_error.MUST_FAIL, "wrong-values")
  always = ("kernels", gradient_error.XLA, gradient_error.SWAPPED)
  right = {name: make_gradients() for name in (*always, *names)}
  rows = right | {"kernels": kernels} | dict(zip(names, wrong, strict=False))
  return gradient_error.judge({"initial": rows, "trained": right})


@pytest.mark.parametrize(
  ("changes", "broken"),
  [
    ({"error": 1.2}, ["size of error", "size of mixers", "swap"]),
    ({"parameter": 1.6}, ["size of worst", "swap"]),
    ({"parameter": 1.06}, ["swap"]),
    ({"parameter": 0.9}, ["swap"]),
    ({"bias": 0.01}, ["bias"]),
    ({"bias": -0.01}, ["bias"]),
    ({"loss": 3e-4}, ["loss"]),
  ],
)
def test_a_wrong_gradient_breaks_a_condition(changes, broken) -> None:
  bad = make_gradients(**changes)
  good = make_gradients(error=1.04, parameter=0.96, bias=0.003, loss=5e-5)
  verdict = judge_gradients(good, bad, bad)
  assert verdict["passes"]
  assert verdict["broken"] == {
    "kernels": [],
    "wrong-size": broken,
    "wrong-tokens": broken,
    "wrong-values": [],  # may stay invisible
  }
  assert gradient_error.report(verdict).endswith("\npassed")
  assert not judge_gradients(bad, bad, bad)["passes"]
  found = judge_gradients(good, bad)  # one of two is not noticed
  assert not found["passes"]
  assert "not measured: wrong-tokens" in gradient_error.report(found)


def test_a_bias_is_told_from_noise_that_is_not_shared() -> None:
  # Without shared roundings the difference of two means has an error of 0.02.
  rng = np.random.default_rng(1)
  rows = {"kernels": make_gradients(), "xla": make_gradients()}
  other = make_gradients()
  other["along"]["b"] = (0.05 * rng.standard_normal(16)).tolist()
  rows[gradient_error.SWAPPED] = other
  judge = lambda: gradient_error.judge({"initial": rows})["broken"]["kernels"]
  assert judge() == []
  rows["kernels"] = make_gradients(bias=0.1)
  assert judge() == ["bias"]


def test_a_record_without_bias_does_not_pass(tmp_path) -> None:
  def old(**changes: float) -> dict:
    row = make_gradients(**changes)
    return {key: row[key] for key in ("error", "mixers", "parameters")}

  right = ("kernels", gradient_error.XLA, gradient_error.SWAPPED)
  rows = {name: old() for name in right}
  rows |= {name: old(error=2) for name in gradient_error.MUST_FAIL}
  path = tmp_path / "record.json"
  path.write_text(json.dumps({"points": {"initial": rows}, "verdict": None}))
  with pytest.raises(SystemExit):
    gradient_error.judge_again(path)
  verdict = json.loads(path.read_text())["verdict"]
  assert not verdict["judges_bias_and_loss"] and not verdict["passes"]
  broken = ["size of error", "size of mixers", "swap"]
  assert verdict["broken"]["wrong-size"] == broken
  assert verdict["broken"]["kernels"] == []


def test_relative_errors_are_of_sums_of_squares() -> None:
  each_NL3 = np.array(
    [[[1.0, 16.0, 4.0], [8.0, 9.0, -3.0]], [[0.0, 16.0, 0.0], [0.0, 9.0, 0.0]]]
  )
  names = ["a", "pairs/second/mixer/b"]
  row = gradient_error._row(each_NL3, each_NL3[0], np.array([1e-3, 0]), names)
  assert row["error"] == pytest.approx(0.3)  # of 3/5 and 0
  assert row["of_mean"] == pytest.approx(0.6)
  assert row["mixers"] == pytest.approx(np.sqrt(8 / 9) / 2, abs=1e-5)
  assert row["parameters"]["a"] == pytest.approx(np.sqrt(1 / 32), abs=1e-5)
  assert row["along"] == {"a": [0.25, 0], "pairs/second/mixer/b": [-0.3333, 0]}
  assert row["loss_minus_float32"] == [1e-3, 0]


def test_defects_are_of_a_hundredth() -> None:
  o_BTHP = jnp.asarray(np.random.default_rng(1).normal(size=(2, 300, 2, 3)))
  o_BTHP = o_BTHP.astype(jnp.float32)
  change = lambda name: variants.VARIANTS[name].defect(o_BTHP) - o_BTHP
  wrong_T = jnp.abs(change("wrong-tokens")).max(axis=(0, 2, 3)) > 0
  assert list(np.flatnonzero(wrong_T)) == [50, 150, 250]
  assert jnp.allclose(change("wrong-size"), 0.01 * o_BTHP, rtol=1e-4)
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
  document = text_corpus.Document(
    "a", "0", text + "c"
  )  # the odd byte is left out
  monkeypatch.setattr(text_corpus, "gather", lambda packages, most: [document])
  sizes = dataclasses.replace(variants.QUICK, vocab_size=3)
  tokens, found = variants.make_tokens(sizes)
  assert found["bytes"] == 2 * len(tokens) == len(text.encode())
  assert list(tokens) == [0, 1, 0] * 10 + [2, 2]  # "aa", "bb" and all others
