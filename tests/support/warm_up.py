"""What forked ranks need of the heavy modules, and all that is compiled: loaded once, in the server that forks them."""

from __future__ import annotations

import gc

import transformers.generation.utils
import transformers.models.deepseek_v3.modeling_deepseek_v3
import transformers.models.gpt_oss.modeling_gpt_oss
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

import epslots.loading  # noqa: F401 - and with it all that is compiled
from epslots.compiled import prepare

prepare()
gc.collect()
gc.freeze()  # transformers collects garbage whenever a cache goes
