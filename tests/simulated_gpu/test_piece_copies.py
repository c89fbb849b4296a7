"""Pieces of caches between a GPU and its host: right, in order, and the stepping thread and its kernels wait for no link."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch

from epslots.generation.cache_image import CacheGone, CacheImage, TensorPlace
from epslots.generation.cache_layout import CacheLayout
from epslots.generation.piece_copies import PieceReader, PieceWriter, ReadPiece
from epslots.simulated_gpu.cuda_api import simulated_gpus
from epslots.simulated_gpu.gpu_spec import GpuSpec
from epslots.simulated_gpu.machine import SimulatedMachine

CELLS, TOKENS, WIDTH, PIECE = 64, 12, 1000, 12_000
# A byte a nanosecond over the link, kernels of a microsecond, and a host that takes no time.
ROUND = GpuSpec("round", (9, 0), 1 << 30, 1e15, 1e15, 1e9, kernel_s=1e-6, copy_s=0.0, launch_s=0.0, wake_s=0.0, query_s=1e-9)


@pytest.fixture
def gpu() -> Iterator[SimulatedMachine]:
    with simulated_gpus(ROUND) as machine:
        yield machine


T = TypeVar("T")


def apart(work: Callable[[], T]) -> T:
    """The work of a hand-over's own thread."""
    with ThreadPoolExecutor(1) as own:
        return own.submit(work).result()


class Copies:
    """The observations."""

    def __init__(self) -> None:
        self.nbytes, self.seconds = 0, 0.0

    def __call__(self, nbytes: int, seconds: float) -> None:
        self.nbytes += nbytes
        self.seconds += seconds


def image_of(seed: int) -> tuple[torch.Tensor, CacheImage]:
    """A pool of cells, and the image of a request that has some of them."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.rand(CELLS, WIDTH, generator=generator).cuda()
    index = torch.randperm(CELLS, generator=generator)[:TOKENS].cuda()
    places = [TensorPlace(pool, index)]
    layout = CacheLayout("rows", TOKENS, b"", (places[0].kept("0.keys", TOKENS),))
    return pool, CacheImage(layout, places)


class HandOver:
    """Both ends of a hand-over, on one GPU.

    Attributes:
        read, written: what was observed.
    """

    def __init__(self, source: CacheImage, target: CacheImage) -> None:
        self.source, self.target, self.read, self.written = source, target, Copies(), Copies()
        self.reader = apart(lambda: PieceReader(source.device, 2 * PIECE, self.read))
        self.writer = apart(lambda: PieceWriter(target.device, 2 * PIECE, self.written))

    def bring(self, under_way: list[ReadPiece]) -> list[torch.Tensor]:
        """The work of both ends' threads between two steps of theirs."""

        def carry() -> list[torch.Tensor]:
            staged = [self.writer.bring(self.reader.arrived(piece).clone()) for piece in under_way]
            self.writer.settle()
            return staged

        return apart(carry)

    def close(self) -> None:
        apart(self.reader.close)
        apart(self.writer.close)


def hand_over(gpu: SimulatedMachine, both: HandOver, pools: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Carry a cache over in two bursts, while steps change the pools."""
    pieces = list(both.source.layout.pieces(PIECE))
    for burst in (pieces[:2], pieces[2:]):
        began_s = gpu.now_s
        under_way = both.reader.read(both.source, burst)
        pools[0].mul_(1.0)  # a step's kernel
        assert not gpu.syncs and gpu.now_s < began_s + 1e-5
        staged = both.bring(under_way)
        waits = dict(gpu.syncs)
        for piece, one in zip(burst, staged, strict=True):
            both.writer.write(both.target, [piece], [one])
        pools[1].mul_(1.0)
        assert dict(gpu.syncs) == waits, "the stepping thread waited"
        apart(both.writer.free)
        gpu.syncs.clear()
    both.close()


def test_pieces_arrive_and_no_step_waits(gpu: SimulatedMachine):
    """Neither the stepping thread nor its kernels: the link's time is others'."""
    (source_pool, source), (target_pool, target) = image_of(1), image_of(2)
    both = HandOver(source, target)
    torch.cuda.synchronize()
    gpu.reset()
    hand_over(gpu, both, (source_pool, target_pool))
    assert gpu.races == []
    sent, came = (pool[image._places[0].index].cpu() for pool, image in ((source_pool, source), (target_pool, target)))
    assert torch.equal(sent, came)
    nbytes = source.layout.nbytes
    assert both.read.nbytes == both.written.nbytes == nbytes
    assert both.read.seconds == pytest.approx(nbytes / 1e9, rel=0.05) == both.written.seconds, "of the link alone"
    assert {kind for kind, _ in gpu.copies} == {"H2D", "D2H"}


def break_off(source: CacheImage, target: CacheImage) -> None:
    both, pieces = HandOver(source, target), list(source.layout.pieces(PIECE))[:2]
    staged = both.bring(both.reader.read(source, pieces))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        both.writer.write(target, pieces[:1], staged[:1])
        target.gone = True
        with pytest.raises(CacheGone):
            both.writer.write(target, pieces[1:], staged[1:])
    both.reader.read(source, pieces)
    both.close()


def test_a_hand_over_that_breaks_leaves_no_copy(gpu: SimulatedMachine):
    """Its memory is free again only when the copies under way have ended."""
    break_off(image_of(1)[1], image_of(2)[1])
    assert gpu.races == []


def write_twice(target: CacheImage) -> None:
    pieces, writer = list(target.layout.pieces(PIECE)), apart(lambda: PieceWriter(target.device, 2 * PIECE, Copies()))

    def bring() -> list[torch.Tensor]:
        staged = [writer.bring(torch.zeros(PIECE, dtype=torch.uint8)) for _ in range(2)]
        writer.settle()
        return staged

    with torch.cuda.stream(torch.cuda.Stream()):  # steps need not be on the stream that the thread allocates on
        for burst in (pieces[:2], pieces[2:]):
            writer.write(target, burst, apart(bring))
            apart(writer.free)
    apart(writer.close)


def test_staged_pieces_are_written_before_the_next_come(gpu: SimulatedMachine):
    pool, target = image_of(1)
    torch.cuda.synchronize()
    write_twice(target)
    assert gpu.races == []
    assert int(pool.cpu().count_nonzero()) == (CELLS - TOKENS) * WIDTH
