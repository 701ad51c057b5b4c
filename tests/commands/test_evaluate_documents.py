"""Test `rebased evaluate` on text and on other data: values, tables, errors."""

import json
import math
from pathlib import Path

from data_cases import EOS, write_prepared
from flax import nnx
import jax.numpy as jnp
import model_cases
import numpy as np
from prepare_cases import jsonl
import pytest
from text_cases import finished as finished, folder as folder
from train_cases import call as call, trainer as trainer

from rebased_jax import (
  BaseConvConfig,
  ModelConfig,
  ReBasedConfig,
  load,
  save,
)
from train import text_evaluation
from train.data.prepare.tokenizer import ByteTokenizer

TEXT = "Ωne day, the 🐈 sat. " * 5
OTHER = "Then it left.\n"
CONFIG = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(heads=2, features=4),
  vocab_size=257,
  width=16,
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, trainer) -> Path:
  path = tmp_path_factory.mktemp("exported") / "model"
  model = nnx.merge(*model_cases.make(CONFIG))
  save(model, path, tokenizer="bytes", eos=EOS)
  return path


def losses_by_hand(path: Path, text: str) -> np.ndarray:
  """Return the loss of each token of a text and of its end, in float64."""
  tokens_T = np.array([EOS, *text.encode(), EOS], np.int32)
  logits_TV = np.asarray(load(path)(jnp.asarray(tokens_T[None, :-1]))[0])
  logits_TV = logits_TV.astype(np.float64)
  best_T = logits_TV.max(-1)
  sum_T = np.exp(logits_TV - best_T[:, None]).sum(-1)
  of_target_T = logits_TV[np.arange(len(logits_TV)), tokens_T[1:]]
  return best_T + np.log(sum_T) - of_target_T


def read(path: Path) -> dict[tuple[str, str], dict]:
  lines = map(json.loads, path.read_text().splitlines())
  return {(x["kind"], x["name"]): x for x in lines}


def test_text_is_evaluated_whatever_its_length(
  call, exported: Path, tmp_path: Path
) -> None:
  (tmp_path / "a.txt").write_text(TEXT)
  (tmp_path / "b.txt").write_text(OTHER)
  files = [str(tmp_path / x) for x in ("a.txt", "b.txt")]
  out_file = tmp_path / "losses.jsonl"
  code, out, err = call(
    *("evaluate", str(exported), "--text", *files, "--piece", "32"),
    *("--rows", "2", "--out", str(out_file)),
  )
  assert (code, err) == (0, "")
  found = read(out_file)
  by_hand = [losses_by_hand(exported, x) for x in (TEXT, OTHER)]
  for name, text, losses_T in zip(
    ("a.txt", "b.txt"), (TEXT, OTHER), by_hand, strict=True
  ):
    each = found["document", name]
    assert found["source", name]["loss"] == each["loss"]
    assert (each["tokens"], each["bytes"]) == (
      len(losses_T),
      len(text.encode()),
    )
    np.testing.assert_allclose(each["loss"], losses_T.mean(), rtol=1e-6)
    bits = losses_T.sum() / math.log(2) / len(text.encode())
    np.testing.assert_allclose(each["bits_per_byte"], bits, rtol=1e-6)
  loss = np.concatenate(by_hand).mean()
  total = found["total", str(exported)]
  np.testing.assert_allclose(total["loss"], loss, rtol=1e-6)
  np.testing.assert_allclose(total["perplexity"], np.exp(loss), rtol=1e-6)
  # Tokens 8 to 15 of both texts.
  place = np.concatenate([x[7:15] for x in by_hand])
  named = found["position", "8 to 15"]
  assert named["tokens"] == len(place)
  np.testing.assert_allclose(named["loss"], place.mean(), rtol=1e-6)
  for shown in (f"{loss:.4f}", "8 to 15", "a.txt", "bits per byte"):
    assert shown in out


def test_prepared_data_has_the_losses_of_its_text(
  call, exported: Path, tmp_path: Path
) -> None:
  texts = [TEXT, OTHER, ""]
  documents = [np.append(list(x.encode()), EOS) for x in texts]
  path = write_prepared(
    tmp_path / "set", (documents[:1], documents[1:]), domains=("code", "prose")
  )
  out_file = tmp_path / "losses.jsonl"
  words = ("evaluate", str(exported), "--piece", "32", "--rows", "2")
  code, _, err = call(*words, "--data.path", str(path), "--out", str(out_file))
  assert (code, err) == (0, "")
  prepared = read(out_file)
  sources = [name for kind, name in prepared if kind == "source"]
  assert sorted(sources) == ["code", "prose"]
  lines = tmp_path / "lines.jsonl"
  lines.write_bytes(jsonl([dict(text=x) for x in texts[:2]]))
  code, _, err = call(*words, "--text", str(lines), "--out", str(out_file))
  assert (code, err) == (0, "")
  found = read(out_file)
  assert found["source", "lines.jsonl"] == dict(
    found["total", str(exported)], kind="source", name="lines.jsonl"
  )
  found = [x for (kind, _), x in found.items() if kind == "document"]
  for i, each in enumerate(found):
    same = prepared["document", f"{path}, document {i}"]
    assert (same["loss"], same["bytes"]) == (each["loss"], each["bytes"])
  empty = prepared["document", f"{path}, document 2"]
  assert (empty["tokens"], empty["bits_per_byte"]) == (1, None)


def test_a_run_takes_other_data(call, finished: Path, tmp_path: Path) -> None:
  documents = [np.append(list(OTHER.encode()), EOS)]
  path = write_prepared(tmp_path / "set", (documents,))
  code, out, err = call("evaluate", str(finished), "--data.path", str(path))
  assert (code, err) == (0, "")
  losses_T = losses_by_hand(finished, OTHER)
  assert f"{losses_T.mean():.4f}" in out and f"{len(losses_T)} " in out
  # As many as one likes; the run has one.
  again = write_prepared(tmp_path / "again", (documents,))
  paths = (str(path), str(again))
  code, out, err = call("evaluate", str(finished), "--data.path", *paths)
  assert (code, err) == (0, "") and f"{2 * len(losses_T)} " in out
  code, _, err = call(
    "evaluate", str(finished), "--data.path", str(path), "--test"
  )
  assert code == 2 and "test=True: expected False, because it has no" in err
  other = write_prepared(tmp_path / "words", (documents,), tokenizer="words")
  code, _, err = call("evaluate", str(finished), "--data.path", str(other))
  assert code == 2 and "prepare the text again" in err


def test_without_an_end_before_it_the_first_token_is_context() -> None:
  ends = text_evaluation.Ends(before=None, after=EOS)
  document = text_evaluation._document(
    "a", "b", np.array([97, 98, EOS]), 2, ByteTokenizer(), ends
  )
  assert document.tokens.tolist() == [97, 98, EOS]
  assert document.bytes == 1


def test_wrong_text_is_an_error(
  call, finished: Path, exported: Path, tmp_path: Path
) -> None:
  for name, data in (
    ("empty.txt", b""),
    ("binary.txt", b"ab\0c"),
    ("latin.txt", "é".encode("latin-1")),
    ("long.txt", b"x" * 100),
    ("fine.txt", b"fine"),
  ):
    (tmp_path / name).write_bytes(data)
  for model, name, options, expected in (
    (exported, "empty.txt", (), "empty.txt is empty: expected some text"),
    (exported, "binary.txt", (), "binary.txt: a NUL at byte 2: expected text"),
    (exported, "latin.txt", (), "latin.txt: broken UTF-8 at byte 0"),
    (exported, "none.txt", (), "none.txt: there is no such plain file"),
    # Its position table has 16 rows.
    (finished, "long.txt", (), "long.txt: 102 tokens: expected at most 17"),
    (finished, "fine.txt", ("--rows", "0"), "rows=0: expected an integer"),
    (finished, "fine.txt", ("--mesh.data", "2"), "mesh=MeshConfig(data=2"),
    (finished, "fine.txt", ("--weights", "ema"), "keeps no average"),
    (finished, "fine.txt", ("--data.path", "a"), "data=DataPlaces(path="),
    (finished, "fine.txt", ("--eos", "x"), "eos='x': expected 'auto'"),
  ):
    words = ("evaluate", str(model), "--text", str(tmp_path / name))
    code, _, err = call(*words, *options)
    assert code == 2 and expected in err, err
  (tmp_path / "bad.jsonl").write_bytes(jsonl([dict(text=5)]))
  for words, expected in (
    (("--text", str(tmp_path)), "is a folder: expected files of text"),
    (("--text", str(tmp_path / "bad.jsonl")), "expected a string\n"),
    ((), "is an exported model, which has no held-out rows"),
    (("--text",), "text=(): expected one file or more"),
  ):
    code, _, err = call("evaluate", str(exported), *words)
    assert code == 2 and expected in err, err
  code, _, err = call("evaluate", str(finished), "--piece", "8")
  assert code == 2 and "piece=8: expected 1024, because it has no" in err


def test_tokens_outside_the_vocabulary_are_named(exported: Path) -> None:
  tokens_T = np.array([1, 2, 300], np.int32)
  document = text_evaluation.Document("b.txt", "b", tokens_T, None)
  with pytest.raises(ValueError, match=r"b.txt: token 2 is 300: .*0 to 256"):
    text_evaluation.evaluate(load(exported), [document])
  alone = text_evaluation.Document("b.txt", "b", tokens_T[:1], None)
  with pytest.raises(ValueError, match="no token to predict in 1 documents"):
    text_evaluation.evaluate(load(exported), [alone])


def test_groups_of_documents_add_up(exported: Path, monkeypatch) -> None:
  model = load(exported)
  random = np.random.default_rng(0)
  documents = [
    text_evaluation.Document(
      str(i), "s", random.integers(0, 257, n).astype(np.int32), n
    )
    for i, n in enumerate((5, 16, 3, 1, 9, 12))
  ]
  whole, order = text_evaluation.evaluate(model, documents, rows=2), []
  monkeypatch.setattr(text_evaluation, "_MOST_TOKENS", 20)
  parts = text_evaluation.evaluate(
    model, documents, rows=2, on_document=lambda x, _: order.append(x.name)
  )
  assert order == ["0", "1", "2", "4", "5"] and parts.left_out == 1
  assert parts.total.tokens == whole.total.tokens == 40
  np.testing.assert_allclose(parts.total.nll, whole.total.nll, rtol=1e-6)
  sums = sum(x.nll for x in parts.positions.values())
  np.testing.assert_allclose(parts.total.nll, sums, rtol=1e-12)
