"""How long a kernel takes on a GPU, predicted from its compiled code: the largest of three terms.

- memory: every byte that the launch is given once, at the memory's peak rate;
- issue: instructions, of which each of an SM's four schedulers issues one a cycle;
- latency: bytes that the loops read, by Little's law: a rate is what is under way over how long it is.

The GPU is done when its busiest SM is: blocks go round the SMs one by one. Not in the model, so that a kernel can be
slower than this, and in the first case faster: what an earlier kernel left in the L2 cache, launches, waiting at
barriers and for results of arithmetic, elements of padded tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

SCHEDULERS, LANES = 4, 32  # of an SM; of a warp
REGISTER_FILE, REGISTER_UNIT, MAX_WARPS, MAX_BLOCKS = 65536, 256, 64, 32
SHARED_BYTES = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # of an SM; each block takes 1 KiB more than it says


class Gpu(NamedTuple):
    """Peak figures."""

    architecture: int
    sms: int
    clock_hz: float
    bandwidth: float  # bytes a second
    bytes_under_way: int  # on each SM, which this bandwidth takes

    @property
    def latency_s(self) -> float:
        """Of the memory while it is busy, by Little's law."""
        return self.bytes_under_way * self.sms / self.bandwidth


# SMs and bandwidth: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and HGX B200. Clocks: their peaks of
# float32 over 2 * 128 operations (A100: 2 * 64) a cycle and SM, and for Hopper less, the 1.755 GHz of H100's PCIe card,
# since that peak takes a clock that a card under load does not keep. Bytes under way: what NVIDIA's CUB asks of its
# transform on each (cub/device/dispatch/tuning/tuning_transform.cuh, arch_to_min_bytes_in_flight).
GPUS = {
    "A100": Gpu(80, 108, 1.410e9, 2.039e12, 16 << 10),
    "H100": Gpu(90, 132, 1.755e9, 3.35e12, 32 << 10),
    "H200": Gpu(90, 132, 1.755e9, 4.8e12, 48 << 10),
    "B200": Gpu(100, 148, 1.980e9, 8.0e12, 64 << 10),
}


class Part(NamedTuple):
    """What a launch does in one of the kernel's loops: in that for rows of whole vectors, or in the other."""

    elements: int  # of each feature map
    per_element: float  # instructions, of a lane
    read_bytes: int  # from all feature maps
    lane_bytes: int  # the most that a lane has under way


class Launch(NamedTuple):
    """A kernel and what it is launched for."""

    blocks: int
    warps: int  # of a block
    resident_warps: int  # of an SM, where there are blocks enough
    outside: float  # instructions of a warp outside of the loops
    total_bytes: int  # of all tensors
    parts: Sequence[Part]


class Prediction(NamedTuple):
    """In seconds."""

    memory: float
    issue: float
    latency: float

    @property
    def binding(self) -> str:
        """The term that counts."""
        return max(self._fields, key=lambda name: float(getattr(self, name)))


def resident_warps(architecture: int, registers: int, shared_bytes: int, warps: int) -> int:
    """That fit an SM at a time."""
    of_a_warp = -(-registers * LANES // REGISTER_UNIT) * REGISTER_UNIT
    blocks = min(
        REGISTER_FILE // of_a_warp // warps, SHARED_BYTES[architecture] // (shared_bytes + 1024), MAX_WARPS // warps
    )
    return min(blocks, MAX_BLOCKS) * warps


def predict(launch: Launch, gpu: Gpu) -> Prediction:
    """The three terms: none where nothing is launched."""
    if not launch.blocks:
        return Prediction(0.0, 0.0, 0.0)
    # The busiest SM's share of all blocks, and the warps that it has at a time.
    blocks = math.ceil(launch.blocks / gpu.sms)
    share, warps = blocks / launch.blocks, min(launch.resident_warps, blocks * launch.warps)
    instructions = sum(p.elements * p.per_element for p in launch.parts) / LANES
    instructions += launch.outside * launch.warps * launch.blocks
    return Prediction(
        memory=launch.total_bytes / gpu.bandwidth,
        issue=share * instructions / (min(SCHEDULERS, warps) * gpu.clock_hz),
        latency=sum(share * p.read_bytes / (p.lane_bytes * LANES * warps) * gpu.latency_s for p in launch.parts),
    )
