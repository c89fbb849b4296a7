"""Packed codes as floats on the CPU, in compiled loops: as ``unpacking.py`` in torch, several times as fast.

Each function computes ``values = (code - zero) * scale`` for some rows, with a scale and a zero for each block of a row's
columns. Codes become floats by shifts and selections, which the compiler turns into vectors: a table of values would be read
one by one. Blocks have a multiple of ``LANES`` columns, or there is one of any size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epslots.compiled import compiled, inlined

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

LANES = 16
_SIGNATURE = "void(uint8[:, ::1], float32[:, ::1], float32[:, ::1], int64, float32[:, ::1])"


@inlined
def _e4m3(code):  # type: ignore[no-untyped-def]
    bits = np.uint32(code)
    magnitude = np.uint32(bits & np.uint32(127))
    normal = np.uint32((magnitude << np.uint32(20)) + np.uint32(120 << 23)).view(np.float32)
    small = np.float32(magnitude) * np.float32(2.0**-9)
    value = small if magnitude < 8 else normal
    others = np.uint32(np.uint32(magnitude == 127) * np.uint32(0x7FC00000)) | ((bits & np.uint32(128)) << np.uint32(24))
    return np.uint32(np.float32(value).view(np.uint32) | others).view(np.float32)


@inlined
def _signed(code):  # type: ignore[no-untyped-def]
    return np.float32(np.uint32(np.uint32(code) ^ np.uint32(128))) - np.float32(128)


@inlined
def _low_half(code):  # type: ignore[no-untyped-def]
    return np.float32(np.uint32(np.uint32(code) & np.uint32(15)))


@inlined
def _high_half(code):  # type: ignore[no-untyped-def]
    return np.float32(np.uint32(np.uint32(code) >> np.uint32(4)))


@inlined
def _e2m1(code):  # type: ignore[no-untyped-def]
    bits = np.uint32(code)
    magnitude = np.uint32(bits & np.uint32(7))
    normal = np.uint32((magnitude << np.uint32(22)) + np.uint32(126 << 23)).view(np.float32)
    small = np.float32(magnitude) * np.float32(0.5)
    value = small if magnitude < 2 else normal
    return np.uint32(np.float32(value).view(np.uint32) | np.uint32((bits & np.uint32(8)) << np.uint32(28))).view(np.float32)


@compiled(_SIGNATURE)
def scale_int4(codes: U8, scale: F32, zero: F32, width: int, values: F32) -> None:
    """Codes 0 to 15, two a byte as ``layout.NIBBLES`` has them."""
    for row in range(codes.shape[0]):
        for block in range(codes.shape[1] // 16):
            first, second = 32 * block // width, (32 * block + 16) // width
            low, high = scale[row, first], scale[row, second]
            low_zero, high_zero = zero[row, first], zero[row, second]
            source, target = codes[row, 16 * block : 16 * block + 16], values[row, 32 * block : 32 * block + 32]
            for lane in range(len(source)):
                target[lane] = (_low_half(source[lane]) - low_zero) * low
            for lane in range(len(source)):
                target[lane + 16] = (_high_half(source[lane]) - high_zero) * high


@compiled(_SIGNATURE)
def scale_e2m1(codes: U8, scale: F32, zero: F32, width: int, values: F32) -> None:
    """4-bit floats, likewise; ``zero`` isn't read."""
    for row in range(codes.shape[0]):
        for block in range(codes.shape[1] // 16):
            low, high = scale[row, 32 * block // width], scale[row, (32 * block + 16) // width]
            for lane in range(16):
                values[row, 32 * block + lane] = _e2m1(codes[row, 16 * block + lane] & 15) * low
            for lane in range(16):
                values[row, 32 * block + 16 + lane] = _e2m1(codes[row, 16 * block + lane] >> 4) * high


def _scale_bytes(value_of: Callable[..., Any]) -> Callable[..., None]:
    """The loop for codes of one byte each; ``zero`` isn't read."""

    @compiled(_SIGNATURE)
    def scale_bytes(codes: U8, scale: F32, zero: F32, width: int, values: F32) -> None:
        columns = codes.shape[1]
        for row in range(codes.shape[0]):
            for block in range(scale.shape[1]):
                factor, begin = scale[row, block], block * width
                end = columns if block == scale.shape[1] - 1 else begin + width
                source, target = codes[row, begin:end], values[row, begin:end]
                for lane in range(len(source)):
                    target[lane] = value_of(source[lane]) * factor

    return scale_bytes


SCALE = {"int4": scale_int4, "e2m1": scale_e2m1, "e4m3": _scale_bytes(_e4m3), "int8": _scale_bytes(_signed)}
"""The loop of each kind of codes: (codes as bytes, scale and zero [rows, blocks], columns of a block, float32 values)."""
