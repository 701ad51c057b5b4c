"""The Hopper kernels of Mamba's scan and of WKV, interpreted and lowered.

The reference is XLA's form in float64, which other tests compare with the
equations.
"""

import dataclasses
import functools

from flax import nnx
import jax
from jax import ShapeDtypeStruct
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest
from recurrence_cases import (
  SCAN,
  WKV,
  answer,
  assert_near,
  documents,
  exact,
  scan_inputs,
  wkv_inputs,
)

from pallas_kernels import (
  WKVState,
  devices,
  empty_wkv_state,
  plain_derivatives,
  selective_scan,
  wkv,
)
from pallas_kernels.time_slices import Cut, cut_time
from rebased_jax import MambaConfig, RWKVConfig
from rebased_jax.mixers import base

if not devices.has_mosaic_gpu():
  pytest.skip("the GPU kernels need jax ≥ 0.11", allow_module_level=True)

import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.selective_scan.gpu import (
  backward as scan_backward,
  forward as scan_forward,
  passes as scan_passes,
  walk as scan_walk,
)
from pallas_kernels.wkv.gpu import (
  backward as wkv_backward,
  forward as wkv_forward,
  passes as wkv_passes,
  walk as wkv_walk,
)

# Sums of float32. 16-bit results, and y's cotangent, round by 2⁻⁹ at most.
LIMITS = {"float32": 3e-6, "bfloat16": 4e-3}


@pytest.fixture
def interpreted(monkeypatch):
  """Run the kernels on the CPU. The fixture's value sets how time is cut."""
  monkeypatch.setitem(devices.KERNEL_PLATFORMS, "gpu", ("cpu",))

  def cut(walk, slices: int, programs: int) -> None:
    cut = Cut(enough=1000, programs=slices * programs, least=1)
    monkeypatch.setattr(walk, "CUT", cut)

  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
    yield cut


def test_a_short_scan_equals_float64(interpreted, monkeypatch) -> None:
  """Two chunks of few tokens: whole ones take long to interpret."""
  for module in (scan_walk, scan_forward, scan_backward, scan_passes):
    monkeypatch.setattr(module, "C", 4)
  for module in (scan_forward, scan_backward):
    monkeypatch.setattr(module, "SUB_CHUNK", 2)
  inputs = scan_inputs(1, 7, 64, 3, "float32", 1e-3, 40)
  ids = np.array([[0, 0, 1, 1, 1, 1, 2]])
  found = answer(SCAN, inputs, ids, "gpu")
  assert_near(found, exact(SCAN, inputs, ids), 3e-6)


def test_a_short_wkv_equals_float64(interpreted, monkeypatch) -> None:
  """Three slices of few tokens; a document starts in the second."""
  interpreted(wkv_walk, 3, 1)
  for module in (wkv_walk, wkv_forward, wkv_backward):
    monkeypatch.setattr(module, "C", 2)
  for module in (wkv_walk, wkv_forward):
    monkeypatch.setattr(module, "BLOCK", 2)
  inputs = wkv_inputs(1, 6, 128, "float32", 3.0)
  ids = np.array([[0, 0, 0, 1, 1, 1]])
  found = answer(WKV, inputs, ids, "gpu")
  assert_near(found, exact(WKV, inputs, ids), 3e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  "T, I, N, dtype, low, high, chance, slices",
  [
    (1, 64, 16, "float32", 1e-3, 1, 0, 1),
    (70, 128, 16, "float32", 1e-3, 0.1, 0, 1),
    (70, 64, 16, "bfloat16", 1e-3, 1, 0, 1),
    (97, 64, 5, "float32", 1e-3, 40, 0.05, 3),
    # Documents that start at, before and after the boundary of slices.
    (130, 64, 24, "bfloat16", 1e-6, 1e-5, 0.03, 2),
    # The published initial values: a Δ of 0.69, and rates of up to −16.
    (64, 64, 16, "float32", 0.6, 0.8, 0, 2),
  ],
)
def test_scans_equal_float64(
  interpreted, T, I, N, dtype, low, high, chance, slices
) -> None:
  interpreted(scan_walk, slices, 2 * I // 64)
  inputs = scan_inputs(2, T, I, N, dtype, low, high)
  ids = documents(2, T, chance) if chance else None
  found = answer(SCAN, inputs, ids, "gpu")
  assert_near(found, exact(SCAN, inputs, ids), LIMITS[dtype])


@pytest.mark.slow
@pytest.mark.parametrize(
  "T, dtype, k_scale, chance, slices",
  [
    (1, "float32", 1, 0, 1),
    (24, "bfloat16", 1, 0, 1),
    (70, "float32", 3, 0.1, 3),
    # The second slice has one block less than the first.
    (41, "bfloat16", 30, 0, 2),
  ],
)
def test_wkvs_equal_float64(
  interpreted, T, dtype, k_scale, chance, slices
) -> None:
  interpreted(wkv_walk, slices, 2)
  inputs = wkv_inputs(2, T, 128, dtype, k_scale)
  if k_scale > 3:
    # The sums themselves are beyond float32; y and the gradients are not.
    inputs["k"] = np.minimum(inputs["k"], 60).astype(inputs["k"].dtype)
  ids = documents(2, T, chance) if chance else None
  found = answer(WKV, inputs, ids, "gpu")
  assert_near(found, exact(WKV, inputs, ids), LIMITS[dtype])


@pytest.mark.slow
def test_inf_and_nan_stay_in_their_document(interpreted) -> None:
  interpreted(scan_walk, 2, 1)
  ids = np.array([[0] * 20 + [1] * 25])
  inputs = scan_inputs(1, 45, 64, 8, "float32", 1e-3, 1)
  clean = answer(SCAN, inputs, ids, "gpu")
  inputs["x"][:, :20] = np.nan
  spoilt = answer(SCAN, inputs, ids, "gpu")
  own = slice(20, None)
  np.testing.assert_array_equal(
    spoilt["results"][0][:, own], clean["results"][0][:, own]
  )
  for name in ("x", "delta", "B", "C"):
    np.testing.assert_array_equal(
      spoilt["grads"][name][:, own], clean["grads"][name][:, own]
    )


def _scan_shapes(rows, T, I, N, dtype="float32"):
  shape = lambda *sizes: ShapeDtypeStruct(sizes, dtype)
  tokens, vectors = shape(rows, T, I), shape(rows, T, N)
  return tokens, tokens, shape(I, N), vectors, vectors


def _wkv_shapes(rows, T, D, dtype="bfloat16"):
  tokens = ShapeDtypeStruct((rows, T, D), dtype)
  channels = ShapeDtypeStruct((D,), "float32")
  return tokens, tokens, channels, channels


def _lowered(operator, shapes, documents=False, **options) -> str:
  ids = ShapeDtypeStruct(shapes[0].shape[:2], "int32") if documents else None

  def loss(arrays, ids):
    y, _ = operator(*arrays, segment_ids=ids, implementation="gpu", **options)
    return y.astype(jnp.float32).sum()

  traced = jax.jit(jax.value_and_grad(loss)).trace(shapes, ids)
  return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_copies_to_hbm_end_within_their_row(monkeypatch) -> None:
  """Mosaic copies a chunk that has no gaps beyond the end of its axis.

  The interpreter cuts such copies off, so that the shapes are compared. With
  one group of channels, all outputs of the scan have chunks without gaps.
  """
  copies = []

  def copy(source, target):
    shape, indices = target.ref.shape, target.transforms[-1].indices
    sizes = [
      (n, x.size)
      for n, x in zip(shape, indices, strict=True)
      if hasattr(x, "size")
    ]
    copies.append(sizes)
    original(source, target)

  original = plgpu.copy_smem_to_gmem
  monkeypatch.setattr(plgpu, "copy_smem_to_gmem", copy)
  _lowered(selective_scan, _scan_shapes(2, 45, 64, 16))
  assert len(copies) >= 5  # y, dx, dΔ, dB and dC
  for sizes in copies:
    assert all(whole % part == 0 for whole, part in sizes), sizes


@pytest.mark.parametrize(
  "rows, T, cut",
  [
    pytest.param(32, 2048, False, marks=pytest.mark.slow),
    (2, 32768, True),
  ],
)
@pytest.mark.parametrize("operator", [selective_scan, wkv])
def test_rows_of_any_length_lower(operator, rows, T, cut) -> None:
  """Long rows are cut into slices of time."""
  if operator is selective_scan:
    shapes, kernels = _scan_shapes(rows, T, 2048, 16), "selective_scan"
    parts = "slice_states", "slice_cotangents"
  else:
    shapes, kernels = _wkv_shapes(rows, T, 1024), "wkv"
    parts = "slice_sums", "slice_cotangents"
  text = _lowered(operator, shapes, documents=True)
  for name in ("forward", "backward"):
    assert f"{kernels}_{name}" in text
  for name in parts:
    assert (f"{kernels}_{name}" in text) == cut


@pytest.mark.parametrize(
  "chunks, walks, expected",
  [
    (64, 1024, (1, 64)),
    (256, 200, (1, 256)),  # enough programs without a cut
    (1024, 64, (8, 128)),
    (40, 64, (5, 8)),  # slices of at least 8 chunks
    (75, 64, (8, 10)),  # the last one has 5
    (7, 1, (1, 7)),
  ],
)
def test_time_is_cut_where_programs_are_few(chunks, walks, expected) -> None:
  cut = Cut(enough=200, programs=528, least=8)
  assert cut_time(chunks, walks, cut) == expected


@pytest.mark.parametrize("T", [pytest.param(1, marks=pytest.mark.slow), 33])
def test_short_rows_lower(T) -> None:
  assert "selective_scan_backward" in _lowered(
    selective_scan, _scan_shapes(3, T, 64, 3, "bfloat16")
  )
  assert "wkv_backward" in _lowered(wkv, _wkv_shapes(3, T, 128, "float32"))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_and_channels_lower_over_a_mesh(kind) -> None:
  mesh = jax.make_mesh((2, 2), ("data", "model"), (kind,) * 2)
  place = jax.NamedSharding(mesh, jax.P("data", None, "model"))
  with jax.set_mesh(mesh):
    k, v, *channels = _wkv_shapes(4, 40, 256)
    k, v = (ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in (k, v))
    text = _lowered(wkv, (k, v, *channels))
  assert "@CustomSPMDPartitioning" in text


def _row_and_group(operator):
  """Return XLA's operator of one row and one group of channels."""

  def scan(x_TW, delta_TW, A_WN, B_TN, C_TN, h_WN):
    row = (x[None] for x in (x_TW, delta_TW, B_TN, C_TN, h_WN))
    x, delta, B, C, h = row
    y, last = selective_scan(
      x, delta, A_WN, B, C, initial_state=h, implementation="xla"
    )
    return y[0], last[0]

  def rwkv(k_TW, v_TW, w_W, u_W, *state):
    row = WKVState(*(x[None] for x in state))
    y, last = wkv(
      *(k_TW[None], v_TW[None], w_W, u_W),
      initial_state=row,
      implementation="xla",
    )
    return y[0], *(x[0] for x in last)

  return scan if operator is SCAN else rwkv


@pytest.fixture
def seen(monkeypatch) -> set[tuple[int, ...]]:
  """Let XLA stand in for the kernels; collect the shapes of x and k."""
  shapes = set()
  over = lambda run, inputs, outputs: jax.vmap(jax.vmap(run, inputs, outputs))
  scans = over(_row_and_group(SCAN), (1, 1, 0, 0, 0, 0), (1, 0))
  wkvs = over(_row_and_group(WKV), (1, 1, 0, 0, 0, 0, 0), (1, 0, 0, 0))
  names = wkv_walk.sums_names

  def scan_inputs_of(arrays, state):
    """Return the arguments of `scans`: each group has its own B and C."""
    each = lambda x: jnp.repeat(x[:, None], state.shape[1], axis=1)
    x, delta, A = arrays["x"], arrays["delta"], arrays["A"]
    return x, delta, A, each(arrays["B"]), each(arrays["C"]), state

  def scan_forward(arrays):
    shapes.add(arrays["x"].shape)
    y, last = scans(*scan_inputs_of(arrays, arrays["h"]))
    return dict(y=y, last=last, before=arrays["h"][:, None])

  def scan_backward(arrays):
    inputs = scan_inputs_of(arrays, arrays["before"][:, 0])
    grads = jax.vjp(scans, *inputs)[1]((arrays["dy"], arrays["dlast"]))
    found = "dx", "ddelta", "dA", "dB", "dC", "dh"
    return dict(zip(found, grads, strict=True))

  def wkv_forward(arrays):
    shapes.add(arrays["k"].shape)
    state = [arrays[name] for name in names("state")]
    y, *last = wkvs(*(arrays[name] for name in "kvwu"), *state)
    found = dict(zip(names("last"), last, strict=True), y=y)
    before = (x[:, None] for x in state)
    return found | dict(zip(names("before"), before, strict=True))

  def wkv_backward(arrays):
    before = [arrays[name][:, 0] for name in names("before")]
    pull = jax.vjp(wkvs, *(arrays[name] for name in "kvwu"), *before)[1]
    a, b, _ = (arrays[name] for name in names("end"))
    *grads, da, db, _ = pull((arrays["dy"], a, -b, jnp.zeros_like(a)))
    found = dict(zip(("dk", "dv", "dw", "du"), grads, strict=True))
    first = da, -db, -before[2]
    return found | dict(zip(names("first"), first, strict=True))

  monkeypatch.setitem(devices.KERNEL_PLATFORMS, "gpu", ("cpu",))
  monkeypatch.setattr(scan_passes, "_forward", scan_forward)
  monkeypatch.setattr(scan_passes, "_backward", scan_backward)
  monkeypatch.setattr(wkv_passes, "_forward", wkv_forward)
  monkeypatch.setattr(wkv_passes, "_backward", wkv_backward)
  return shapes


@pytest.mark.parametrize("operator", [SCAN, WKV])
def test_devices_compute_their_rows_and_channels(
  hopper, operator, seen
) -> None:
  """Values and gradients over 2 x 2 devices equal those of one."""
  if operator is SCAN:
    inputs = scan_inputs(2, 5, 128, 8, "float32", 1e-3, 1)
    part = (1, 5, 1, 64)
    places = dict(A=jax.P("model"), B=jax.P("data"), C=jax.P("data"))
  else:
    inputs = wkv_inputs(2, 5, 256, "float32", 1)
    part = (1, 5, 1, 128)
    places = dict(w=jax.P("model"), u=jax.P("model"))
  places["initial_state"] = jax.P("data", "model")
  wanted = answer(operator, inputs, None, "xla")
  mesh = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2)
  with jax.set_mesh(mesh):
    tokens = jax.P("data", None, "model")
    split = {
      name: jax.device_put(x, places.get(name, tokens))
      for name, x in inputs.items()
    }
    found = answer(operator, split, None, None)
  assert part in seen
  assert_near(found, wanted, 1e-5)


@pytest.mark.parametrize(
  "operator, shapes, word",
  [
    (selective_scan, _scan_shapes(2, 8, 96, 16), "I=96"),
    (selective_scan, _scan_shapes(2, 8, 64, 33), "N=33"),
    (wkv, _wkv_shapes(2, 8, 64), "D=64"),
  ],
)
def test_calls_beyond_the_kernels_name_the_reason(
  operator, shapes, word
) -> None:
  with pytest.raises(NotImplementedError, match=f"{word}.*'xla' does"):
    _lowered(operator, shapes)


@pytest.mark.parametrize(
  "operator, shapes, word",
  [
    (selective_scan, _scan_shapes(2, 8, 96, 16), "I=96"),
    (wkv, _wkv_shapes(65536, 1, 128), "B=65536"),
  ],
)
def test_xla_does_such_calls_by_default(
  hopper, monkeypatch, operator, shapes, word
) -> None:
  """It says why where the calls are expected on a GPU."""
  monkeypatch.setattr(devices, "platform", lambda: "gpu")
  with pytest.warns(UserWarning, match=f"runs 'xla': .*{word}"):
    jax.eval_shape(operator, *shapes)


def test_what_xla_computes_on_a_known_hopper_gpu(hopper, monkeypatch) -> None:
  """A call with chunks, one in float64, and what `plain_derivatives` has."""
  shapes = _scan_shapes(2, 8, 64, 16)

  def kernels_of(call) -> bool:
    # A new function at each call, because jax keeps what it traced.
    return "by_platform" in str(jax.make_jaxpr(lambda *x: call(*x))(*shapes))

  assert kernels_of(selective_scan)
  assert not kernels_of(functools.partial(selective_scan, chunk=4))
  assert not kernels_of(functools.partial(selective_scan, implementation="xla"))
  with plain_derivatives():
    assert not kernels_of(selective_scan)
  with jax.enable_x64(True):
    assert not kernels_of(selective_scan)
  # The kind of a GPU that a program is only lowered for is not known.
  monkeypatch.setattr(devices, "is_hopper", lambda: False)
  assert not kernels_of(selective_scan)
  with pytest.raises(NotImplementedError, match="chunk=4.*'xla' does"):
    selective_scan(
      **scan_inputs(1, 4, 64, 8, "float32", 1e-3, 1),
      chunk=4,
      implementation="gpu",
    )


@pytest.mark.parametrize("operator", [SCAN, WKV])
def test_a_program_for_two_platforms(hopper, operator) -> None:
  """It has the kernels for CUDA, and XLA's values and gradients for the CPU."""
  inputs = (
    scan_inputs(1, 7, 64, 4, "bfloat16", 1e-3, 1)
    if operator is SCAN
    else wkv_inputs(1, 7, 128, "bfloat16", 1)
  )
  ids = np.array([[0] * 3 + [1] * 4])
  found = answer(operator, inputs, ids, None)
  wanted = answer(operator, inputs, ids, "xla")
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  shapes = jax.tree.map(jax.typeof, jax.tree.map(jnp.asarray, inputs))
  traced = jax.jit(lambda arrays: operator(**arrays)).trace(shapes)
  text = traced.lower(lowering_platforms=("cpu", "cuda")).as_text()
  assert "mosaic_gpu" in text


@pytest.mark.parametrize(
  "config, kernel",
  [(MambaConfig(), "selective_scan_forward"), (RWKVConfig(), "wkv_forward")],
)
def test_a_mixer_runs_the_kernels_by_default(hopper, config, kernel) -> None:
  x_BTD = ShapeDtypeStruct((1, 40, 128), "float32")
  for named in (config, dataclasses.replace(config, implementation="xla")):
    mixer = named.make(base.Site(128), rngs=nnx.Rngs(0))
    traced = jax.jit(mixer).trace(x_BTD)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert (kernel in text) == (named is config)
  # A decoded token runs no kernel.
  mixer = dataclasses.replace(config, implementation="gpu").make(
    base.Site(128), rngs=nnx.Rngs(0)
  )
  mixer.step(jnp.ones((1, 128)), mixer.init_state(1))


def test_a_named_kernel_runs_on_no_other_platform() -> None:
  inputs = scan_inputs(1, 4, 64, 8, "float32", 1e-3, 1)
  with pytest.raises(NotImplementedError, match="lowered for cpu"):
    selective_scan(**inputs, implementation="gpu")
  inputs = wkv_inputs(1, 4, 128, "float32", 1)
  with pytest.raises(NotImplementedError, match="lowered for cpu"):
    wkv(**inputs, implementation="gpu")
  state = empty_wkv_state((1, 128))
  assert wkv(**inputs | dict(initial_state=state))[0].shape == (1, 4, 128)
