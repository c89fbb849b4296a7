"""The memory plan: what a rank needs, against what it has. Pure arithmetic on integers; nothing is read or allocated.

    dense weights    everything that isn't an expert; every rank holds all of it
    slots            the pool: quota of each MoE layer x bytes of one of its records
    KV cache         keys, values and recurrent states of all sequences
    workspace        the activations of one MoE layer for one batch, and the logits
    unpacking        packed records (FP8, MXFP4) on their way into slots
    predictor        what tells of the next layer's experts, and the rows that it remembers
    reserve          the rest of the forward pass, allocator fragmentation, the device's context

One sum decides whether a configuration starts, and when it doesn't fit, the same sum is the message.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import msgspec

from epslots.errors import ConfigError, DoesNotFitError
from epslots.layout import ITEM_BYTES, LayerSpec, RecordLayout, unpacking_bytes
from epslots.units import SlotsSetting, format_bytes

RESERVE_LEAST_BYTES = 512 * 1024**2
RESERVE_PERCENT = 5
# What `MemoryPlan.alternatives` compares, besides one slot per layer.
ALTERNATIVE_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
# Records that are unpacked at a time: one on each stream of copies (copy_engine.py).
UNPACKED_AT_A_TIME = 2
_FP32_BYTES = ITEM_BYTES["float32"]


class KVLayer(msgspec.Struct, frozen=True):
    """What one sequence keeps of one attention or recurrent layer.

    A layer that keeps two kinds of state (a window beside a compressed history) is two of these.

    Attributes:
        bytes_per_token: grows with every token, up to ``window``.
        window: tokens kept at most; None = all.
        fixed_bytes: recurrent and convolution states, whatever the length.
    """

    bytes_per_token: int
    window: int | None = None
    fixed_bytes: int = 0

    def nbytes(self, tokens: int) -> int:
        """Bytes after ``tokens`` tokens."""
        kept = tokens if self.window is None else min(tokens, self.window)
        return kept * self.bytes_per_token + self.fixed_bytes


class ModelShape(msgspec.Struct, frozen=True):
    """The sizes of a model: all that planning needs to know of it.

    Attributes:
        name: what to call it in messages.
        dtype: of weights and activations, a key of ``ITEM_BYTES``.
        layers: the MoE layers, in order.
        top_k: experts per token.
        dense_bytes: all weights outside the experts; a tied one counts once.
        kv: what one sequence keeps; layers that keep nothing have no entry.
        hidden_size: H, the width of a token between layers.
        vocab_size: V, the width of the logits.
    """

    name: str
    dtype: str
    layers: tuple[LayerSpec, ...]
    top_k: int
    dense_bytes: int
    kv: tuple[KVLayer, ...]
    hidden_size: int
    vocab_size: int

    @property
    def num_experts(self) -> int:
        """Experts of all layers together."""
        return sum(layer.num_experts for layer in self.layers)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts' records."""
        return sum(layer.num_experts * layer.record.nbytes for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Weights of the whole model, counting the dense ones as if all were of ``dtype``."""
        experts = sum(layer.num_experts * layer.layout.elements for layer in self.layers)
        return experts + self.dense_bytes // ITEM_BYTES[self.dtype]

    def kv_bytes(self, tokens: int) -> int:
        """Bytes that one sequence of ``tokens`` tokens keeps."""
        return sum(layer.nbytes(tokens) for layer in self.kv)


def default_reserve(memory_bytes: int | None) -> int:
    """Bytes kept free unless told otherwise: 5 % of the memory, and no less than 512 MiB."""
    return max(RESERVE_LEAST_BYTES, (memory_bytes or 0) * RESERVE_PERCENT // 100)


# --- slots -----------------------------------------------------------------------------------------------------------


def resolve_quotas(setting: SlotsSetting, layers: Sequence[LayerSpec], pool_bytes: int | None) -> tuple[int, ...]:
    """How many slots each MoE layer gets: from 1 to its number of experts.

    Args:
        setting: slots per layer, a share of each layer's experts (rounded down), bytes for the pool, or auto.
        layers: the MoE layers; they may differ in experts and in record size.
        pool_bytes: bytes for the pool when ``setting`` is auto, None = as many as there are experts. Else ignored.

    Raises:
        ConfigError: more slots per layer than the largest layer has experts.
        DoesNotFitError: the bytes don't hold one slot of every layer.
    """
    if setting.per_layer is not None:
        largest = max(layer.num_experts for layer in layers)
        if not 1 <= setting.per_layer <= largest:
            raise ConfigError(
                f"slots={setting.per_layer}: allowed are 1 to {largest} slots per MoE layer, since the largest layer has "
                f"{largest} experts"
            )
        return tuple(min(setting.per_layer, layer.num_experts) for layer in layers)
    if setting.share is not None:
        # The float nearest to 29 % lies below 29/100, which would lose a slot: take the ratio that was meant.
        share = Fraction(setting.share).limit_denominator(1_000_000)
        return tuple(max(1, math.floor(share * layer.num_experts)) for layer in layers)
    budget = pool_bytes if setting.is_auto else setting.total_bytes
    if budget is None:
        return tuple(layer.num_experts for layer in layers)
    return _fill(layers, budget)


def _fill(layers: Sequence[LayerSpec], budget: int) -> tuple[int, ...]:
    """One slot per layer, then slot by slot to the layer that would hold the smallest share of its experts."""
    least = slot_bytes(layers, [1] * len(layers))
    if least > budget:
        raise DoesNotFitError(
            f"one slot in each of {len(layers)} MoE layers takes {_describe_slots(layers, [1] * len(layers))} = "
            f"{format_bytes(least)}, and the pool has {format_bytes(budget)}"
        )
    left = budget - least
    # Shares are compared in units of 1 / lcm, which makes them integers. Ties go to the earlier layer.
    unit = math.lcm(*(layer.num_experts for layer in layers))
    quotas = [1] * len(layers)
    queue = [(2 * (unit // layer.num_experts), i) for i, layer in enumerate(layers) if layer.num_experts > 1]
    heapq.heapify(queue)
    while queue:
        share, i = queue[0]
        if layers[i].layout.nbytes > left:
            heapq.heappop(queue)  # and for good: what is left only shrinks
            continue
        left -= layers[i].layout.nbytes
        quotas[i] += 1
        if quotas[i] < layers[i].num_experts:
            heapq.heapreplace(queue, (share + unit // layers[i].num_experts, i))
        else:
            heapq.heappop(queue)
    return tuple(quotas)


def slot_bytes(layers: Sequence[LayerSpec], quotas: Sequence[int]) -> int:
    """Bytes of a pool with these quotas."""
    return sum(quota * layer.layout.nbytes for quota, layer in zip(quotas, layers, strict=True))


def _describe_slots(layers: Sequence[LayerSpec], quotas: Sequence[int]) -> str:
    """The pool as a sum, ``58 x 84 MiB``: slots x bytes of one, for each size of record."""
    slots: dict[int, int] = {}
    for quota, layer in zip(quotas, layers, strict=True):
        slots[layer.layout.nbytes] = slots.get(layer.layout.nbytes, 0) + quota
    return " + ".join(f"{count:,} x {format_bytes(size)}" for size, count in slots.items())


# --- workspace -------------------------------------------------------------------------------------------------------


def moe_workspace_bytes(shape: ModelShape, batch_tokens: int, ranks: int) -> int:
    """Activations of one MoE layer for a batch of T tokens of this rank, all alive at once.

    There are T x K (token, expert) rows, K experts per token: the sorted copies [T*K, H], gate and up [T*K, 2I], the
    activation [T*K, I], the output [T*K, H], and twice [T*K, H] in fp32 when the rows are weighted and summed over k. With
    several ranks, two more [T*K, H]: rows travel out and back. It is assumed that ranks receive as many rows as they send.
    """
    layouts = {layer.layout for layer in shape.layers}
    row = max(map(_row_bytes, layouts), default=0) + 2 * shape.hidden_size * _FP32_BYTES
    if ranks > 1:
        row += 2 * shape.hidden_size * ITEM_BYTES[shape.dtype]
    return batch_tokens * shape.top_k * row


def _row_bytes(layout: RecordLayout) -> int:
    """A row through one expert: each matrix reads a row as long as one of its sides and writes one as long as the other.

    For gate_up [2I, H] and down [H, I], transposed or not: (H + 2I) + (I + H). Biases are added in place.
    """
    return sum(sum(t.shape) * ITEM_BYTES[t.dtype] for t in layout.tensors if len(t.shape) == 2)


# --- the plan --------------------------------------------------------------------------------------------------------


class Alternative(msgspec.Struct, frozen=True):
    """What another ``slots`` setting would cost one rank, everything else being equal."""

    setting: SlotsSetting
    quotas: tuple[int, ...]
    slot_bytes: int
    total_bytes: int
    resident_share: float
    fits: bool


class MemoryPlan(msgspec.Struct, frozen=True):
    """One rank's memory, item by item; ``plan_memory`` makes these.

    Attributes:
        shape: the model.
        setting: the ``slots`` setting that was asked for.
        quotas: what it comes to, slots of each MoE layer.
        memory_bytes: what the rank has; None = unknown, and everything fits.
        ranks: ranks that share the experts among them.
        kv_tokens: tokens kept of each sequence.
        sequences: sequences that a rank runs at a time.
        batch_tokens: tokens that a rank puts through a layer at a time.
        reserve_bytes: kept free.
        predictor_bytes: of what the layers look ahead by (``foresight.planned_bytes``).
        memory_note: where ``memory_bytes`` comes from, for messages.
    """

    shape: ModelShape
    setting: SlotsSetting
    quotas: tuple[int, ...]
    memory_bytes: int | None
    ranks: int
    kv_tokens: int
    sequences: int
    batch_tokens: int
    reserve_bytes: int
    predictor_bytes: int = 0
    memory_note: str = "memory of one rank"

    @property
    def slot_bytes(self) -> int:
        return slot_bytes(self.shape.layers, self.quotas)

    @property
    def kv_bytes(self) -> int:
        return self.sequences * self.shape.kv_bytes(self.kv_tokens)

    @property
    def workspace_bytes(self) -> int:
        return moe_workspace_bytes(self.shape, self.batch_tokens, self.ranks) + self.logits_bytes

    @property
    def logits_bytes(self) -> int:
        """The next token's logits of every sequence, [sequences, V] in fp32."""
        return self.sequences * self.shape.vocab_size * _FP32_BYTES

    @property
    def unpacking_bytes(self) -> int:
        """What packed records take on their way into slots."""
        return UNPACKED_AT_A_TIME * max(map(unpacking_bytes, self.shape.layers), default=0)

    @property
    def fixed_bytes(self) -> int:
        """Everything but the slots."""
        weights = self.shape.dense_bytes + self.predictor_bytes
        return weights + self.kv_bytes + self.workspace_bytes + self.unpacking_bytes + self.reserve_bytes

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.slot_bytes

    @property
    def free_bytes(self) -> int | None:
        """What is left; negative = short of so much; None = the memory is unknown."""
        return None if self.memory_bytes is None else self.memory_bytes - self.total_bytes

    @property
    def fits(self) -> bool:
        return self.free_bytes is None or self.free_bytes >= 0

    @property
    def host_store_bytes(self) -> int:
        """Host memory or disk that a node needs for its one copy of the experts, whatever its number of ranks."""
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

    @property
    def items(self) -> tuple[tuple[str, int, str], ...]:
        """What adds up to ``total_bytes``: (name, bytes, how it comes about)."""
        layers = self.shape.layers
        plural = "sequence" if self.sequences == 1 else "sequences"
        unpacking = (("unpacking", self.unpacking_bytes, "packed records on their way into slots"),)
        predictor = (("predictor", self.predictor_bytes, "what tells of the next layer's experts"),)
        return (
            ("dense weights", self.shape.dense_bytes, "every rank holds all of them"),
            ("expert slots", self.slot_bytes, f"{_describe_slots(layers, self.quotas)}: {describe_quotas(self.quotas)}"),
            ("KV cache", self.kv_bytes, f"{self.sequences:,} {plural} of {self.kv_tokens:,} tokens"),
            (
                "workspace",
                self.workspace_bytes,
                f"{self.batch_tokens:,} tokens x {self.shape.top_k} experts in one MoE layer, and the logits",
            ),
            *(unpacking if self.unpacking_bytes else ()),
            *(predictor if self.predictor_bytes else ()),
            ("reserve", self.reserve_bytes, "rest of the forward pass, fragmentation, device context"),
        )

    @property
    def alternatives(self) -> tuple[Alternative, ...]:
        """What other settings cost: one slot per layer, then shares of the experts up to all of them."""
        settings = [SlotsSetting(per_layer=1), *(SlotsSetting(share=share) for share in ALTERNATIVE_SHARES)]
        return tuple(map(self._alternative, settings))

    @property
    def largest_fit(self) -> Alternative | None:
        """The most slots per layer, the same number for each, that fit; None if not even one does."""
        layers = self.shape.layers
        most = max(layer.num_experts for layer in layers)
        if self.memory_bytes is None:
            return self._alternative(SlotsSetting(per_layer=most))
        low, high = 0, most
        while low < high:  # low fits (0 being no slots at all), high + 1 doesn't
            middle = (low + high + 1) // 2
            if self._alternative(SlotsSetting(per_layer=middle)).fits:
                low = middle
            else:
                high = middle - 1
        return self._alternative(SlotsSetting(per_layer=low)) if low else None

    def _alternative(self, setting: SlotsSetting) -> Alternative:
        quotas = resolve_quotas(setting, self.shape.layers, None)
        pool = slot_bytes(self.shape.layers, quotas)
        total = self.fixed_bytes + pool
        fits = self.memory_bytes is None or total <= self.memory_bytes
        return Alternative(setting, quotas, pool, total, sum(quotas) / self.shape.num_experts, fits)

    def check(self) -> None:
        """Refuse a configuration that doesn't fit.

        Raises:
            DoesNotFitError: with the sum, line by line, and with what would fit.
        """
        if self.memory_bytes is None or self.free_bytes is None or self.fits:
            return
        rows = [
            *self.items,
            ("needed", self.total_bytes, ""),
            ("available", self.memory_bytes, self.memory_note),
            ("short of", -self.free_bytes, ""),
        ]
        table = "\n".join(f"  {name:14}{format_bytes(size):>11}  {note}".rstrip() for name, size, note in rows)
        raise DoesNotFitError(
            f"{self.shape.name} in {self.shape.dtype} with slots={self.setting} doesn't fit:\n{table}\n{self.advice}"
        )

    @property
    def advice(self) -> str:
        """What would fit, in a sentence."""
        if best := self.largest_fit:
            return (
                f"The most that fits is slots={best.setting.per_layer} ({100 * best.resident_share:.3g}% of the experts, "
                f'{format_bytes(best.slot_bytes)}); slots="auto" takes what there is.'
            )
        least = self._alternative(SlotsSetting(per_layer=1)).total_bytes
        return (
            f"Not even one slot per layer fits, which needs {format_bytes(least)} in all: it takes more memory, or fewer or "
            f"shorter sequences, a smaller batch, or a smaller dtype."
        )


def describe_quotas(quotas: Sequence[int]) -> str:
    """``64 per layer``, or ``31 to 32 per layer``."""
    low, high = min(quotas), max(quotas)
    return f"{low:,} per layer" if low == high else f"{low:,} to {high:,} per layer"


def plan_memory(
    shape: ModelShape,
    setting: SlotsSetting,
    *,
    memory_bytes: int | None,
    ranks: int = 1,
    kv_tokens: int = 4096,
    sequences: int = 1,
    batch_tokens: int = 512,
    reserve_bytes: int | None = None,
    predictor_bytes: int = 0,
    memory_note: str = "memory of one rank",
) -> MemoryPlan:
    """Plan one rank's memory. A plan that doesn't fit is returned, not raised: ``check()`` refuses it.

    Args:
        shape: the model.
        setting: the slots asked for; auto takes what the rest leaves, up to all experts, and at least one per layer.
        memory_bytes: what a rank has; None = unknown.
        ranks: ranks that share the experts; each has the memory above and holds the same number of slots.
        kv_tokens: tokens to keep of each sequence, prompt and output together.
        sequences: sequences that a rank runs at a time.
        batch_tokens: tokens that a rank puts through a layer at a time.
        reserve_bytes: what to keep free; None = ``default_reserve``.
        predictor_bytes: of what the layers look ahead by.
        memory_note: where ``memory_bytes`` comes from, for messages.

    Raises:
        ConfigError: a number is out of range, or there are more slots per layer than experts.
        DoesNotFitError: slots were given in bytes that don't hold one slot of every layer.
    """
    for name, value in (("memory_bytes", memory_bytes), ("reserve_bytes", reserve_bytes), ("kv_tokens", kv_tokens)):
        if value is not None and value < 0:
            raise ConfigError(f"{name}={value}: allowed are 0 and more")
    for name, value in (("ranks", ranks), ("sequences", sequences), ("batch_tokens", batch_tokens)):
        if value < 1:
            raise ConfigError(f"{name}={value}: allowed are 1 and more")
    assert shape.layers, "a model without experts has no use for slots"
    reserve = default_reserve(memory_bytes) if reserve_bytes is None else reserve_bytes
    ones = (1,) * len(shape.layers)
    plan = MemoryPlan(
        shape=shape,
        setting=setting,
        quotas=ones,
        memory_bytes=memory_bytes,
        ranks=ranks,
        kv_tokens=kv_tokens,
        sequences=sequences,
        batch_tokens=batch_tokens,
        reserve_bytes=reserve,
        predictor_bytes=predictor_bytes,
        memory_note=memory_note,
    )
    pool = None if memory_bytes is None else memory_bytes - plan.fixed_bytes
    if setting.is_auto and pool is not None and pool < plan.slot_bytes:
        return plan
    return msgspec.structs.replace(plan, quotas=resolve_quotas(setting, shape.layers, pool))
