"""Two processes of one run: that they agree, their rows, votes and deaths."""

import asyncio
from collections.abc import Iterator
import dataclasses
import errno
import importlib
import json
from pathlib import Path
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from train_cases import ROOT, environment, tiny, trainer as trainer

from train import same_run
from train.devices import peers, processes
from train.devices.peers import EXIT_PEER_LOST, Loss, Peers, Place
from train.nonfinite_steps import TrainingFailed

_VERSIONS = {"python": "3.11", "jax": "0.10"}


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


@pytest.fixture
def ends(monkeypatch) -> Iterator[list[tuple[str, int]]]:
  """Record how processes end instead of ending this one."""
  found: list[tuple[str, int]] = []
  monkeypatch.setattr(peers, "_GRACE", 0.05)
  monkeypatch.setattr(peers, "end_process", lambda *end: found.append(end))
  yield found


@pytest.fixture(autouse=True)
def met() -> Iterator[list[Peers]]:
  """Close the processes that met in a test."""
  _MET.clear()
  yield _MET
  for process in _MET:
    process.close()


_MET: list[Peers] = []


def _meet(
  places: list[Place], versions: dict[int, dict[str, str]] | None = None
) -> list[Peers | str]:
  """Let processes, here threads, meet; return each one, or its refusal."""
  found: dict[int, Peers | str] = {}

  def join(number: int, place: Place) -> None:
    mine = (versions or {}).get(number, _VERSIONS)
    try:
      process = Peers(place, mine, timeout=3)
      _MET.append(process)
      found[number] = process
    except ValueError as error:
      found[number] = str(error)

  threads = [
    threading.Thread(target=join, args=pair) for pair in enumerate(places)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  return [found[number] for number in range(len(places))]


def _places(count: int, of: int | None = None) -> list[Place]:
  port = _free_port()
  return [Place("127.0.0.1", port, of or count, i) for i in range(count)]


def test_a_missing_process_is_named() -> None:
  found = _meet(_places(2, of=4))
  assert all("process" in x and "did not come within 3 s" in x for x in found)
  assert "processes 2, 3 did not come" in found[0] and found[1] == found[0]


def test_processes_with_other_versions_are_refused() -> None:
  found = _meet(_places(2), {1: {"python": "3.11", "jax": "0.12"}})
  expected = "other versions: jax 0.10 on process 0, 0.12 on process 1"
  assert expected in found[0] and expected in found[1]


def test_the_number_of_processes_must_agree() -> None:
  first, second = _places(2)
  found = _meet([first, Place("127.0.0.1", second.port, 3, 1)])
  expected = "3 processes on process 1, 2 on process 0"
  assert expected in found[0] and expected in found[1]


def test_each_process_has_its_own_number() -> None:
  first, second, _ = _places(3)
  found = _meet([first, second, second])
  expected = "two processes are number 1: expected each number once"
  assert all(expected in x for x in found)


def test_processes_have_equally_many_devices(monkeypatch) -> None:
  devices = [SimpleNamespace(process_index=i) for i in (0, 0, 1)]
  monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
  monkeypatch.setattr(processes.jax, "devices", lambda: devices)
  with pytest.raises(ValueError, match=r"\[2, 1\] devices, .* the same number"):
    processes.gather("a value")


@pytest.mark.parametrize(
  ("host", "reason"),
  [("no-such-host.invalid", "no such host"), ("127.0.0.1", "refused")],
)
def test_an_unreachable_process_0_is_named(
  host: str, reason: str, monkeypatch
) -> None:
  port = _free_port()
  begin = time.monotonic()
  with pytest.raises(ValueError, match=f"(?i){host}:{port}.*{reason}"):
    Peers(Place(host, port, 2, 1), _VERSIONS, timeout=1)
  assert time.monotonic() - begin < 20


def test_a_taken_port_is_named() -> None:
  with socket.socket() as other:
    other.bind(("", 0))
    other.listen()
    port = other.getsockname()[1]
    with pytest.raises(ValueError, match=f"cannot listen at port {port}"):
      Peers(Place("127.0.0.1", port, 2, 0), _VERSIONS, timeout=1)


def _vanish(process: Peers) -> None:
  """Close the connections of a process, as the kernel does when it dies."""
  for writer in process._writers.values():
    process._loop.call_soon_threadsafe(writer.transport.abort)


@pytest.mark.parametrize("dead", [0, 2])
def test_a_death_reaches_every_process(dead: int, ends) -> None:
  found = _meet(_places(3))
  _vanish(found[dead])
  expected = f"process {dead} of 3 has ended without a word"
  losses = [x.lost(10) for i, x in enumerate(found) if i != dead]
  assert all(x.code is None for x in losses)
  # On a busy machine the second process may see the first one's end before the
  # death that caused it.
  assert any(expected in x.what for x in losses)
  assert all("of 3 has ended without a word" in x.what for x in losses)
  deadline = time.monotonic() + 10
  while len(ends) < 2 and time.monotonic() < deadline:
    time.sleep(0.02)
  assert any(expected in what for what, _ in ends)
  assert len(ends) >= 2
  assert {code for _, code in ends} == {EXIT_PEER_LOST}


def test_a_failure_is_a_loss_and_an_end_is_none(ends) -> None:
  first, second = _meet(_places(2))
  second.leave(1)
  assert first.lost(10) == Loss("process 1 of 2 has ended with exit code 1", 1)
  first, second = _meet(_places(2))
  second.leave(0)
  _vanish(second)
  assert first.lost(0.3) is None


def test_silence_is_a_loss(ends, monkeypatch) -> None:
  monkeypatch.setattr(peers, "SILENCE", 0.2)
  first, _ = _meet(_places(2))
  assert "has not answered for 0.2 s" in first.lost(10).what


def test_jax_is_relayed_to_its_service() -> None:
  """Bytes for jax reach the service of process 0, and come back."""
  first, second = _meet(_places(2))

  async def talk() -> bytes:
    async def answer(reader, writer) -> None:
      writer.write(b"to " + await reader.readexactly(3))
      await writer.drain()
      writer.close()

    port = int(first.jax_address.rpartition(":")[2])
    server = await asyncio.start_server(answer, "127.0.0.1", port)
    near = second.jax_address.rpartition(":")[2]
    reader, writer = await asyncio.open_connection("127.0.0.1", int(near))
    writer.write(b"you")
    answered = await asyncio.wait_for(reader.readexactly(6), 10)
    server.close()
    writer.close()
    return answered

  assert asyncio.run(talk()) == b"to you"


@pytest.mark.parametrize(
  "words", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"kind": "peer"}\n', b""]
)
def test_a_stranger_at_the_port_changes_nothing(
  words: bytes, ends, caplog
) -> None:
  """Neither while the processes gather, nor when they are together."""
  places = _places(2)

  def call(deadline: float) -> None:
    while time.monotonic() < deadline:
      try:
        with socket.create_connection(("127.0.0.1", places[0].port)) as link:
          link.sendall(words)
          return
      except OSError:
        time.sleep(0.01)

  stranger = threading.Thread(target=call, args=(time.monotonic() + 5,))
  if words != b'{"kind": "peer"}\n':  # that is a process of another run
    stranger.start()
    stranger.join(0.05)
  first, second = _meet(places)
  call(time.monotonic() + 5)
  assert first.lost(0.2) is None and second.lost(0) is None
  assert ends == [] and caplog.text == ""


@pytest.mark.parametrize("words", [b"5\n", b"HTTP/1.1 400\r\n", b"[]\n", b""])
def test_something_else_listens_where_process_0_should(words: bytes) -> None:
  with socket.create_server(("127.0.0.1", 0)) as server:
    place = Place("127.0.0.1", server.getsockname()[1], 2, 1)

    def answer() -> None:
      link = server.accept()[0]
      link.sendall(words)
      link.close()

    threading.Thread(target=answer, daemon=True).start()
    with pytest.raises(ValueError, match="process 0 at 127.0.0.1:.* ended, or"):
      peers.Peers(place, {}, 5)


def test_the_wait_for_process_0_is_told_once(monkeypatch, capfd) -> None:
  monkeypatch.setattr(peers, "_NOTICE", 0.05)
  monkeypatch.setattr(peers, "_RETRY", 0.02)
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]  # nobody listens there from now on
  with pytest.raises(ValueError, match=rf"reach process 0 at .*{port} within"):
    peers.Peers(Place("127.0.0.1", port, 2, 1), {}, 0.3)
  told = "".join(capfd.readouterr())
  assert told.count(f"waiting for process 0 at 127.0.0.1:{port} (") == 1


def test_reasons_are_in_words() -> None:
  assert peers._reason(OSError(errno.ECONNREFUSED, "x")) == "Connection refused"
  assert peers._reason(socket.gaierror(8, "x")) == "no such host"


@pytest.mark.parametrize(
  ("how", "message"),
  [
    ("on", "distributed='on': expected off, auto, or HOST:PORT,N,I"),
    ("localhost:80,2,2", "with I < N"),
    ("localhost:99999,2,1", "a port of 1 to 65535"),
  ],
)
def test_processes_that_cannot_be_found(how: str, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    processes.start(how)


# What two processes do together. Each prints one line of JSON.
_TWO = """
import dataclasses, json, os, sys
import jax, numpy as np
from train.devices import batch_sharding, mesh as mesh_lib, processes
where, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
processes.start(f"{where},2,{index}")
from train import same_run
from train.presets import make_presets
from train.records.run_folder import RunFolder
said = {}

def refusal(call):
  try:
    call()
  except ValueError as error:
    return str(error)

base = make_presets()["mqar"]
def of(config, path="run", **options):
  mine = base if index == 0 else config
  path = "run" if index == 0 else path
  options = {} if index == 0 else options
  return refusal(lambda: same_run.check(mine, RunFolder(path), **options))
change = dataclasses.replace
fewer = change(base.data, test_examples=base.data.test_examples // 2)
said["same"] = of(base)
said["rate"] = of(
  change(base, optimizer=change(base.optimizer, learning_rate=0.5))
)
said["seed"] = of(change(base, seed=3))
said["fewer"] = of(change(base, data=fewer))
said["width"] = of(change(base, model=change(base.model, width=32)))
said["mesh"] = of(change(base, mesh=change(base.mesh, fsdp=2)))
said["steps"] = of(change(base, steps=base.steps + 1))
said["folder"] = of(base, path="other")
said["option"] = of(base, allow_data_change=True)
with jax.default_matmul_precision("highest" if index else None):
  said["setting"] = of(base)
if index == 1:  # the same config, but other files
  same_run.hash_of_code = lambda config: "other code"
  same_run._identity = lambda batches: {"rows": "other rows"}
  same_run._names = lambda run: ["other names"]
said["files"] = of(base)

def fail_in_one():
  with processes.all_or_none():
    if index == 1:
      raise ValueError("no such file")
said["one fails"] = refusal(fail_in_one)
seen = RunFolder(folder if index == 0 else folder + "-elsewhere")
said["no folder"] = refusal(lambda: same_run.check_folder(seen, seconds=0))

mesh = mesh_lib.make_mesh()
vote = processes.Vote(mesh)
said["most"] = [int(vote.cast(x[index])) for x in ((0, 15), (7, 2))]
oks = (True, False), (True, True)
said["all"] = [processes.all_processes(x[index]) for x in oks]
rows = batch_sharding.local_rows(8, mesh)
said["rows"] = [rows.start, rows.stop]
tokens = np.arange(24, dtype=np.int32).reshape(8, 3)
with jax.set_mesh(mesh):
  placed = batch_sharding.put_batch({"tokens": tokens[rows]}, mesh, 8)["tokens"]
  said["sum of rows × row"] = int(
    jax.jit(lambda x: (x * np.arange(8)[:, None]).sum())(placed)
  )
print("said", json.dumps(said), flush=True)
if index == 1:
  os._exit(9)
try:
  with processes.naming_lost_peers():
    while True:
      processes.all_processes(True)
except processes.PeerLost as error:
  print("lost", error, flush=True)
  processes.leave(3)
"""


def test_two_processes_agree_or_refuse(tmp_path: Path, trainer: Path) -> None:
  """Rows, votes and agreement of two real processes, and a death."""
  where = f"127.0.0.1:{_free_port()}"
  (tmp_path / "config.json").write_text("{}")
  started = [
    subprocess.Popen(
      [sys.executable, "-c", _TWO, where, str(i), str(tmp_path)],
      cwd=ROOT,
      env=environment(trainer, devices=2),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  outputs = [process.communicate(timeout=120) for process in started]
  assert [process.returncode for process in started] == [3, 9], outputs
  said = []
  for out, _ in outputs:
    line = next(x for x in out.splitlines() if x.startswith("said "))
    said.append(json.loads(line.removeprefix("said ")))
  first, second = said
  assert first.pop("rows") == [0, 4] and second.pop("rows") == [4, 8]
  one = first.pop("one fails"), second.pop("one fails")
  assert one == ("refused by process 1: no such file", "no such file")
  assert first == second
  assert first.pop("same") is None
  files = first.pop("files")
  for text in (
    *(" data.rows: ", " held_out_data.rows: ", " init_from_files: "),
    "'other code' on process 1",
  ):
    assert text in files, files
  assert first.pop("most") == [15, 7]
  assert first.pop("all") == [False, True]
  assert first.pop("sum of rows × row") == sum(
    (3 * row * row * 3 + 3 * row) for row in range(8)
  )
  expected = {
    "rate": "config.optimizer.learning_rate: 0.01 on process 0, 0.5 on "
    "process 1",
    "seed": "config.seed: 0 on process 0, 3 on process 1",
    "fewer": "held_out_data.num_batches",
    "width": "config.model.width: ",
    "mesh": "config.mesh.fsdp: 1 on process 0, 2 on process 1",
    "steps": "config.steps: ",
    "folder": "run_dir: 'run' on process 0, 'other' on process 1",
    "option": "options.allow_data_change: nothing on process 0, True on "
    "process 1",
    "setting": "settings.jax_default_matmul_precision: 'None' on process 0, "
    "'highest' on process 1",
    "no folder": "'no config.json' on process 1",
  }
  assert set(first) == set(expected)
  for name, text in expected.items():
    assert text in first[name], first[name]
  assert "process 1 of 2 has ended without a word" in outputs[0][0]
  assert "Check failure" not in outputs[0][1]


def test_a_slurm_job_names_the_place_of_its_processes(monkeypatch) -> None:
  for name, value in dict(
    SLURM_JOB_ID="4711",
    SLURM_STEP_NODELIST="node[3-5]",
    SLURM_NTASKS="6",
    SLURM_PROCID="4",
    SLURM_LOCALID="1",
  ).items():
    monkeypatch.setenv(name, value)
  place, local = processes._find_cluster()
  assert (place.host, place.count, place.index) == ("node3", 6, 4)
  assert 1 << 10 < place.port < 1 << 16 and local == [1]


_THING = """
import dataclasses
@dataclasses.dataclass(frozen=True)
class Thing:
  size: int = {size}
"""


def test_the_code_of_a_users_classes_is_compared(
  tmp_path: Path, monkeypatch
) -> None:
  monkeypatch.syspath_prepend(tmp_path)
  file = tmp_path / "users_thing.py"
  file.write_text(_THING.format(size=1))
  thing = importlib.import_module("users_thing").Thing()
  config = tiny()
  inside = dataclasses.make_dataclass("Inside", ["thing"])(thing)
  cases = (config, (config, thing), (config, (thing,)), (config, inside))
  before = [same_run.hash_of_code(x) for x in cases]
  file.write_text(_THING.format(size=2))
  after = [same_run.hash_of_code(x) for x in cases]
  changed = [x != y for x, y in zip(before, after, strict=True)]
  assert changed == [False, True, True, True]
  assert before[0] not in before[1:]


@pytest.mark.parametrize(
  ("loss", "error", "raised"),
  [
    (None, ValueError("x"), ValueError),
    (Loss("gone"), ValueError("Gloo"), processes.PeerLost),
    (Loss("gone"), TrainingFailed("x"), processes.PeerLost),
    (Loss("failed", 1), RuntimeError("Gloo"), processes.PeerLost),
    (Loss("failed", 1), TrainingFailed("x"), TrainingFailed),
    (Loss("refused", 2), ValueError("x"), ValueError),
  ],
)
def test_an_error_keeps_its_name_unless_a_death_caused_it(
  loss, error, raised, monkeypatch
) -> None:
  known = SimpleNamespace(lost=lambda seconds: loss)
  monkeypatch.setattr(processes, "_peers", known)
  with pytest.raises(raised), processes.naming_lost_peers():
    raise error
