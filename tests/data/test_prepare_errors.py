"""Test errors of `prepare`, which name the cause and change nothing."""

import os
from pathlib import Path
import re
import socket
import subprocess
import sys

from prepare_cases import jsonl, records, run, tree, write_formats
import pytest

from train.data.prepare import input_files, read_documents, tokenizer
from train.data.prepare.prepare_dataset import PrepareConfig
from train.data.prepare.shard import PrepareError
from train.data.prepare.train_tokenizer import (
  TokenizerTraining,
  train_tokenizer,
)


def test_a_folder_of_another_data_set_is_refused(tmp_path):
  folder, out = tmp_path / "in", tmp_path / "out"
  write_formats(folder)
  run([folder], out)
  whole = tree(out)
  for options, expected in (
    (dict(text_field="meta"), "fields.text was 'text', is 'meta'"),
    (dict(eos="none"), "tokenizer.eos was 256, is None"),
    (dict(max_document_mb=1), "fields.most_bytes was"),
    (dict(row_length=8), "rows.length was None, is 8"),
  ):
    with pytest.raises(ValueError, match=expected):
      run([folder], out, **options)
  (folder / "new.jsonl").write_bytes(jsonl(records(1)))
  with pytest.raises(ValueError, match="input new.jsonl is new"):
    run([folder], out)
  (folder / "new.jsonl").unlink()
  a = (folder / "a.jsonl").read_bytes()
  (folder / "a.jsonl").write_bytes(a + b"\n")
  with pytest.raises(ValueError, match=r"input a.jsonl had [\d,]+ bytes"):
    run([folder], out)
  (folder / "a.jsonl").write_bytes(a.replace(b"vu", b"uv"))
  with pytest.raises(ValueError, match="a.jsonl changed since shard-00000"):
    run([folder], out)
  (folder / "a.jsonl").unlink()
  with pytest.raises(ValueError, match="input a.jsonl is gone"):
    run([folder], out)
  (folder / "a.jsonl").write_bytes(a)  # of another time, and the same
  run([folder], out)
  assert tree(out) == whole


def test_wrong_arguments_are_named(tmp_path):
  (tmp_path / "x.jsonl").write_bytes(jsonl(records(1)))
  (tmp_path / "x.csv.gz").write_bytes(b"")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "mine").write_text("")
  good, out = [tmp_path / "x.jsonl"], tmp_path / "out"
  for inputs, options, expected in (
    ([], {}, "inputs=()"),
    ([tmp_path / "none"], {}, "no such plain file"),
    ([tmp_path / "x.csv.gz"], {}, "expected .jsonl"),
    (good, dict(corpus="stdlib"), "expected one of them"),
    ([], dict(corpus="web"), "corpus='web'"),
    (good, dict(tokenizer="none.json"), "tokenizer='none.json'"),
    (good, dict(eos="</s>"), "eos='</s>'"),
    (good, dict(shard="2/2"), "shard='2/2'"),
    (good, dict(shard="x"), "shard='x'"),
    (good, dict(text_field="a..b"), "text_field='a..b'"),
    (good, dict(max_document_mb=0), "max_document_mb=0"),
  ):
    with pytest.raises(ValueError) as error:
      run(inputs, out, **options)
    assert expected in str(error.value)
  assert not out.exists()
  with pytest.raises(ValueError, match="is not empty"):
    run(good, tmp_path / "full")
  with pytest.raises(ValueError, match="lies in the input folder"):
    run([tmp_path], out)
  with pytest.raises(ValueError, match="workers=-1"):
    PrepareConfig("out", workers=-1)


def test_no_file_is_left_out_silently(tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  (folder / "a.txt").write_text("a")
  (folder / "b.txt").symlink_to(tmp_path / "none")
  os.mkfifo(folder / "c.txt")  # reading it would wait for ever
  found = input_files.find_sources([str(folder)])
  assert [x.name for x in found.sources[0].files] == ["a.txt"]
  assert dict(found.left_out) == {"a broken link or not a regular file": 2}
  with pytest.raises(ValueError, match="no such plain file"):
    input_files.find_sources([str(folder / "c.txt")])
  Path(os.fsdecode(os.fsencode(folder) + b"/\xff.txt")).write_text("a")
  with pytest.raises(ValueError, match="expected a name in UTF-8"):
    input_files.find_sources([str(folder)])


def test_a_linked_folder_is_read_once_under_its_name(tmp_path):
  folder, other = tmp_path / "in", tmp_path / "other"
  (folder / "deep").mkdir(parents=True)
  (other / "sub").mkdir(parents=True)
  (other / "a.jsonl").write_bytes(jsonl(records(2)))
  (other / "sub" / "b.jsonl").write_bytes(jsonl(records(2, 2)))
  (folder / "c.jsonl").write_bytes(jsonl(records(2, 4)))
  (folder / "link").symlink_to(other)
  (folder / "deep" / "file.jsonl").symlink_to(other / "a.jsonl")
  found = input_files.find_sources([str(folder)])
  assert [x.name for x in found.sources] == [
    *("c.jsonl", "deep/file.jsonl", "link/a.jsonl", "link/sub/b.jsonl")
  ]
  assert run([folder], tmp_path / "out")["documents"] == 8
  # An input may be a link itself, and may be named twice.
  (tmp_path / "whole").symlink_to(folder)
  again = input_files.find_sources([str(tmp_path / "whole")] * 2)
  assert [x.name for x in again.sources] == [x.name for x in found.sources]


@pytest.mark.parametrize("target", ["in", "in/a", "in/a/b", "other"])
def test_a_folder_that_links_lead_to_twice_is_named(tmp_path, target):
  """Link around in a circle, to a folder beside, and to a second input."""
  folder, other = tmp_path / "in", tmp_path / "other"
  (folder / "a" / "b").mkdir(parents=True)
  other.mkdir()
  (folder / "a" / "x.txt").write_text("a")
  (folder / "a" / "b" / "link").symlink_to(tmp_path / target)
  with pytest.raises(
    ValueError, match=r"link.* are the same folder|same.*link"
  ):
    input_files.find_sources([str(folder), str(other)])


def test_pipes_sockets_and_devices_are_named(tmp_path):
  os.mkfifo(tmp_path / "a.jsonl")
  with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(str(tmp_path / "b.txt"))
    inputs = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt"), "/dev/zero"]
    for name in inputs:
      with pytest.raises(ValueError, match=f"^{name}: .* but a pipe, socket"):
        input_files.find_sources([name])
  for name in (str(tmp_path / "a.jsonl"), "/dev/zero"):
    with pytest.raises(ValueError, match="tokenizer='.* it is no plain file"):
      tokenizer.load(name)
  # A plain file that becomes a pipe later does not block either.
  (tmp_path / "c.jsonl").write_bytes(jsonl(records(1)))
  (source,) = input_files.find_sources([str(tmp_path / "c.jsonl")]).sources
  (tmp_path / "c.jsonl").unlink()
  os.mkfifo(tmp_path / "c.jsonl")
  nothing = lambda _: None
  reader = read_documents.read(
    source, read_documents.Fields(), nothing, nothing
  )
  with pytest.raises(OSError, match=r"c.jsonl: expected a plain file"):
    list(reader)


@pytest.mark.parametrize("url", ["gs://b/x", "s3://b/x", "hf://x", "file:///x"])
def test_an_url_is_refused(tmp_path, monkeypatch, url):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "x.jsonl").write_bytes(jsonl(records(1)))
  refused = f"={re.escape(repr(url))}: expected a path of this machine"
  for inputs, options in (
    (["x.jsonl"], dict(out=url)),
    ([url], dict(out="out")),
    (["x.jsonl"], dict(out="out", tokenizer=url)),
  ):
    with pytest.raises(ValueError, match=refused):
      run(inputs, **options)
  for inputs, out in ((["x.jsonl"], f"{url}.json"), ([url], "t.json")):
    with pytest.raises(ValueError, match="expected a path of this machine"):
      train_tokenizer(TokenizerTraining(out), inputs)
  assert [x.name for x in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_field_with_a_value_for_each_document_is_no_domain(tmp_path):
  """Domains are numbered in int16: 32,768 of them fit."""
  lines = [f'{{"text": "a", "id": "{i}"}}\n' for i in range(32_769)]
  path, options = tmp_path / "x.jsonl", dict(domain_field="id")
  path.write_text("".join(lines))
  with pytest.raises(
    PrepareError, match="x.jsonl, line 32769.*: id has more than 32,768 values"
  ):
    run([path], tmp_path / "out", **options)
  path.write_text("".join(lines[:-1]))
  dataset = run([path], tmp_path / "most", **options)
  assert len(dataset["domain_names"]) == 32_768


def test_two_processes_do_not_make_the_same_shard(tmp_path):
  write_formats(tmp_path / "in")
  hold = (
    "import sys; from train.data.prepare import plan_and_locks as p\n"
    "from train.data.prepare import read_documents, input_files, tokenizer\n"
    "from pathlib import Path\n"
    "found = input_files.find_sources([sys.argv[1]]).sources\n"
    "spec = tokenizer.load('bytes').spec\n"
    "plan = p.make_plan(found, spec, read_documents.Fields())\n"
    "with p.claimed(Path(sys.argv[2]), plan) as file:\n"
    "  p.lock(file, [2]); print('held', flush=True); sys.stdin.read()\n"
  )
  out = tmp_path / "out"
  with subprocess.Popen(
    [sys.executable, "-c", hold, str(tmp_path / "in"), str(out)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another process.*shard-00002"):
      run([tmp_path / "in"], out)
    assert run([tmp_path / "in"], out, shard="1/4") is None
    process.stdin.close()
  assert run([tmp_path / "in"], out) is not None


def test_an_unfinished_folder_without_shards_may_be_deleted(tmp_path):
  (tmp_path / "x.jsonl").write_bytes(jsonl([dict(content="a")]))
  out = tmp_path / "out"
  with pytest.raises(
    PrepareError, match=r"\['content'\] \(--text-field\); --on"
  ):
    run([tmp_path / "x.jsonl"], out)
  hint = "is 'content'; choose another --out, or delete the folder: no shard"
  with pytest.raises(ValueError, match=hint):
    run([tmp_path / "x.jsonl"], out, text_field="content")
  done = tmp_path / "done"
  run([tmp_path / "x.jsonl"], done, text_field="content")
  with pytest.raises(ValueError, match="choose another --out$"):
    run([tmp_path / "x.jsonl"], done)


def test_a_folder_without_text_is_described(tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  for files, expected in (
    ((), "found none; name other suffixes"),
    (
      ("a.py", "b.py", "c.png"),
      "found 2 with .py, 1 with .png; name other suffixes",
    ),
  ):
    for name in files:
      (folder / name).write_text("text")
    with pytest.raises(ValueError) as error:
      run([folder], tmp_path / "out")
    assert expected in str(error.value)
  assert not (tmp_path / "out").exists()
  dataset = run([folder], tmp_path / "out", text_suffixes=(".py",))
  assert dataset["documents"] == 2


def test_a_changed_file_of_a_group_is_named(tmp_path):
  folder, out = tmp_path / "in", tmp_path / "out"
  folder.mkdir()
  for i in range(9):
    (folder / f"{i}.txt").write_text(f"text {i}")
  run([folder], out)
  (folder / "3.txt").write_text("text 3")  # of another time, and the same
  run([folder], out)
  (folder / "4.txt").write_text("tExt 4")
  with pytest.raises(ValueError, match="^4.txt changed since shard-00000"):
    run([folder], out)
  for i in range(9):
    (folder / f"{i}.txt").write_text(f"tExt {i}")
  with pytest.raises(ValueError, match="^0.txt, .* 4.txt and 4 more changed"):
    run([folder], out)
