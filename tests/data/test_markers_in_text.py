"""Test that text never becomes a control token, for every kind of model."""

import json
from pathlib import Path

from prepare_cases import jsonl, run
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from train.data.prepare import tokenizer as tokenize
from train.data.prepare.shard import PrepareError

_CHARACTERS = {x: i for i, x in enumerate("abdefnotx|<>/[]▁s")}
_PIECES = [("<unk>", 0.0), *((x, -3.0) for x in _CHARACTERS)]


def _bpe(end: str, *, merged: bool, **options) -> tokenizers.Tokenizer:
  """Return a byte-level BPE model; `merged`: its merges make the end."""
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  vocab = {x: i for i, x in enumerate(sorted(alphabet))}
  merges = []
  if merged:
    for i in range(1, len(end)):
      merges.append((end[:i], end[i]))
      vocab.setdefault(end[: i + 1], len(vocab))
  vocab.setdefault(end, len(vocab))
  whole = tokenizers.Tokenizer(models.BPE(vocab, merges, **options))
  whole.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  whole.decoder = decoders.ByteLevel()
  return whole


def _model(kind: str, end: str) -> tokenizers.Tokenizer:
  """Return a tokenizer whose vocabulary has `end`, of a kind of model."""
  if kind == "bpe":
    return _bpe(end, merged=False)
  if kind == "bpe merges":
    return _bpe(end, merged=True)
  if kind == "bpe whole words":
    return _bpe(end, merged=False, ignore_merges=True)
  if kind == "unigram":
    whole = tokenizers.Tokenizer(models.Unigram([*_PIECES, (end, 0.0)], 0))
    whole.pre_tokenizer = pre_tokenizers.Metaspace()
    whole.decoder = decoders.Metaspace()
    return whole
  words = {**_CHARACTERS, end: 90, "[UNK]": 91}
  if kind == "words":
    whole = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
  else:
    pieces = words | {f"##{x}": 30 + i for x, i in _CHARACTERS.items()}
    whole = tokenizers.Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
  whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return whole


_KINDS = ("bpe", "bpe merges", "bpe whole words", "unigram", "words", "pieces")


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("special", [None, False, True])
def test_an_end_in_a_text_stays_text(tmp_path, kind, special):
  """Try an end that is no added token, a plain one and a special one."""
  end, file = "</s>", tmp_path / "t.json"
  whole = _model(kind, end)
  if special is not None:
    token = tokenizers.AddedToken(end, special=special, normalized=False)
    whole.add_tokens([token])
  whole.save(str(file))
  found = tokenize.load(str(file))
  eos = whole.token_to_id(end)
  assert found.spec.eos == eos
  assert found.spec.vocab_size == max(whole.get_vocab().values()) + 1
  texts = [end, f"a {end} b", f"{end}{end}", f"a{end}b"]
  tokens = found.encode(texts)
  assert all(eos not in x and x.size for x in tokens)
  if kind != "words":  # there an unknown word is one token
    for text, x in zip(texts, tokens, strict=True):
      if kind != "pieces":
        assert found.decode(x) == text
      else:
        assert found.decode(x).replace(" ##", "") == text
  # Other texts have the tokens that the library gives.
  plain = whole.encode("a b", add_special_tokens=False).ids
  assert found.encode(["a b"])[0].tolist() == plain
  assert found.decode([eos]) in (end, "")  # "" is Unigram's own behaviour


def test_other_controls_stay_text_and_added_words_are_found(tmp_path):
  whole, file = _model("bpe", "</s>"), tmp_path / "t.json"
  controls = ["<|im_start|>", "<think>", "[PAD]", "</s>"]
  words = ["   ", "COVID-19", "<not one>"]
  whole.add_tokens([tokenizers.AddedToken(x, special=False) for x in controls])
  whole.add_tokens([tokenizers.AddedToken(x, special=False) for x in words])
  whole.save(str(file))
  for eos in ("auto", "none", "<think>"):
    found = tokenize.load(str(file), eos)
    numbers = {whole.token_to_id(x) for x in controls}
    for text in controls:
      (tokens,) = found.encode([f"x {text}y"])
      assert not numbers & set(tokens.tolist())
      assert found.decode(tokens) == f"x {text}y"
    for text in words:  # as the library does
      (tokens,) = found.encode([f"x{text}y"])
      assert tokens[1] == whole.token_to_id(text) and tokens.size == 3


def test_a_normaliser_cannot_make_an_end(tmp_path):
  whole, file = _model("words", "</s>"), tmp_path / "t.json"
  whole.normalizer = normalizers.NFKC()
  whole.add_tokens([tokenizers.AddedToken("</s>", special=False)])
  whole.save(str(file))
  found = tokenize.load(str(file))
  (tokens,) = found.encode(["a ＜／s＞ b"])  # noqa: RUF001
  assert found.spec.eos not in tokens and tokens.size == 3


def test_a_trained_unigram_cannot_make_its_end(tmp_path):
  whole, file = tokenizers.Tokenizer(models.Unigram()), tmp_path / "t.json"
  whole.pre_tokenizer = pre_tokenizers.Metaspace()
  trainer = trainers.UnigramTrainer(
    vocab_size=60,
    special_tokens=["<pad>", "</s>", "<unk>"],
    unk_token="<unk>",
    show_progress=False,
  )
  whole.train_from_iterator(["the end </s> of <pad> it"] * 9, trainer)
  whole.save(str(file))
  controls = {whole.token_to_id(x) for x in ("<pad>", "</s>")}
  (tokens,) = tokenize.load(str(file)).encode(["the </s> end <pad> of it"])
  assert not controls & set(tokens.tolist())


def test_an_ordinary_token_as_the_end_is_refused_where_a_text_has_it(tmp_path):
  _bpe("</s>", merged=False).save(str(tmp_path / "t.json"))
  path = tmp_path / "x.jsonl"
  path.write_bytes(jsonl([dict(text="b"), dict(text="a"), dict(text="c")]))
  options = dict(tokenizer=str(tmp_path / "t.json"), eos="a")
  with pytest.raises(PrepareError, match=r"line 2: .* which ends a document"):
    run([path], tmp_path / "out", **options)
  dataset = run([path], tmp_path / "out", on_error="skip", **options)
  assert (dataset["documents"], dataset["skipped"]) == (2, 1)


def test_merges_may_be_pairs_or_text(tmp_path):
  whole = json.loads(_bpe("<e>", merged=True).to_str())
  assert whole["model"]["merges"] == [["<", "e"], ["<e", ">"]]
  for merges in (["< e", "<e >"], [["<", "e"], ["<e", ">"]]):
    whole["model"]["merges"] = merges
    (tmp_path / "t.json").write_text(json.dumps(whole))
    found = tokenize.load(str(tmp_path / "t.json"), "<e>")
    (tokens,) = found.encode(["<e>"])
    assert tokens.size == 2 and found.spec.eos not in tokens


def test_a_tokenizer_that_panics_is_named_or_counted(tmp_path, capfd):
  whole = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, "a"))
  whole.pre_tokenizer = pre_tokenizers.FixedLength(0)  # the library panics
  whole.save(str(tmp_path / "t.json"))
  path = tmp_path / "x.jsonl"
  path.write_bytes(jsonl([dict(text="a"), dict(text="b"), dict(text="")]))
  options = dict(tokenizer=str(tmp_path / "t.json"))
  with pytest.raises(
    PrepareError, match=r"x.jsonl, line 1: the tokenizer failed: chunk size"
  ):
    run([path], tmp_path / "out", **options)
  with pytest.raises(PrepareError, match="no document was found"):
    run([path], tmp_path / "out", on_error="skip", **options)
  record = json.loads(
    Path(tmp_path, "out/prepare/shard-00000.json").read_text()
  )
  assert (record["shard"]["skipped"], record["shard"]["empty"]) == (2, 1)
  capfd.readouterr()  # the library prints each panic


def test_an_interrupt_in_the_library_is_not_its_failure(tmp_path, monkeypatch):
  _bpe("</s>", merged=False).save(str(tmp_path / "t.json"))
  found = tokenize.load(str(tmp_path / "t.json"))

  class Interrupted:
    def encode_batch_fast(self, *args, **options):
      raise KeyboardInterrupt

  monkeypatch.setattr(found, "_encoder", Interrupted())
  with pytest.raises(KeyboardInterrupt):
    found.encode(["a"])
