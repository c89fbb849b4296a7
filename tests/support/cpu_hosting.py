"""Models that compute some of their misses on the CPU, by costs that make it worth it."""

from __future__ import annotations

import msgspec
from transformers import PreTrainedModel

import epslots
from epslots.moe.moe_layer import plan_alone
from epslots.moe.peers import Alone
from epslots.planner.cost_model import Costs
from epslots.planner.cpu_offload import CpuShare
from epslots.runtime import runtime_of
from tests.support.grouped_ranks import TOKENS_TRAVEL

# A fetch costs as much as many pairs on the host; and as two experts there.
ALWAYS = Costs(10**9, 10**9, 1, 1, 1, 1, 10**6, host_expert=2, host_pair=1)
OFTEN = msgspec.structs.replace(TOKENS_TRAVEL, host_expert=4 * 10**8, host_pair=10**6)


def hosting(model: PreTrainedModel, costs: Costs, *, concurrent: bool) -> PreTrainedModel:
    """The model on one rank, told to compute misses on the CPU where ``costs`` say so."""
    for runner in runtime_of(model).runners:
        share = CpuShare(1, runner.cache.num_experts, costs, concurrent=concurrent)
        runner.form(Alone(), plan_alone(runner.cache, cpu_share=share), complete=runner.cache.holds_all)
    return model


def fetched_bytes(model: PreTrainedModel) -> int:
    return sum(layer.host_bytes for layer in epslots.stats(model).layers)
