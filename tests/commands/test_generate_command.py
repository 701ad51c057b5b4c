"""Test `rebased generate`: the text, the tokenizer, and the errors."""

import dataclasses
import json
from pathlib import Path
import shutil

import chex
from data_cases import EOS, write_megatron
from flax import nnx
import jax
import numpy as np
from prepare_cases import jsonl, records, run as prepare
import pytest
from text_cases import (
  DOCUMENTS,
  finished as finished,
  folder as folder,
  make_config,
)
from train_cases import call as call, run, tiny, trainer as trainer

import rebased_jax
from rebased_jax import generate
from train import load, text_completion
from train.data.prepare import tokenizer as tokenize
from train.text_completion import ModelSource, Sampling

_BYTES = tokenize.ByteTokenizer()


def test_generate_prints_what_the_model_generates(call, finished: Path) -> None:
  prompt = "déf"
  tokens = np.array([[*prompt.encode()]], np.int32)
  for options, how in (
    (("--temperature", "0"), dict()),
    (
      ("--seed", "7", "--temperature", "2", "--top-k", "40"),
      dict(temperature=2.0, top_k=40, key=jax.random.key(7)),
    ),
    (
      ("--seed", "7", "--temperature", "2", "--top-p", "0.9"),
      dict(temperature=2.0, top_p=0.9, key=jax.random.key(7)),
    ),
  ):
    words = ("generate", str(finished), "--prompt", prompt, "--tokens", "12")
    code, out, err = call(*words, *options)
    assert (code, err) == (0, "")
    rest = generate(load(finished), tokens, steps=12, **how)[0].tolist()
    if EOS in rest:
      rest = rest[: rest.index(EOS)]
    expected = bytes([*tokens[0], *rest]).decode(errors="replace")
    assert out == expected + "\n" and expected != prompt
  found = [
    text_completion.complete(finished, "a", Sampling(12, 2.0, seed=seed))
    for seed in (0, 0, 1)
  ]
  assert found[0] == found[1] != found[2]
  early = text_completion.complete(
    finished, "a", Sampling(12, 0.0), ModelSource(step=2)
  )
  assert early != text_completion.complete(finished, "a", Sampling(12, 0.0))


def test_the_end_of_a_document_ends_the_text(
  finished: Path, monkeypatch
) -> None:
  blocks = [[98], [99, EOS, 100]]
  monkeypatch.setattr(text_completion, "sample", lambda *_: iter(blocks))
  assert text_completion.complete(finished, "a", Sampling(4)) == "abc"
  blocks[1][1] = 101
  assert text_completion.complete(finished, "a", Sampling(4)) == "abced"
  # Each part is text that no later token changes: "é" is two bytes.
  blocks = [list(x) for x in (b"b", b"\xc3", b"\xa9-", b"e", b"nd.", b"-\xff")]
  parts = lambda *stop: list(
    text_completion.stream(finished, "a-end", Sampling(9, stop=stop))
  )
  assert parts() == ["a-endb", "é-", "e", "nd.", "-", "\ufffd"]
  assert parts("-end", "x") == ["a-endb", "é"]
  assert parts("-elf") == ["a-endb", "é", "-end.", "-\ufffd"]
  assert parts("b") == ["a-end"]


def test_wrong_arguments_are_errors(
  call, finished: Path, tmp_path: Path
) -> None:
  mqar = tmp_path / "mqar"
  run(tiny(steps=4), mqar)
  bare = tmp_path / "bare"
  bare.mkdir()
  shutil.copy(finished / "config.json", bare)
  for words, expected in (
    ((mqar, "--prompt", "x"), "MQARStreamData: expected a language model"),
    ((tmp_path / "none", "--prompt", "x"), "none does not exist: expected"),
    ((bare, "--prompt", "x"), "no checkpoint yet"),
    ((finished,), "--prompt"),
    ((finished, "--prompt", ""), "prompt='': expected some text"),
    ((tmp_path / "none", "--prompt", ""), "prompt='': expected some text"),
    ((finished, "--prompt", "\udcff"), "prompt='\\udcff': "),
    ((finished, "--prompt", "x" * 9, "--tokens", "9"), "at most 16 tokens"),
    ((finished, "--prompt", "x", "--tokens", "0"), "tokens=0"),
    ((finished, "--prompt", "x", "--temperature", "-1"), "temperature=-1"),
    ((finished, "--prompt", "x", "--temperature", "nan"), "temperature=nan"),
    ((finished, "--prompt", "x", "--top-k", "0"), "top_k=0"),
    ((finished, "--prompt", "x", "--top-k", "999"), "at most the 257"),
    (
      (finished, "--prompt", "x", "--top-k", "3", "--temperature", "0"),
      "None with temperature=0",
    ),
    ((finished, "--prompt", "x", "--top-p", "0"), "top_p=0.0"),
    (
      (finished, "--prompt", "x", "--top-p", "1", "--temperature", "0"),
      "top_p=1.0: expected None with temperature=0",
    ),
    ((finished, "--prompt", "x", "--stop", ""), "stop=('',)"),
    ((finished, "--prompt", "x", "--seed", "-1"), "seed=-1"),
    ((finished, "--prompt", "x", "--tokenizer", "a.json"), "'a.json'"),
    ((finished, "--prompt", "x", "--eos", "x"), "eos='x'"),
    ((finished, "--prompt", "x", "--step", "77"), "77"),
    (
      (finished, "--prompt", "x", "--tokens", "3", "--weights", "ema"),
      "keeps no average",
    ),
  ):
    code, out, err = call("generate", *map(str, words))
    assert code == 2 and out == "" and "Traceback" not in err, (words, err)
    assert expected in err.replace("\n", " "), (words, err)
  code, out, err = call(
    "generate", str(finished), "--prompt=-x y", "--tokens", "1"
  )
  assert code == 0 and out.startswith("-x y"), err
  # 9 + 8 tokens fit 16 positions: the last token is never read.
  code, _, err = call(
    *("generate", str(finished), "--prompt", "x" * 9, "--tokens", "8")
  )
  assert code == 0, err


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> tuple[Path, Path]:
  """Return a data set with a trained tokenizer, and a run on it."""
  place = tmp_path_factory.mktemp("learnt")
  (place / "x.jsonl").write_bytes(jsonl(records(60)))
  texts = [x["text"] for x in records(60)]
  (place / "t.json").write_text(tokenize.train_bpe(texts, 300))
  prepare([place / "x.jsonl"], place / "set", tokenizer=str(place / "t.json"))
  data = dict(held_out="end")
  config = make_config(place / "set", data=data, model=dict(vocab_size=320))
  run(dataclasses.replace(config, steps=4, eval_every=4), place / "run")
  return place / "set", place / "run"


def test_the_tokenizer_is_that_of_the_data_set(
  call, learnt, tmp_path: Path
) -> None:
  data, path = learnt
  tokenizer = tokenize.load(str(data))
  words = ("generate", str(path), "--tokens", "4", "--prompt", "déjà vu 日本")
  code, out, err = call(*words)
  assert code == 0 and out.startswith("déjà vu 日本"), err
  assert len(tokenizer.encode(["déjà vu 日本"])[0]) < 13  # 4 more fit 16
  file = data / "tokenizer.json"
  sound = file.read_text()
  other = json.loads(sound)
  other["added_tokens"][0]["normalized"] ^= True
  try:
    file.write_text(json.dumps(other))
    code, _, err = call(*words)
    assert code == 2 and f"{str(file)!r}: its SHA-256 is" in err, err
    code, _, err = call(*words, "--tokenizer", str(file))
    assert code == 2 and "of the tokenizer that made the tokens" in err
    file.unlink()
    code, _, err = call(*words)
    assert code == 2 and f"{str(file)!r}: expected" in err, err
    assert "; --tokenizer names one" in err
    (tmp_path / "moved.json").write_text(sound)
    again = call(*words, "--tokenizer", str(tmp_path / "moved.json"))
    assert again == (0, out, "")
  finally:
    file.write_text(sound)
  sidecar = data / "dataset.json"
  sidecar.rename(data / "away")
  code, _, err = call(*words)
  assert code == 2 and "no dataset.json" in err
  (data / "away").rename(sidecar)


def test_megatron_data_needs_a_tokenizer(call, tmp_path: Path) -> None:
  path = write_megatron(tmp_path / "d", DOCUMENTS)
  config = make_config(path, steps=4, eval_every=4, save_every=4)
  run(config, tmp_path / "run")
  words = (
    "generate",
    str(tmp_path / "run"),
    "--prompt",
    "def",
    "--tokens",
    "3",
  )
  code, _, err = call(*words)
  assert code == 2 and "Megatron's format names no tokenizer" in err
  code, out, err = call(*words, "--tokenizer", "bytes")
  assert code == 0 and out.startswith("def"), err
  big = tmp_path / "big.json"
  big.write_text(tokenize.train_bpe(["some text, some more text"], 262))
  code, _, err = call(*words, "--tokenizer", str(big))
  assert code == 2 and "model.vocab_size=257: expected at least 262" in err


def test_a_mixture_must_have_one_tokenizer(
  call, learnt, folder, tmp_path
) -> None:
  data, _ = learnt
  paths = dict(path=(str(folder), str(data)))
  config = make_config(folder, data=paths, model=dict(vocab_size=320))
  with pytest.raises(ValueError, match=f"{data}: its tokenizer's SHA-256"):
    run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_an_export_generates_the_text_of_its_run(
  call, finished: Path, learnt, tmp_path: Path
) -> None:
  """With the byte tokenizer, and with a tokenizer from a file."""
  for run_dir in (finished, learnt[1]):
    out = tmp_path / run_dir.parent.name
    code, printed, err = call("export", str(run_dir), "--out", str(out))
    assert (code, err) == (0, ""), err
    assert "parameters" in printed and "model.safetensors" in printed
    words = ("--prompt", "déjà", "--tokens", "4", "--temperature", "0")
    wanted = call("generate", str(run_dir), *words)
    assert wanted[0] == 0 and call("generate", str(out), *words) == wanted
    found, model = rebased_jax.load(out), load(run_dir)
    chex.assert_trees_all_equal(nnx.state(found), nnx.state(model))
    assert found.config == model.config
  assert (out / "tokenizer.json").read_bytes() == (
    learnt[0] / "tokenizer.json"
  ).read_bytes()
  code, _, err = call("export", str(finished), "--out", str(out))
  assert code == 2 and "is not empty: expected a new folder" in err
  code, _, err = call("generate", str(out), *words, "--step", "2")
  assert code == 2 and "has one set of weights" in err
  bare = tmp_path / "bare"
  code, _, err = call(
    *("export", str(finished), "--out", str(bare), "--step", "2"),
    *("--tokenizer", "none", "--max-file-mb", "1"),
  )
  assert code == 0, err
  early = nnx.state(rebased_jax.load(bare))
  chex.assert_trees_all_equal(early, nnx.state(load(finished, 2)))
  code, _, err = call("generate", str(bare), "--prompt", "a")
  assert code == 2 and "has no tokenizer: expected --tokenizer" in err
  words = ("--prompt", "a", "--tokenizer", "bytes", "--tokens", "3")
  code, text, err = call("generate", str(bare), *words)
  assert code == 0 and text.startswith("a"), err
  (out / "tokenizer.json").write_text("{}")
  code, _, err = call("generate", str(out), "--prompt", "a")
  assert code == 2 and "is not the tokenizer of config.json" in err
