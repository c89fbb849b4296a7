"""A grouped product on the CPU: each slot's rows times its matrix, where it lies. It takes as many threads as torch has.

    launch    lists the slots that have rows (*spans*), cuts their products into tasks, and starts the threads
    work      of each thread: takes tasks until none is left, so a thread that other processes slow down does less

The terms of a row's sums are added in an order that depends neither on the number of rows, nor on threads or tasks: so each
row has the same bits in any batch. With codes, that needs ``TILED`` = 0: a few rows are multiplied with weights that aren't
rounded otherwise.

A *job* is an array of integers, whose fields are named below. It and everything it points to belong to the calling thread.
"""

from __future__ import annotations

from epslots.compiled import callback, compiled
from epslots.moe.packed_tiles import codes_tile, unpack_row, write_scales
from epslots.moe.product_tiles import (
    ROW_BLOCK,
    finish,
    finish_gated,
    multiply_tile,
    read,
    read_int32,
    run_threads,
    take_next,
    write,
)
from epslots.moe.vector_code import LANES

# Fields of a job. The first ones are launch's own; NEXT_TASK and NEXT_THREAD are alone in their cache lines.
NEXT_TASK, NEXT_THREAD, TASKS, CHUNKS = 0, 8, 16, 17
# Addresses of functions: what each thread runs, and OpenMP's fork.
WORK, FORK_JOIN, THREADS = 18, 19, 20
# Inputs [N, K] and outputs, with bytes from row to row; ends int32 [Q], where the rows of each slot end.
NUM_ROWS, ROWS, ROW_STRIDE, OUT, OUT_STRIDE, SLOTS, ENDS = 21, 22, 23, 24, 25, 26, 27
# Weights [Q, 2 * PAIRS, K], with bytes from slot to slot and from row to row; biases [Q, 2 * PAIRS] (0 = none).
WEIGHTS, SLOT_STRIDE, WEIGHT_STRIDE, BIAS, BIAS_STRIDE, PAIRS, INNER = 28, 29, 30, 31, 32, 33, 34
# The activation of a pair of results, by the numbers below; the form of the weights; bytes of an output.
ACTIVATION, FORM, OUT_BYTES = 35, 36, 37
# Memory: SPAN integers for each slot, and THREAD_BYTES for each thread.
SPANS, SCRATCH, THREAD_BYTES = 38, 39, 40
# Bytes from a row of the first half of the matrix to its fellow in the second; pairs of a chunk at most.
FAR, MOST = 41, 42
# Codes in the weights' stead, of a kind (-1 = none), which are unpacked a pair of rows after another: then WEIGHT_STRIDE and
# FAR are those of unpacked rows. Rows of a slot up to which codes are multiplied as they are. Bytes from row to row and from
# half to half of codes; columns with padding.
KIND, TILED, CODES_STRIDE, CODES_FAR, COLUMNS = 43, 44, 45, 46, 47
# Blocks of a row, columns and rows of a block (packed_tiles.py); the kind of scales, their bytes, and two floats.
BLOCKS, WIDTH, HALVED, BLOCK_ROWS, SCALE_KIND, SCALE_BYTES, CONSTANTS = 48, 49, 50, 51, 52, 53, 54
# Of each half of the matrix: scales and zeros [Q, block rows, BLOCKS], row scales [Q, rows], the half's first row in these.
SCALES, ZEROS, ROW_SCALES, FIRST_ROW = 55, 57, 59, 61
SCALES_STRIDE, ZEROS_STRIDE, ROW_SCALES_STRIDE = 63, 64, 65
JOB_FIELDS = 66

NO_ACTIVATION, SILU, GELU_TANH = 0, 1, 2

# A span: its slot, first row, and number of rows.
SPAN = 3
# A task is a chunk of pairs: at most so many, whose weights stay in a core's second cache; tasks for each thread at least.
CHUNK, CHUNK_BYTES, SMALLEST_CHUNK, TASKS_PER_THREAD = 64, 1 << 18, LANES, 4
# Pairs of the largest chunk where even the smallest exceeds the cache, and pairs aren't a whole number of these.
LARGEST_REST = 2 * SMALLEST_CHUNK - 1
# A thread's memory: results of these rows with both halves of a chunk. Behind them, of packed matrices, a chunk's unpacked
# pairs of rows, and the scales and zeros of two rows.
_ROW = 4 * CHUNK
_HALF = ROW_BLOCK * _ROW
SCRATCH_BYTES = 2 * _HALF
NO_CODES = -1


@compiled("void(int64, int64, int64, int64, int64, int64)")
def _multiply_rows(job: int, inputs: int, rows: int, weights: int, width: int, results: int) -> None:
    """Results of at most ``ROW_BLOCK`` rows with ``width`` pairs of weights."""
    form, inner, stride = read(job, FORM), read(job, INNER), read(job, ROW_STRIDE)
    weight_stride, far = read(job, WEIGHT_STRIDE), read(job, FAR)
    for column in range(width):
        at, out = weights + column * weight_stride, results + 4 * column
        multiply_tile(rows, form, at, far, inputs, stride, out, _ROW, _HALF, inner)


@compiled("void(int64, int64, int64, int64, int64, int64)")
def _write_row_scales(job: int, slot: int, column: int, half: int, out: int, out_zeros: int) -> None:
    """Scales and zeros of the blocks of one row of a half of a matrix of codes."""
    row, blocks = column + read(job, FIRST_ROW + half), read(job, BLOCKS)
    kind, size, constants = read(job, SCALE_KIND), read(job, SCALE_BYTES), read(job, CONSTANTS)
    first = row // read(job, BLOCK_ROWS) * blocks
    scales = read(job, SCALES + half) + slot * read(job, SCALES_STRIDE) + first * size
    zeros = read(job, ZEROS + half)
    if zeros:
        zeros += slot * read(job, ZEROS_STRIDE) + first
    row_scale = read(job, ROW_SCALES + half) + slot * read(job, ROW_SCALES_STRIDE)
    if read(job, ROW_SCALES_STRIDE):
        row_scale += 4 * row
    block = 0
    while block < blocks:
        at, to, to_zero = scales + block * size, out + 4 * block, out + out_zeros + 4 * block
        if blocks - block >= LANES:
            if zeros:
                write_scales(LANES, 1, kind, at, zeros + block, row_scale, constants, to, to_zero)
            else:
                write_scales(LANES, 0, kind, at, 0, row_scale, constants, to, to_zero)
            block += LANES
        else:
            if zeros:
                write_scales(1, 1, kind, at, zeros + block, row_scale, constants, to, to_zero)
            else:
                write_scales(1, 0, kind, at, 0, row_scale, constants, to, to_zero)
            block += 1


@compiled("void(int64, int64, int64, int64, int64, int64, int64)")
def _multiply_codes(job: int, inputs: int, rows: int, slot: int, column: int, width: int, scratch: int) -> None:
    """Results of a few rows with ``width`` pairs of rows of codes."""
    kind, stride, columns, block = read(job, KIND), read(job, CODES_STRIDE), read(job, COLUMNS), read(job, WIDTH)
    zeros, block_rows, far = 4 * read(job, BLOCKS), read(job, BLOCK_ROWS), read(job, CODES_FAR)
    scales, row_stride = scratch + read(job, THREAD_BYTES) - 4 * zeros, read(job, ROW_STRIDE)
    codes = read(job, WEIGHTS) + slot * read(job, SLOT_STRIDE)
    for number in range(width):
        row, out = column + number, scratch + 4 * number
        for half in range(2):
            if number == 0 or read(job, ROW_SCALES_STRIDE) or (row + read(job, FIRST_ROW + half)) % block_rows == 0:
                _write_row_scales(job, slot, row, half, scales + 2 * half * zeros, zeros)
        at = codes + row * stride
        if read(job, HALVED):
            codes_tile(1, rows, kind, at, far, stride, scales, zeros, block, columns, inputs, row_stride, out, _ROW, _HALF)
        else:
            codes_tile(0, rows, kind, at, far, stride, scales, zeros, block, columns, inputs, row_stride, out, _ROW, _HALF)


@compiled("void(int64, int64, int64, int64, int64)")
def _unpack(job: int, slot: int, column: int, width: int, scratch: int) -> None:
    """Unpack ``width`` pairs of rows into a thread's memory."""
    kind, form, columns, block = read(job, KIND), read(job, FORM), read(job, COLUMNS), read(job, WIDTH)
    zeros, rows, stride = 4 * read(job, BLOCKS), read(job, BLOCK_ROWS), read(job, CODES_STRIDE)
    unpacked, scales = scratch + SCRATCH_BYTES, scratch + read(job, THREAD_BYTES) - 4 * zeros
    held = read(job, INNER)
    codes = read(job, WEIGHTS) + slot * read(job, SLOT_STRIDE)
    for number in range(width):
        for half in range(2):
            row, at = column + number, scales + 2 * half * zeros
            if number == 0 or read(job, ROW_SCALES_STRIDE) or (row + read(job, FIRST_ROW + half)) % rows == 0:
                _write_row_scales(job, slot, row, half, at, zeros)
            stored = codes + row * stride + half * read(job, CODES_FAR)
            out = unpacked + number * read(job, WEIGHT_STRIDE) + half * read(job, FAR)
            if read(job, HALVED):
                unpack_row(1, kind, form, stored, stride, at, zeros, block, columns, held, out)
            else:
                unpack_row(0, kind, form, stored, stride, at, zeros, block, columns, held, out)


@compiled("void(int64, int64, int64, int64, int64)")
def _write_row(job: int, results: int, bias: int, width: int, out: int) -> None:
    """One row's outputs of a chunk: biased, activated and rounded."""
    form, size, activation = read(job, FORM), read(job, OUT_BYTES), read(job, ACTIVATION)
    far = read(job, PAIRS) * size
    for position in range(0, width, LANES):
        at = min(position, width - LANES)  # the last vector repeats a part of the one before
        first, place, first_bias = results + 4 * at, out + at * size, bias + at * size
        second, second_bias = first + _HALF, first_bias + far
        if activation == SILU:
            if bias:
                finish_gated("silu", 1, form, first, second, first_bias, second_bias, place)
            else:
                finish_gated("silu", 0, form, first, second, 0, 0, place)
        elif activation == GELU_TANH:
            if bias:
                finish_gated("gelu_tanh", 1, form, first, second, first_bias, second_bias, place)
            else:
                finish_gated("gelu_tanh", 0, form, first, second, 0, 0, place)
        elif bias:
            finish(1, form, first, first_bias, place)
            finish(1, form, second, second_bias, place + far)
        else:
            finish(0, form, first, 0, place)
            finish(0, form, second, 0, place + far)


@compiled("void(int64, int64, int64)")
def _multiply_chunk(job: int, task: int, scratch: int) -> None:
    """All rows of a span with a chunk of its slot's matrix."""
    chunks, pairs, size = read(job, CHUNKS), read(job, PAIRS), read(job, OUT_BYTES)
    span = read(job, SPANS) + 8 * SPAN * (task // chunks)
    slot, first, rows = read(span, 0), read(span, 1), read(span, 2)
    column = pairs * (task % chunks) // chunks
    width = pairs * (task % chunks + 1) // chunks - column
    bias, packed, few = read(job, BIAS), read(job, KIND) != NO_CODES, rows <= ROW_BLOCK
    if bias:
        bias += slot * read(job, BIAS_STRIDE) + column * size
    weights = read(job, WEIGHTS) + slot * read(job, SLOT_STRIDE) + column * read(job, WEIGHT_STRIDE)
    if packed:
        weights = scratch + SCRATCH_BYTES
        if not few:
            _unpack(job, slot, column, width, scratch)
    for row in range(first, first + rows, ROW_BLOCK):
        some = min(ROW_BLOCK, first + rows - row)
        inputs = read(job, ROWS) + row * read(job, ROW_STRIDE)
        if packed and rows <= read(job, TILED):
            _multiply_codes(job, inputs, some, slot, column, width, scratch)
        elif packed and few:  # while a pair is in the first cache
            for number in range(width):
                _unpack(job, slot, column + number, 1, scratch)
                _multiply_rows(job, inputs, some, weights, 1, scratch + 4 * number)
        else:
            _multiply_rows(job, inputs, some, weights, width, scratch)
        for number in range(some):
            out = read(job, OUT) + (row + number) * read(job, OUT_STRIDE) + column * size
            _write_row(job, scratch + number * _ROW, bias, width, out)


@callback("void(int64)")
def work(job: int) -> None:
    """Take part in a job."""
    scratch = read(job, SCRATCH) + take_next(job, NEXT_THREAD) * read(job, THREAD_BYTES)
    tasks, task = read(job, TASKS), take_next(job, NEXT_TASK)
    while task < tasks:
        _multiply_chunk(job, task, scratch)
        task = take_next(job, NEXT_TASK)


@compiled("void(int64)")
def launch(job: int) -> None:
    """Compute a job, by its address. The fields from ``WORK`` on are filled in; results of rows past the last end aren't."""
    spans, ends, threads, pairs = read(job, SPANS), read(job, ENDS), read(job, THREADS), read(job, PAIRS)
    found = first = 0
    for slot in range(read(job, SLOTS)):
        end = min(read_int32(ends + 4 * slot), read(job, NUM_ROWS))
        if end > first:
            span = spans + 8 * SPAN * found
            write(span, 0, slot)
            write(span, 1, first)
            write(span, 2, end - first)
            found, first = found + 1, end
    if found:
        most = read(job, MOST)
        chunks = max((pairs + most - 1) // most, (TASKS_PER_THREAD * threads + found - 1) // found)
        chunks = min(chunks, pairs // SMALLEST_CHUNK)
        write(job, CHUNKS, chunks)
        write(job, TASKS, found * chunks)
        write(job, NEXT_TASK, 0)
        write(job, NEXT_THREAD, 0)
        run_threads(read(job, FORK_JOIN), read(job, WORK), job, min(threads, found * chunks))


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def start(job: int, given: int, rows: int, inputs: int, out: int, ends: int, threads: int, scratch: int) -> None:
    """Compute a job whose other fields are those of another one, ``given``.

    Args:
        rows, inputs, out: number and address of inputs, address of outputs.
        ends: 0 = all rows are the first slot's.
        scratch: memory for each thread, and behind it the spans.
    """
    for field in range(WORK, JOB_FIELDS):
        write(job, field, read(given, field))
    write(job, THREADS, threads)
    write(job, NUM_ROWS, rows)
    write(job, ROWS, inputs)
    write(job, OUT, out)
    # Of 32 bits: the lower half comes first on every processor that torch has wheels for.
    write(job, ENDS, ends if ends else job + 8 * NUM_ROWS)
    write(job, SCRATCH, scratch)
    write(job, SPANS, scratch + threads * read(given, THREAD_BYTES))
    launch(job)
