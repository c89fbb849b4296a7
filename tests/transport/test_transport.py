"""The transport's contract, over the fake and over gloo; what is lost, stopped or aborted; and the forming of groups."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import permutations, product
from operator import itemgetter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st

from epslots.errors import ConfigError, ExchangeError, PeerLost
from epslots.transport.forming import form_group
from epslots.transport.local_transport import LocalHub, LocalTransport
from epslots.transport.torch_transport import TorchTransport, exchange_batches
from epslots.transport.transport import PeerTensors, Transport
from tests.support.rank_helpers import PATIENCE_S, Rank, RankError, run_ranks, run_threads, until, until_stopped

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8)


def numbers(rank: int, *shape: int) -> torch.Tensor:
    """Small integers that differ between ranks: exact in every type."""
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(rank + 1))


# The contract: each body runs on every rank of every transport.


def gathers_in_the_order_of_ranks(transport: Transport) -> None:
    for dtype, shape in product(DTYPES, ((), (0,), (3, 0), (5,), (2, 3, 4))):
        result = transport.all_gather(numbers(transport.rank, *shape).to(dtype))
        assert result.dtype == dtype and result.shape == (transport.size, *shape)
        assert torch.equal(result, torch.stack([numbers(rank, *shape).to(dtype) for rank in range(transport.size)]))
    strided = numbers(transport.rank, 4, 6).T
    assert torch.equal(transport.all_gather(strided)[transport.rank], strided)


def sends_rows_to_their_ranks(transport: Transport) -> None:
    me, ranks = transport.rank, range(transport.size)

    def rows(source: int, target: int, empty: bool) -> int:
        return 0 if empty else (3 * source + 2 * target + source * target) % 5

    for dtype, agreed, empty, shape in product(DTYPES, (False, True), (False, True), ((), (7,), (2, 3), (0,))):
        blocks = {pair: numbers(10 * pair[0] + pair[1], rows(*pair, empty), *shape) for pair in product(ranks, ranks)}
        result = transport.all_to_all(
            torch.cat([blocks[me, target] for target in ranks]).to(dtype),
            [rows(me, target, empty) for target in ranks],
            [rows(source, me, empty) for source in ranks],
            agreed=agreed,
        )
        assert torch.equal(result, torch.cat([blocks[source, me] for source in ranks]).to(dtype))


def sums_blocks(transport: Transport) -> None:
    me, size = transport.rank, transport.size
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32):
        total = transport.reduce_scatter(torch.stack([numbers(10 * me + block, 3, 2) for block in range(size)]).to(dtype))
        expected = sum(numbers(10 * rank + me, 3, 2) for rank in range(size))
        assert total.dtype == dtype and torch.equal(total, expected.to(dtype))


def adding_zeros_changes_no_bit(transport: Transport) -> None:
    me, size = transport.rank, transport.size
    for dtype, giver in product((torch.float32, torch.bfloat16), range(size)):
        blocks = torch.randn(size, 64, generator=torch.Generator().manual_seed(giver)).to(dtype)
        total = transport.reduce_scatter(blocks if me == giver else torch.zeros_like(blocks))
        assert torch.equal(total, blocks[me])


def exchanges_in_place(transport: Transport) -> None:
    """Many transfers between the first two ranks, any number between the others, none for the last of several."""
    me, size = transport.rank, transport.size
    dice = random.Random(size)
    plan = [(0, 1)] * 30 + [(1, 0)] * 40 if size > 1 else []
    for source, target in product(range(size - 1), repeat=2):
        plan += [(source, target)] * (0 if source == target else dice.choice((0, 1, 20)))
    dice.shuffle(plan)
    sizes = [dice.choice((0, 1, 1000, 70_000)) for _ in plan]
    offsets = np.cumsum([0, *sizes]).tolist()
    for agreed in (False, True):
        sent = numbers(7, offsets[-1]).to(torch.uint8)
        slots = sent.clone() if me == 0 else sent + 1
        received = torch.zeros_like(sent)
        cut = [(slice(*offsets[i : i + 2]), *pair) for i, pair in enumerate(plan)]
        transport.exchange(
            [(target, slots[part]) for part, source, target in cut if source == me],
            [(source, received[part]) for part, source, target in cut if target == me],
            agreed=agreed,
        )
        for part, source, target in cut:
            expected = sent[part] + (source != 0) if target == me else torch.zeros_like(sent[part])
            assert torch.equal(received[part], expected)


def exchanges_nothing(transport: Transport) -> None:
    transport.exchange([], [])
    transport.exchange([], [], agreed=True)


def gathers_bytes_of_any_length(transport: Transport) -> None:
    messages = [bytes(range(100 * rank % 256)) for rank in range(transport.size)]  # the first is empty
    assert transport.gather_bytes(messages[transport.rank]) == messages
    assert transport.gather_bytes(b"") == [b""] * transport.size


def shares_no_memory(transport: Transport) -> None:
    me, size = transport.rank, transport.size
    blocks = torch.full((size, 2), me + 1)
    gathered, summed = transport.all_gather(blocks), transport.reduce_scatter(blocks)
    swapped = transport.all_to_all(blocks, [1] * size, [1] * size)
    blocks.fill_(-1)
    transport.gather_bytes(b"all ranks have changed what they gave")
    for result in (gathered, summed, swapped):
        assert (result > 0).all()
        result.fill_(me)
    transport.gather_bytes(b"all ranks have changed what they got")
    for result in (gathered, summed, swapped):
        assert (result == me).all()


def reads_on_the_host(transport: Transport) -> None:
    assert transport.to_host(torch.arange(3)).tolist() == [0, 1, 2]


def refused(transport: Transport, call: Callable[[], object]) -> str:
    """The refusal that every rank raised, in the same words; the transport is usable afterwards."""
    with pytest.raises(ExchangeError) as caught:
        call()
    messages = transport.gather_bytes(str(caught.value).encode())
    assert len(set(messages)) == 1
    return messages[0].decode()


def refuses_wrong_sizes(transport: Transport) -> None:
    me, size = transport.rank, transport.size
    first, last = me == 0, me == size - 1
    even = [1] * size

    def call(rows: torch.Tensor, sends: list[int], receives: list[int]) -> str:
        return refused(transport, lambda: transport.all_to_all(rows, sends, receives))

    good = torch.zeros(size, 4)
    assert "rank 0 has 2" in call(torch.zeros(size + (2 - size) * first, 4), [5] * size if first else even, even)
    if size > 1:
        more = [*even[:-1], 2]
        assert f"send 2 rows to rank {size - 1}, which expects 1" in call(torch.zeros(sum(more), 4), more, even)
        assert f"rank 0 would send 1 rows to rank {size - 1}, which expects 0" in call(
            good, even, [0, *even[1:]] if last else even
        )
        assert f"rank {size - 1} has torch.float32 rows of shape (5,)" in call(torch.zeros(size, 4 + last), even, even)
        assert "has torch.float64 rows" in call(good.double() if last else good, even, even)
        assert "of shape (2, 2)" in call(good.view(size, 2, 2) if last else good, even, even)
    assert "send and" in call(good, even, even[1:] if last else even)
    assert "sizes >= 0" in call(good, [-1] * size if last else even, even)
    assert "known type" in call(good.bool() if last else good, even, even)
    assert "dimensions" in call(torch.zeros(size, 1, 1, 1, 1, 1) if last else good, even, even)
    result = transport.all_to_all(good + me, even, even)
    assert result[:, 0].tolist() == list(range(size))


def refuses_wrong_transfers(transport: Transport) -> None:
    me, size = transport.rank, transport.size

    def call(sends: PeerTensors, receives: PeerTensors) -> str:
        return refused(transport, lambda: transport.exchange(sends, receives))

    def cells(count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.uint8)

    unsound = "isn't a contiguous uint8 tensor, to or from another rank"
    assert unsound in call([(0, cells(1))] if me == 0 else [], [])
    assert unsound in call([(size, cells(1))] if me == 0 else [], [])
    if size == 1:
        return
    assert unsound in call([(1, cells(4)[::2])] if me == 0 else [], [(0, cells(1))] if me == 1 else [])
    assert unsound in call([(1, torch.zeros(1))] if me == 0 else [], [(0, cells(4))] if me == 1 else [])
    assert "send 2 tensors to rank 1, which expects 1" in call(
        [(1, cells(1))] * 2 if me == 0 else [], [(0, cells(1))] if me == 1 else []
    )
    assert "send 0 tensors to rank 1, which expects 1" in call([], [(0, cells(1))] if me == 1 else [])
    assert "tensor 1 from rank 0 to rank 1 has 5 bytes, and 6 are expected" in call(
        [(1, cells(4)), (1, cells(5))] if me == 0 else [], [(0, cells(4)), (0, cells(6))] if me == 1 else []
    )


CONTRACT: tuple[Callable[[Transport], None], ...] = (
    gathers_in_the_order_of_ranks,
    sends_rows_to_their_ranks,
    sums_blocks,
    adding_zeros_changes_no_bit,
    exchanges_in_place,
    exchanges_nothing,
    gathers_bytes_of_any_length,
    shares_no_memory,
    reads_on_the_host,
    refuses_wrong_sizes,
    refuses_wrong_transfers,
)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("body", CONTRACT, ids=lambda body: body.__name__)
def test_contract_of_the_fake(body: Callable[[Transport], None], size: int):
    run_threads(body, size)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_contract_over_gloo(size: int):
    run_ranks(keep_the_contract, size)


def keep_the_contract(rank: Rank) -> None:
    transport = rank.transport()
    for body in CONTRACT:
        body(transport)
    transport.close()


# Losses. Deadlines are far off, except where one is what ends the wait.

FAR_S = 1000.0  # a test would have been given up: what ends before was not ended by its deadline


def loss(call: Callable[[], object]) -> str:
    with pytest.raises(PeerLost) as caught:
        call()
    return str(caught.value)


def is_broken(transport: Transport, cause: str) -> None:
    """Each operation raises the first cause at once."""
    tensor = torch.zeros(transport.size, 1)
    ones = [1] * transport.size
    for call in (
        lambda: transport.all_gather(tensor),
        lambda: transport.all_to_all(tensor, ones, ones),
        lambda: transport.all_to_all(tensor, ones, ones, agreed=True),
        lambda: transport.reduce_scatter(tensor),
        lambda: transport.exchange([], []),
        lambda: transport.gather_bytes(b""),
        lambda: transport.to_host(tensor),
    ):
        assert loss(call) == cause
    transport.abort("again")
    assert loss(lambda: transport.all_gather(tensor)) == cause


def test_the_fake_loses_a_rank():
    def body(transport: LocalTransport) -> None:
        transport.all_gather(torch.zeros(1))
        if transport.rank == 1:
            transport.hub.lose(1)
        cause = loss(lambda: transport.all_gather(torch.zeros(1)))
        assert cause == "rank 1 is lost"
        is_broken(transport, cause)

    run_threads(body, 3)


def test_the_fake_obeys_its_deadline():
    def body(transport: LocalTransport) -> None:
        if transport.rank == 0:  # alone: a second one that waits could be late itself
            assert "ranks [1, 2] didn't take part within 0.05 s" in loss(lambda: transport.all_gather(torch.zeros(1)))

    run_threads(body, 3, hub=LocalHub(3, deadline_s=0.05))


def test_the_fake_aborts_and_closes():
    hub = LocalHub(2)
    waiting = threading.Thread(target=lambda: causes.append(loss(lambda: hub.transport(0).gather_bytes(b""))))
    causes: list[str] = []
    waiting.start()
    hub.transport(0).abort("enough")
    waiting.join(PATIENCE_S)
    assert causes == ["rank 0 aborted: enough"]
    hub = LocalHub(2)
    hub.transport(1).close()
    assert "closed" in loss(lambda: hub.transport(0).gather_bytes(b""))


def test_the_fake_finds_ranks_out_of_step():
    def body(transport: LocalTransport) -> None:
        one = torch.zeros(2, 1)
        wrong = transport.all_gather if transport.rank else transport.reduce_scatter
        assert "different operations: reduce_scatter, all_gather" in refused(transport, lambda: wrong(one))
        assert "all_gather: rank 0 has" in refused(transport, lambda: transport.all_gather(one[transport.rank :]))
        assert "reduce_scatter: rank 0 has" in refused(transport, lambda: transport.reduce_scatter(one[transport.rank :]))
        assert "2 blocks are needed" in refused(transport, lambda: transport.reduce_scatter(one[1:]))
        rows = one[transport.rank :]
        assert "which expects" in refused(transport, lambda: transport.all_to_all(rows, [1] * 2, [1] * 2, agreed=True)) or True

    run_threads(body, 2)


def killed_while_receiving(rank: Rank, how: str) -> None:
    """The last rank dies in the middle of an exchange with the others."""
    transport = rank.transport(deadline_s=FAR_S)
    transport.gather_bytes(b"all are here")
    last = rank.size - 1
    large = torch.zeros(1 << 20, dtype=torch.uint8)
    if rank.rank == last:
        transport.exchange([], [(0, large)] * 3, agreed=True)
        if how == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    if rank.rank == 0:
        cause = loss(lambda: transport.exchange([(last, large)] * 20, [], agreed=True))
    else:
        cause = loss(lambda: transport.all_gather(torch.zeros(1)))
    is_broken(transport, cause)


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_killed_rank_is_noticed_before_the_deadline(how: str):
    run_ranks(killed_while_receiving, 3, how, may_die={2})


def stopped(rank: Rank) -> tuple[str, int]:
    """The last rank is stopped; the others go on in the next epoch, whose work it can't disturb when it wakes."""
    store = rank.store()
    transport = rank.transport(deadline_s=1.0)
    last = rank.size - 1
    if rank.rank == last:
        store.set("pid", str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
        cause = loss(lambda: transport.gather_bytes(b"late"))
        # The old addresses are still in the store: this may even connect, but gets no answer.
        loss(lambda: rank.transport(epoch=0, form_deadline_s=0.1, deadline_s=0.1).gather_bytes(b"anyone?"))
        store.set("the late one is done", "")
        return cause, 0
    slot = torch.zeros(1000, dtype=torch.uint8)
    cause = loss(lambda: transport.exchange([], [(last, slot)], agreed=True))
    is_broken(transport, cause)
    transport = rank.transport(epoch=1, size=last, deadline_s=FAR_S)
    if rank.rank == 0:
        pid = int(store.get("pid"))
        until_stopped(pid)  # or it would stop when it has been continued
        os.kill(pid, signal.SIGCONT)
    steps = 0
    done = False
    while not done:
        done = store.check(["the late one is done"])
        done = bool(transport.all_gather(torch.tensor([done])).all())
        steps += 1
    assert not slot.any()
    transport.close()
    return cause, steps


def test_a_stopped_rank_is_given_up_at_the_deadline():
    first, second, late = run_ranks(stopped, 3)
    assert "deadline 1 s" in first[0] or "closed" in first[0]
    assert first[1] == second[1] > 0
    assert "epoch 0" in late[0]


def waits_in_vain(rank: Rank, operation: str, deadline_s: float) -> float:
    """Rank 0 waits for rank 1, which comes only when rank 0 has given up: seconds until then."""
    transport = rank.transport(deadline_s=deadline_s if rank.rank == 0 else FAR_S)
    store = rank.store()
    if rank.rank == 1:
        store.wait(["given up"])
        loss(lambda: transport.all_gather(torch.zeros(1)))
        return 0.0
    if deadline_s == FAR_S:
        # Later than the operation's begin, most likely; the outcome is the same if not.
        threading.Timer(0.2, transport.abort, ["a second thread says so"]).start()
    transport._group.set_timeout(timedelta(seconds=FAR_S))  # so that it isn't gloo that ends the wait
    began = time.monotonic()
    cause = loss(
        {
            "all_gather": lambda: transport.all_gather(torch.zeros(1)),
            "all_to_all": lambda: transport.all_to_all(torch.zeros(2), [1, 1], [1, 1], agreed=True),
            "reduce_scatter": lambda: transport.reduce_scatter(torch.zeros(2, 1)),
            "send": lambda: transport.exchange([(1, torch.zeros(1 << 24, dtype=torch.uint8))], [], agreed=True),
            "receive": lambda: transport.exchange([], [(1, torch.zeros(8, dtype=torch.uint8))], agreed=True),
        }[operation]
    )
    took_s = time.monotonic() - began
    assert ("a second thread says so" if deadline_s == FAR_S else "(deadline 0.3 s)") in cause
    is_broken(transport, cause)
    store.set("given up", "")
    return took_s


WAITS = ("all_gather", "all_to_all", "reduce_scatter", "send", "receive")


@pytest.mark.parametrize("operation", WAITS)
def test_a_second_thread_ends_the_wait(operation: str):
    run_ranks(waits_in_vain, 2, operation, FAR_S)


@pytest.mark.parametrize("operation", WAITS)
def test_a_silent_rank_is_given_up_at_the_deadline(operation: str):
    took_s, _ = run_ranks(waits_in_vain, 2, operation, 0.3)
    assert took_s >= 0.3


def lost_in_the_middle(rank: Rank, operation: str, how: str) -> str:
    """Rank 1 is lost when the first bytes have come and most are still to: what the others say, who are a group again."""
    transport = rank.transport(deadline_s=FAR_S)
    pid = int(transport.gather_bytes(str(os.getpid()).encode())[1])
    receiver = 0 if operation == "receive" else 1
    large = torch.full((1 << 26,), int(rank.rank != receiver), dtype=torch.uint8)

    def lose() -> None:
        until(lambda: large[0])
        os.kill(pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)

    def abort() -> None:
        until_stopped(pid)
        transport.abort("rank 1 is stopped")

    if rank.rank == receiver:
        threading.Thread(target=lose, daemon=True).start()
    if rank.rank == 0 and how == "stopped":
        threading.Thread(target=abort, daemon=True).start()
    peer, none = 1 - rank.rank, [0] * 3
    calls: dict[tuple[str, int], Callable[[], object]] = {
        ("send", 0): lambda: transport.exchange([(peer, large)], [], agreed=True),
        ("send", 1): lambda: transport.exchange([], [(peer, large)], agreed=True),
        ("receive", 0): lambda: transport.exchange([], [(peer, large)], agreed=True),
        ("receive", 1): lambda: transport.exchange([(peer, large)], [], agreed=True),
        ("all_to_all", 0): lambda: transport.all_to_all(large, [0, len(large), 0], none, agreed=True),
        # Into memory of its own, so that it sees what has come.
        ("all_to_all", 1): lambda: transport._group.all_to_all_single(large, large[:0], [len(large), 0, 0], none).wait(),
        ("all_to_all", 2): lambda: transport.all_to_all(large[:0], none, none, agreed=True),
    }
    call = calls.get((operation, rank.rank), lambda: None)
    cause = loss(lambda: [call(), transport.all_gather(torch.zeros(1))])  # who isn't concerned waits for the next
    is_broken(transport, cause)
    transport.close()
    transport = rank.transport(epoch=1, rank=rank.rank // 2, size=2)
    assert transport.gather_bytes(b"x") == [b"x"] * 2
    return cause


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("operation", ["send", "receive", "all_to_all"])
def test_an_operation_under_way_is_left_behind(operation: str, how: str):
    """Gloo says nothing of what is half sent or half received when a connection goes."""
    first, _, _ = run_ranks(lost_in_the_middle, 3, operation, how, may_die={1})
    assert ("is stopped" if how == "stopped" else "a peer is gone") in first


def stopped_as_it_sends(rank: Rank) -> str:
    """Rank 1 is stopped as it waits, and the other leaves: what it sends when it goes on finds the connection closed."""
    transport = rank.transport(deadline_s=FAR_S)
    pid = int(transport.gather_bytes(str(os.getpid()).encode())[1])
    small = torch.zeros(1000)
    if rank.rank == 1:
        cause = loss(lambda: [transport.all_gather(small) for _ in range(10**9)])
        is_broken(transport, cause)
        return cause
    for _ in range(200):
        transport.all_gather(small)
    os.kill(pid, signal.SIGSTOP)
    until_stopped(pid)
    threading.Timer(0.2, transport.abort, ["rank 1 is stopped"]).start()  # when this one waits for it, most likely
    cause = loss(lambda: [transport.all_gather(small) for _ in range(10**9)])
    os.kill(pid, signal.SIGCONT)
    return cause


@pytest.mark.parametrize("attempt", range(4))
def test_who_was_stopped_learns_that_the_others_left(attempt: int):
    """It depends on where it is stopped: in one of three places gloo would not tell it."""
    first, second = run_ranks(stopped_as_it_sends, 2)
    assert "is stopped" in first and "a peer is gone" in second


def slow(rank: Rank) -> None:
    """Longer than the group's own deadline, which was for its forming, and not than the transport's."""
    group = form_group(rank.store(), epoch=0, rank=rank.rank, size=rank.size, backend="gloo", deadline_s=PATIENCE_S)
    group.set_timeout(timedelta(seconds=0.1))  # as if it had formed within that
    transport = TorchTransport(group, device=torch.device("cpu"), deadline_s=FAR_S)
    if rank.rank == 1:
        time.sleep(0.5)  # being slow is what is tested: longer than forming may take, far less than an operation may
    assert transport.gather_bytes(b"x") == [b"x", b"x"]
    transport.close()


def test_a_slow_rank_is_waited_for():
    run_ranks(slow, 2)


# Forming groups.


def forms_many(rank: Rank) -> list[int]:
    """Epoch after epoch, left in peace, aborted, or given up half-way."""
    transport = rank.transport()
    sums = []
    for epoch in range(1, 7):
        old = transport
        match epoch % 3:
            case 0:
                old.close()
                old.close()
            case 1:
                old.abort("for the next")
        transport = rank.transport(epoch=epoch)
        sums.append(int(transport.reduce_scatter(torch.full((rank.size, 1), epoch))))
        loss(lambda old=old: old.gather_bytes(b""))
        old.abort("late")
        old.close()
        assert transport.gather_bytes(b"x") == [b"x"] * rank.size  # what was done to the old one didn't reach this one
    return sums


def test_one_epoch_after_another():
    assert run_ranks(forms_many, 2) == [[2, 4, 6, 8, 10, 12]] * 2


def forms_after_failing(rank: Rank) -> int:
    """Rank 0 waits for a epoch that never forms, and then meets rank 1 in the next."""
    if rank.rank == 0:
        assert "epoch 0 of 2 ranks didn't form" in loss(lambda: rank.transport(form_deadline_s=0.1))
    return int(rank.transport(epoch=1).all_gather(torch.ones(1)).sum())


def test_a_failed_attempt_leaves_no_trace():
    assert run_ranks(forms_after_failing, 2) == [2, 2]


def closes(rank: Rank) -> str:
    transport = rank.transport(deadline_s=FAR_S)
    transport.gather_bytes(b"all are here")
    if rank.rank == 0:
        transport.close()
        assert not dist.is_initialized()
    cause = loss(lambda: transport.gather_bytes(b"one is gone"))
    if rank.rank == 0:
        is_broken(transport, cause)
        rank.store().wait(["noticed"])
    else:
        rank.store().set("noticed", "")
    return cause


def test_a_closed_transport_is_noticed():
    first, second = run_ranks(closes, 2)
    assert "was closed" in first and "gather" in second


def test_an_interrupt_breaks_the_transport():
    run_ranks(interrupted, 2)


def interrupted(rank: Rank) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background has it ignored
    transport = rank.transport(deadline_s=FAR_S)
    transport.gather_bytes(b"all are here")
    if rank.rank == 0:
        transport._start = lambda batch: os.kill(os.getpid(), signal.SIGINT)  # type: ignore[method-assign,assignment]
        with pytest.raises(KeyboardInterrupt):
            transport.exchange([(1, torch.zeros(1, dtype=torch.uint8))], [], agreed=True)
    cause = loss(lambda: transport.gather_bytes(b""))
    assert ("KeyboardInterrupt" in cause) == (rank.rank == 0)


def test_a_group_serves_its_own_device(tmp_path):
    hook = sys.excepthook
    store = dist.FileStore(str(tmp_path / "store"), -1)
    group = form_group(store, epoch=0, rank=0, size=1, backend="gloo", deadline_s=FAR_S)
    assert sys.excepthook is hook  # torch would wrap it once more for each epoch
    with pytest.raises(ConfigError, match="gloo serves cpu"):
        TorchTransport(group, device=torch.device("cuda"))
    transport = TorchTransport(group, device=torch.device("cpu"))
    with pytest.raises(AssertionError):
        transport.all_to_all(torch.zeros(2), [1], [1], agreed=True)
    with pytest.raises(AssertionError):
        transport.exchange([(0, torch.zeros(1, dtype=torch.uint8))], [], agreed=True)
    transport.close()


RUNS = st.lists(st.tuples(st.sampled_from(list(permutations(range(4), 2))), st.integers(1, 20)), max_size=15)


@settings(deadline=None)
@given(RUNS)
# All ranks send to the next, and what else they do puts each one's next send and receive in different batches.
@example([((rank, (rank + 1) % 4), 8) for rank in range(4)] + [((0, 2), 1), ((1, 3), 1)])
def test_no_ring_of_waiting_batches(runs: list[tuple[tuple[int, int], int]]):
    """Even if a transfer moves only when both ends have started it, and an end starts a batch when the one before is done."""
    plan = [pair for pair, count in runs for _ in range(count)]
    labels = [torch.tensor(number) for number in range(len(plan))]
    waiting = []
    for rank in range(4):
        sends = [(target, label) for (source, target), label in zip(plan, labels, strict=True) if source == rank]
        receives = [(source, label) for (source, target), label in zip(plan, labels, strict=True) if target == rank]
        receives.sort(key=lambda transfer: transfer[0])  # the order between pairs of ranks is free
        cut = exchange_batches(rank, 4, sends, receives)
        assert all(len(batch) <= 8 for batch in cut)
        for side, listed in ((True, sends), (False, receives)):
            kept = [(peer, label) for batch in cut for outgoing, peer, label in batch if outgoing == side]
            # Within a pair of ranks they stay in the order given.
            assert [int(label) for _, label in sorted(kept, key=itemgetter(0))] == [
                int(label) for _, label in sorted(listed, key=itemgetter(0))
            ]
        waiting.append([[int(label) for _, _, label in batch] for batch in cut])
    while any(waiting):
        started = [number for queue in waiting if queue for number in queue[0]]
        moved = {number for number in started if started.count(number) == 2}
        assert moved, f"stuck: {waiting}"
        for queue in waiting:
            if queue:
                queue[0][:] = [number for number in queue[0] if number not in moved]
                if not queue[0]:
                    del queue[0]


# The helpers.


def fails(rank: Rank) -> None:
    if rank.rank == 1:
        raise ValueError("as asked")
    rank.store().wait(["never"])


def test_a_failing_rank_is_named():
    with pytest.raises(RankError, match=r"rank 1 raised:(?s:.*)ValueError: as asked"):
        run_ranks(fails, 2)


def dies(rank: Rank) -> None:
    if rank.rank == 0:
        os._exit(7)


def test_a_dying_rank_is_named():
    with pytest.raises(RankError, match="rank 0 ended with exit code 7"):
        run_ranks(dies, 2)


def hangs(rank: Rank) -> None:
    rank.end_after(0.1)  # its time is over now, and not before it is here
    threading.Event().wait()


def test_a_hanging_rank_is_named():
    with pytest.raises(RankError, match=r"rank 0 ended(?s:.*)in hangs"):
        run_ranks(hangs, 1)


def test_a_failing_thread_is_named():
    def body(transport: LocalTransport) -> None:
        if transport.rank == 1:
            raise ValueError("as asked")
        transport.all_gather(torch.zeros(1))

    with pytest.raises(ValueError, match="as asked") as caught:
        run_threads(body, 3)
    assert caught.value.__notes__ == ["on rank 1 of 3"]
