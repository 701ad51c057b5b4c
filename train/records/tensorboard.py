"""Event files for TensorBoard, the only module that knows their form.

Each process of a run adds one file. TensorBoard hides what earlier files have
of the step that the process starts from, and of later ones, so that a killed
and resumed run is shown once. What stays valid of that step is written again.
"""

import time
from typing import Any
import uuid

from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2


class Board:
  """One event file.

  Args:
    folder: where the files of the run are; made if it is missing.
    start: updates that are done when the process starts.
  """

  def __init__(self, folder: epath.Path, start: int):
    folder.mkdir(parents=True, exist_ok=True)
    # The library names a file by the second; the suffix makes it unique.
    suffix = f".{start}-{uuid.uuid4().hex[:8]}"
    self._file = EventsWriter(str(folder / "events"), suffix)
    begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(start, session_log=begin)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Add a record; the numbers are float32 in the file."""
    shown = [
      summary_pb2.Summary.Value(tag=tag, simple_value=value)
      for tag, value in values.items()
    ]
    self._write(step, summary=summary_pb2.Summary(value=shown))

  def _write(self, step: int, **content: Any) -> None:
    self._file.write_event(
      event_pb2.Event(wall_time=time.time(), step=step, **content)
    )

  def flush(self) -> None:
    """Wait until all records are in the file."""
    self._file.flush()

  def close(self) -> None:
    """Close the file."""
    self._file.close()
