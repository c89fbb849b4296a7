"""A step's keys and values into cells of pools, and the cells that its rows read. One compiled loop on the CPU.

torch makes four operations of it, each of which takes longer for a short context than the copies. Cells hold a token's heads
one behind another. A *job* is an array of integers, whose fields are named below; addresses, and strides in bytes.
"""

from __future__ import annotations

import torch
from numba.core import config

from epslots.compiled import callback, compiled, prepare
from epslots.moe.product_tiles import copy_bytes, read, read_int32, run_threads, take_next, write
from epslots.moe.thread_memory import fork_join, thread_memory

# NEXT_TASK is alone in its cache line. Tasks are so many cells that are read.
NEXT_TASK, TASKS, TASK = 0, 8, 9
# Numbers of cells that are written, in each row, and of those that are read; their addresses.
NEW, WIDTH, READ, NEW_CELLS, READ_CELLS = 10, 11, 12, 13, 14
# Of keys, then of values: pool, bytes of a cell, and from cell to cell; new states, with their strides, heads and bytes of a
# head; the results of reads.
OF_KEYS, OF_VALUES = 15, 25
POOL, CELL, NEXT, STATES, STATES_ROW, STATES_TOKEN, STATES_HEAD, HEADS, HEAD, OUT = range(10)
# Bytes of a task; fewer in all are copied by one thread sooner than several meet.
_TASK_BYTES = 1 << 17


@compiled("void(int64, int64)")
def _write_new(job: int, side: int) -> None:
    heads, size, width = read(job, side + HEADS), read(job, side + HEAD), read(job, WIDTH)
    for number in range(read(job, NEW)):
        row, token = number // width, number % width
        states = read(job, side + STATES) + row * read(job, side + STATES_ROW) + token * read(job, side + STATES_TOKEN)
        cell = read(job, side + POOL) + read(read(job, NEW_CELLS), number) * read(job, side + NEXT)
        for head in range(heads):
            copy_bytes(states + head * read(job, side + STATES_HEAD), cell + head * size, size)


@compiled("void(int64, int64, int64, int64)")
def _read_cells(job: int, side: int, first: int, end: int) -> None:
    size, out = read(job, side + CELL), read(job, side + OUT)
    for number in range(first, end):
        cell = read_int32(read(job, READ_CELLS) + 4 * number)
        copy_bytes(read(job, side + POOL) + cell * read(job, side + NEXT), out + number * size, size)


@callback("void(int64)")
def work(job: int) -> None:
    """Take part in a job's reads."""
    tasks, count, task = read(job, TASKS), read(job, TASK), take_next(job, NEXT_TASK)
    while task < tasks:
        end = min((task + 1) * count, read(job, READ))
        _read_cells(job, OF_KEYS, task * count, end)
        _read_cells(job, OF_VALUES, task * count, end)
        task = take_next(job, NEXT_TASK)


@compiled("void(int64, int64, int64, int64)")
def _launch(job: int, work_address: int, fork: int, threads: int) -> None:
    _write_new(job, OF_KEYS)
    _write_new(job, OF_VALUES)
    write(job, NEXT_TASK, 0)
    run_threads(fork, work_address, job, threads)


def has_whole_cells(pool: torch.Tensor) -> bool:
    """Whether the numbers of a cell of a pool [C, G, D] lie one behind another, apart from other cells'."""
    (_, heads, size), (cell, head, number) = pool.shape, pool.stride()
    return number == 1 and head == size and cell >= heads * size


def fits(pool: torch.Tensor, new: torch.Tensor, cells: torch.Tensor) -> bool:
    """Whether this step's states and cells can be handled here.

    New states [B, G, W, D] go into a pool [C, G, D], and cells, int32 [B * S], are read. There are no gradients here.
    """
    plain = pool.is_cpu and new.dim() == 4 and pool.dim() == 3 and not config.DISABLE_JIT and has_whole_cells(pool)
    if not plain or new.dtype is not pool.dtype or (new.requires_grad and torch.is_grad_enabled()):
        return False
    alike = pool.shape[1] == new.shape[1] and pool.shape[2] == new.shape[3]
    return alike and new.stride(3) == 1 and cells.dtype is torch.int32 and cells.is_contiguous()


def append(
    pools: tuple[torch.Tensor, torch.Tensor],
    new: tuple[torch.Tensor, torch.Tensor],
    new_cells: torch.Tensor,
    read_cells: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put a step's keys and values into cells, and read what its rows attend to: [B, G, S, D] each.

    Args:
        pools: of keys and values, [C, G, D] each.
        new: [B, G, W, D] each, which ``fits`` their pools.
        new_cells: int64 [B * W], contiguous.
        read_cells: int32 [B * S]; may name new ones.
    """
    rows, _, width, _ = new[0].shape
    count = read_cells.shape[0]
    outs = [pool.new_empty(rows, count // rows, *pool.shape[1:]) for pool in pools]
    sides: list[int] = []
    for pool, states, out in zip(pools, new, outs, strict=True):
        item, (_, heads, size) = pool.element_size(), pool.shape
        row, head, token, _ = states.stride()
        strides = row * item, token * item, head * item
        cell = heads * size * item, pool.stride(0) * item
        sides += (pool.data_ptr(), *cell, states.data_ptr(), *strides, heads, size * item, out.data_ptr())
    cell_bytes = sides[CELL] + sides[OF_VALUES - OF_KEYS + CELL]
    task = max(1, _TASK_BYTES // cell_bytes)
    tasks = -(-count // task)
    threads = min(tasks, torch.get_num_threads()) if fork_join() else 1
    if work.address is None:
        prepare()
    here = thread_memory()
    here.enter(TASKS, tasks, task, rows * width, width, count, new_cells.data_ptr(), read_cells.data_ptr(), *sides)
    _launch(here.job, work.address, fork_join(), threads)
    return outs[0].transpose(1, 2), outs[1].transpose(1, 2)
