"""Tables of tuned sizes: what is read, what is chosen, what is measured."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
  REBASED,
  devices,
  measure,
  polynomial_attention,
  tuning,
)
from pallas_kernels.polynomial import api, arg_specs, tuned
from pallas_kernels.polynomial.arg_specs import ArgSpec
from pallas_kernels.polynomial.passes import Kernel
from pallas_kernels.polynomial.tuned import DEFAULT, Entry, Shape, Sizes, Table

_SPECS = {spec.name: spec for spec in arg_specs.SPECS}
_SHAPE = Shape(heads=24, T=4096, F=16, P=64, square=True)
_CUDA = pytest.mark.skipif(
  not devices.has_mosaic_gpu(), reason="the GPU kernels need jax ≥ 0.11"
)


def _entry(shape=_SHAPE, sizes=DEFAULT, implementation="gpu") -> Entry:
  return Entry("a", shape, sizes, implementation, {"gpu": 1.5}, "by hand")


def _table(*entries: Entry, default=DEFAULT) -> Table:
  return Table("A card", "0.12.0", "today", default, "so", entries)


def test_a_table_is_read_as_it_was_written():
  other = _entry(dataclasses.replace(_SHAPE, T=7), Sizes(66, 32), "xla")
  table = _table(_entry(), other)
  assert tuned.parse(tuned.dump(table), "x") == table


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda t: t[:-5], "Expecting"),
    (lambda t: "[]", "the table has"),
    (lambda t: t.replace('"device"', '"card"'), "the table has.*card"),
    (lambda t: t.replace('"A card"', "3"), "device=3"),
    (lambda t: t.replace('"today"', "3"), "date=3"),
    (lambda t: t.replace('"so"', "null"), "default.timed=None"),
    (lambda t: t.replace("264", "264.0", 1), "programs=264.0"),
    (lambda t: t.replace("264", "true", 1), "programs=True"),
    (lambda t: t.replace('"chunks": 8', '"chunks": 7'), "chunks=7"),
    (lambda t: t.replace('"heads": 24', '"heads": 0'), r"entries\[0\]: heads"),
    (lambda t: t.replace('"square": true', '"square": 1'), "square=1"),
    (lambda t: t.replace('"T": 4096', '"time": 4096'), r"entries\[0\] has"),
    (lambda t: t.replace('"gpu"', '"tpu"', 1), "implementation='tpu'"),
    (lambda t: t.replace("1.5", "-1.5"), "ms="),
    (lambda t: t.replace("1.5", "NaN"), "ms="),
    (lambda t: t.replace('"by hand"', '""'), "timed=''"),
  ],
)
def test_what_is_no_table_is_one_error(change, words):
  text = tuned.dump(_table(_entry()))
  assert change(text) != text
  with pytest.raises(ValueError, match=f"^a.json: .*{words}"):
    tuned.parse(change(text), "a.json")


def test_an_entry_counts_for_shapes_near_its_own():
  sizes = Sizes(66, 16)
  near = dataclasses.replace(_SHAPE, T=6000)
  table = _table(
    _entry(sizes=sizes, implementation="xla"), _entry(near, Sizes(528, 32))
  )
  for change, found in [
    ({}, sizes),
    ({"T": 2048, "heads": 48}, sizes),
    ({"T": 4800}, sizes),
    ({"T": 5600}, Sizes(528, 32)),
    ({"P": 49, "F": 3}, sizes),  # filled up to 64 and 16
    ({"P": 48}, DEFAULT),
    ({"F": 17}, DEFAULT),
    ({"square": False}, DEFAULT),
    ({"T": 2047}, DEFAULT),
    ({"heads": 49}, DEFAULT),
  ]:
    shape = dataclasses.replace(_SHAPE, **change)
    assert table.sizes(shape) == found, change
    wanted = "xla" if found == sizes else "gpu"
    assert table.implementation(shape) == wanted, change


def test_the_shipped_tables():
  folder = tuned.resources.files(tuned.__name__)
  names = [f.name for f in folder.iterdir() if f.name.endswith(".json")]
  names = [x for x in names if not x.startswith("tpu_")]  # of tpu_sizes.py
  assert "h100.json" in names
  for name in names:
    table = tuned.parse((folder / name).read_text(), name)
    assert tuned.file_name(table.device) == name
    assert tuned.of_device(table.device) == table
    measured = bool(table.entries) or table.default != DEFAULT
    assert measured == (table.jax is not None) == (table.date is not None)
    if not measured:
      assert table.default_timed == tuned.NOT_MEASURED


def test_a_card_without_a_table_has_the_defaults():
  for device in ("NVIDIA H100 PCIe", "NVIDIA L4", "cpu"):
    table = tuned.of_device(device)
    assert table == Table(device)
    assert table.sizes(_SHAPE) == DEFAULT
    assert table.implementation(_SHAPE) == "gpu"
  with pytest.raises(ValueError, match="device=''"):
    tuned.file_name("")


@_CUDA
@pytest.mark.parametrize(
  "sizes, P, slices",
  [
    (DEFAULT, 64, 11),
    (DEFAULT, 128, 5),
    (Sizes(66, 8), 64, 2),
    (Sizes(264, 32), 64, 8),
    (Sizes(264, 64), 128, 4),
  ],
)
def test_the_kernels_are_cut_by_the_table(sizes, P, slices):
  from pallas_kernels.polynomial.gpu import passes, tiles

  assert (tiles.C, tiles.V) == (tuned.CHUNK, tuned.WIDTH)
  q = jax.ShapeDtypeStruct((2, 16384, 12, 16), jnp.bfloat16)
  v = jax.ShapeDtypeStruct((2, 16384, 12, P), jnp.bfloat16)
  shape = dataclasses.replace(_SHAPE, T=16384, P=P)
  table = _table(_entry(shape, sizes), default=Sizes(1, 8))
  with tuned.using(table):
    call = passes._call(q, v, None, Kernel(REBASED, 1e-6))
  assert call.slices == slices


@_CUDA
def test_calls_run_what_the_table_has_as_fastest(monkeypatch):
  monkeypatch.setattr(devices, "check_gpu", lambda: None)
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(x, (1, 40, 3, 16), jnp.bfloat16) for x in keys)
  shape = Shape(3, 40, 16, 16, True)
  found = {}
  for name in ("xla", "reference"):
    with tuned.using(_table(_entry(shape, implementation=name))):
      found[name] = polynomial_attention(q, k, v)
      kernel = Kernel(REBASED, 1e-6)
      assert api._choose("gpu", q, v, kernel, None, False, None) == "gpu"
    np.testing.assert_array_equal(
      found[name], polynomial_attention(q, k, v, implementation=name)
    )
  assert (found["xla"] != found["reference"]).any()  # two implementations


def test_candidates_cut_time_differently():
  assert tuning.candidates(_SPECS["lm-1k"]) == [DEFAULT]
  found = tuning.candidates(_SPECS["lm-64k"])
  assert found[0] == DEFAULT and len(set(found)) == len(found) > 3
  shape = tuning.shape_of(_SPECS["lm-64k"])
  programs = {shape.programs(sizes) // 12 for sizes in found}
  assert len(programs) == len(found)


def _timer(times, calls):
  """By implementation, or by programs and chunks; the rest takes 1 ms."""

  def timer(spec, implementation, sizes):
    calls.append((spec.name, implementation, sizes))
    key = sizes if implementation == "gpu" else implementation
    return times.get(key, 1.0)

  return timer


def test_the_fastest_is_kept_and_the_default_where_it_is_close():
  spec = _SPECS["lm-64k"]
  other, third = tuning.candidates(spec)[1:3]
  calls = []
  times = {other: 0.9, third: 0.89}
  (entry,) = tuning.tune([spec], _timer(times, calls), lambda _: None)
  assert entry.sizes == third and entry.implementation == "gpu"
  assert min(entry.ms.values()) == 0.89 and len(entry.ms) == len(calls)
  assert {name for _, name, _ in calls} == {"gpu"}  # too long for the rest
  times = {other: 0.98, third: None}
  (entry,) = tuning.tune([spec], _timer(times, []), lambda _: None)
  assert entry.sizes == DEFAULT
  assert len(entry.ms) == len(tuning.candidates(spec)) - 1


def test_short_rows_may_run_something_else():
  spec = _SPECS["lm-1k"]
  for times, fastest in [
    ({"xla": 0.99, "reference": None}, "gpu"),
    ({"xla": 0.9}, "xla"),
    ({"xla": 0.9, "reference": 0.5}, "reference"),
  ]:
    (entry,) = tuning.tune([spec], _timer(times, []), lambda _: None)
    assert entry.implementation == fastest
    assert entry.shape == Shape(768, 1024, 16, 64, True)
  with pytest.raises(RuntimeError, match="lm-1k: the default sizes do not run"):
    tuning.tune([spec], _timer({DEFAULT: None}, []))


def test_the_command_writes_the_table(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(devices, "check_gpu", lambda: None)
  monkeypatch.setattr(tuning, "device_timer", lambda: _timer({}, []))
  out = tmp_path / "mine.json"
  tuning.main(["--specs", "lm-1k", "based-360m", "--out", str(out)])
  table = tuned.parse(out.read_text(), "mine")
  assert [entry.name for entry in table.entries] == ["lm-1k", "based-360m"]
  assert table.device == devices.device_kind()
  assert table.jax == jax.__version__ and table.date is not None
  assert "lm-1k" in capsys.readouterr().out
  with pytest.raises(SystemExit):
    tuning.main(["--specs", "lm-1k"])
  assert "--specs needs --out" in capsys.readouterr().err


def test_the_command_needs_a_gpu():
  if jax.devices()[0].platform == "gpu":
    pytest.skip("there is one")
  with pytest.raises(SystemExit, match="needs a Hopper GPU"):
    tuning.main([])


def test_the_timer_checks_values_first(monkeypatch):
  spec = ArgSpec("tiny", 1, 40, 2, 4, 4)
  assert tuning.device_timer()(spec, "xla", DEFAULT) > 0
  large = ArgSpec("large", 64, 65536, 12, 16, 64)
  assert tuning.device_timer()(large, "reference", DEFAULT) is None
  right = measure.operator

  def wrong(spec, implementation):
    call = right(spec, "xla")
    return call if implementation == "xla" else lambda q, k, v: -call(q, k, v)

  monkeypatch.setattr(measure, "operator", wrong)
  with pytest.raises(RuntimeError, match="tiny, passes.*wrong values"):
    tuning.device_timer()(spec, "gpu", DEFAULT)


def test_times_are_of_one_call_of_many():
  calls = []
  ms = measure.milliseconds(lambda: calls.append(1) or jnp.zeros(()))
  assert 0 < ms < 1000 and len(calls) > 5
