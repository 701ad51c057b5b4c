"""Counts of collectives and of matrix products in compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.by_platform import Kernels, by_platform
from train.compile import collectives, flops
from train.compile.collectives import Collective
from train.devices import mesh as mesh_lib
from train.devices.mesh import MeshConfig

_TEXT = """
%fused.1 (x: f32[8]) -> f32[16,8] {
  ROOT %a = f32[16,8]{1,0} all-gather(%x), channel_id=1, dimensions={0}
}

%fused.2 (x: f32[8]) -> f32[16,8] {
  ROOT %a.1 = f32[16,8]{1,0} all-gather(%x), channel_id=1, dimensions={0}
}

%all-reduce-scatter.1 (x: f32[8]) -> f32[2] {
  %i = f32[8]{0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %j = f32[2]{0} dynamic-slice(%i, %k), dynamic_slice_sizes={2}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %scattered = f32[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %first = f32[16,8]{1,0} fusion(%p), kind=kOutput, calls=%fused.1
  %done = f32[16,8]{1,0} fusion(%first), kind=kOutput, calls=%fused.2
  %b = (f32[4,8]{1,0}, bf16[16]{0}) all-reduce(%x, %y), to_apply=%add
  %c = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%z), dimensions={0}
  %d = f32[8,8]{1,0} all-gather-done(%c)
  %e = (f32[3]{0}, f32[3]{0}, u32[], u32[]) collective-permute-start(%w)
  %f = s32[] all-reduce(%v), replica_groups={{0,1},{2,3}}, to_apply=%add
  %g = f32[4]{0} add(%all-reduce.1, %u)
  %h = f32[8]{0} reduce-scatter(%u), replica_groups=[2,4]<=[8], to_apply=%add
}
"""

# As the TPU compiler writes a loop over 0, 2, 4, 6: the end is in the
# condition, the step in the body.
_LOOP = """
%condition (p: (f32[8], u32[])) -> pred[] {
  %p = (f32[8]{0}, u32[]) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  %n = u32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={}
}

%body.1 (p: (f32[8], u32[])) -> (f32[8], u32[]) {
  %p.1 = (f32[8]{0}, u32[]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p.1), index=0
  %i.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=1
  %two = u32[]{:T(128)} constant(2)
  %y = f32[8]{0} all-reduce(%x), channel_id=3, replica_groups=mesh['data'=2,\
'fsdp'=4] {'fsdp'}, to_apply=%add
  %next = u32[]{:T(128)} add(%i.1, %two), metadata={}
  ROOT %t = (f32[8]{0}, u32[]) tuple(%y, %next)
}

ENTRY %main (p: (f32[8], u32[])) -> f32[8] {
  %p.2 = (f32[8]{0}, u32[]) parameter(0)
  %w = (f32[8]{0}, u32[]) while(%p.2), condition=%condition, body=%body.1
}
"""


def test_an_unknown_dtype_is_named() -> None:
  text = _TEXT.replace("bf16[16]", "f8e4m3fn[16]")
  with pytest.raises(NotImplementedError, match="of dtype f8e4m3fn: expected"):
    list(collectives.find(text, 8))


def test_bytes_are_those_of_the_result() -> None:
  found = list(collectives.find(_TEXT, 8))
  assert [(x.kind, x.size, x.devices) for x in found] == [
    ("all-gather", 512, 8),
    ("reduce-scatter", 8, 4),
    ("all-reduce", 128 + 32, 8),
    ("all-gather", 256, 8),
    ("collective-permute", 12, 8),
    ("all-reduce", 4, 2),
    ("reduce-scatter", 32, 4),
  ]
  assert {x.times for x in found} == {1}


def test_a_loop_counts_as_often_as_it_runs() -> None:
  (found,) = collectives.find(_LOOP, 8)
  assert found == Collective("all-reduce", 32, times=4, devices=4)


@pytest.mark.parametrize(
  "kind, moved",
  [
    ("all-reduce", 2 * 3 / 4 * 96),
    ("all-gather", 3 / 4 * 96),
    ("all-to-all", 3 / 4 * 96),
    ("reduce-scatter", 3 * 96),
    ("collective-permute", 96),
  ],
)
def test_bytes_that_leave_a_device(kind: str, moved: float) -> None:
  assert Collective(kind, 96, times=5, devices=4).moved == 5 * moved


def _looped(x):
  """Return a program with seven sums over a mesh axis, three around them."""
  mesh = mesh_lib.make_mesh(MeshConfig(data=2, fsdp=4))
  inner = lambda x, _: (jnp.sin(jax.lax.psum(x, "fsdp")), None)

  def outer(x, _):
    return jax.lax.psum(jax.lax.scan(inner, x, length=7)[0], "data"), None

  local = lambda x: jax.lax.scan(outer, x, length=3)[0]
  return jax.shard_map(
    local, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False
  )(x)


def test_loops_of_a_compiled_program() -> None:
  text = jax.jit(_looped).lower(jnp.ones((4, 8))).compile().as_text()
  found = sorted((x.times, x.devices) for x in collectives.find(text, 8))
  assert found == [(3, 2), (21, 4)]


def test_products_count_as_often_as_they_run() -> None:
  x, w = jnp.ones((6, 4)), jnp.ones((4, 4))
  one = 2 * 6 * 4 * 4
  layer = lambda x, w: jnp.sin(x @ w)
  scanned = lambda x, w: jax.lax.scan(
    lambda x, _: (layer(x, w), None), x, length=5
  )[0]
  count = lambda f, *args: flops.of_jaxpr(jax.make_jaxpr(f)(*args))
  assert count(layer, x, w) == one
  assert count(scanned, x, w) == 5 * one
  # Each product has two more in the backward, and is made again by remat.
  loss = lambda f: jax.grad(lambda w, x: f(x, w).sum())
  both = jax.grad(lambda w, x: layer(x, w).sum(), argnums=(0, 1))
  assert count(both, w, x) == 3 * one
  again = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable)
  assert count(loss(again), w, x) == count(loss(layer), w, x) + one
  choose = lambda x, w: jax.lax.cond(
    x[0, 0] > 0, lambda: layer(layer(x, w), w), lambda: layer(x, w)
  )
  assert count(choose, x, w) == 2 * one
  # An operator has another form for platforms without its kernels.
  forms = lambda x, w: by_platform(
    Kernels("gpu", ("cuda",), "a GPU"),
    layer,
    lambda x, w: layer(layer(x, w), w),
    *(x, w),
  )
  assert count(forms, x, w) == one


def test_products_of_devices_and_batches() -> None:
  mesh = mesh_lib.make_mesh(MeshConfig(data=2, fsdp=4))
  split = jax.shard_map(
    lambda x, w: jnp.einsum("bmk,kn->bmn", x, w),
    mesh=mesh,
    in_specs=(jax.P("data"), jax.P()),
    out_specs=jax.P("data"),
    axis_names={"data"},
  )
  with jax.set_mesh(mesh):
    jaxpr = jax.make_jaxpr(split)(jnp.ones((8, 3, 4)), jnp.ones((4, 5)))
  assert flops.of_jaxpr(jaxpr) == 2 * 8 * 3 * 4 * 5
