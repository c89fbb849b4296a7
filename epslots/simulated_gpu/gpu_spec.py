"""The speeds and costs of a simulated GPU: figures of data sheets, and of launches as they are commonly measured."""

from __future__ import annotations

import msgspec


class GpuSpec(msgspec.Struct, frozen=True):
    """One kind of GPU.

    Attributes:
        name: as the driver reports it.
        capability: of its multiprocessors (SM), major and minor.
        memory_bytes: of the device.
        memory_rate: bytes per second between its memory and its multiprocessors.
        flops: multiplications and additions per second, dense bf16.
        link_rate: bytes per second between pinned memory and the device, each direction.
        kernel_s: the shortest kernel.
        copy_s: of a copy engine, from its turn to the first byte.
        launch_s: the host's time to queue one operation through torch.
        replay_s: the host's time to replay a captured graph.
        node_s: the device's time between two kernels of a graph.
        query_s: the host's time to look at an event.
        wake_s: the host's time from the end of what it waits for to its next instruction.
        copy_rate: bytes per second that one core of the host copies.
        peer_rate: bytes per second between two GPUs of a node, each direction.
        collective_s: the shortest operation between GPUs.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    memory_rate: float
    flops: float
    link_rate: float
    kernel_s: float = 2e-6
    copy_s: float = 2e-6
    launch_s: float = 4.5e-6
    replay_s: float = 10e-6
    node_s: float = 1e-6
    query_s: float = 0.5e-6
    wake_s: float = 10e-6
    copy_rate: float = 10e9
    peer_rate: float = 25e9
    collective_s: float = 12e-6

    @property
    def fast_grouped_mm(self) -> bool:
        """Whether torch's grouped matrix multiplication in bf16 runs without the host: only on majors 9 and 10."""
        return self.capability[0] in (9, 10)


# Memory and dense bf16 products (fp32 sums, no sparsity) by NVIDIA's data sheets of A100 80GB SXM (2,039 GB/s, 312 TFLOPS),
# H100 SXM (3.35 TB/s, 1,979 with sparsity), H200 SXM (4.8 TB/s, the same) and B200 (8 TB/s, 2.25 PFLOPS), and its whitepapers
# of Ada (4090: 1,008 GB/s, 165.2) and Blackwell (5090: 1,792 GB/s, 209.5). Links: PCIe 4.0 and 5.0 x16 have 31.5 and 63 GB/s
# each way, of which a large pinned copy reaches about 4/5. NVLink has 600 (A100), 900 (H100, H200) and 1,800 GB/s (B200), both
# ways together; without it, peers copy over PCIe.
GPUS = {
    "a100": GpuSpec("A100-SXM4-80GB", (8, 0), 80 << 30, 2.04e12, 312e12, 25e9, peer_rate=300e9),
    "4090": GpuSpec("GeForce RTX 4090", (8, 9), 24 << 30, 1.01e12, 165e12, 25e9),
    "h100": GpuSpec("H100-SXM5-80GB", (9, 0), 80 << 30, 3.35e12, 989e12, 50e9, peer_rate=450e9),
    "h200": GpuSpec("H200-SXM5-141GB", (9, 0), 141 << 30, 4.8e12, 989e12, 50e9, peer_rate=450e9),
    "b200": GpuSpec("B200", (10, 0), 180 << 30, 8.0e12, 2250e12, 50e9, peer_rate=900e9),
    "5090": GpuSpec("GeForce RTX 5090", (12, 0), 32 << 30, 1.79e12, 209e12, 50e9, peer_rate=50e9),
}
"""By the name that users give."""
