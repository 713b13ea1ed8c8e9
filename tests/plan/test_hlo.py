# ruff: noqa: E501 (lines as compilers write them)
"""Collectives read from compiled programs, against programs whose traffic is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gamayun_jax.config import MeshConfig
from gamayun_jax.model import sharding
from gamayun_jax.plan import hlo


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 2, 1, 3]]),
        (
            "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x",
            [[0, 1], [2, 3]],
        ),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
        ("to_apply=%add", [[0, 1, 2, 3]]),
    ],
)
def test_groups_in_every_spelling(text, groups):
    found = hlo.replica_groups(f"all-reduce(%x), {text}", 4)
    assert sorted(map(sorted, found.tolist())) == sorted(map(sorted, groups))


def test_the_axes_of_groups():
    shape = {"data": 2, "fsdp": 2, "tensor": 2}
    ids = np.arange(8).reshape(2, 2, 2)
    assert hlo.group_axes(ids.reshape(4, 2), shape) == ("tensor",)
    assert hlo.group_axes(ids.transpose(1, 2, 0).reshape(4, 2), shape) == ("data",)
    both = ids.transpose(2, 0, 1).reshape(2, 4)
    assert hlo.group_axes(both, shape) == ("data", "fsdp")
    assert hlo.group_axes(np.arange(8)[:, None], shape) == ()


def test_sizes_of_types():
    text = "(bf16[2,3]{1,0:T(8,128)(2,1)}, f32[], /*index=5*/s8[7], token[], u32[2])"
    assert hlo.array_bytes(text) == [12, 4, 7, 8]


def compiled(function, mesh, *specs_and_shapes):
    """Optimised text of a jitted function of float32 arrays on the mesh."""
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for spec, shape in specs_and_shapes
    ]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*args).compile().as_text()


def test_loops_are_counted_by_their_trips():
    """7 x 3 gathers of a weight inside nested scans, 5 sums outside them."""
    mesh = sharding.make_mesh(MeshConfig(2, 4, 1))

    def run(x, w):
        def gathered(x):
            return jax.lax.with_sharding_constraint(x, P())

        def inner(x, _):
            return jnp.tanh(x @ gathered(w)), None

        def outer(x, _):
            x, _ = jax.lax.scan(inner, x, length=3)
            return jnp.sin(x), None

        return jax.lax.scan(outer, x, length=7)[0]

    text = compiled(run, mesh, (P("data"), (4, 16)), (P("fsdp"), (16, 16)))
    found = hlo.collectives(hlo.Program(text), dict(mesh.shape))
    gathers = [c for c in found if c.kind == "all-gather"]
    # The compiler may take the gather of a constant out of the loops, or not.
    assert [(c.axes, c.group) for c in gathers] == [(("fsdp",), 4)]
    assert gathers[0].count in (1, 21)
    assert gathers[0].result_bytes == 16 * 16 * 4
    assert gathers[0].moved_bytes == gathers[0].count * 16 * 16 * 4 * 3 / 4


def test_what_each_kind_moves():
    """Collectives written by hand: their counts, axes and ring traffic."""
    mesh = sharding.make_mesh(MeshConfig(2, 4, 1))

    def body(x):  # [8, 16] float32 on every device: 512 bytes
        def step(x, _):
            x = jax.lax.psum(x, "data") * 0.5
            part = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)
            whole = jax.lax.all_gather(part, "fsdp", axis=0, tiled=True)
            ring = [(i, (i + 1) % 4) for i in range(4)]
            return jax.lax.ppermute(jnp.sin(whole), "fsdp", ring), None

        return jax.lax.scan(step, x, length=5)[0]

    run = jax.shard_map(
        body, mesh=mesh, in_specs=P("data", "fsdp"), out_specs=P("data", "fsdp"),
        check_vma=False,
    )  # fmt: skip
    text = compiled(run, mesh, (P("data", "fsdp"), (16, 64)))
    found = {c.kind: c for c in hlo.collectives(hlo.Program(text), dict(mesh.shape))}
    moved = {
        "all-reduce": 2 * 512 / 2,
        "reduce-scatter": 512 * 3 / 4,
        "all-gather": 512 * 3 / 4,
        "collective-permute": 512,
    }
    assert set(found) == set(moved)
    for kind, c in found.items():
        assert c.axes == (("data",) if kind == "all-reduce" else ("fsdp",))
        assert (c.count, c.dtype) == (5, "f32")
        assert c.moved_bytes == 5 * moved[kind], kind
    rows = hlo.summarise(list(found.values()))
    assert [r["bytes"] for r in rows] == sorted(5 * b for b in moved.values())[::-1]


def test_steps_of_one_asynchronous_gather_count_once():
    """As the TPU compiler writes it: one channel in several fusions of a loop."""
    text = """HloModule m
%fused_computation.1 (p: bf16[8,16]) -> bf16[32,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %g = bf16[32,16]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}
%async_collective_fusion.2 (q: bf16[8,16]) -> bf16[32,16] {
  %q = bf16[8,16]{1,0} parameter(0)
  ROOT %h = bf16[32,16]{1,0} all-gather(%q), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}
%all-reduce-scatter.3 (r: f32[32,16]) -> f32[8,16] {
  %r = f32[32,16]{1,0} parameter(0)
  %a = f32[32,16]{1,0} all-reduce(%r), channel_id=9, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %s = f32[8,16]{1,0} dynamic-slice(%a)
}
%condition.4 (c: (s32[], bf16[8,16])) -> pred[] {
  %c = (s32[], bf16[8,16]{1,0}) parameter(0)
  %n = s32[]{:T(128)} constant(26)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%body.5 (b: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %b = (s32[], bf16[8,16]{1,0}) parameter(0)
  %start = (bf16[8,16], bf16[32,16]) fusion(%b), kind=kCustom, calls=%fused_computation.1, backend_config={"estimated_cycles":"100"}
  %done = bf16[32,16] fusion(%start), kind=kCustom, calls=%async_collective_fusion.2, backend_config={"estimated_cycles":"50"}
  %rs = f32[8,16] fusion(%done), kind=kCustom, calls=%all-reduce-scatter.3
  %j = s32[]{:T(128)} get-tuple-element(%b), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%j, %one)
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%next, /*index=1*/%done)
}
ENTRY %main.6 (x: bf16[8,16]) -> bf16[8,16] {
  %x = bf16[8,16]{1,0} parameter(0)
  %w = (s32[], bf16[8,16]{1,0}) while(%t), condition=%condition.4, body=%body.5
  %no = f32[] add(%x, %x), backend_config={"estimated_cycles":"9223372036854775807"}
}
"""
    gather, scatter = hlo.collectives(
        hlo.Program(text), {"data": 2, "fsdp": 4, "tensor": 1}
    )
    assert (gather.kind, gather.count, gather.axes) == ("all-gather", 26, ("fsdp",))
    assert gather.moved_bytes == 26 * 32 * 16 * 2 * 3 / 4
    assert (scatter.kind, scatter.count) == ("reduce-scatter", 26)
    assert scatter.moved_bytes == 26 * 32 * 16 * 4 * 3 / 4
    assert hlo.estimated_cycles(hlo.Program(text)) == 26 * 150


WINDOWED = """HloModule m
%windowed_dot_general_cond_rs.1 (c: (bf16[128,64], u32[], u32[])) -> pred[] {
  %n = u32[]{:T(128)} constant(8), metadata={op_name="jit(step)/dot_general"}
  %c = (bf16[128,64]{1,0}, u32[]{:T(128)}, u32[]{:T(128)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%c), index=1
  ROOT %compare.1 = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={op_name="x"}
}
%windowed_dot_general_body_rs.1 (b: (bf16[128,64], u32[], u32[])) -> (bf16[128,64], u32[], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %b = (bf16[128,64]{1,0}, u32[]{:T(128)}, u32[]{:T(128)}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%b), index=1
  %k = u32[]{:T(128)} get-tuple-element(%b), index=2
  %part = bf16[128,64]{1,0} get-tuple-element(%b), index=0
  %start = (bf16[128,64]{1,0}, bf16[128,64]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%part), channel_id=58, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %done = bf16[128,64]{1,0} collective-permute-done(%start), backend_config={"estimated_cycles":"10"}
  %add.1 = u32[]{:T(128)} add(%j, %two)
  ROOT %tuple.1 = (bf16[128,64]{1,0}, u32[], /*index=2*/u32[]) tuple(%done, %add.1, /*index=2*/%k)
}
ENTRY %main.6 (x: bf16[128,64]) -> bf16[128,64] {
  %x = bf16[128,64]{1,0} parameter(0)
  %w = (bf16[128,64]{1,0}, u32[], u32[]) while(%t), condition=%windowed_dot_general_cond_rs.1, body=%windowed_dot_general_body_rs.1
}
"""


def test_a_product_that_is_windowed_counts_in_twos():
    """As the TPU compiler writes what it splits to overlap with its own transfers."""
    shape = {"data": 1, "fsdp": 4, "tensor": 1}
    (found,) = hlo.collectives(hlo.Program(WINDOWED), shape)
    assert (found.kind, found.count, found.axes) == ("collective-permute", 4, ("fsdp",))
    # Of what a start returns, the result alone is moved.
    assert found.moved_bytes == 4 * 128 * 64 * 2
    assert hlo.estimated_cycles(hlo.Program(WINDOWED)) == 40
    assert sorted(hlo.Program(WINDOWED).unknown) == []


@pytest.mark.parametrize(
    "wrong", ["%j, %k", "%two, %two", "%j, %j"], ids=["variable", "both", "none"]
)
def test_a_loop_that_cannot_be_read_is_named_and_counts_once(wrong):
    text = WINDOWED.replace("add(%j, %two)", f"add({wrong})")
    assert sorted(hlo.Program(text).unknown) == ["windowed_dot_general_body_rs.1"]
    (found,) = hlo.collectives(hlo.Program(text), {"data": 1, "fsdp": 4, "tensor": 1})
    assert found.count == 1


def test_a_loop_that_ends_by_what_it_computes_is_unknown():
    """Read from a program that XLA made, on this machine."""

    def run(x):
        return jax.lax.while_loop(lambda x: x[0] < 10.0, lambda x: x * 2, x)

    text = jax.jit(run).lower(jnp.ones(3)).compile().as_text()
    assert len(sorted(hlo.Program(text).unknown)) == 1


def test_what_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.collectives(hlo.Program("HloModule m"), {"data": 1})
