"""Test lm-evaluation-harness on local tasks, against sums of plain logits."""

import json
import os
from pathlib import Path
import warnings

from data_cases import EOS
from flax import nnx
import jax
import jax.numpy as jnp
import model_cases
import numpy as np
import pytest
from text_cases import finished as finished, folder as folder
from train_cases import call as call, trainer as trainer

from rebased_jax import (
  LM,
  BaseConvConfig,
  ModelConfig,
  ReBasedConfig,
  generate,
  load,
  save,
)

# The harness reads local files alone.
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
  os.environ.setdefault(name, "1")
with warnings.catch_warnings(action="ignore"):
  pytest.importorskip("lm_eval", reason="lm_eval is not installed: [eval]")
  from lm_eval import simple_evaluate
  from lm_eval.api.instance import Instance
  from lm_eval.tasks import TaskManager

  from train.harness import RebasedLM

TASKS = Path(__file__).parent / "lm_eval_tasks"
CONFIG = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(heads=2, features=4),
  vocab_size=257,
  width=16,
)
POSITIONS = 24
# float32 against float64, in sums of up to 90 log-probabilities.
CLOSE = dict(rtol=0, atol=1e-4)

# Other people's code warns.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=[None, POSITIONS], ids=["any", "24"])
def model(request, tmp_path_factory, trainer) -> Path:
  """A model that reads any length, and one that reads 24 tokens."""
  config = dict(positions=request.param)
  path = tmp_path_factory.mktemp("exported") / "model"
  made = nnx.merge(*model_cases.make(ModelConfig(**{**vars(CONFIG), **config})))
  save(made, path, tokenizer="bytes", eos=EOS)
  return path


def lines(name: str) -> list[dict]:
  text = (TASKS / f"{name}.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def by_hand(lm: LM, context: list[int], tokens: list[int]) -> tuple:
  """Return log p of tokens after a context in float64, and if it is greedy."""
  row = np.array([*context, *tokens], np.int32)
  padded = np.resize(row, lm.config.positions or 128)[None]
  logits_TV = np.asarray(jax.jit(lambda x: lm(x))(jnp.asarray(padded))[0])
  logits_TV = logits_TV[len(context) - 1 : len(row) - 1].astype(np.float64)
  best_T = logits_TV.max(-1)
  sum_T = np.log(np.exp(logits_TV - best_T[:, None]).sum(-1)) + best_T
  of_target_T = logits_TV[np.arange(len(tokens)), tokens]
  greedy = (logits_TV.argmax(-1) == tokens).all()
  return (of_target_T - sum_T).sum(), bool(greedy)


def run(model: Path, task: str, monkeypatch, **options) -> dict:
  monkeypatch.chdir(TASKS)
  return simple_evaluate(
    model="rebased",
    model_args={"run": str(model), "piece": 32, **options},
    tasks=[task],
    task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
    batch_size=2,
    log_samples=True,
    bootstrap_iters=0,
  )


def responses(found: dict, task: str) -> list:
  samples = sorted(found["samples"][task], key=lambda x: x["doc_id"])
  return [x["filtered_resps"] for x in samples]


def test_choices_have_the_log_likelihoods_of_plain_logits(
  model: Path, monkeypatch
) -> None:
  lm = load(model)
  found = run(model, "rebased_choice", monkeypatch)
  right = []
  for each, choices in zip(
    lines("choice"), responses(found, "rebased_choice"), strict=True
  ):
    wanted = []
    for choice in each["choices"]:
      tokens = list(f" {choice}".encode())
      context = list(each["question"].encode())
      if lm.config.positions is not None:  # of which the last token is not read
        context = context[-(POSITIONS + 1 - len(tokens)) :]
      wanted.append(by_hand(lm, context, tokens))
    values, greedy = zip(*choices, strict=True)
    np.testing.assert_allclose(
      np.array(values, float), [x for x, _ in wanted], **CLOSE
    )
    assert list(map(str, greedy)) == [str(x) for _, x in wanted]
    right.append(np.argmax([x for x, _ in wanted]) == each["answer"])
  assert found["results"]["rebased_choice"]["acc,none"] == np.mean(right)


def test_rolling_reads_the_whole_text_or_windows(
  model: Path, monkeypatch
) -> None:
  lm = load(model)
  found = run(model, "rebased_rolling", monkeypatch)
  bits, size = 0.0, 0
  for each, (value,) in zip(
    lines("rolling"), responses(found, "rebased_rolling"), strict=True
  ):
    tokens, wanted = list(each["text"].encode()), 0.0
    window = lm.config.positions or len(tokens)
    before = EOS
    for at in range(0, len(tokens), window):
      part = tokens[at : at + window]
      context = [before]
      if at and len(part) < window:  # the last window has a full context
        context = tokens[len(tokens) - window - 1 : at]
      wanted += by_hand(lm, context, part)[0]
      before = part[-1]
    np.testing.assert_allclose(float(value), wanted, **CLOSE)
    bits, size = bits - wanted / np.log(2), size + len(tokens)
  np.testing.assert_allclose(
    found["results"]["rebased_rolling"]["bits_per_byte,none"],
    bits / size,
    rtol=1e-5,
  )


def test_text_is_generated_up_to_a_stop(model: Path, monkeypatch) -> None:
  found = run(model, "rebased_until", monkeypatch)
  lm, texts = RebasedLM(str(model), batch_size=4), {}
  room = POSITIONS + 1 - 20 if lm.max_length else 10**6
  for each, text in zip(
    lines("until"), responses(found, "rebased_until"), strict=True
  ):
    prompt = list(each["question"].encode())[-room:]
    new = generate(lm.model, jnp.array([prompt], jnp.int32), steps=20)[0]
    new = new.tolist()
    new = new[: new.index(EOS)] if EOS in new else new
    whole = bytes(new).decode(errors="replace")
    assert text == [whole.split("\n")[0]]
    texts[each["question"]] = whole
  # A stop of two characters in the middle of what is generated.
  question, whole = max(texts.items(), key=lambda x: len(x[1]))
  stop = whole[5:7]
  options = {"until": [stop], "max_gen_toks": 20}
  request = Instance("generate_until", {}, (question, options), 0)
  assert lm.generate_until([request]) == [whole.split(stop)[0]]
  sampled = dict(options, do_sample=True, temperature=2.0, until=[])
  request = Instance("generate_until", {}, (question, sampled), 0)
  first = RebasedLM(str(model), seed=1).generate_until([request])
  again = RebasedLM(str(model), seed=1).generate_until([request, request])
  assert again[0] == first[0] and again[1] != first[0]
  sampled["min_p"] = 0.5
  with pytest.raises(ValueError, match="min_p=0.5: expected only"):
    lm.generate_until([request])


def test_a_run_is_a_model_too(finished: Path) -> None:
  request = Instance("loglikelihood", {}, ("", "ab"), 0)
  (found,) = RebasedLM(str(finished)).loglikelihood([request])
  wanted, greedy = by_hand(load(finished), [EOS], list(b"ab"))
  np.testing.assert_allclose(found[0], wanted, **CLOSE)
  assert found[1] == greedy
  first = RebasedLM(str(finished), step=2).loglikelihood([request])
  assert first[0][0] != found[0]


@pytest.mark.parametrize("model", [None], ids=["any"], indirect=True)
def test_the_command_prints_the_harnesss_table(
  model: Path, call, monkeypatch, tmp_path: Path
) -> None:
  monkeypatch.chdir(TASKS)
  code, out, err = call(
    *("lm-eval", str(model), "--tasks", "rebased_choice"),
    *("--include_path", str(TASKS), "--model_args", "piece=32"),
    *("--weights", "trained"),
    *("--output_path", str(tmp_path / "results")),
  )
  assert code == 0, err
  assert "|rebased_choice|" in out and "batch_size: 8" in out
  assert list((tmp_path / "results").rglob("results_*.json"))


@pytest.mark.parametrize("model", [None], ids=["any"], indirect=True)
def test_wrong_arguments_are_errors(model: Path, call) -> None:
  code, out, _ = call("lm-eval")
  assert code == 2 and "--tasks" in out
  assert call("lm-eval", "--help")[0] == 0
  for words, expected in (
    (("none", "--tasks", "x"), "none does not exist: expected"),
    (("a,b", "--tasks", "x"), "a,b: expected a path without a comma"),
    ((str(model), "--model", "hf"), "--model: expected no such option"),
    ((str(model), "--device=cpu"), "--device: expected no such option"),
  ):
    code, _, err = call("lm-eval", *words)
    assert code != 0 and expected in err, err
  for options, expected in (
    (dict(batch_size="many"), "batch_size='many': expected a number"),
    (dict(step=3), "has one set of weights"),
  ):
    with pytest.raises(ValueError, match=expected):
      RebasedLM(str(model), **options)
