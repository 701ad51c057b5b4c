"""Test prepared data sets: their documents, and damaged files."""

from collections.abc import Iterator
import dataclasses
import io
import json
from pathlib import Path
import pickle
import shutil

from array_record.python.array_record_module import ArrayRecordWriter
from data_cases import documents, write_prepared
import grain
import numpy as np
import pytest
from rich.console import Console

from train.commands.inspect_data import show
from train.config import TextData
from train.data.file_hashes import sampled_hash
from train.data.text.prepared_source import PreparedSource
from train.data.text.token_source import DataError, Pieces

_TEXTS = documents(30, seed=3)
_REST = sum(len(x) for x in (*_TEXTS[11:15], _TEXTS[29]))
_SHARDS = (_TEXTS[:11], _TEXTS[11:11], _TEXTS[11:])  # the second is empty


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  return write_prepared(tmp_path / "set", _SHARDS, domains=("wiki", "code"))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_documents_across_shards(tmp_path: Path, dtype: str) -> None:
  texts = [x + 70_000 * (dtype == "uint32") for x in _TEXTS]
  path = write_prepared(
    tmp_path / "set", (texts[:4], texts[4:]), dtype=dtype, vocab_size=2**16
  )
  source = PreparedSource(path)
  assert isinstance(source, grain.sources.RandomAccessDataSource)
  assert source.lengths.tolist() == [len(x) for x in texts]
  assert source.vocab_size == 2**16
  for copy in (source, pickle.loads(pickle.dumps(source))):
    for i, text in enumerate(texts):
      np.testing.assert_array_equal(copy[i], text)
  with pytest.raises(IndexError, match="no document -1 of 30"):
    source[-1]


def test_any_part_of_documents_in_any_order(folder: Path) -> None:
  source = PreparedSource(folder)
  which = np.array([29, 3, 11, 3, 10])
  stops = np.array([len(_TEXTS[i]) for i in which])
  starts = stops // 3
  lengths = stops - starts
  places = np.cumsum(lengths) - lengths
  out = np.full(lengths.sum(), -1, np.int32)
  source.fill(Pieces(which, starts, lengths, places), out)
  expected = [_TEXTS[i][a:] for i, a in zip(which, starts, strict=True)]
  np.testing.assert_array_equal(out, np.concatenate(expected))


def test_domains(folder: Path) -> None:
  source = PreparedSource(folder)
  assert source.sidecar["domain_names"] == ["code", "wiki"]
  expected = [i % 2 for i in range(11)] + [i % 2 for i in range(19)]
  assert source.domains.tolist() == expected


def _edit(folder: Path, **changes) -> None:
  path = folder / "dataset.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_shard(folder: Path, **changes) -> None:
  data = json.loads((folder / "dataset.json").read_text())
  data["shards"][2].update(changes)
  for field in ("documents", "tokens"):
    data[field] = sum(x[field] for x in data["shards"])
  _edit(folder, **data)


def _cut(path: Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


_REFUSED = {
  "unfinished": (lambda x: (x / "dataset.json").unlink(), "an unfinished one"),
  "no JSON": (lambda x: _cut(x / "dataset.json"), "dataset.json: "),
  "format": (lambda x: _edit(x, format="mine"), "format='rebased-tokens'"),
  "version": (lambda x: _edit(x, version=2), "version=2: expected 1"),
  "kind": (lambda x: _edit(x, kind="mine"), "kind='mine'"),
  "rows": (lambda x: _edit(x, kind="rows"), "length=None: expected 1"),
  "row counts": (lambda x: _edit(x, kind="rows", length=4), "tokens and rows"),
  "dtype": (lambda x: _edit(x, dtype="int16"), "dtype='int16'"),
  "vocabulary": (lambda x: _edit(x, vocab_size=70_000), "1 to 65536"),
  "tokenizer": (lambda x: _edit(x, tokenizer={}), "tokenizer={}"),
  "no shards": (lambda x: _edit(x, shards=[]), "one or more"),
  "a path": (lambda x: _edit_shard(x, name="../x"), r"shards\[2\]"),
  "documents": (lambda x: _edit(x, documents=31), "30, the sum over"),
  "tokens": (lambda x: _edit(x, tokens=5), "the sum over its shards"),
  "a shard": (
    lambda x: (x / "shard-00002.arrayrecord").unlink(),
    "shard-00002.arrayrecord: missing",
  ),
  "lengths": (
    lambda x: (x / "shard-00002.lengths.npy").unlink(),
    "00002.lengths.npy: cannot be read",
  ),
  "cut lengths": (
    lambda x: _cut(x / "shard-00002.lengths.npy"),
    "00002.lengths.npy: cannot be read",
  ),
  "count": (lambda x: _edit_shard(x, documents=18), r"expected int64\[18\]"),
  "sum": (lambda x: _edit_shard(x, tokens=1), "expected 1, as dataset.json"),
  "int32 lengths": (
    lambda x: np.save(x / "shard-00000.lengths.npy", np.ones(11, np.int32)),
    r"int32\[11\]: expected int64\[11\]",
  ),
  "negative": (
    lambda x: np.save(x / "shard-00000.lengths.npy", -np.ones(11, np.int64)),
    "record 0 has -1 tokens",
  ),
}


_REFUSED |= {
  "an overflow": (
    lambda x: np.save(
      x / "shard-00002.lengths.npy",
      np.array([2**62] * 4 + [len(y) for y in _TEXTS[15:29]] + [_REST]),
    ),
    "tokens: expected [0-9]+, as dataset.json says",
  ),
  "longer lengths": (
    lambda x: (x / "shard-00002.lengths.npy").write_bytes(
      (x / "shard-00002.lengths.npy").read_bytes() + bytes(8)
    ),
    "00002.lengths.npy: cannot be read: 288 bytes: expected 280",
  ),
  "objects": (
    lambda x: np.save(
      x / "shard-00002.lengths.npy", np.array([{}] * 19), allow_pickle=True
    ),
    "00002.lengths.npy: cannot be read: expected a NumPy file",
  ),
  "a truth": (lambda x: _edit(x, skipped=True), "skipped=True: expected a cou"),
  "a fraction": (lambda x: _edit(x, vocab_size=257.0), "257.0: expected a cou"),
  "eos": (lambda x: _edit(x, eos=257), "eos=257: expected a token below 257"),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_a_damaged_data_set_is_named(folder: Path, name: str) -> None:
  change, expected = _REFUSED[name]
  change(folder)
  with pytest.raises(DataError, match=expected) as caught:
    PreparedSource(folder)
  assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
  "name", ["", ".", "..", "a/b", "/etc/x", "a\0b", "\ud800"]
)
def test_a_shard_outside_the_folder_is_refused(folder, name) -> None:
  _edit_shard(folder, name=name)
  expected = r"shards\[2\].name=.*: expected the name of a file in this folder"
  with pytest.raises(DataError, match=expected):
    PreparedSource(folder)


def test_a_shard_that_is_named_twice_is_refused(folder: Path) -> None:
  data = json.loads((folder / "dataset.json").read_text())
  _edit(folder, shards=[*data["shards"], data["shards"][0]])
  with pytest.raises(DataError, match="'shard-00000.arrayrecord' is there tw"):
    PreparedSource(folder)


@pytest.mark.parametrize("change", ["cut", "longer"])
def test_a_shard_of_another_size_is_named_at_the_start(folder, change) -> None:
  path = folder / "shard-00002.arrayrecord"
  size = path.stat().st_size
  _edit_shard(folder, bytes=size)
  PreparedSource(folder)
  content = path.read_bytes()
  path.write_bytes(content[:-1] if change == "cut" else content + b"\0")
  with pytest.raises(DataError, match=f"bytes: expected {size:,}") as caught:
    PreparedSource(folder)
  assert str(path) in str(caught.value)


_WRONG = (None, True, "x", "", "[/b]", -1, 1.5, 10**30, float("nan"))
_WRONG += ([], [1], {}, {"x": 1})


def _places(value: object, place: tuple = ()) -> Iterator[tuple]:
  """Yield the place of every value inside a JSON value."""
  items = ()
  if isinstance(value, dict):
    items = value.items()
  elif isinstance(value, list):
    items = enumerate(value)
  for key, inner in items:
    yield (*place, key)
    yield from _places(inner, (*place, key))


@pytest.mark.parametrize("kind", ["documents", "rows"])
def test_a_wrong_field_of_dataset_json_is_named(tmp_path, kind) -> None:
  """Every field is replaced by values of other types, or left out."""
  if kind == "documents":
    path = write_prepared(tmp_path / "set", _SHARDS[:1], domains=("a", "b"))
  else:
    path = write_prepared(tmp_path / "set", [[np.arange(5)] * 3])
    entry = json.loads((path / "dataset.json").read_text())["shards"][0]
    shard = {**entry, "rows": 3, "documents": 2, "tokens": 14}
    shard |= {"bytes": (path / entry["name"]).stat().st_size}
    rows = dict(kind="rows", length=4, rows=3, documents=2, tokens=14)
    _edit(path, shards=[shard], **rows, left_over=1)
  file, refused, shown = path / "dataset.json", 0, 0
  sound = file.read_text()
  for place in _places(json.loads(sound)):
    for wrong in (*_WRONG, "absent"):
      data = json.loads(sound)
      inner = data
      for key in place[:-1]:
        inner = inner[key]
      if wrong == "absent":
        del inner[place[-1]]
      else:
        inner[place[-1]] = wrong
      file.write_text(json.dumps(data))
      console = Console(file=io.StringIO())
      try:
        show(str(path), console, length=8, verify=True)
        shown += 1
      except DataError as error:
        assert str(path) in str(error)
        refused += 1
  assert refused > 200 and shown > 20


def test_a_damaged_lengths_file_is_named(folder: Path) -> None:
  """Bytes are flipped, cut, added and replaced; no wrong length passes."""
  path, random = folder / "shard-00002.lengths.npy", np.random.default_rng(0)
  sound = path.read_bytes()
  lengths = [len(x) for x in _TEXTS]
  for i in range(300):
    content = bytearray(sound)
    # Half of the changes are in the text of the header.
    at = int(random.integers(80 if i % 2 else len(sound)))
    kind = i // 2 % 5
    if kind == 0:
      content = content[:at]
    elif kind == 1:
      content[at] ^= 1 << int(random.integers(8))
    elif kind == 2:
      content[at : at + 4] = random.bytes(4)
    elif kind == 3:
      content[at:at] = bytes(random.choice(list(b"()9{'[,\n"), 3))
    else:
      content[at : at + 9] = b"9" * 9
    path.write_bytes(content)
    try:
      source = PreparedSource(folder)
    except DataError as error:
      assert str(path) in str(error)
      continue
    # A sum that did not change is not noticed until the record is read.
    if source.lengths.tolist() != lengths:
      with pytest.raises(DataError, match="lengths.npy says"):
        list(source)


def test_a_truncated_or_replaced_shard_is_named(folder: Path) -> None:
  path = folder / "shard-00002.arrayrecord"
  sound = path.read_bytes()
  path.write_bytes(b"")
  with pytest.raises(DataError, match="00002.arrayrecord: "):
    PreparedSource(folder)[20]
  path.write_bytes(sound[:100])
  with pytest.raises(DataError, match="00002.arrayrecord"):
    PreparedSource(folder)[20]
  shutil.copy(folder / "shard-00000.arrayrecord", path)
  with pytest.raises(DataError, match="11 records: expected 19"):
    PreparedSource(folder)[20]


def test_a_record_of_another_length_is_named(folder: Path) -> None:
  path = folder / "shard-00002.arrayrecord"
  writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
  for text in _TEXTS[11:]:
    writer.write(text[:-1].astype("<u2").tobytes())
  writer.close()
  size = len(_TEXTS[12])
  with pytest.raises(DataError, match="lengths.npy says") as caught:
    PreparedSource(folder)[12]
  assert f"{path}, record 1: {2 * size - 2} bytes" in str(caught.value)


def test_verify_reads_every_byte(folder: Path) -> None:
  source = PreparedSource(folder)
  source.verify()
  path = folder / "shard-00002.arrayrecord"
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  with pytest.raises(DataError, match="00002.arrayrecord: its SHA-256 is not"):
    source.verify()


def test_damage_in_place_is_named_by_verify_and_by_reading(folder) -> None:
  """Every byte of a shard is zeroed, or one bit is flipped: same size."""
  path = folder / "shard-00002.arrayrecord"
  sound, random = path.read_bytes(), np.random.default_rng(1)
  _edit_shard(folder, bytes=len(sound))
  data = TextData((str(folder),), length=8, verify=True)
  data.check_files(257)
  for i in range(40):
    content = bytearray(len(sound) if i == 0 else sound)
    if i:
      content[int(random.integers(len(sound)))] ^= 1 << int(random.integers(8))
    path.write_bytes(content)
    with pytest.raises(DataError, match="its SHA-256 is not the one in datas"):
      data.check_files(257)
    try:
      read = [x.tolist() for x in PreparedSource(folder)]
    except DataError as error:
      assert str(path) in str(error)
    else:
      assert i and read == [x.tolist() for x in _TEXTS]
  # Without `verify` only the size is compared, before anything is read.
  dataclasses.replace(data, verify=False).check_files(257)
  with pytest.raises(ValueError, match="data.verify='yes': expected True or"):
    dataclasses.replace(data, verify="yes")


def test_a_shard_without_a_checksum_is_not_called_sound(folder: Path) -> None:
  data = json.loads((folder / "dataset.json").read_text())
  del data["shards"][1]["sha256"]
  _edit(folder, **data)
  with pytest.raises(DataError, match="shard-00001.* has no SHA-256 of it"):
    PreparedSource(folder).verify()


def test_a_domain_without_a_name_is_an_error(folder: Path) -> None:
  domains = np.full(11, 2, np.int16)
  np.save(folder / "shard-00000.domains.npy", domains)
  with pytest.raises(DataError, match="outside of its 2 names"):
    _ = PreparedSource(folder).domains


def test_the_fingerprint_changes_with_the_files(folder: Path) -> None:
  before = PreparedSource(folder).fingerprint
  path = folder / "shard-00000.arrayrecord"
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  after = PreparedSource(folder).fingerprint
  assert [x for x in before if before[x] != after[x]] == ["blocks"]
  _edit(folder, tokenizer={"name": "bytes", "sha256": "other"})
  after = PreparedSource(folder).fingerprint
  assert [x for x in before if before[x] != after[x]] == [
    "index",
    "tokenizer",
    "blocks",
  ]


def test_large_files_are_sampled_to_their_ends(tmp_path: Path) -> None:
  paths = [tmp_path / "a", tmp_path / "b"]
  for path in paths:
    path.write_bytes(bytes(1 << 20))
  before = sampled_hash(paths)
  for path, at in ((paths[0], 0), (paths[1], -1)):
    content = bytearray(1 << 20)
    content[at] = 1
    path.write_bytes(content)
    assert sampled_hash(paths) != before
    path.write_bytes(bytes(1 << 20))
  assert sampled_hash(paths) == before
