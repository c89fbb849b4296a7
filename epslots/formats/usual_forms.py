"""The forms that each format's checkpoints mostly have, for plans of known models: they have no headers to read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from epslots.layout import PackedForm

USUAL_FORMS: dict[str, Callable[[int, int], PackedForm]] = {
    "fp8": partial(PackedForm, "e4m3", group="float32", block=(128, 128)),
    "fp8-channels": partial(PackedForm, "e4m3", row=True),
    "int8-channels": partial(PackedForm, "int8", row=True),
    "int4-groups": partial(PackedForm, "int4", group="bfloat16", block=(1, 32)),
    "awq": partial(PackedForm, "int4", group="float16", block=(1, 128), zero=True),
    "gptq": partial(PackedForm, "int4", group="float16", block=(1, 128), zero=True),
    "mxfp4": partial(PackedForm, "e2m1", group="uint8", block=(1, 32)),
    "nvfp4": partial(PackedForm, "e2m1", group="float8_e4m3fn", block=(1, 16), row=True),
}
"""By name, the form of a matrix of so many rows and columns.

    fp8             blocks of 128 x 128 (DeepSeek-V3, Kimi-K2, Qwen3's FP8 checkpoints)
    fp8-channels    compressed-tensors with a scale for each row; int8-channels likewise
    int4-groups     compressed-tensors' pack-quantized, symmetric, in groups of 32 (Kimi-K2-Thinking)
    awq, gptq       groups of 128 with zeros, no act order
    mxfp4           gpt-oss
    nvfp4           modelopt's and compressed-tensors'
"""
