"""Test `rebased prepare`: every input format, and the data set it makes."""

import json
import os
from pathlib import Path
import subprocess
import sys

import numpy as np
from prepare_cases import (
  DOMAINS,
  jsonl,
  parquet_bytes,
  read,
  records,
  run,
  shard_texts,
  tree,
  write_formats,
)
import pytest

from train import cli
from train.data.prepare import input_files, tokenizer as tokenize
from train.data.prepare.shard import PrepareError


def _train(path: Path) -> None:
  texts = (x["text"] for x in records(20))
  path.write_text(tokenize.train_bpe(texts, 300))


@pytest.mark.quick
def test_every_format_gives_its_documents_in_order(tmp_path):
  data = write_formats(tmp_path / "in")
  out = tmp_path / "out"
  dataset = run([tmp_path / "in"], out)
  assert dataset == json.loads((out / "dataset.json").read_text())
  assert shard_texts(out) == [[x["text"] for x in v] for v in data.values()]
  assert [x["input"]["name"] for x in dataset["shards"]] == list(data)
  assert (dataset["dtype"], dataset["vocab_size"], dataset["eos"]) == (
    "uint16",
    257,
    256,
  )
  assert dataset["skipped"] == dataset["empty"] == 0
  # No temporary file is left.
  assert not [name for name in tree(out) if "tmp" in name]


def test_domains_are_counted_and_stored_for_each_record(tmp_path):
  data = write_formats(tmp_path / "in")
  dataset = run([tmp_path / "in"], tmp_path / "out")
  assert dataset["domain_names"] == sorted(DOMAINS)
  for shard, values in zip(dataset["shards"], data.values(), strict=True):
    name = shard["name"].replace(".arrayrecord", ".domains.npy")
    numbers = np.load(tmp_path / "out" / name)
    assert numbers.dtype == np.int16
    own = [value["meta"]["pile_set_name"] for value in values]
    assert [dataset["domain_names"][i] for i in numbers] == own
    assert {k: v["documents"] for k, v in shard["domains"].items()} == {
      domain: own.count(domain) for domain in DOMAINS
    }
    tokens = sum(x["tokens"] for x in shard["domains"].values())
    assert tokens == shard["tokens"]


def test_a_record_without_a_domain_is_unknown(tmp_path):
  values = [dict(text="a"), *records(2), dict(text="b", meta=None)]
  (tmp_path / "x.jsonl").write_bytes(jsonl(values))
  dataset = run([tmp_path / "x.jsonl"], tmp_path / "out")
  assert dataset["shards"][0]["domains"]["unknown"]["documents"] == 2
  (tmp_path / "y.jsonl").write_bytes(jsonl([dict(text="a")]))
  dataset = run([tmp_path / "y.jsonl"], tmp_path / "none")
  assert dataset["domain_names"] == []
  assert not (tmp_path / "none" / "shard-00000.domains.npy").exists()


def test_a_folder_of_text_is_grouped_and_the_rest_is_named(tmp_path, capsys):
  folder = tmp_path / "in"
  (folder / "deep").mkdir(parents=True)
  for i in range(5):
    (folder / "deep" / f"{i}.txt").write_text(f"text {i}\n")
  (folder / "z.md").write_bytes(b"\xef\xbb\xbf# title")
  for name in ("a.png", "settings.json", ".hidden.txt"):
    (folder / name).write_bytes(b"\0")
  with pytest.raises(SystemExit) as stop:
    cli.main(["prepare", str(folder), "--out", str(tmp_path / "out")])
  assert stop.value.code == 0
  printed = capsys.readouterr().out
  assert "left out: 1 files with .png" in printed
  assert "left out: 1 files with .json" in printed
  assert "1 shard in " in printed and " 0.00 MB (" in printed
  (texts,) = shard_texts(tmp_path / "out")
  assert texts == [f"text {i}\n" for i in range(5)] + ["# title"]


def test_groups_are_bounded_and_hold_every_file_once():
  files = [input_files.TextFile(f"{i:03}", "", 1 << 20) for i in range(1000)]
  groups = input_files._groups(files, "text")
  assert [file for group in groups for file in group.files] == files
  assert max(group.bytes for group in groups) <= 1000 / 64 * (1 << 20)
  assert len(groups) == 67  # of 15 MiB, the last of 10


def test_the_standard_library_is_a_corpus():
  found = input_files.find_sources((), "stdlib").sources
  names = [file.name for source in found for file in source.files]
  assert any(name.endswith("/asyncio/tasks.py") for name in names)
  assert all(name.endswith(".py") for name in names)
  assert not [name for name in names if "site-packages" in name]
  assert sum(source.bytes for source in found) > 5e6


def test_nested_fields_and_columns(tmp_path):
  values = [dict(doc=dict(body=f"text {i}"), set="s") for i in range(3)]
  (tmp_path / "a.jsonl").write_bytes(jsonl(values))
  (tmp_path / "b.parquet").write_bytes(parquet_bytes(values))
  for name in ("a.jsonl", "b.parquet"):
    found = read(tmp_path / name, text="doc.body", domain="set")
    assert [x.text for x in found] == ["text 0", "text 1", "text 2"]
    assert {x.domain for x in found} == {"s"}


def test_empty_documents_are_counted_not_written(tmp_path):
  (tmp_path / "x.jsonl").write_bytes(
    jsonl([dict(text=""), dict(text="a"), dict(text="")]) + b"\n \n"
  )
  dataset = run([tmp_path / "x.jsonl"], tmp_path / "out")
  assert (dataset["documents"], dataset["empty"]) == (1, 2)


def test_no_end_of_text_on_request(tmp_path):
  (tmp_path / "x.jsonl").write_bytes(jsonl([dict(text="ab")]))
  dataset = run([tmp_path / "x.jsonl"], tmp_path / "out", eos="none")
  assert (dataset["eos"], dataset["tokens"]) == (None, 2)
  assert shard_texts(tmp_path / "out") == [["ab"]]


def test_a_document_of_50_mb_stays_whole_or_is_refused(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_bytes(jsonl([dict(text="a"), dict(text="b" * 50_000_000), {}]))
  with pytest.raises(PrepareError, match=r"x.jsonl, line 3 .*no field 'text'"):
    run([path], tmp_path / "out")
  path.write_bytes(jsonl([dict(text="a"), dict(text="b" * 50_000_000)]))
  assert run([path], tmp_path / "whole")["tokens"] == 2 + 50_000_001
  small = dict(max_document_mb=16)
  with pytest.raises(
    PrepareError, match=r"x.jsonl, line 2 .*at most 16,777,216"
  ):
    run([path], tmp_path / "small", **small)
  dataset = run([path], tmp_path / "small", on_error="skip", **small)
  assert (dataset["documents"], dataset["skipped"]) == (1, 1)


def test_shards_of_machines_make_the_same_data_set(tmp_path):
  write_formats(tmp_path / "in")
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  run([tmp_path / "in"], whole)
  assert run([tmp_path / "in"], parts, shard="1/3") is None
  assert not (parts / "dataset.json").exists()
  assert run([tmp_path / "in"], parts, shard="0/3") is None
  record = next((parts / "prepare").glob("shard-00000*.json"))
  sound = record.read_bytes()
  record.write_text("{}")
  with pytest.raises(PrepareError, match=f"{record} is damaged: run the --sh"):
    run([tmp_path / "in"], parts, shard="2/3")
  record.write_bytes(sound)
  assert run([tmp_path / "in"], parts, shard="2/3") is not None
  assert tree(parts) == tree(whole)


def test_a_second_run_does_nothing(tmp_path):
  write_formats(tmp_path / "in")
  out = tmp_path / "out"
  first = run([tmp_path / "in"], out)
  times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
  assert run([tmp_path / "in"], out) == first
  assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == times


def test_lost_and_damaged_shards_are_made_again(tmp_path):
  write_formats(tmp_path / "in")
  out = tmp_path / "out"
  run([tmp_path / "in"], out)
  whole = tree(out)
  (out / "shard-00001.arrayrecord").unlink()
  with (out / "shard-00002.arrayrecord").open("ab") as file:
    file.write(b"x")
  (out / "shard-00003.lengths.npy").unlink()
  (out / "dataset.json").unlink()
  run([tmp_path / "in"], out)
  assert tree(out) == whole


def _flip(path: Path) -> None:
  """Change one byte of a file, and keep its size and modification time."""
  data, times = bytearray(path.read_bytes()), path.stat()
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("rows", [None, 16])
def test_a_changed_byte_in_any_file_is_found_and_mended(tmp_path, rows):
  write_formats(tmp_path / "in")
  _train(tmp_path / "t.json")
  out = tmp_path / "out"
  options = dict(tokenizer=str(tmp_path / "t.json"), row_length=rows)
  run([tmp_path / "in"], out, **options)
  whole = tree(out)
  damaged = [x for x in whole if "plan" not in x and "00000.json" not in x]
  assert len(damaged) == (17 if rows else 21)
  for name in damaged:
    _flip(out / name)
  (out / "prepare" / "shard-00000.json").write_text('{"shard": []}')
  run([tmp_path / "in"], out, **options)
  assert tree(out) == whole
  (out / "shard-00001.arrayrecord").write_bytes(
    bytes(len(whole["shard-00001.arrayrecord"]))
  )
  (out / "dataset.json").write_text("{")
  run([tmp_path / "in"], out, **options)
  assert tree(out) == whole


def test_a_damaged_plan_is_named(tmp_path):
  (tmp_path / "x.jsonl").write_bytes(jsonl(records(1)))
  out = tmp_path / "out"
  run([tmp_path / "x.jsonl"], out)
  for text in ("{", "[]", "[" * 10**5, '{"sources": [3]}', '{"fields": 1}'):
    (out / "prepare" / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=r"plan.json is damaged|holds another"):
      run([tmp_path / "x.jsonl"], out)


def test_a_failed_run_continues_when_the_text_is_corrected(tmp_path):
  data = write_formats(tmp_path / "in")
  bad = tmp_path / "in" / "e.jsonl"
  good = jsonl(records(3))
  bad.write_bytes(good[:-1] + b"#")
  with pytest.raises(PrepareError, match=r"e.jsonl, line 3 .*not JSON"):
    run([tmp_path / "in"], tmp_path / "out")
  assert not (tmp_path / "out" / "dataset.json").exists()
  bad.write_bytes(good)  # of the same size
  run([tmp_path / "in"], tmp_path / "out")
  texts = [[x["text"] for x in v] for v in (*data.values(), records(3))]
  assert shard_texts(tmp_path / "out") == texts


def test_prepare_does_not_import_jax(tmp_path):
  (tmp_path / "x.jsonl").write_bytes(jsonl(records(1)))
  code = (
    "import sys; from train import cli\n"
    "try: cli.main(sys.argv[1:])\n"
    "except SystemExit as stop: assert stop.code == 0, stop.code\n"
    "assert not {'jax', 'flax', 'grain'} & set(sys.modules)\n"
  )
  words = ["prepare", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "o")]
  run = [sys.executable, "-W", "error", "-c", code, *words]
  subprocess.run(run, check=True, env=dict(os.environ))


def test_exit_codes(tmp_path, capsys):
  (tmp_path / "x.jsonl").write_bytes(b'{"text": null}\n')
  for options, code, expected in (
    ([], 1, "x.jsonl, line 1 (byte 0): text is null: expected a string"),
    (["--shard", "3"], 2, "shard='3'"),
  ):
    words = ["prepare", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "o")]
    with pytest.raises(SystemExit) as stop:
      cli.main([*words, *options])
    assert stop.value.code == code
    assert expected in capsys.readouterr().err


def test_byte_tokens():
  tokenizer = tokenize.load("bytes")
  (tokens,) = tokenizer.encode(["é\0<|endoftext|>"])
  assert tokens.tolist() == list("é\0<|endoftext|>".encode())
  assert tokenizer.decode([104, 105, 256, 106]) == "hi<|endoftext|>j"


def test_suffixes_are_case_insensitive(tmp_path):
  lower, upper = tmp_path / "lower", tmp_path / "UPPER"
  write_formats(lower)
  (lower / "e.txt").write_text("plain")
  upper.mkdir()
  for path in lower.iterdir():
    (upper / path.name.upper()).write_bytes(path.read_bytes())
  run([lower], tmp_path / "a")
  run([upper], tmp_path / "b")
  assert shard_texts(tmp_path / "b") == shard_texts(tmp_path / "a")
  with pytest.raises(ValueError, match="expected .jsonl"):
    (tmp_path / "x.ZIP").write_bytes(b"PK")
    run([tmp_path / "x.ZIP"], tmp_path / "c")
