"""``tiny_twin``: a model of the true number of layers, experts and choices with tiny widths, for predicted timelines."""

from __future__ import annotations

import copy

from transformers import PreTrainedConfig

from epslots.errors import ConfigError
from epslots.simulated_gpu.true_sizes import TrueSizes

# Tiny widths by the configuration's name; whole multiples of 8, as grouped products need. Those of one model, and what is
# computed from them, all differ, and no number of experts, heads or layers is among them.
_WIDTHS = {"hidden_size": 40, "moe_intermediate_size": 56, "intermediate_size": 88, "head_dim": 24, "vocab_size": 208}
ARCHITECTURES = ("Qwen3MoeForCausalLM", "MixtralForCausalLM")
"""Those whose every dimension is one of these, or made of them."""


def tiny_twin(config: PreTrainedConfig, layers: int | None = None) -> tuple[PreTrainedConfig, TrueSizes]:
    """A configuration with tiny widths, and what they stand for.

    Args:
        config: of one of ``ARCHITECTURES``.
        layers: of the twin; None = as many as there are.

    Raises:
        ConfigError: it is of another one.
    """
    architecture = (config.architectures or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"a timeline of {architecture}: allowed: {', '.join(ARCHITECTURES)}")
    twin, sizes = copy.deepcopy(config), TrueSizes({})
    twin.architectures = config.architectures
    for name, tiny in _WIDTHS.items():
        true = getattr(config, name, None)
        if name == "head_dim" and true is None:
            true = config.hidden_size // config.num_attention_heads
        if true is not None:
            setattr(twin, name, tiny)
            sizes.add(tiny, true)
    expert = "moe_intermediate_size" if hasattr(config, "moe_intermediate_size") else "intermediate_size"
    head = sizes.numel([twin.head_dim])
    sizes.add(2 * getattr(twin, expert), 2 * getattr(config, expert))  # gate and up
    sizes.add(twin.head_dim // 2, head // 2)  # rotary embeddings
    for heads in {config.num_attention_heads, config.num_key_value_heads}:
        sizes.add(heads * twin.head_dim, heads * head)
    twin.num_hidden_layers = config.num_hidden_layers if layers is None else layers
    if getattr(twin, "layer_types", None):
        twin.layer_types = twin.layer_types[: twin.num_hidden_layers]
    return twin, sizes
