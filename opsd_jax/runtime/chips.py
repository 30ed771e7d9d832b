"""Data sheets of chips, and how much memory a device has."""

import dataclasses

import jax

GIB = 2**30
# Seconds that a collective takes however little it sends. An order of magnitude, not measured: a
# few hops of a microsecond each, and starting it.
LATENCY = 1e-5


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU or GPU. Numbers are per device that JAX sees (half a chip on tpu7x).

    hbm: GiB that libtpu lets a program have; of a GPU, all of its memory.
    flops: peak of bfloat16 operations per second.
    bandwidth: bandwidth of HBM, in bytes per second.
    link: bandwidth of one ICI link in one direction, in bytes per second. Two links carry a ring,
      so of a GPU this is half of what it sends by NVLink, or by PCIe where it has no NVLink.
    axes: number of axes of the torus that the chips of a slice form; 1 for GPUs.
    cores: TensorCores of a chip; names such as v5p-16 count them.
    devices: devices of a chip. One device with two cores is what libtpu calls a megacore.
    aliases: other names of the generation.
    kinds: what JAX calls the devices (`jax.Device.device_kind`).
    """

    hbm: float
    flops: float
    bandwidth: float
    link: float
    axes: int
    cores: int = 1
    devices: int = 1
    aliases: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


# Sources: Google's pages of the generations; hbm as libtpu 0.0.42 enforces it; kinds as
# jax/_src/pallas/mosaic/tpu_info.py of jax 0.10 lists them.
CHIPS = {
    "v4": Chip(30.75, 275e12, 1.2e12, 4.5e10, 3, cores=2, kinds=("TPU v4",)),
    "v5e": Chip(
        15.75,
        197e12,
        8.1e11,
        4.5e10,
        2,
        aliases=("v5litepod",),
        kinds=("TPU v5 lite", "TPU v5e"),
    ),
    "v5p": Chip(95.74, 459e12, 2.77e12, 9e10, 3, cores=2, kinds=("TPU v5", "TPU v5p")),
    "v6e": Chip(31.25, 918e12, 1.64e12, 9e10, 2, kinds=("TPU v6 lite", "TPU v6e")),
    "tpu7x": Chip(
        94.75,
        1153e12,
        3.69e12,
        9e10,
        3,
        cores=2,
        devices=2,
        aliases=("7x", "v7x"),
        kinds=("TPU7x",),
    ),
}
# Sources: NVIDIA's data sheets, bfloat16 without sparsity. No program is compiled for these without
# having them. A part of a GPU (MIG) has another kind and no data sheet here.
GPUS = {
    "a100-40gb-sxm": Chip(40, 312e12, 1.555e12, 1.5e11, 1, kinds=("NVIDIA A100-SXM4-40GB",)),
    "a100-40gb-pcie": Chip(40, 312e12, 1.555e12, 1.6e10, 1, kinds=("NVIDIA A100-PCIE-40GB",)),
    "a100-80gb-sxm": Chip(80, 312e12, 2.039e12, 1.5e11, 1, kinds=("NVIDIA A100-SXM4-80GB",)),
    "a100-80gb-pcie": Chip(80, 312e12, 1.935e12, 1.6e10, 1, kinds=("NVIDIA A100 80GB PCIe",)),
    "h100-sxm": Chip(80, 989e12, 3.35e12, 2.25e11, 1, kinds=("NVIDIA H100 80GB HBM3",)),
    "h100-pcie": Chip(80, 756e12, 2.0e12, 3.2e10, 1, kinds=("NVIDIA H100 PCIe",)),
    "h100-nvl": Chip(94, 835e12, 3.9e12, 1.5e11, 1, kinds=("NVIDIA H100 NVL",)),
    "h200": Chip(141, 989e12, 4.8e12, 2.25e11, 1, kinds=("NVIDIA H200",)),
    "l4": Chip(24, 121e12, 3.0e11, 1.6e10, 1, kinds=("NVIDIA L4",)),
}


def data_sheet(device: jax.Device) -> Chip | None:
    """The data sheet of a TPU or a GPU; None for a CPU or what is not listed."""
    every = (*CHIPS.values(), *GPUS.values())
    return next((chip for chip in every if device.device_kind in chip.kinds), None)


def memory(device: jax.Device) -> float | None:
    """Bytes that programs on a device may have; None where that is not known, as on a CPU."""
    chip = data_sheet(device)
    if chip and device.platform == "tpu":
        return chip.hbm * GIB
    if device.platform == "cpu":
        return None
    return (device.memory_stats() or {}).get("bytes_limit")
