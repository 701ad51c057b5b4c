"""Test data sets in Megatron's format: the index and its data files."""

import itertools
from pathlib import Path
import pickle
import struct

from data_cases import documents, write_idx, write_megatron
import grain
import numpy as np
import pytest

from train.data.text.lm_batches import LMBatches
from train.data.text.megatron_source import (
  MegatronSource,
  find_shards,
  read_index,
)
from train.data.text.rows import Layout
from train.data.text.token_source import DataError, Pieces

# The bytes of an index of two documents, of 3 and 1 tokens.
_BYTES = bytes.fromhex(
  "4d4d494449445800000100000000000000"  # magic; version 1
  "08"
  "02000000000000000300000000000000"  # uint16; S = 2, D = 3
  "0300000001000000"  # lengths
  "00000000000000000600000000000000"  # byte offsets
  "000000000000000001000000000000000200000000000000"  # document starts
)


def test_the_index_byte_for_byte(tmp_path: Path) -> None:
  path = tmp_path / "a.idx"
  path.write_bytes(_BYTES)
  index = read_index(path)
  assert index.dtype == np.dtype("<u2") and index.total_bytes == 8
  assert index.lengths_S.tolist() == [3, 1]
  assert index.offsets_S.tolist() == [0, 6]
  assert index.documents_D.tolist() == [0, 1, 2]
  assert not index.offsets_S.flags.aligned  # 34 + 4 S is no multiple of 8
  other = tmp_path / "b.idx"
  write_idx(other, [3, 1])
  assert other.read_bytes() == _BYTES


@pytest.mark.parametrize("code", [4, 8])
@pytest.mark.parametrize("cuts", [None, (400, 800), (333, 334, 1001)])
def test_documents_across_shards(tmp_path: Path, code, cuts) -> None:
  texts = documents(40, seed=1)
  if code == 4:
    texts = [x + 70_000 for x in texts]  # beyond uint16
  path = write_megatron(tmp_path / "d", texts, code=code, cuts=cuts)
  source = MegatronSource(path)
  assert len(source.shards) == (1 if cuts is None else len(cuts) + 1)
  assert len(source) == 40
  assert isinstance(source, grain.sources.RandomAccessDataSource)
  for copy in (source, pickle.loads(pickle.dumps(source))):
    for i, text in enumerate(texts):
      np.testing.assert_array_equal(copy[i], text)
      assert copy[i].dtype == np.int32
  assert source.lengths.tolist() == [len(x) for x in texts]
  with pytest.raises(IndexError, match="no document 40 of 40"):
    source[40]


def test_a_sequence_across_many_shards(tmp_path: Path) -> None:
  text = np.arange(1000)
  cuts = (1, 2, 999, 1000, 1001)  # bytes: inside of tokens, too
  path = write_megatron(tmp_path / "d", [text[:500], text[500:]], cuts=cuts)
  source = MegatronSource(path)
  np.testing.assert_array_equal(source[0], text[:500])
  np.testing.assert_array_equal(source[1], text[500:])


def test_any_part_of_a_document(tmp_path: Path) -> None:
  texts = documents(20, seed=2)
  path = write_megatron(tmp_path / "d", texts, cuts=(101, 500))
  source = MegatronSource(path)
  random = np.random.default_rng(0)
  which = random.integers(0, 20, 50)
  starts = np.array([random.integers(0, len(texts[i])) for i in which])
  stops = [
    random.integers(a + 1, len(texts[i]) + 1)
    for i, a in zip(which, starts, strict=True)
  ]
  lengths = np.array(stops) - starts
  places = np.cumsum(lengths) - lengths
  out = np.full(lengths.sum(), -1, np.int32)
  source.fill(Pieces(which, starts, lengths, places), out)
  expected = [
    texts[i][a:b] for i, a, b in zip(which, starts, stops, strict=True)
  ]
  np.testing.assert_array_equal(out, np.concatenate(expected))


def test_documents_of_several_sequences(tmp_path: Path) -> None:
  parts = [np.arange(4), np.arange(0), np.arange(3), np.arange(5)]
  path = write_megatron(tmp_path / "d", parts, starts=[0, 2, 4])
  source = MegatronSource(path)
  assert [x.tolist() for x in source] == [
    [0, 1, 2, 3],
    [0, 1, 2, 0, 1, 2, 3, 4],
  ]
  rows = MegatronSource(path, "sequence")
  assert [x.tolist() for x in rows] == [x.tolist() for x in parts]


@pytest.mark.parametrize("code", [4, 8])
@pytest.mark.parametrize(
  "starts", [[0, 0, 1, 3], [0, 2, 2, 3], [0, 1, 3, 3], [0, 0, 0, 3, 3, 3]]
)
def test_a_document_without_sequences_is_empty(tmp_path, starts, code) -> None:
  """Megatron-LM's tool writes the same start twice for an empty document."""
  parts = [np.arange(4), np.arange(4, 7), np.arange(7, 12)]
  path = write_megatron(
    tmp_path / "d", parts, starts=starts, code=code, cuts=(9,)
  )
  source = MegatronSource(path)
  expected = [
    [token for part in parts[a:b] for token in part.tolist()]
    for a, b in itertools.pairwise(starts)
  ]
  assert [x.tolist() for x in source] == expected
  assert source.lengths.tolist() == [len(x) for x in expected]
  # The rows are those of the set without empty documents.
  some = sorted(set(starts))
  full = write_megatron(tmp_path / "full", parts, starts=some, code=code)
  for packing in ("stream", "documents"):
    rows = [
      LMBatches(
        (str(place),),
        Layout(3, packing, validation=0.0),
        rows=4,
        shuffle=False,
        once=True,
        cache_dir=tmp_path / "plans",
      )[0]
      for place in (path, full)
    ]
    for name, array in rows[0].items():
      np.testing.assert_array_equal(array, rows[1][name])


def test_a_data_file_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
  path = write_megatron(tmp_path / "d", documents(9, seed=1))
  source, data = MegatronSource(path), tmp_path / "d.bin"
  size = data.stat().st_size
  with data.open("r+b") as file:
    file.truncate(size - 3)
  with pytest.raises(DataError, match=f"offset {size - 3}: the file ends"):
    source[8]


def test_data_files_are_not_mapped_into_memory(tmp_path: Path) -> None:
  """A map reads ahead at each place, hundreds of times what a row needs."""
  path = write_megatron(tmp_path / "mapped", documents(9, seed=1), cuts=(40,))
  source = MegatronSource(path)
  assert len(source[8])
  maps = Path("/proc/self/maps").read_text()
  assert f"{path}" in maps and f"{tmp_path}/mapped-00" not in maps


def test_a_shard_name_ends_with_the_last_index(tmp_path: Path) -> None:
  path = write_megatron(tmp_path / "d", documents(9), cuts=(40, 80))
  names = [shard.name for shard in find_shards(path)]
  assert names == [f"d-{i:05}-of-00002.bin" for i in range(3)]
  (tmp_path / "d-00002-of-00002.bin").unlink()
  with pytest.raises(DataError, match=r"of-2.*0 to 2, .*missing \[2\]"):
    MegatronSource(path)


def test_other_files_are_not_read(tmp_path: Path) -> None:
  path = write_megatron(tmp_path / "d", documents(9))
  write_megatron(tmp_path / "d2", documents(9), cuts=(40, 80))
  assert [x.name for x in find_shards(path)] == ["d.bin"]
  (tmp_path / "d-00000-of-00000.bin").write_bytes(b"")
  with pytest.raises(DataError, match="one of them; found .*of-0.*d.bin"):
    MegatronSource(path)
  path = tmp_path / "lone.idx"
  path.write_bytes(_BYTES)
  with pytest.raises(DataError, match="found neither"):
    MegatronSource(path)


def _patched(offset: int, data: bytes) -> bytes:
  return _BYTES[:offset] + data + _BYTES[offset + len(data) :]


def _int64(value: int) -> bytes:
  return struct.pack("<q", value)


_REFUSED = {
  "empty": (b"", 0, "ends inside the header"),
  "no arrays": (_BYTES[:34], 34, "34 bytes: expected 82"),
  "cut": (_BYTES[:-1], 81, "81 bytes: expected 82"),
  "longer": (_BYTES + b"\0\0", 82, "84 bytes: expected 82"),
  "magic": (_patched(0, b"TNTIDX"), 0, "TNTIDX"),
  "version": (_patched(9, b"\2"), 9, "version 2: expected 1"),
  "float32 or 64": (_patched(17, b"\6"), 17, "code 6 .float32 or float64"),
  "float64 or 32": (_patched(17, b"\7"), 17, "code 7 .float32 or float64"),
  "int16": (_patched(17, b"\3"), 17, "code 3: expected 4, int32, or 8"),
  "another width": (_patched(17, b"\4"), 50, "begins at byte 6: expected 12"),
  "no sequences": (_patched(18, _int64(0)), 18, "no sequences"),
  "no documents": (_patched(26, _int64(1)), 26, "1 document starts"),
  "huge": (_patched(18, b"\xff" * 8), 82, "82 bytes: expected 2213"),
  "negative length": (_patched(34, b"\xff" * 4), 34, "has -1 tokens"),
  "length": (_patched(34, b"\4"), 50, "begins at byte 6: expected 8"),
  "first offset": (_patched(42, _int64(2)), 42, "at byte 2: expected 0"),
  "offset": (_patched(50, _int64(5)), 50, "at byte 5: expected 6"),
  "first document": (_patched(58, _int64(1)), 58, "sequence 1: expected 0"),
  "document": (_patched(66, _int64(-1)), 66, "-1: expected 0 or more"),
  "last document": (_patched(74, _int64(3)), 74, "at sequence 3: expected 2"),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_a_damaged_index_is_named(tmp_path: Path, name: str) -> None:
  content, offset, expected = _REFUSED[name]
  path = tmp_path / "a.idx"
  path.write_bytes(content)
  with pytest.raises(DataError, match=expected) as caught:
    read_index(path)
  assert f"{path}, offset {offset}: " in str(caught.value)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_total_size_is_named(tmp_path: Path, change: int) -> None:
  path = write_megatron(tmp_path / "d", documents(9), cuts=(40,))
  last = tmp_path / "d-00001-of-00001.bin"
  content = last.read_bytes()
  last.write_bytes(content[:-1] if change < 0 else content + b"\0")
  total = 40 + len(content)
  with pytest.raises(DataError, match=f"expected {total}") as caught:
    MegatronSource(path)
  assert str(caught.value).startswith(f"{last}, offset {total - 40 + change}: ")
  assert f"after {total + change} bytes in 2 files" in str(caught.value)


@pytest.mark.parametrize("seed", range(6))
def test_a_changed_index_never_gives_other_tokens(tmp_path, seed) -> None:
  """A hundred mutations a seed: an error with file and offset, or no change.

  With a document a sequence no changed byte can pass.
  """
  random = np.random.default_rng(seed)
  texts = documents(12, seed=seed)
  path = write_megatron(
    tmp_path / "d", texts, cuts=(101, 250), code=(4, 8)[seed % 2]
  )
  sound = path.read_bytes()
  for _ in range(100):
    content = bytearray(sound)
    kind = random.integers(5)
    at = int(random.integers(len(content)))
    if kind == 0:
      content = content[:at]
    elif kind == 1:
      content[at] ^= 1 << int(random.integers(8))
    elif kind == 2:
      content[at : at + 8] = random.bytes(8)
    elif kind == 3:
      content[at:at] = random.bytes(int(random.integers(1, 20)))
    else:
      content[at], content[-1 - at] = content[-1 - at], content[at]
    if bytes(content) == sound:
      continue
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
      MegatronSource(path)
    assert f"{path}, offset " in str(caught.value) or (
      f"data of {path}" in str(caught.value)
    ), caught.value


def test_changed_document_starts_keep_the_sequences(tmp_path: Path) -> None:
  """Only document boundaries between sequences can change unnoticed."""
  texts, random = documents(30, seed=5), np.random.default_rng(5)
  path = write_megatron(tmp_path / "d", texts, starts=[0, 7, 15, 22, 30])
  sound, passed = path.read_bytes(), 0
  for _ in range(200):
    content = bytearray(sound)
    at = len(sound) - 8 * int(random.integers(1, 6))
    content[at] ^= 1 << int(random.integers(8))
    path.write_bytes(content)
    try:
      source = MegatronSource(path)
    except DataError as error:
      assert "offset " in str(error)
      continue
    passed += 1
    assert 0 <= content[at] <= 30
    joined = np.concatenate(list(source))
    np.testing.assert_array_equal(joined, np.concatenate(texts))
  assert 0 < passed < 100
