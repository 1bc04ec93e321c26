"""The chips' table, and slices of them to compile for."""

import math

import jax
import numpy as np
import pytest

from sparqle_jax import chips
from sparqle_jax.chips import CHIPS, chip_of, slice_of, topology


class TestNames:
    @pytest.mark.parametrize(
        ("chip", "shapes"),
        [
            ("v4", {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 1024: "8x8x8"}),
            ("v4", {256: "4x4x8", 384: "4x4x12", 512: "4x8x8", 1536: "8x8x12", 8192: "16x16x16"}),
            (
                "v5e",
                {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
            ),
            ("v5p", {8: "2x2x1", 16: "2x2x2", 64: "2x4x4", 128: "4x4x4", 2048: "8x8x16", 4096: "8x16x16"}),
            ("v5p", {8192: "16x16x16", 12288: "16x16x24"}),
            (
                "v6e",
                {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
            ),
            ("tpu7x", {2: "1x1x1", 8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4"}),
            ("tpu7x", {9216: "12x16x24", 18432: "16x24x24"}),
        ],
    )
    def test_a_slice_has_the_shape_that_google_lists(self, chip, shapes):
        for number, shape in shapes.items():
            found, sizes = slice_of(f"{chip}-{number}")
            assert (found.name, "x".join(map(str, sizes))) == (chip, shape)
            assert math.prod(sizes) * found.cores == number

    def test_v5e_has_another_name(self):
        assert slice_of("v5litepod-16") == slice_of("v5e-16")

    @pytest.mark.parametrize(
        "name", ["", "v5e", "v5e-2", "v5e-512", "v5p-4", "v5p-9", "v5p-192", "v4-16384", "v3-8", "v5e-16 "]
    )
    def test_other_names_are_an_error_that_lists_all(self, name):
        with pytest.raises(ValueError, match="is not the name of a TPU slice") as error:
            slice_of(name)
        lines = str(error.value).splitlines()[1:]
        assert lines[1] == "  v5e-1, v5e-4, v5e-8, v5e-16, v5e-32, v5e-64, v5e-128, v5e-256"
        assert lines[2] == (
            "  v5p-8, v5p-16, v5p-32, v5p-64, v5p-128 and further multiples of 128 up to v5p-12288"
        )
        for line in lines:
            for listed in line.replace(" and further multiples of 128 up to", ",").split(","):
                slice_of(listed.strip())


class TestFigures:
    def test_of_a_device(self):
        assert chip_of("TPU v5 lite").peak == 197e12
        assert chip_of("TPU v5p") is chip_of("TPU v5")
        assert chip_of(jax.devices()[0].device_kind) is None

    def test_they_are_of_one_scale(self):
        """Nobody wrote bits for bytes: all of the memory is read in 10 to 50 ms, and so on."""
        for chip in CHIPS:
            assert 10e-3 < chip.hbm_bytes / chip.hbm_bandwidth < 50e-3
            assert 150 < chip.peak / chip.hbm_bandwidth < 600
            assert 1.5 < chip.hbm_bandwidth / chip.ici_bandwidth < 10
            assert 50 < chip.ici_bandwidth / chip.dcn_bandwidth < 200


class TestTopology:
    @pytest.mark.parametrize(
        ("name", "devices", "hosts"),
        [
            ("v4-32", 16, 4),
            ("v5e-8", 8, 1),
            ("v5e-16", 16, 4),
            ("v5p-8", 4, 1),
            ("v6e-256", 256, 64),
            ("tpu7x-8", 8, 1),
        ],
    )
    def test_a_slice_without_a_tpu(self, name, devices, hosts):
        pytest.importorskip("libtpu")
        made = topology(name)
        assert len(made) == devices
        assert len({device.process_index for device in made}) == hosts
        assert {chip_of(device.device_kind) for device in made} == {slice_of(name)[0]}

    def test_several_slices(self):
        pytest.importorskip("libtpu")
        made = topology("v5e-4", slices=3)
        assert [device.slice_index for device in made] == np.repeat([0, 1, 2], 4).tolist()
        with pytest.raises(ValueError, match="slices=0"):
            topology("v5e-4", slices=0)

    def test_without_libtpu(self, monkeypatch):
        def missing(**_):
            raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

        monkeypatch.setattr(chips.topologies, "get_topology_desc", missing)
        with pytest.raises(ImportError, match=r"Linux on x86-64 alone: pip install -e '\.\[tpu\]'"):
            topology("v5e-4")

    def test_a_libtpu_that_makes_something_else(self, monkeypatch):
        other = type("Topology", (), {"devices": jax.devices()})
        monkeypatch.setattr(chips.topologies, "get_topology_desc", lambda **_: other)
        with pytest.raises(RuntimeError, match=r"8 devices of kind \['cpu'\] for 1 x v5e-4, which has 4"):
            topology("v5e-4")
