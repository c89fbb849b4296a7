"""The heavy modules and compiled code of forked ranks, loaded once, in the server that forks them."""

from __future__ import annotations

import gc
from importlib import import_module

from epslots.importing import without_collections

MODULES = (
    "transformers.generation.utils",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "epslots.loading",
)

with without_collections():
    for module in MODULES:
        import_module(module)
    import_module("epslots.compiled").prepare()
    gc.freeze()  # transformers collects garbage whenever a cache goes
