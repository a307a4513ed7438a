"""What GPUs reach: data sheets, and the shares of them that libraries are known to reach.

Everything here is from documents or measured by others, but for one number: bf16 products were
measured once on an H200, 788 TFLOP/s, which is its 0.80 of the data sheet.
"""

from dataclasses import dataclass

from cavmae.trainer.cost_model.kernel_time import Ceilings, Range


@dataclass(frozen=True)
class Gpu:
    """A GPU as specified, without sparsity, and the share of it that products reach.

    Attributes:
        name: driver's name of the GPU, or the beginning of it.
        fp32, bf16: matrix operations a second; fp32 without TF32.
        bytes_per_second: memory bandwidth.
        memory_bytes: of the device.
        multiprocessors: that compute.
        clock_hz: of them at most.
        share: of `bf16` that large matrix products reach: those of a transformer's shapes, and the
            best of all shapes.
        source: of the share; the rest is from the data sheet and whitepaper of the GPU.
    """

    name: str
    fp32: float
    bf16: float
    bytes_per_second: float
    memory_bytes: float
    multiprocessors: int
    clock_hz: float
    share: Range
    source: str


_MAMF = "best: MAMF table of S. Bekman, Machine Learning Engineering; least: ASSUMED"
_H200 = "best: 788 TFLOP/s measured on one H200, MAMF table 794; least: ASSUMED"
_L4 = "ASSUMED: at 72 W its clock falls under products"
_AMPERE, _HOPPER = Range(0.70, 0.86), Range(0.60, 0.80)

GPUS = (
    Gpu("NVIDIA A100-SXM4-80GB", 19.5e12, 312e12, 2.039e12, 80e9, 108, 1.41e9, _AMPERE, _MAMF),
    Gpu("NVIDIA A100-SXM4-40GB", 19.5e12, 312e12, 1.555e12, 40e9, 108, 1.41e9, _AMPERE, _MAMF),
    Gpu(
        "NVIDIA A100 80GB PCIe",
        19.5e12,
        312e12,
        1.935e12,
        80e9,
        108,
        1.41e9,
        Range(0.65, 0.82),
        _MAMF,
    ),
    Gpu(
        "NVIDIA A100-PCIE-40GB",
        19.5e12,
        312e12,
        1.555e12,
        40e9,
        108,
        1.41e9,
        Range(0.65, 0.82),
        _MAMF,
    ),
    Gpu("NVIDIA H100 80GB HBM3", 67e12, 989.5e12, 3.35e12, 80e9, 132, 1.83e9, _HOPPER, _MAMF),
    Gpu("NVIDIA H100 PCIe", 51e12, 756.5e12, 2.0e12, 80e9, 114, 1.755e9, _HOPPER, "ASSUMED as SXM"),
    Gpu("NVIDIA H100 NVL", 60e12, 835.5e12, 3.9e12, 94e9, 132, 1.785e9, _HOPPER, "ASSUMED as SXM"),
    Gpu("NVIDIA H200 NVL", 60e12, 835.5e12, 4.8e12, 141e9, 132, 1.785e9, _HOPPER, "ASSUMED as SXM"),
    Gpu("NVIDIA H200", 67e12, 989.5e12, 4.8e12, 141e9, 132, 1.83e9, _HOPPER, _H200),
    Gpu("NVIDIA L4", 30.3e12, 121e12, 0.3e12, 24e9, 58, 2.04e9, Range(0.45, 0.75), _L4),
    Gpu("NVIDIA B200", 75e12, 2250e12, 8.0e12, 180e9, 148, 1.85e9, Range(0.55, 0.776), _MAMF),
)
"""A prefix of another name comes after it. Where only rates with sparsity are specified, half of
them."""

BANDWIDTH_SHARE = Range(0.80, 0.92)
"""Of the data sheet's. ASSUMED: large copies reach the upper one on all of these, kernels that
reduce or that read with strides less."""
ATTENTION_SHARE = {"forward": Range(0.37, 0.58), "backward": Range(0.15, 0.33)}
"""Of the data sheet's products, that attention's own reach beside the exponentials. Source: Shah et
al., FlashAttention-3, 2024, figures 5 and 6, on an H100 with a head width of 128 and 512 to 1,024
tokens: FlashAttention-2 forward 309 to 350 TFLOP/s, cuDNN 497 to 574; backward about half. Other
head widths and GPUs are ASSUMED to reach as much."""
EXPONENTIALS_PER_CLOCK = 16
"""Of a multiprocessor. Source: CUDA C++ Programming Guide, throughput of native arithmetic; on an
H100 3.9e12 a second, as FlashAttention-3, section 3.1, has it."""
LAUNCH_SECONDS = Range(4e-6, 12e-6)
"""Of Python, torch and the driver for a kernel. ASSUMED: NVIDIA's Getting Started with CUDA Graphs
has 3.8 us for the launch alone, and torch's dispatch with autograd is some microseconds more."""
GAP_SECONDS = Range(0.5e-6, 2e-6)
"""Between the end of a kernel and the beginning of the next one that waits for it. ASSUMED, from
the 3.4 us a kernel of 2.9 us takes within a graph, in the same article."""


def find_gpu(name: str) -> Gpu | None:
    """Return a GPU by its driver's name, or by a part such as `H200`; None where it is unknown.

    CPUs are not here: the number of multiply units of a core can't be read. Nor are parts of a GPU
    (MIG), whose names begin as that of the whole.
    """
    if " MIG " in name:
        return None
    # Whole words: an L40 is no L4.
    by_driver = (one for one in GPUS if f"{name} ".startswith(f"{one.name} "))
    exact = (one for one in GPUS if one.name == f"NVIDIA {name}")
    begins = (one for one in GPUS if name and one.name.startswith(f"NVIDIA {name}"))
    return next((one for found in (by_driver, exact, begins) for one in found), None)


def known_gpu(name: str) -> Gpu:
    """Return `find_gpu`; raise ValueError where it is unknown."""
    if found := find_gpu(name):
        return found
    names = ", ".join(one.name.removeprefix("NVIDIA ") for one in GPUS)
    raise ValueError(f"gpu is {name!r}, whose speed is not known here; use one of {names}")


def gpu_ceilings(gpu: Gpu, dtype: str) -> Ceilings:
    """Return what a GPU is expected to reach.

    Args:
        gpu: one of `GPUS`.
        dtype: bf16 or fp32, without TF32.
    """
    peak = gpu.bf16 if dtype == "bf16" else gpu.fp32
    return Ceilings(
        name=gpu.name,
        source=f"data sheet; {gpu.source}",
        flops_per_second=gpu.share.times(peak),
        bytes_per_second=BANDWIDTH_SHARE.times(gpu.bytes_per_second),
        attention={during: share.times(peak) for during, share in ATTENTION_SHARE.items()},
        exponentials_per_second=EXPONENTIALS_PER_CLOCK * gpu.multiprocessors * gpu.clock_hz,
        launch_seconds=LAUNCH_SECONDS,
        gap_seconds=GAP_SECONDS,
        multiprocessors=gpu.multiprocessors,
    )
