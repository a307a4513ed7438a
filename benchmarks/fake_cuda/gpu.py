"""Which GPU the fake device says it is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FakeGpu:
    """What torch, Triton and Inductor are told of the device; the defaults are an H200's.

    Attributes:
        name: as the driver gives it.
        capability: (major, minor).
        multiprocessors: their number.
        memory_bytes, l2_bytes: of the device.
        shared_bytes: most shared memory of a program.
    """

    name: str = "NVIDIA H200"
    capability: tuple[int, int] = (9, 0)
    multiprocessors: int = 132
    memory_bytes: int = 141 * 10**9
    l2_bytes: int = 50 << 20
    shared_bytes: int = 232448


H200 = FakeGpu()
