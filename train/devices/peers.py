"""Connections between the processes of one run: who came, and who has gone.

Process 0 listens at HOST:PORT. Each other process connects to it and says its
number. When all are there, jax's own coordination starts, through the same
port:

    process 3                                 process 0
    jax → 127.0.0.1:a  ──── HOST:PORT ────→   127.0.0.1:b, jax's service

jax aborts with a stack trace where a process does not come or goes away. Here
the line is ours: a closed connection shows at once that a process has died, and
jax sees that only later, because its connection ends in this process.
"""

import asyncio
from collections.abc import Coroutine
import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from typing import Any, NoReturn, TypeVar

#: The exit code of a process that ends because another one of the run has.
EXIT_PEER_LOST = 3
#: Seconds without any word after which a process counts as lost.
SILENCE = 120
_BEAT = 10  # seconds between two words of a process that has nothing to say
_GRACE = 5  # seconds in which a process may end by itself after a loss
_RETRY = 0.5  # seconds between two attempts to reach process 0
_NOTICE = 10  # seconds of waiting after which it is reported

_T = TypeVar("_T")
_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclasses.dataclass(frozen=True)
class Place:
  """This process's place among the processes of a run."""

  #: Where process 0 listens.
  host: str
  port: int
  #: The number of processes.
  count: int
  #: The number of this process, from 0.
  index: int

  @property
  def address(self) -> str:
    """HOST:PORT of process 0."""
    return f"{self.host}:{self.port}"


@dataclasses.dataclass(frozen=True)
class Loss:
  """The end of another process, without which this one cannot continue."""

  #: What happened, as "process 2 of 4 has ended without a word".
  what: str
  #: The exit code that the process announced. None: it announced nothing.
  code: int | None = None


class Peers:
  """The other processes of this run, watched by a thread.

  Args:
    place: this process's place among them.
    versions: what all processes must have alike, by name.
    timeout: seconds to wait for the others.

  Attributes:
    jax_address: the address at which this process's jax finds its service.

  Raises:
    ValueError: the port is taken, the others have not come in time, or one of
      them has other versions.
  """

  def __init__(self, place: Place, versions: dict[str, str], timeout: float):
    self._place, self._timeout = place, timeout
    self._versions = versions
    self._lost: Loss | None = None
    self._lost_event = threading.Event()
    self._leaving = False
    self._writers: dict[int, asyncio.StreamWriter] = {}
    self._arrived = asyncio.Event()  # changes whenever a process comes
    self._refused: str | None = None
    self._tasks: set[asyncio.Task] = set()  # asyncio itself forgets them
    self._server: asyncio.Server | None = None
    self._open: set[asyncio.StreamWriter] = set()
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(
      target=self._loop.run_forever, name="peers", daemon=True
    )
    self._thread.start()
    meet = self._gather if place.index == 0 else self._join
    try:
      self.jax_address: str = self._call(meet())
    except BaseException:
      self.close()
      raise

  def lost(self, seconds: float) -> Loss | None:
    """Wait whether a process is lost; return None if none is by then."""
    self._lost_event.wait(seconds)
    return self._lost

  def leave(self, code: int) -> None:
    """Tell the others that this process ends, with this exit code."""
    with contextlib.suppress(TimeoutError):
      self._call(self._say_end(code), _GRACE)

  def close(self) -> None:
    """Close all connections and end the thread; jax must have ended before."""
    self._leaving = True
    self._call(self._stop())
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()

  async def _stop(self) -> None:
    if self._server is not None:
      self._server.close()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for writer in self._open:
      writer.transport.abort()
    await asyncio.sleep(0.01)  # the loop closes them in its next turns

  def _call(self, work: Coroutine[Any, Any, _T], seconds: float | None = None):
    return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

  def _start(self, work: Coroutine[Any, Any, Any]) -> None:
    task = self._loop.create_task(work)
    self._tasks.add(task)
    task.add_done_callback(self._tasks.discard)

  # Process 0.

  async def _gather(self) -> str:
    """Wait for all others, and return the address of jax's service."""
    place = self._place
    inner = _free_port()

    async def accept(
      reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
      self._take(writer)
      try:
        hello = json.loads(await asyncio.wait_for(reader.readline(), _NOTICE))
        kind = hello["kind"]
        index, count = int(hello.get("index", 0)), int(hello.get("count", 0))
        versions = dict(hello.get("versions", {}))
      except (ValueError, TypeError, KeyError, AttributeError, OSError):
        writer.close()  # a stranger
        return
      if kind == "peer":
        await self._greet(Place("", 0, count, index), versions, reader, writer)
      elif (service := await _reach_service(inner)) is not None:
        self._take(service[1])
        await _join_streams((reader, writer), service)

    try:
      self._server = await asyncio.start_server(accept, None, place.port)
    except OSError as error:
      raise ValueError(
        f"distributed: process 0 cannot listen at port {place.port} "
        f"({os.strerror(error.errno or 0)}): expected a port that nothing uses "
        "on this host; is an earlier run still there?"
      ) from error
    await self._wait_for_all()
    for index in self._writers:
      self._send(index, {"all": True})
    return f"127.0.0.1:{inner}"

  async def _wait_for_all(self) -> None:
    begin, told = time.monotonic(), False
    while len(self._writers) < self._place.count - 1 and not self._refused:
      passed = time.monotonic() - begin
      if passed > self._timeout:
        self._refused = (
          f"distributed: {self._missing()} did not come within "
          f"{self._timeout:g} s: expected {self._place.count} processes with "
          f"--distributed {self._place.address},{self._place.count},I"
        )
        break
      if passed > _NOTICE and not told:
        told = True
        _print(f"waiting for {self._missing()} of {self._place.count}")
      self._arrived.clear()
      with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(self._arrived.wait(), _RETRY)
    if self._refused:
      for writer in self._writers.values():
        writer.write(_line({"refused": self._refused}))
      await asyncio.sleep(_RETRY)  # until it is sent
      raise ValueError(self._refused)

  def _missing(self) -> str:
    missing = sorted(set(range(1, self._place.count)) - set(self._writers))
    shown = ", ".join(map(str, missing[:8])) + (", …" * (len(missing) > 8))
    return f"process{'es' * (len(missing) > 1)} {shown}"

  async def _greet(
    self,
    other: Place,
    versions: dict[str, str],
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
  ) -> None:
    """Take a process in, or refuse all if it does not belong here.

    Args:
      other: the number and count that the process says.
      versions: its versions.
      reader: what it says.
      writer: what is said to it.
    """
    index, count = other.index, other.count
    problem = None
    if count != self._place.count:
      problem = (
        f"{count} processes on process {index}, {self._place.count} on "
        "process 0: expected the same number"
      )
    elif index in self._writers or index == 0:
      problem = f"two processes are number {index}: expected each number once"
    elif versions != self._versions:
      problem = "other versions: " + "; ".join(
        f"{name} {mine} on process 0, {theirs} on process {index}"
        for name, mine, theirs in (
          (x, self._versions.get(x), versions.get(x))
          for x in {**self._versions, **versions}
        )
        if mine != theirs
      )
    if problem is not None:
      problem = f"distributed: {problem}"
      writer.write(_line({"refused": problem}))
      if len(self._writers) < self._place.count - 1:
        self._refused = problem  # not of a run that trains already
      self._arrived.set()
      return
    self._writers[index] = writer
    self._arrived.set()
    self._start(self._beat(index))
    await self._listen(index, reader)

  # Every other process.

  async def _join(self) -> str:
    """Reach process 0, and return the address of the relay to jax's service."""
    place = self._place
    hello = {"index": place.index, "count": place.count}
    reader, writer = await self._reach()
    writer.write(_line({"kind": "peer", "versions": self._versions, **hello}))
    # Process 0 may wait for the others as long as this process waited for it.
    answer: dict[str, Any] = {}
    while "all" not in answer:
      try:
        text = await asyncio.wait_for(
          reader.readline(), self._timeout + _NOTICE
        )
        answer = dict(json.loads(text))
      except (ValueError, TypeError, OSError, TimeoutError) as error:
        raise ValueError(
          f"distributed: process 0 at {place.address} ended, or did not answer "
          "while the processes gathered: expected process 0 of this run, whose "
          "output may say why, and no other program at this port"
        ) from error
      if "refused" in answer:
        raise ValueError(answer["refused"])
    self._writers[0] = writer
    self._start(self._beat(0))
    self._start(self._listen(0, reader))

    async def relay(
      near: asyncio.StreamReader, back: asyncio.StreamWriter
    ) -> None:
      try:
        far = await asyncio.open_connection(place.host, place.port)
      except OSError:
        return  # process 0 has gone, which its own connection tells
      self._take(back)
      self._take(far[1])
      far[1].write(_line({"kind": "jax"}))
      # Not closed with the other end: jax would abort before our line is out.
      await _join_streams((near, back), far, close_first=False)

    self._server = await asyncio.start_server(relay, "127.0.0.1", 0)
    return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

  async def _reach(self) -> _Streams:
    place = self._place
    begin, told = time.monotonic(), False
    while True:
      try:
        streams = await asyncio.wait_for(
          asyncio.open_connection(place.host, place.port), _NOTICE
        )
      except (OSError, TimeoutError) as error:
        passed = time.monotonic() - begin
        reason = _reason(error)
        if passed > self._timeout:
          raise ValueError(
            f"distributed: process {place.index} cannot reach process 0 at "
            f"{place.address} within {self._timeout:g} s ({reason}): expected "
            "the host and port at which process 0 runs"
          ) from error
        if passed > _NOTICE and not told:
          told = True
          _print(f"waiting for process 0 at {place.address} ({reason})")
        await asyncio.sleep(_RETRY)
      else:
        self._take(streams[1])
        return streams

  # All.

  def _take(self, writer: asyncio.StreamWriter) -> None:
    """Keep a connection open, and notice when its other host is gone."""
    _keep_alive(writer)
    self._open.add(writer)

  def _send(self, index: int, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # it is gone
      self._writers[index].write(_line(message))

  async def _beat(self, index: int) -> None:
    while True:
      self._send(index, {})
      await asyncio.sleep(_BEAT)

  async def _listen(self, index: int, reader: asyncio.StreamReader) -> None:
    """Take the words of another process until it has gone."""
    of_all = f"process {index} of {self._place.count}"
    while True:
      try:
        text = await asyncio.wait_for(reader.readline(), SILENCE)
      except TimeoutError:
        self._lose(Loss(f"{of_all} has not answered for {SILENCE} s"))
        return
      except OSError:
        text = b""
      if not text:
        self._lose(
          Loss(f"{of_all} has ended without a word (killed, or crashed)")
        )
        return
      message = json.loads(text)
      if "lost" in message:
        self._lose(Loss(**message["lost"]))
        return
      if "end" in message:
        code = message["end"]
        if code:
          self._lose(Loss(f"{of_all} has ended with exit code {code}", code))
        return

  def _lose(self, loss: Loss) -> None:
    """Note a loss, tell the others, and end this process if it does not."""
    if self._leaving or self._lost is not None:
      return
    self._lost = loss
    if self._place.index == 0:
      for index in self._writers:
        self._send(index, {"lost": dataclasses.asdict(loss)})
    self._lost_event.set()
    self._loop.call_later(_GRACE, self._end_process)

  def _end_process(self) -> NoReturn:
    assert self._lost is not None
    end_process(f"{self._lost.what}; this process ends too", EXIT_PEER_LOST)

  async def _say_end(self, code: int) -> None:
    self._leaving = True
    for index, writer in self._writers.items():
      self._send(index, {"end": code})
      with contextlib.suppress(OSError):
        await writer.drain()


def end_process(message: str, code: int) -> NoReturn:
  """Print a line and end this process at once, whatever its threads do."""
  _print(message)
  os._exit(code)


def _print(message: str) -> None:
  # Not through sys.stderr, whose lock a thread that hangs may hold.
  with contextlib.suppress(OSError):
    os.write(2, f"rebased: {message}\n".encode())


def _line(message: dict[str, Any]) -> bytes:
  return json.dumps(message).encode() + b"\n"


def _reason(error: Exception) -> str:
  if isinstance(error, TimeoutError):
    return "no answer"
  if isinstance(error, socket.gaierror):
    return "no such host"
  return (
    os.strerror(error.errno) if getattr(error, "errno", None) else "refused"
  )


async def _reach_service(port: int) -> _Streams | None:
  """Connect to jax's service, which may still start; None if it does not."""
  for _ in range(100):
    with contextlib.suppress(OSError):
      return await asyncio.open_connection("127.0.0.1", port)
    await asyncio.sleep(0.1)
  return None


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def _keep_alive(writer: asyncio.StreamWriter) -> None:
  """Notice within a minute that the other host has lost power or network."""
  connection = writer.get_extra_info("socket")
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for option, value in (
    (socket.TCP_KEEPIDLE, 20),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 3),
  ):
    connection.setsockopt(socket.IPPROTO_TCP, option, value)


async def _join_streams(
  first: _Streams, second: _Streams, *, close_first: bool = True
) -> None:
  """Copy bytes both ways until an end closes; then close the other one."""

  async def copy(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, close: bool
  ) -> None:
    with contextlib.suppress(OSError):
      while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    if close:
      writer.close()

  await asyncio.gather(
    copy(first[0], second[1], True), copy(second[0], first[1], close_first)
  )
