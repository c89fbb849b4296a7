"""The memory plan: the bytes that a rank needs. ``memory_report.py`` puts it into words. Pure arithmetic on integers.

dense weights    everything that isn't an expert; every rank holds all of it
slots            the pool: quota of each MoE layer x bytes of one of its slots
KV cache         keys, values, latents and states of all requests, as the engine allocates them (``model_shape.py``)
workspace        the activations of one MoE layer for one step; the logits, and the choice of tokens
unpacking        one matrix at a time, where slots hold experts packed
predictor        its weights, and the rows that it remembers
captured steps   what CUDA graphs of decoding steps keep: activations, and each graph's logits (``captured_sizes.py``)
communication    NCCL's buffers, on GPUs of several ranks
reserve          the rest of the forward pass (attention), hand-overs' pieces, allocator fragmentation, the context
"""

from __future__ import annotations

import msgspec

from epslots.config import EngineConfig
from epslots.errors import ConfigError
from epslots.layout import ITEM_BYTES, RecordLayout, unpacking_bytes
from epslots.models.cache_slots import CacheSlots, exchange_obstacle, in_cells, plan_cache_slots
from epslots.models.captured_sizes import CapturedSizes
from epslots.models.model_shape import ModelShape, row_bytes
from epslots.models.quotas import pool_bytes, resolve_quotas, served_tokens
from epslots.units import SlotsSetting

MIN_RESERVE_BYTES = 512 * 1024**2
RESERVE_PERCENT = 5
# Choosing tokens takes up to so many bytes for each logit, for so many logits at a time, or one row (next_token.py).
CHOICE_LOGIT_BYTES = 50
CHOICE_LOGITS = 2**22
# NCCL's buffers, for all channels and peers, and its kernels: users report 0.3 to 1.5 GB. Not measured here.
NCCL_BYTES = 1024**3
_FP32_BYTES = ITEM_BYTES["float32"]


class PlannedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's device, as far as its memory is planned.

    Attributes:
        kind: "cpu" or "cuda".
        memory_bytes: memory of the rank; None = unknown, and everything fits.
        memory_note: the origin of ``memory_bytes``, for messages.
        reserve_bytes: kept free; None = ``default_reserve``.
        captures: whether the layers' work can be captured on a GPU: above all their products (``product_choice.py``).
        fetches: whether a GPU can fetch experts by itself: the host store is in memory, and will be pinned, and the policy is
            known on the device.
    """

    kind: str = "cpu"
    memory_bytes: int | None = None
    memory_note: str = "memory of one rank"
    reserve_bytes: int | None = None
    captures: bool = True
    fetches: bool = True


class MemoryPlan(msgspec.Struct, frozen=True):
    """One rank's memory, item by item; made by ``plan_memory``.

    Attributes:
        shape: the model.
        setting: the ``slots`` setting that was asked for.
        quotas: slots of each MoE layer by that setting.
        device: of the rank.
        ranks: ranks that share the experts among them.
        engine: requests and tokens that there is room for.
        predictor_bytes: of the prefetchers' predictor (``prefetch.setup.planned_bytes``).
    """

    shape: ModelShape
    setting: SlotsSetting
    quotas: tuple[int, ...]
    device: PlannedDevice
    ranks: int
    engine: EngineConfig
    predictor_bytes: int = 0

    @property
    def memory_bytes(self) -> int | None:
        """Memory of the rank; None = unknown, and everything fits."""
        return self.device.memory_bytes

    @property
    def reserve_bytes(self) -> int:
        """Kept free."""
        given = self.device.reserve_bytes
        return default_reserve(self.memory_bytes) if given is None else given

    @property
    def slot_bytes(self) -> int:
        return pool_bytes(self.shape.layers, self.quotas)

    @property
    def cache_slots(self) -> CacheSlots | None:
        """The exchange of slots and cache with ``kv_tokens="auto"``; None with a number."""
        if not self.engine.exchanges_memory:
            return None
        return plan_cache_slots(self.shape, self.quotas, self.shape.step_tokens(self.engine))

    @property
    def most_kv_tokens(self) -> int:
        """Tokens that the KV cache holds at most."""
        sizes = self.cache_slots
        return self.engine.planned_tokens if sizes is None else sizes.most_tokens

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache; with ``kv_tokens="auto"`` without the slots that layers may cede, which count as slots."""
        sizes = self.cache_slots
        if sizes is None:
            return self.shape.kv_bytes(self.engine)
        outside = [tensor for tensor in self.shape.cache if not in_cells(tensor)]
        step_tokens = self.shape.step_tokens(self.engine)
        return sizes.own_bytes + row_bytes(outside, self.engine, step_tokens, sizes.most_tokens)

    @property
    def workspace_bytes(self) -> int:
        experts = moe_workspace_bytes(self.shape, self.shape.step_tokens(self.engine), self.ranks)
        return experts + self.logits_bytes + self.choice_bytes

    @property
    def logits_bytes(self) -> int:
        """The next token's logits of every request, [requests, V], in the model's dtype and in fp32."""
        logits = self.engine.max_requests * self.shape.vocab_size
        return logits * (ITEM_BYTES[self.shape.dtype] + _FP32_BYTES)

    @property
    def choice_bytes(self) -> int:
        """The choice of tokens from logits, in parts."""
        vocabulary = self.shape.vocab_size
        return CHOICE_LOGIT_BYTES * min(self.engine.max_requests * vocabulary, max(vocabulary, CHOICE_LOGITS))

    @property
    def unpacking_bytes(self) -> int:
        """Memory in which packed matrices are unpacked, one at a time."""
        return max(map(unpacking_bytes, self.shape.layers), default=0)

    @property
    def served_tokens(self) -> int | None:
        """Tokens of a step that can't need more experts than any layer has slots; None = any number."""
        return served_tokens(self.shape.layers, self.quotas, self.shape.top_k)

    @property
    def captures(self) -> bool:
        """Whether the engine captures decoding steps, whole or in pieces."""
        return self.device.kind == "cuda" and self.engine.capture and self.shape.capture_obstacle is None

    @property
    def captures_in_pieces(self) -> bool:
        """Whether it captures them in pieces: the device can't decide about slots (``cuda_graph/lent_slots.py``)."""
        device_decides = self.ranks == 1 and self.device.captures and (self.device.fetches or self.served_tokens is None)
        return self.captures and not device_decides

    @property
    def captured_sizes(self) -> CapturedSizes:
        """The decoding steps that the engine captures."""
        rows = self.engine.max_requests if self.captures else 0
        if self.served_tokens is not None and not self.captures_in_pieces:
            rows = min(rows, self.served_tokens)
        return CapturedSizes(rows, self.engine.planned_tokens)

    @property
    def captured_bytes(self) -> int:
        """Bytes that the graphs of these steps keep."""
        sizes = self.captured_sizes
        if self.captures_in_pieces:
            return sizes.nbytes(self.shape, 0) + sizes.pieces_nbytes(self.shape)
        return sizes.nbytes(self.shape, moe_workspace_bytes(self.shape, sizes.rows, self.ranks))

    @property
    def communication_bytes(self) -> int:
        """Bytes that NCCL takes after the plan is made, when ranks connect and first exchange."""
        return NCCL_BYTES if self.device.kind == "cuda" and self.ranks > 1 else 0

    @property
    def fixed_bytes(self) -> int:
        """Everything but the slots."""
        weights = self.shape.dense_bytes + self.predictor_bytes
        work = self.workspace_bytes + self.unpacking_bytes + self.captured_bytes + self.communication_bytes
        return weights + self.kv_bytes + work + self.reserve_bytes

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.slot_bytes

    @property
    def free_bytes(self) -> int | None:
        """Bytes left over; negative = missing; None = the memory is unknown."""
        return None if self.memory_bytes is None else self.memory_bytes - self.total_bytes

    @property
    def fits(self) -> bool:
        return self.free_bytes is None or self.free_bytes >= 0

    @property
    def host_store_bytes(self) -> int:
        """Host memory or disk for a node's one copy of the experts; its ranks share it."""
        return self.shape.expert_bytes

    @property
    def resident_share(self) -> float:
        """Slots of one rank over all experts."""
        return sum(self.quotas) / self.shape.num_experts

    @property
    def slots_per_expert(self) -> float:
        """Slots of all ranks over all experts: above 1, experts can have replicas."""
        return self.ranks * self.resident_share

    @property
    def all_resident(self) -> bool:
        """Whether every expert can be in a slot of some rank at the same time."""
        return all(self.ranks * q >= layer.num_experts for q, layer in zip(self.quotas, self.shape.layers, strict=True))

    def with_slots(self, setting: SlotsSetting) -> MemoryPlan:
        """The same plan with another ``slots`` setting, which is not auto."""
        return msgspec.structs.replace(self, setting=setting, quotas=resolve_quotas(setting, self.shape.layers, None))


def plan_memory(
    shape: ModelShape,
    setting: SlotsSetting,
    device: PlannedDevice,
    *,
    ranks: int = 1,
    engine: EngineConfig | None = None,
    predictor_bytes: int = 0,
) -> MemoryPlan:
    """Plan one rank's memory. A plan that doesn't fit is returned: ``memory_report.check_fits`` refuses it.

    Args:
        shape: the model.
        setting: the slots asked for; auto takes the memory that is left, up to all experts, and at least one per layer.
        device: of each rank.
        ranks: ranks that share the experts; each has such a device and holds the same number of slots.
        engine: requests and tokens to have room for; by default those of ``EngineConfig``.
        predictor_bytes: of the prefetchers' predictor.

    Raises:
        ConfigError: a number is out of range, there are more slots per layer than experts, or the model's cache and experts
            can't exchange memory.
        DoesNotFitError: slots were given in bytes that don't hold one slot of every layer.
    """
    _check_at_least(0, memory_bytes=device.memory_bytes, reserve_bytes=device.reserve_bytes)
    _check_at_least(1, ranks=ranks)
    assert shape.layers, "a model without experts has no use for slots"
    engine = EngineConfig() if engine is None else engine
    if engine.exchanges_memory and (obstacle := exchange_obstacle(shape)) is not None:
        raise ConfigError(f"kv_tokens='auto': {shape.name} can't exchange memory, because {obstacle}; allowed: a number")
    plan = MemoryPlan(shape, setting, (1,) * len(shape.layers), device, ranks, engine, predictor_bytes)
    if setting.is_auto and device.memory_bytes is not None:
        return _with_auto_slots(plan, device.memory_bytes)
    return msgspec.structs.replace(plan, quotas=resolve_quotas(setting, shape.layers, None))


def _with_auto_slots(plan: MemoryPlan, memory_bytes: int) -> MemoryPlan:
    """The plan with as many slots as there is memory for; with one per layer, if there is none.

    With more slots, larger steps are captured, whose graphs take memory, too: the most slots are searched for.
    """

    def with_pool(nbytes: int) -> MemoryPlan:
        return msgspec.structs.replace(plan, quotas=resolve_quotas(plan.setting, plan.shape.layers, nbytes))

    fewest, most = plan.slot_bytes, memory_bytes - (plan.fixed_bytes - plan.captured_bytes)
    if most < fewest:
        return plan
    if (found := with_pool(most)).fits:
        return found
    while most - fewest > min(layer.layout.nbytes for layer in plan.shape.layers):
        middle = (fewest + most) // 2
        if with_pool(middle).fits:
            fewest = middle
        else:
            most = middle
    return with_pool(fewest)


def default_reserve(memory_bytes: int | None) -> int:
    """Bytes kept free by default: 5 % of the memory, and no less than 512 MiB."""
    return max(MIN_RESERVE_BYTES, (memory_bytes or 0) * RESERVE_PERCENT // 100)


def moe_workspace_bytes(shape: ModelShape, batch_tokens: int, ranks: int) -> int:
    """Activations of one MoE layer for a batch of this rank, all alive at once.

    For T tokens there are T x K (token, expert) rows, K experts per token: the sorted copies [T*K, H], gate and up [T*K, 2I],
    the activation [T*K, I], the output [T*K, H], and twice [T*K, H] in fp32 when the rows are weighted and summed over k. With
    several ranks, two more [T*K, H]: rows travel out and back. Ranks are assumed to receive as many rows as they send.
    """
    layouts = {layer.weights for layer in shape.layers}
    row = max(map(_row_bytes, layouts), default=0) + 2 * shape.hidden_size * _FP32_BYTES
    if ranks > 1:
        row += 2 * shape.hidden_size * ITEM_BYTES[shape.dtype]
    return batch_tokens * shape.top_k * row


def _row_bytes(layout: RecordLayout) -> int:
    """Bytes of a row through one expert: each matrix reads a row of one of its sides' length and writes one of the other's.

    For gate_up [2I, H] and down [H, I], transposed or not: (H + 2I) + (I + H). Biases are added in place.
    """
    return sum(sum(t.shape) * ITEM_BYTES[t.dtype] for t in layout.tensors if len(t.shape) == 2)


def _check_at_least(least: int, **numbers: int | None) -> None:
    """Raises ConfigError for a number below ``least``."""
    for name, value in numbers.items():
        if value is not None and value < least:
            raise ConfigError(f"{name}={value}: allowed are {least} and more")
