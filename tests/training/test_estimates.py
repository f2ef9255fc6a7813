"""The compiler's estimates, read from its text."""

import pathlib
import types

import jax
import numpy as np
import pytest

from mmdiff.training import estimates, hlo, perf

V6E = perf.chip("TPU v6 lite")

# What the TPU compiler writes, cut to a loop of 7 rounds, a kernel, and collectives with and without something beside them.
TEXT = """\
HloModule m, is_scheduled=true, num_partitions=4

FileNames
1 "/a/mmdiff/training/step.py"
2 "/a/mmdiff/nets/fused_attention.py"
3 "/a/mmdiff/processes/discrete.py"

FunctionNames
1 "make_step.<locals>.step"
2 "attention"
3 "Discrete.loss"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=1 end_line=1 column=1 end_column=2}
3 {file_name_id=3 function_name_id=3 line=1 end_line=1 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
4 {file_location_id=2 parent_frame_id=1}
5 {file_location_id=3 parent_frame_id=1}

%inner (p.0: f32[8,128]) -> f32[8,128] {
  %p.0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %product = f32[8,128]{1,0:T(8,128)} add(%p.0, %p.0), backend_config={"window_config":{"estimated_cycles":"1000000"}}
}

%apart (p.1: f32[8,128]) -> f32[32,128] {
  %p.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %gather = f32[32,128]{1,0:T(8,128)} all-gather(%p.1), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}

%body (p.2: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%p.2), index=0
  %h = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p.2), index=1
  %kernel = f32[8,128]{1,0:T(8,128)} custom-call(%h), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/a/pallas_call" stack_frame_id=4}
  %sum = f32[8,128]{1,0:T(8,128)} all-reduce(%kernel), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  %begun = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) collective-permute-start(%sum), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %moved = f32[8,128]{1,0:T(8,128)} collective-permute-done(%begun)
  %next = f32[8,128]{1,0:T(8,128)} fusion(%moved), kind=kLoop, calls=%inner, metadata={op_name="jit(f)/mlp/in/dot_general" stack_frame_id=9}, backend_config={"window_config":{"estimated_cycles":"250"}}
  ROOT %out = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%i, %next)
}

%condition (p.3: (s32[], f32[8,128])) -> pred[] {
  %p.3 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)S(6)} get-tuple-element(%p.3), index=0
  %end = s32[]{:T(128)S(6)} constant(7)
  ROOT %less = pred[]{:T(512)S(6)} compare(%j, %end), direction=LT
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)S(6)} constant(0)
  %start = ((f32[8,128]{1,0:T(8,128)}), f32[32,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) async-start(%a), calls=%apart
  %all = f32[32,128]{1,0:T(8,128)S(1)} async-done(%start)
  %state = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%zero, %a)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%state), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %last = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  %fetch = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%last), metadata={op_name="batch['a']"}
  %near = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %nll = f32[8,128]{1,0:T(8,128)S(1)} negate(%near), metadata={op_name="jit(f)/jvp()/neg" stack_frame_id=5}, backend_config={"window_config":{"estimated_cycles":"40"}}
  %gathered = f32[8,128]{1,0:T(8,128)S(1)} negate(%nll), backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  ROOT %new = f32[8,128]{1,0:T(8,128)} add(%nll, %gathered), metadata={op_name="jit(f)/add" stack_frame_id=1}, backend_config={"window_config":{"estimated_cycles":"30"}}
}
"""  # noqa: E501
TILE = 8 * 128 * 4


def test_cycles_kinds_and_kernels_are_counted_as_often_as_they_run():
    found = estimates.report(hlo.Program(TEXT), V6E, 4, 8 * 918e12, [perf.CollectiveCost("all-reduce", ("fsdp",), 1.0, 3.0, exposed=2.0)])
    estimate = found["estimate"]
    assert estimate["cycles"] == 7 * 250 + 40 + 30  # a fusion's own, not those of its parts
    assert estimate["kernels"] == 7 and estimate["exposed"] == 2.0
    assert estimate["step"] == pytest.approx(2.0 + 1820 / 1.75e9) and estimate["mfu"] == pytest.approx(2 / estimate["step"])
    assert found["traffic_by_kind"] == {
        "collectives": 7 * 4 * TILE + 5 * TILE,  # the gather's copy in main memory, too
        "attention": 7 * 2 * TILE, "products": 7 * 2 * TILE,
        "outputs and losses": TILE,  # the copy to fast memory is the loss's
        "optimizer": TILE,
    }  # fmt: skip
    assert found["traffic"] == sum(found["traffic_by_kind"].values()) == hlo.Program(TEXT).traffic()
    rows = dict(estimates.rows({**found, "unknown_loops": 1}))
    assert "(0.00182 M cycles at 1.75 GHz) and 2e+03 ms of links not overlapped: MFU 100.0%" in rows["compiler's estimate"]
    assert "7 calls of kernels are not in the estimate" in [value for _, value in estimates.rows(found)]


def test_the_text_is_read_that_the_compiler_writes_itself():
    class Compiled:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction should have 1 operands but sees 3")

    def compile(options):
        for file in files:
            (pathlib.Path(options["xla_dump_to"]) / f"module_0000.jit_f.cl_1.{file}.txt").write_text(TEXT)
        return Compiled()

    files = ["after_optimizations", "after_codegen"]
    assert estimates.compile_readable(compile)[1].traffic() == hlo.Program(TEXT).traffic()
    files.pop()
    assert estimates.compile_readable(compile)[1] is None


def test_a_sum_of_which_a_fusion_keeps_a_slice_is_a_reduce_scatter():
    program = """HloModule m, num_partitions=4

%all-reduce-scatter (input: f32[32,128]) -> f32[8,128] {
  %input = f32[32,128]{1,0:T(8,128)} parameter(0)
  %sum = f32[32,128]{1,0:T(8,128)} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %device = u32[]{:T(128)} partition-id()
  ROOT %part = f32[8,128]{1,0:T(8,128)} dynamic-slice(%sum, %device, %device), dynamic_slice_sizes={8,128}
}

ENTRY %main (a: f32[32,128], b: f32[32,128]) -> f32[8,128] {
  %a = f32[32,128]{1,0:T(8,128)} parameter(0)
  %b = f32[32,128]{1,0:T(8,128)} parameter(1)
  %scattered = f32[8,128]{1,0:T(8,128)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
  %whole = f32[32,128]{1,0:T(8,128)} all-reduce(%b), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  %place = u32[]{:T(128)} partition-id()
  ROOT %cut = f32[8,128]{1,0:T(8,128)} dynamic-slice(%whole, %place, %place), dynamic_slice_sizes={8,128}
}
"""
    found = hlo.Program(program).collectives()
    assert sorted((c.kind, c.bytes, c.synchronous) for c in found) == [("all-reduce", 4 * TILE, True), ("reduce-scatter", 4 * TILE, True)]


def test_a_collective_overlaps_if_it_has_a_start_and_an_end():
    found = {(c.kind, c.times): c.synchronous for c in hlo.Program(TEXT).collectives()}
    assert found == {("all-gather", 1): False, ("all-reduce", 7): True, ("collective-permute", 7): False}
    devices = np.array([types.SimpleNamespace(coords=place) for place in ((0, 0), (1, 0), (0, 1), (1, 1))])
    mesh = types.SimpleNamespace(devices=devices, axis_names=("fsdp",), shape={"fsdp": 4}, size=4)
    costs = {cost.kind: cost for cost in perf.collective_costs(hlo.Program(TEXT), mesh, V6E)}
    assert costs["all-reduce"].exposed == costs["all-reduce"].seconds > 0 == costs["all-gather"].exposed
