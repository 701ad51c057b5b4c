"""Test tokenizers: training, encoding, decoding and files."""

import dataclasses
import json
from pathlib import Path
import signal
import subprocess
import sys

import numpy as np
from prepare_cases import jsonl, run, shard_texts, write_formats
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from train import cli
from train.data.prepare import tokenizer as tokenize
from train.data.prepare.shard import PlannedTokenizer, PrepareError

_TEXTS = [f"the cat {i} sat on the mat; déjà vu 日本\n\t{i}" for i in range(99)]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> str:
  path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
  path.write_text(tokenize.train_bpe(_TEXTS, 400))
  return str(path)


def _save_words(path: Path, words: dict[str, int], *, unknown: str) -> None:
  """Write a tokenizer of whole words; others become the word `unknown`."""
  whole = tokenizers.Tokenizer(models.WordLevel(words, unk_token=unknown))
  whole.pre_tokenizer = pre_tokenizers.Whitespace()
  whole.save(str(path))


def test_training_is_deterministic_and_compresses(learnt):
  assert tokenize.train_bpe(iter(_TEXTS), 400) == Path(learnt).read_text()
  tokenizer = tokenize.load(learnt)
  assert 257 < tokenizer.spec.vocab_size <= 400
  assert tokenizer.spec.eos == 0
  tokens = tokenizer.encode(_TEXTS)
  size = sum(len(text.encode()) for text in _TEXTS)
  assert sum(map(len, tokens)) < size / 3
  assert all(x.dtype == np.dtype("<u2") for x in tokens)


@pytest.mark.parametrize(
  ("size", "dtype"), [(1, "<u2"), (1 << 16, "<u2"), ((1 << 16) + 1, "<u4")]
)
def test_tokens_are_stored_in_two_bytes_where_all_fit(size, dtype):
  spec = tokenize.TokenizerSpec("bytes", "bytes", "", size, None)
  assert spec.dtype == np.dtype(dtype)
  assert np.array(size - 1).astype(spec.dtype) == size - 1


def test_any_text_decodes_to_itself(learnt):
  tokenizer = tokenize.load(learnt)
  odd = ["", " ", "a\0b", "<|endoftext|>", "𝄞\r\n\u2028", " x ", "\ufffd"]
  for text, tokens in zip(odd, tokenizer.encode(odd), strict=True):
    assert tokenizer.decode(tokens) == text
    assert tokenizer.spec.eos not in tokens  # text cannot end a document


def test_truncation_padding_templates_and_dropout_of_a_file_are_not_used(
  learnt, tmp_path
):
  whole = tokenizers.Tokenizer.from_file(learnt)
  whole.model.dropout = 0.9  # each encoding would differ
  whole.enable_truncation(4)
  whole.enable_padding(length=6)
  whole.post_processor = processors.TemplateProcessing(
    single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
  )
  whole.save(str(tmp_path / "t.json"))
  plain, odd = tokenize.load(learnt), tokenize.load(str(tmp_path / "t.json"))
  for a, b in zip(plain.encode(_TEXTS), odd.encode(_TEXTS), strict=True):
    np.testing.assert_array_equal(a, b)
  assert plain.spec.sha256 != odd.spec.sha256


def test_a_vocabulary_above_16_bits_is_stored_in_32(tmp_path):
  words = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000}
  path = tmp_path / "big.json"
  _save_words(path, words, unknown="w0")
  (tmp_path / "x.jsonl").write_bytes(jsonl([dict(text="w1 w69999 w5")]))
  inputs, out = [tmp_path / "x.jsonl"], tmp_path / "out"
  dataset = run(inputs, out, tokenizer=str(path))
  assert (dataset["dtype"], dataset["vocab_size"]) == ("uint32", 70_001)
  assert dataset["eos"] == 70_000
  with pytest.raises(ValueError, match="eos='<nul>'"):
    run(inputs, out, tokenizer=str(path), eos="<nul>")


def test_the_tokenizer_is_copied_and_another_is_refused(learnt, tmp_path):
  data = write_formats(tmp_path / "in")
  out = tmp_path / "out"
  dataset = run([tmp_path / "in"], out, tokenizer=learnt)
  assert (out / "tokenizer.json").read_bytes() == Path(learnt).read_bytes()
  assert dataset["tokenizer"]["name"] == "tokenizer.json"
  assert shard_texts(out) == [[x["text"] for x in v] for v in data.values()]
  other = tmp_path / "other.json"
  other.write_text(tokenize.train_bpe(_TEXTS, 300))
  with pytest.raises(ValueError, match="tokenizer.sha256 was"):
    run([tmp_path / "in"], out, tokenizer=str(other))


def test_a_worker_refuses_another_tokenizer_than_the_planned_one(
  learnt, tmp_path
):
  """Also one of the same kind, such as the file after it was changed."""
  spec = tokenize.load(learnt).spec
  assert PlannedTokenizer(learnt, "auto", spec).load().spec == spec
  changed = tmp_path / "tokenizer.json"
  changed.write_text(tokenize.train_bpe(_TEXTS[:50], 400))
  others = (
    tokenize.load(str(changed)).spec,
    tokenize.load("bytes").spec,
    dataclasses.replace(spec, sha256="0" * 64),
    dataclasses.replace(spec, vocab_size=spec.vocab_size + 1),
    dataclasses.replace(spec, eos=None),
  )
  for other in others:
    with pytest.raises(PrepareError, match="the tokenizer changed while"):
      PlannedTokenizer(learnt, "auto", other).load()
  with pytest.raises(PrepareError, match="missing"):
    PlannedTokenizer(str(tmp_path / "missing.json"), "auto", spec).load()


def test_a_text_that_the_tokenizer_refuses_is_named(tmp_path):
  words = {"a": 0, "b": 1, "</s>": 2}
  _save_words(tmp_path / "t.json", words, unknown="none")
  texts = [dict(text=x) for x in ("a b", "a c", "b")]
  (tmp_path / "x.jsonl").write_bytes(jsonl(texts))
  options = dict(tokenizer=str(tmp_path / "t.json"))
  with pytest.raises(
    PrepareError, match="x.jsonl, line 2: the tokenizer failed"
  ):
    run([tmp_path / "x.jsonl"], tmp_path / "out", **options)
  options |= dict(on_error="skip")
  dataset = run([tmp_path / "x.jsonl"], tmp_path / "out", **options)
  assert (dataset["documents"], dataset["skipped"]) == (2, 1)


def test_a_text_without_tokens_counts_as_empty(tmp_path):
  _save_words(tmp_path / "t.json", {"a": 0, "</s>": 1}, unknown="</s>")
  texts = [dict(text=x) for x in ("  ", "a", "\n", "")]
  (tmp_path / "x.jsonl").write_bytes(jsonl(texts))
  dataset = run(
    [tmp_path / "x.jsonl"], tmp_path / "out", tokenizer=str(tmp_path / "t.json")
  )
  assert (dataset["documents"], dataset["empty"]) == (1, 3)
  assert dataset["tokens"] == 2


def test_wrong_tokenizers_are_named(tmp_path):
  bad = tmp_path / "t.json"
  bad.write_text('{"a": 1}')
  with pytest.raises(ValueError, match=r"t.json: no tokenizer.json"):
    tokenize.load(str(bad))
  tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(bad))
  with pytest.raises(ValueError, match="eos='auto': .* has none of"):
    tokenize.load(str(bad))
  assert tokenize.load(str(bad), "none").spec.eos is None
  assert tokenize.load(str(bad), "a").spec.eos == 0
  with pytest.raises(ValueError, match="vocab_size=100: expected at least 257"):
    tokenize.train_bpe(["a"], 100)
  with pytest.raises(
    ValueError, match="vocab_size=10{12}: .* at most 16777216"
  ):
    tokenize.train_bpe(["a"], 10**12)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_training_that_is_merging(
  tmp_path: Path, number: signal.Signals
) -> None:
  """Replace the training by one long call that Python cannot interrupt."""
  code = (
    "import hashlib, sys\n"
    "from train import cli\n"
    "from train.commands import tokenizer\n"
    "def merge(*args):\n"
    "  print('merging', flush=True)\n"
    "  hashlib.pbkdf2_hmac('sha256', b'a', b'b', 2**31 - 1)\n"
    "tokenizer.train_tokenizer = merge\n"
    "cli.main(sys.argv[1:])\n"
  )
  words = ["tokenizer", "train", "in", "--out", str(tmp_path / "t.json")]
  with subprocess.Popen(
    [sys.executable, "-c", code, *words],
    cwd=Path(__file__).parents[2],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    try:
      assert any("merging" in line for line in process.stdout)
      process.send_signal(number)
      _, printed = process.communicate(timeout=120)
    finally:
      process.kill()
  assert printed == f"rebased: stopped by {number.name}\n"
  assert process.returncode == 128 + number


def test_the_command_trains_a_tokenizer(tmp_path, capsys):
  write_formats(tmp_path / "in")
  out = tmp_path / "new" / "tokenizer.json"
  words = ["tokenizer", "train", str(tmp_path / "in"), "--out", str(out)]
  for code in (0, 2):
    with pytest.raises(SystemExit) as stop:
      cli.main([*words, "--vocab-size", "300"])
    assert stop.value.code == code
  shown = capsys.readouterr()
  assert "300 tokens, from 80 documents" in shown.out
  assert "it exists" in shown.err
  assert len(json.loads(out.read_text())["model"]["vocab"]) == 300
  (tmp_path / "in" / "a.jsonl").write_text("{")
  words[-1] = str(tmp_path / "b.json")
  with pytest.raises(SystemExit) as stop:
    cli.main(words)
  assert stop.value.code == 1
  assert "a.jsonl, line 1" in capsys.readouterr().err
  assert not (tmp_path / "b.json").exists()
