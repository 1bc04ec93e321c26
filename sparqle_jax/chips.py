"""TPU chips: what is published of them, and slices of them to compile for on a machine without any.

Figures are of one chip, in FLOP/s, bytes and bytes/s. They come from the pages of Google's documentation
that each chip names (cloud.google.com/tpu/docs/...); what those leave out, from "How to Scale Your Model"
(jax-ml.github.io/scaling-book/tpus) and from Jouppi et al., "TPU v4", ISCA 2023, table 4.
"""

import dataclasses
import math
import os
import re

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of chips. The peak is that of dense products in bfloat16.

    hbm_bytes: the whole memory, of which programs get up to 2.5 GiB less; the compiler says how much.
    ici_bandwidth: of all links to other chips of the slice together, both directions added.
    dcn_bandwidth: to other slices, over the host's network: its NICs' bandwidth by the chips that share it.
    devices: how many `jax.Device` a chip is. cores: what the number in a slice's name counts per chip.
    dimensions: of the grid that a slice is. largest: the chips of the largest slice.
    single: whether there are slices of a single chip.
    """

    name: str
    device_kinds: tuple[str, ...]
    source: str
    peak: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    devices: int = 1
    cores: int = 1
    dimensions: int = 2
    largest: int = 256
    single: bool = True
    config: str = "default"


CHIPS = (
    Chip(
        "v4",
        ("TPU v4",),
        "v4; links: ISCA 2023, 6 of 50 GB/s each way; network: How to Scale Your Model",
        peak=275e12,
        hbm_bytes=32 * 2**30,
        hbm_bandwidth=1200e9,
        ici_bandwidth=600e9,
        dcn_bandwidth=6.25e9,
        cores=2,
        dimensions=3,
        largest=4096,
        single=False,
        config="megacore",  # the two cores are one device, as on a TPU VM; libtpu's default here is two
    ),
    Chip(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        "v5e; network: two NICs of 100 Gbit/s for 8 chips",
        peak=197e12,
        hbm_bytes=16 * 2**30,
        hbm_bandwidth=819e9,
        ici_bandwidth=400e9,
        dcn_bandwidth=3.125e9,
    ),
    Chip(
        "v5p",
        ("TPU v5p", "TPU v5"),
        "v5p; network: tpu7x, 50 Gbit/s",
        peak=459e12,
        hbm_bytes=95 * 2**30,
        hbm_bandwidth=2765e9,
        ici_bandwidth=1200e9,
        dcn_bandwidth=6.25e9,
        cores=2,
        dimensions=3,
        largest=6144,
        single=False,
        config="megacore",
    ),
    Chip(
        "v6e",
        ("TPU v6 lite", "TPU v6e"),
        "v6e; network: tpu7x, 100 Gbit/s",
        peak=918e12,
        hbm_bytes=32 * 2**30,
        hbm_bandwidth=1638e9,
        ici_bandwidth=800e9,
        dcn_bandwidth=12.5e9,
    ),
    Chip(
        "tpu7x",
        ("TPU7x",),
        "tpu7x",
        peak=2307e12,
        hbm_bytes=192 * 2**30,
        hbm_bandwidth=7380e9,
        ici_bandwidth=1200e9,
        dcn_bandwidth=12.5e9,
        devices=2,  # two chiplets, each with half of everything
        cores=2,
        dimensions=3,
        largest=9216,
    ),
)

_OTHER_NAMES = {"v5litepod": "v5e"}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device, by `jax.Device.device_kind`; None for what is not in the table (a CPU, a GPU)."""
    return next((chip for chip in CHIPS if device_kind in chip.device_kinds), None)


def slice_of(name: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip and the shape, in chips, of a slice by its name at Google Cloud: "v5e-16" -> v5e, (4, 4).

    The number counts cores, two per chip, for v4, v5p and tpu7x, and chips for v5e (or v5litepod) and v6e.
    Raises ValueError, with the names that there are, for another name.
    """
    match = re.fullmatch(r"(\w+)-(\d+)", name)
    generation = match and _OTHER_NAMES.get(match[1], match[1])
    for chip in CHIPS:
        if chip.name == generation:
            chips, rest = divmod(int(match[2]), chip.cores)
            shape = None if rest else _shape(chip, chips)
            if shape is not None:
                return chip, shape
    raise ValueError(f"{name!r} is not the name of a TPU slice; there are\n" + "\n".join(map(_names, CHIPS)))


def topology(name: str, slices: int = 1) -> list[jax.Device]:
    """The devices of `slices` slices of a name that `slice_of` knows: to compile for, not to run on.

    Needs libtpu, but no TPU. `slice_index` of the devices says which slice, where there are several.
    Raises ValueError for a name that does not exist, ImportError without libtpu, and RuntimeError when
    libtpu makes of the name something else than it should.
    """
    chip, shape = slice_of(name)
    if slices < 1:
        raise ValueError(f"slices={slices} must be at least 1.")
    # libtpu reads these when it starts. On a TPU VM they are set, or asked of a server that is not here.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # any; unset, libtpu complains
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # or only one process at a time could compile
    options = {"num_slices": slices} if slices > 1 else {}
    try:
        devices = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{chip.name}:{'x'.join(map(str, shape))}",
            chip_config_name=chip.config,
            chips_per_host_bounds=_host(shape),
            wrap=_wrap(shape),
            **options,
        ).devices
    except RuntimeError as error:
        if "not installed" not in str(error):
            raise
        raise ImportError(
            "to compile for TPUs libtpu must be installed, which exists for Linux on x86-64 alone: "
            "pip install -e '.[tpu]'"
        ) from error
    kinds = sorted({device.device_kind for device in devices})
    expected = math.prod(shape) * chip.devices * slices
    if len(devices) != expected or chip_of(kinds[0]) is not chip or len(kinds) > 1:
        raise RuntimeError(
            f"libtpu made {len(devices)} devices of kind {kinds} for {slices} x {name}, which has {expected} "
            f"of kind {chip.device_kinds[0]!r}: another version of libtpu may know it by another name."
        )
    return devices


def _shape(chip: Chip, chips: int) -> tuple[int, ...] | None:
    """The shape of the standard slice of so many chips, None if there is none."""
    dimensions = chip.dimensions
    if chips == 1 and chip.single:
        return (1,) * dimensions
    if not 4 <= chips <= chip.largest:
        return None
    power = chips.bit_length() - 1
    if dimensions == 2:
        return (2 ** (power // 2), 2 ** (power - power // 2)) if chips == 2**power else None
    if chips < 64:  # parts of a rack, the cube of 4x4x4
        return {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}.get(chips)
    return None if chips % 64 else tuple(4 * side for side in _most_cubic(chips // 64))


def _most_cubic(volume: int) -> tuple[int, int, int]:
    """Three sides, in ascending order, with this product and the smallest sum."""
    sides = [
        (a, b, volume // (a * b))
        for a in range(1, round(volume ** (1 / 3)) + 1)
        for b in range(a, math.isqrt(volume // a) + 1)
        if volume % (a * b) == 0
    ]
    return min(sides, key=sum)


def _host(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The part of a slice that is one host's: 4 chips, but all of the small flat ones."""
    if len(shape) == 2 and math.prod(shape) <= 8:
        return (*shape, 1)
    return (min(2, shape[0]), min(2, shape[1]), 1)


def _wrap(shape: tuple[int, ...]) -> tuple[bool, bool, bool]:
    """Tells which dimensions are rings: those of 16 in a flat slice, and all of whole cubes."""
    if len(shape) == 2:
        return (shape[0] == 16, shape[1] == 16, False)
    return (min(shape) >= 4,) * 3


def _names(chip: Chip) -> str:
    """The names of all slices of a chip, in a line."""
    sizes = [n for n in range(1, chip.largest + 1) if _shape(chip, n)]
    if chip.dimensions == 2:
        return "  " + ", ".join(f"{chip.name}-{n * chip.cores}" for n in sizes)
    names = ", ".join(f"{chip.name}-{n * chip.cores}" for n in sizes if n <= 64)
    step, last = 64 * chip.cores, chip.largest * chip.cores
    return f"  {names} and further multiples of {step} up to {chip.name}-{last}"
