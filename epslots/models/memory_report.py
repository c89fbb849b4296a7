"""A memory plan in words: its items, other settings, and the refusal of one that doesn't fit.

One sum decides whether a configuration starts, and when it doesn't fit, the same sum is the message.
"""

from __future__ import annotations

from epslots.errors import DoesNotFitError
from epslots.models.memory_plan import MemoryPlan
from epslots.models.quotas import describe_pool, describe_quotas
from epslots.units import SlotsSetting, format_bytes

# Shares of the experts that ``alternatives`` compares, besides one slot per layer.
ALTERNATIVE_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)


def plan_items(plan: MemoryPlan) -> tuple[tuple[str, int, str], ...]:
    """The items that add up to ``total_bytes``: (name, bytes, origin)."""
    pool = f"{describe_pool(plan.shape.layers, plan.quotas)}: {describe_quotas(plan.quotas)}"
    pool += f"; {plan.shape.slot_note}" if plan.shape.slot_note else ""
    step = f"{plan.shape.step_tokens(plan.engine):,} tokens x {plan.shape.top_k} experts in one MoE layer, and choosing tokens"
    unpacking = ("unpacking", plan.unpacking_bytes, "one matrix at a time, of packed slots")
    predictor = ("predictor", plan.predictor_bytes, "predicts the next layer's experts")
    rows, pieces = plan.captured_sizes.rows, " in pieces" if plan.captures_in_pieces else ""
    what = f"CUDA graphs{pieces} of decoding up to {rows} requests at a time (capture)"
    captured = ("captured steps", plan.captured_bytes, what)
    communication = ("communication", plan.communication_bytes, "NCCL's buffers")
    return (
        ("dense weights", plan.shape.dense_bytes, "every rank holds all of them"),
        ("expert slots", plan.slot_bytes, pool),
        ("KV cache", plan.kv_bytes, describe_cache(plan)),
        ("workspace", plan.workspace_bytes, step),
        *(item for item in (unpacking, predictor, captured, communication) if item[1]),
        ("reserve", plan.reserve_bytes, "rest of the forward pass, fragmentation, device context"),
    )


def describe_cache(plan: MemoryPlan) -> str:
    """The cache that the engine uses, and the room in it."""
    engine, shape, sizes = plan.engine, plan.shape, plan.cache_slots
    requests = f"{engine.max_requests:,} request{'s' if engine.max_requests > 1 else ''}"
    if sizes is None:
        text = f"{shape.cache_kind}: {engine.planned_tokens:,} tokens of up to {requests}, {shape.token_bytes:,} bytes a token"
    else:
        left = [quota - sizes.most_levels * (layer in sizes.layers) for layer, quota in enumerate(plan.quotas)]
        text = (
            f"rows: from {sizes.least_tokens:,} tokens to {sizes.most_tokens:,} with {describe_quotas(left)} left to experts, "
            f"of up to {requests}, {sizes.slot_bytes // sizes.cells_per_slot:,} bytes a token"
        )
    return f"{text}, {shape.request_bytes:,} a request" if shape.request_bytes else text


def alternatives(plan: MemoryPlan) -> tuple[MemoryPlan, ...]:
    """The same plan with one slot per layer, then with growing shares of the experts."""
    settings = [SlotsSetting(per_layer=1), *(SlotsSetting(share=share) for share in ALTERNATIVE_SHARES)]
    return tuple(map(plan.with_slots, settings))


def largest_fit(plan: MemoryPlan) -> MemoryPlan | None:
    """The plan with the most slots per layer that fits, the same number for each layer. None if not even one does."""
    low, high = 0, max(layer.num_experts for layer in plan.shape.layers)
    while low < high:  # low fits (0 being no slots at all), high + 1 doesn't
        middle = (low + high + 1) // 2
        if plan.with_slots(SlotsSetting(per_layer=middle)).fits:
            low = middle
        else:
            high = middle - 1
    return plan.with_slots(SlotsSetting(per_layer=low)) if low else None


def check_fits(plan: MemoryPlan) -> None:
    """Refuse a plan that doesn't fit.

    Raises:
        DoesNotFitError: with the sum, line by line, and the largest setting that would fit.
    """
    if plan.memory_bytes is None or plan.free_bytes is None or plan.fits:
        return
    rows = [
        *plan_items(plan),
        ("needed", plan.total_bytes, ""),
        ("available", plan.memory_bytes, plan.device.memory_note),
        ("short of", -plan.free_bytes, ""),
    ]
    table = "\n".join(f"  {name:14}{format_bytes(size):>11}  {note}".rstrip() for name, size, note in rows)
    raise DoesNotFitError(
        f"{plan.shape.name} in {plan.shape.dtype} with slots={plan.setting} doesn't fit:\n{table}\n{advice(plan)}"
    )


def advice(plan: MemoryPlan) -> str:
    """A sentence that names the largest setting that would fit."""
    if best := largest_fit(plan):
        return (
            f"The most that fits is slots={best.setting.per_layer} ({100 * best.resident_share:.3g}% of the experts, "
            f'{format_bytes(best.slot_bytes)}); slots="auto" takes what there is.'
        )
    least = plan.with_slots(SlotsSetting(per_layer=1)).total_bytes
    return (
        f"Not even one slot per layer fits, which needs {format_bytes(least)} in all: it takes more memory, a smaller "
        f"kv_tokens, max_requests or max_batch_tokens, or a smaller dtype."
    )
