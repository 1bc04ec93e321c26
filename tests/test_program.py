"""What is read from compiled programs: written by hand as CPU's and TPU's compilers write them, and real."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparqle_jax.model import partition
from sparqle_jax.program import Collective, census, frozen_gradients, weight_shapes
from sparqle_jax.sharding import make_mesh
from tests.batches import stage1_batch, stage2_batch


def program(*computations: str, devices: int = 8) -> str:
    header = f"HloModule jit_f, is_scheduled=true, num_partitions={devices}"
    return "\n\n".join([header, *(textwrap.dedent(computation).strip() for computation in computations)])


def entry(*lines: str) -> str:
    return "ENTRY %main (x: f32[4,6]) -> f32[4,6] {\n" + "\n".join(f"  {line}" for line in lines) + "\n}"


X = "%x = f32[4,6]{1,0} parameter(0)"


class TestCensus:
    @pytest.mark.parametrize(
        ("kind", "result", "sent"),
        [
            ("all-gather", "f32[8,6]{1,0}", 192 * 3 // 4),
            ("all-reduce", "f32[8,6]{1,0}", 2 * 192 * 3 // 4),
            ("reduce-scatter", "f32[2,6]{1,0}", 48 * 3),
            ("all-to-all", "bf16[8,6]{1,0:T(8,128)(2,1)S(1)}", 96 * 3 // 4),
        ],
    )
    def test_bytes_that_each_kind_sends(self, kind, result, sent):
        line = f'ROOT %c = {result} {kind}(%x), replica_groups=[2,4]<=[8], metadata={{op_name="jit(f)/dot"}}'
        (collective,) = census(program(entry(X, line))).collectives
        assert (collective.kind, collective.group, collective.sent) == (kind, 4, sent)
        assert (collective.times, collective.crosses, collective.source) == (1, False, "jit(f)/dot")

    def test_a_permutation_sends_what_it_receives(self):
        pairs = "source_target_pairs={{0,1},{1,0},{2,2},{3,3}}"
        line = f"ROOT %c = f32[4,6]{{1,0}} collective-permute(%x), {pairs}"
        (collective,) = census(program(entry(X, line))).collectives
        assert collective.sent == 96

    @pytest.mark.parametrize(
        ("groups", "size"),
        [
            ("{{0,2,4,6},{1,3,5,7}}", 4),
            ("{}", 8),
            ("[4,2]<=[8]", 2),
            ("[2,4]<=[4,2]T(1,0)", 4),
            ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", 4),
            ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0','axis_1':(2)2}", 4),
        ],
    )
    def test_every_way_to_write_groups(self, groups, size):
        line = (
            f"ROOT %c = f32[4,6]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add"
        )
        add = "%add (a: f32[], b: f32[]) -> f32[] {\n  ROOT %c = f32[] add(%a, %b)\n}"
        (collective,) = census(program(add, entry(X, line))).collectives
        assert collective.group == size

    def test_groups_that_can_not_be_read_are_an_error(self):
        line = "ROOT %c = f32[4,6]{1,0} all-reduce(%x), replica_groups=@groups"
        with pytest.raises(ValueError, match="can't read which devices take part in c: "):
            census(program(entry(X, line)))
        line = (
            '%r = (f32[4], u32[], token[]) recv(%a), frontend_attributes={_xla_host_transfer_rendezvous="c"'
        )
        line += ',_xla_megascale_target=all,_xla_megascale_transfer_type="ALL_REDUCE"}'
        with pytest.raises(ValueError, match="can't read which slices take part in c: "):
            census(program(entry(X, line)))

    def test_groups_of_one_device_and_transfers_to_oneself_send_nothing(self):
        lines = (
            "%c = f32[4,6]{1,0} all-reduce(%x), replica_groups={{0},{1}}",
            "ROOT %d = f32[4,6]{1,0} collective-permute(%c), source_target_pairs={{0,0},{1,1}}",
        )
        assert census(program(entry(X, *lines))).collectives == ()

    def test_several_arrays_are_added(self):
        line = (
            "ROOT %c = (f32[4,6]{1,0}, /*index=1*/bf16[3]{0}, pred[5]{0}) all-reduce(%x), replica_groups={}"
        )
        (collective,) = census(program(entry(X, line))).collectives
        assert collective.result == 96 + 6 + 5

    def test_a_start_and_its_done_are_one(self):
        lines = (
            "%s = (f32[4,6]{1,0}, f32[8,6]{1,0}, u32[]) all-gather-start(%x), replica_groups=[4,2]<=[8]",
            "ROOT %d = f32[8,6]{1,0} all-gather-done(%s)",
        )
        (collective,) = census(program(entry(X, *lines))).collectives
        assert collective == Collective("all-gather", 1, 192, 2, False, "")

    def test_a_call_that_runs_beside_other_work(self):
        called = """
            %wrapped (p: f32[4,6]) -> f32[1,6] {
              ROOT %c = f32[1,6]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%add
            }"""
        lines = (
            "%s = ((f32[4,6]{1,0}), f32[1,6]{1,0}) async-start(%x), calls=%wrapped",
            "ROOT %d = f32[1,6]{1,0} async-done(%s)",
        )
        add = "%add (a: f32[], b: f32[]) -> f32[] {\n  ROOT %c = f32[] add(%a, %b)\n}"
        (collective,) = census(program(add, called, entry(X, *lines))).collectives
        assert collective == Collective("reduce-scatter", 1, 24, 4, False, "")

    BODY = """
        %body (state: (s32[], f32[4,6])) -> (s32[], f32[4,6]) {
          %state = (s32[], f32[4,6]{1,0}) parameter(0)
          %one = s32[] constant(1)
          %i = s32[] get-tuple-element(%state), index=0
          %next = s32[] add(%i, %one)
          %v = f32[4,6]{1,0} get-tuple-element(%state), index=1
          %c = f32[4,6]{1,0} all-reduce(%v), replica_groups=[4,2]<=[8]
          ROOT %t = (s32[], f32[4,6]{1,0}) tuple(%next, %c)
        }"""
    CONDITION = """
        %condition (state: (s32[], f32[4,6])) -> pred[] {
          %limit = s32[] constant(7)
          %state.1 = (s32[], f32[4,6]{1,0}) parameter(0)
          %i.1 = s32[] get-tuple-element(%state.1), index=0
          ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
        }"""
    LOOP = (
        "%zero = s32[] constant(2)",
        "%start = s32[] copy(%zero)",
        "%t.1 = (s32[], f32[4,6]{1,0}) tuple(%start, %x)",
        "%loop = (s32[], f32[4,6]{1,0}) while(%t.1), condition=%condition, body=%body",
    )

    def test_a_loop_of_known_length(self):
        loop = self.LOOP[-1] + ', backend_config={"known_trip_count":{"n":"32"}}'
        found = census(program(self.BODY, self.CONDITION, entry(X, *self.LOOP[:-1], loop)))
        assert [collective.times for collective in found.collectives] == [32]
        assert found.collectives[0].sent == 32 * 96
        assert found.unknown_loops == ()

    def test_a_loop_that_counts_between_constants(self):
        """TPU's compiler does not write how often it runs: from 2 up to 7."""
        found = census(program(self.BODY, self.CONDITION, entry(X, *self.LOOP)))
        assert [collective.times for collective in found.collectives] == [5]
        assert found.unknown_loops == ()

    def test_a_loop_of_unknown_length_counts_once_and_is_named(self):
        condition = self.CONDITION.replace("s32[] constant(7)", "s32[] parameter(1)")
        found = census(program(self.BODY, condition, entry(X, *self.LOOP)))
        assert [collective.times for collective in found.collectives] == [1]
        assert found.unknown_loops == ("loop",)

    # A product with a weight split over 16 chips in each of 3 layers, as TPU's compiler wrote it for v5e-16,
    # without what computes: parts of the weight go round in a ring, both ways, 8 steps, two at a time.
    RING = """
        %wide.windowed_dot_general_body_ag.clone.sunk (wide.param.1: (u32[])) -> (u32[]) {
          %constant.208..sunk2 = u32[]{:T(128)} constant(2)
          %wide.param.1 = STATE parameter(0)
          %get-tuple-element.209 = PART get-tuple-element(%wide.param.1), index=1
          %collective-permute-start = SENT collective-permute-start(%get-tuple-element.209), BACK
          %get-tuple-element.211 = PART get-tuple-element(%wide.param.1), index=3
          %collective-permute-start.2 = SENT collective-permute-start(%get-tuple-element.211), FORTH
          %get-tuple-element.212 = u32[]{:T(128)} get-tuple-element(%wide.param.1), index=4
          %add.60 = u32[]{:T(128)} add(%get-tuple-element.212, %constant.208..sunk2)
          %collective-permute-done = PART collective-permute-done(%collective-permute-start)
          %collective-permute-start.1 = SENT collective-permute-start(%collective-permute-done), BACK
          %collective-permute-done.2 = PART collective-permute-done(%collective-permute-start.2)
          %collective-permute-start.3 = SENT collective-permute-start(%collective-permute-done.2), FORTH
          %get-tuple-element.218 = bf16[1164,1024]{0,1:T(8,128)} get-tuple-element(%wide.param.1), index=0
          %get-tuple-element.210 = bf16[1164,4096]{1,0:T(8,128)} get-tuple-element(%wide.param.1), index=2
          %collective-permute-done.1 = PART collective-permute-done(%collective-permute-start.1)
          %collective-permute-done.3 = PART collective-permute-done(%collective-permute-start.3)
          %get-tuple-element.223 = u32[]{:T(128)} get-tuple-element(%wide.param.1), index=5
          ROOT %tuple.47 = STATE tuple(%get-tuple-element.218, %collective-permute-done.1, \
            %get-tuple-element.210, %collective-permute-done.3, %add.60, /*index=5*/%get-tuple-element.223)
        }

        %wide.windowed_dot_general_cond_ag.clone (wide.param.9: (u32[])) -> pred[] {
          %constant.191 = u32[]{:T(128)} constant(8)
          %wide.param.9 = STATE parameter(0)
          %get-tuple-element.121 = u32[]{:T(128)} get-tuple-element(%wide.param.9), index=4
          ROOT %compare.6 = pred[]{:T(512)} compare(%get-tuple-element.121, %constant.191), direction=LT
        }

        %wide.region_0.1_spmd.sunk (wide.param.0: (s32[])) -> (s32[]) {
          %constant.203..sunk = u32[]{:T(128)} constant(0)
          %constant.3.clone.1..sunk = s32[]{:T(128)} constant(1)
          %wide.param.0 = LAYERS parameter(0)
          %get-tuple-element.275 = s32[]{:T(128)} get-tuple-element(%wide.param.0), index=0
          %get-tuple-element.294 = bf16[3,64,4096]{2,1,0} get-tuple-element(%wide.param.0), index=2
          %constant_dynamic-slice_fusion.2 = PART fusion(%get-tuple-element.294, %get-tuple-element.275)
          %collective-permute-start.8 = SENT collective-permute-start(%constant_dynamic-slice_fusion.2), \
            FORTH
          %custom-call.2 = bf16[1164,4096]{1,0} custom-call(), custom_call_target="AllocateBuffer"
          %copy.38 = u32[]{:T(128)} copy(%constant.203..sunk)
          %copy.8 = u32[]{:T(128)} copy(%copy.38)
          %add.53 = s32[]{:T(128)} add(%get-tuple-element.275, %constant.3.clone.1..sunk)
          %collective-permute-done.8 = PART collective-permute-done(%collective-permute-start.8)
          %get-tuple-element.276 = bf16[1164,1024]{0,1} get-tuple-element(%wide.param.0), index=1
          %tuple.45 = STATE tuple(%get-tuple-element.276, %constant_dynamic-slice_fusion.2, %custom-call.2, \
            %collective-permute-done.8, %copy.8, /*index=5*/%constant.203..sunk)
          %while.17 = STATE while(%tuple.45), condition=%wide.windowed_dot_general_cond_ag.clone, \
            body=%wide.windowed_dot_general_body_ag.clone.sunk
          %get-tuple-element.297 = u32[]{:T(128)} get-tuple-element(%wide.param.0), index=3
          ROOT %tuple.53 = LAYERS tuple(%add.53, %get-tuple-element.276, %get-tuple-element.294, \
            %get-tuple-element.297)
        }

        %wide.region_1.2_spmd (wide.param.5: (s32[])) -> pred[] {
          %constant.10.clone.1 = s32[]{:T(128)} constant(3)
          %wide.param.5 = LAYERS parameter(0)
          %get-tuple-element.142 = s32[]{:T(128)} get-tuple-element(%wide.param.5), index=0
          ROOT %lt.3 = pred[]{:T(512)} compare(%get-tuple-element.142, %constant.10.clone.1), direction=LT
        }

        ENTRY %main.4_spmd (param.7: bf16[3,64,4096], param.6: bf16[1164,1024]) -> f32[] {
          %constant.14.clone = s32[]{:T(128)} constant(0)
          %constant.203 = u32[]{:T(128)} constant(0)
          %param.6 = bf16[1164,1024]{1,0} parameter(1)
          %param.7 = bf16[3,64,4096]{2,1,0} parameter(0)
          %copy.37 = s32[]{:T(128)} copy(%constant.14.clone)
          %tuple.51 = LAYERS tuple(%copy.37, %param.6, %param.7, %constant.203)
          %while.16 = LAYERS while(%tuple.51), condition=%wide.region_1.2_spmd, \
            body=%wide.region_0.1_spmd.sunk
          ROOT %get-tuple-element.35 = bf16[1164,1024]{0,1} get-tuple-element(%while.16), index=1
        }"""

    def ring(self, *changes: tuple[str, str]) -> str:
        part = "bf16[1,64,4096]{2,1,0:T(8,128)(2,1)S(1)}"
        back = [f"{{{i},{(i - 1) % 16}}}" for i in range(16)]
        forth = [f"{{{i},{(i + 1) % 16}}}" for i in range(16)]
        names = {
            "STATE": f"(bf16[1164,1024]{{0,1}}, {part}, bf16[1164,4096], {part}, u32[], /*index=5*/u32[])",
            "LAYERS": "(s32[]{:T(128)}, bf16[1164,1024]{0,1}, bf16[3,64,4096]{2,1,0}, u32[]{:T(128)})",
            "SENT": f"({part}, {part}, u32[]{{:S(2)}}, u32[]{{:S(2)}})",
            "PART": part,
            "BACK": f"source_target_pairs={{{','.join(back)}}}",
            "FORTH": f"source_target_pairs={{{','.join(forth)}}}",
        }
        text = self.RING
        for old, new in (*changes, *names.items()):
            assert old in text
            text = text.replace(old, new)
        return program(text, devices=16)

    CARRIED = (  # of all layers, the loop around hands it on
        "%copy.38 = u32[]{:T(128)} copy(%constant.203..sunk)",
        "%get-tuple-element.9 = u32[]{:T(128)} get-tuple-element(%wide.param.0), index=3\n"
        "          %copy.38 = u32[]{:T(128)} copy(%get-tuple-element.9)",
    )
    LEFT = (  # a loop before it left it as it was
        "%copy.37 = s32[]{:T(128)} copy(%constant.14.clone)",
        "%tuple.9 = LAYERS tuple(%constant.14.clone, %param.6, %param.7, %constant.14.clone)\n"
        "          %while.9 = LAYERS while(%tuple.9), condition=%wide.region_1.2_spmd, "
        "body=%wide.region_0.1_spmd.sunk\n"
        "          %get-tuple-element.9 = s32[]{:T(128)} get-tuple-element(%while.9), index=3\n"
        "          %copy.37 = s32[]{:T(128)} copy(%get-tuple-element.9)",
    )

    @pytest.mark.parametrize(("changes", "loops"), [((), 1), ((CARRIED,), 1), ((LEFT,), 2)])
    def test_a_weight_that_goes_round_in_a_ring(self, changes, loops):
        """As the compiler wrote it; and where the first number of its steps comes from further away."""
        found = census(self.ring(*changes))
        assert found.unknown_loops == ()
        part = 64 * 4096 * 2
        once = [("collective-permute", 3, part)] + [("collective-permute", 3 * 4, part)] * 4
        assert [(one.kind, one.times, one.sent // one.times) for one in found.collectives] == once * loops
        # To gather the weight, 15 parts would do: the two of the last step are there already.
        assert sum(one.sent for one in found.collectives) == loops * 3 * 17 * part

    @pytest.mark.parametrize(
        "change",
        [
            # The first number, the step or the last one is no constant; it does not count up, or not itself.
            ("copy(%constant.203..sunk)", "copy(%get-tuple-element.275)"),
            ("add(%get-tuple-element.212, %constant.208..sunk2)", "add(%get-tuple-element.212, %add.60)"),
            (
                "compare(%get-tuple-element.121, %constant.191)",
                "compare(%get-tuple-element.121, %wide.param.9)",
            ),
            ("%constant.191), direction=LT", "%constant.191), direction=NE"),
            ("add(%get-tuple-element.212,", "add(%get-tuple-element.223,"),
            ("add(%get-tuple-element.212,", "multiply(%get-tuple-element.212,"),
            ("compare(%get-tuple-element.121,", "compare(%constant.191,"),
            ("= u32[]{:T(128)} constant(2)", "= u32[]{:T(128)} constant({2})"),
            ("%while.17 = STATE while(%tuple.45)", "%while.17 = STATE while(%constant.203..sunk)"),
        ],
    )
    def test_a_ring_of_unknown_length(self, change):
        found = census(self.ring(change))
        assert found.unknown_loops == ("while.17",)
        assert [one.times for one in found.collectives] == [3] * 5

    def test_a_number_that_a_loop_changes_is_unknown(self):
        """The layers' own number is where the steps begin."""
        carried = (self.CARRIED[0], self.CARRIED[1].replace("index=3", "index=0"))
        assert census(self.ring(carried)).unknown_loops == ("while.17",)

    def test_of_a_condition_the_branch_that_sends_more_counts(self):
        branches = [
            f"""
            %{name} (p: f32[4,6]) -> f32[4,6] {{
              ROOT %c = f32[{rows},6]{{1,0}} all-gather(%p), replica_groups=[4,2]<=[8]
            }}"""
            for name, rows in (("few", 8), ("many", 16), ("two", 2))
        ]
        line = "ROOT %r = f32[4,6]{1,0} conditional(%n, %x, %x, %x), branch_computations={%few, %many, %two}"
        (collective,) = census(program(*branches, entry(X, line))).collectives
        assert collective.result == 16 * 6 * 4

    def test_a_reduce_scatter_of_tpus_is_a_fusion(self):
        fused = """
            %all-reduce-scatter.8.clone.1 (p: f32[4,6]) -> f32[1,6] {
              %c = f32[4,6]{1,0:T(8,128)} all-reduce(%p), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
              ROOT %s = f32[1,6]{1,0:T(8,128)} dynamic-slice(%c, %i, %j), dynamic_slice_sizes={1,6}
            }"""
        line = "ROOT %f = f32[1,6]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.8.clone.1"
        (collective,) = census(program(fused, entry(X, line))).collectives
        assert collective == Collective("reduce-scatter", 1, 24, 4, False, "")

    def test_a_collective_over_several_fusions_of_tpus_is_one(self):
        fusions = [
            f"""
            %{name} (p: f32[4,6]) -> f32[8,6] {{
              %c = f32[8,6]{{1,0}} all-gather(%p), replica_groups=[4,2]<=[8], {attributes}
            }}"""
            for name, attributes in (
                ("first", 'frontend_attributes={chain_id="3"}'),
                ("second", 'frontend_attributes={chain_id="3"}'),
                ("other", 'frontend_attributes={chain_id="4"}'),
            )
        ]
        lines = [
            f"%f.{name} = f32[8,6]{{1,0}} fusion(%x), kind=kCustom, calls=%{name}"
            for name in ("first", "second", "other")
        ]
        assert len(census(program(*fusions, entry(X, *lines))).collectives) == 2

    @pytest.mark.parametrize(
        ("kind", "target", "expected"),
        [
            ("ALL_REDUCE", '"{1,2,3}x{0:3}"', ("all-reduce", 3, 2 * 48 * 2 // 3)),
            ("ALL_GATHER", "{{100000,200000},{100001,200001}}", ("all-gather", 2, 48 // 2)),
            ("ONE_TO_ONE", "{{200000->100001},{100001->200000}}", ("collective-permute", 2, 48)),
        ],
    )
    def test_what_crosses_to_other_slices_of_tpus(self, kind, target, expected):
        names = f'_xla_host_transfer_rendezvous="c.1_0",_xla_megascale_target={target}'
        attributes = f'frontend_attributes={{{names},_xla_megascale_transfer_type="{kind}"}}'
        lines = (
            f"%s = (bf16[4,6]{{1,0:T(8,128)}}, u32[], token[]) send(%x, %a), channel_id=2, {attributes}",
            f"%r = (bf16[4,6]{{1,0:T(8,128)}}, u32[], token[]) recv(%a), channel_id=1, {attributes}",
            "%q = (f32[9], u32[], token[]) recv(%a), channel_id=3, is_host_transfer=true",
        )
        (collective,) = census(program(entry(X, *lines), devices=4)).collectives
        assert (collective.kind, collective.group, collective.sent) == expected
        assert collective.crosses
        assert collective.source == "c.1_0"

    def test_other_text_is_an_error(self):
        with pytest.raises(ValueError, match="no ENTRY computation"):
            census("module @jit_f {}")


def test_a_weight_split_over_fsdp_is_gathered():
    mesh = make_mesh((2, 4, 1))
    rows, kernel = jax.P(("data", "fsdp")), jax.P("fsdp")

    def layers(x, w):
        def layer(x, w):
            return jnp.sin(jax.lax.with_sharding_constraint(x @ w, rows)), None

        return jax.lax.scan(layer, x, w)[0]

    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=jax.NamedSharding(mesh, rows))
        w = jax.ShapeDtypeStruct(
            (5, 64, 64), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(None, *kernel))
        )
        found = census(jax.jit(layers).lower(x, w).compile().as_text())
    (collective,) = found.collectives
    assert (collective.kind, collective.times, collective.result, collective.group) == (
        "all-gather",
        5,
        64 * 64 * 4,
        4,
    )
    assert collective.sent == 5 * (64 * 64 * 4) * 3 // 4
    assert "while" in collective.source
    assert found.unknown_loops == ()


class TestFrozenGradients:
    """Of the tiny models, with batches of 5: no activation has the shape of a weight."""

    def program(self, model, batch, frozen_too: bool = False):
        graph, trained, frozen = partition(model)

        def step(trained, frozen, batch):
            def loss(trained, frozen):
                return nnx.merge(graph, trained, frozen).loss(batch, jax.random.key(0))[0]

            return jax.grad(loss, (0, 1) if frozen_too else 0)(trained, frozen)

        text = jax.jit(step).lower(trained, frozen, batch).compile().as_text()
        return frozen_gradients(text, weight_shapes(frozen), weight_shapes(trained))

    @pytest.mark.slow
    def test_there_are_none(self, aligner, sparqle):
        rng = np.random.default_rng(0)
        assert self.program(aligner, stage1_batch(rng, 5)) == []
        assert self.program(sparqle, stage2_batch(rng, 5)) == []

    def test_those_of_a_tower_that_is_differentiated_are_named(self, sparqle):
        names = self.program(sparqle, stage2_batch(np.random.default_rng(0), 5), frozen_too=True)
        shapes = sorted(tuple(sorted(map(int, name.rpartition(" [")[2][:-1].split(",")))) for name in names)
        # Query and out, gate, up and down, the LM head; keys and values have the projection's shape, 32 x 64.
        assert shapes == [(64, 64)] * 2 + [(64, 97)] + [(64, 112)] * 3
        assert sum("transpose(jvp(layers))" in name for name in names) == 5

    def test_a_weight_of_several_layers_has_two_shapes(self, sparqle):
        shapes = weight_shapes(nnx.state(sparqle.llm))
        assert {(3, 64, 112), (64, 112), (97, 64)} < shapes
        assert not any(len(shape) < 2 for shape in shapes)

    def test_shapes_of_trained_weights_are_left_out(self):
        text = program(entry(X, "ROOT %d = f32[6,4,1]{2,1,0} dot(%x, %x)"), devices=1)
        assert frozen_gradients(text, [(4, 6)]) == ["d [6, 4, 1]"]
        assert frozen_gradients(text, [(4, 6)], [(6, 4)]) == []
        assert frozen_gradients(text, [(4, 7)]) == []
