"""The settings of a model: declared, explained and checked here, once.

``epslots.load`` and ``Cluster`` take them as keywords; ``epslots generate``, ``epslots serve`` and ``python -m cluster.job``
take them as options. All make one frozen ``LoadConfig`` of them, and hand that down; a cluster sends it to its ranks.

To add a setting, touch three files: this one (a field of ``LoadConfig``, and its type as a keyword in ``LoadSettings``), the
module that uses it, and ``cli/options.py`` (a field of ``LoadConfigOptions``).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, TypeVar, Unpack, get_type_hints

import msgspec

from epslots.errors import ConfigError
from epslots.planner.cache_policy import DEFAULT_POLICY, resolve_policy
from epslots.planner.cost_model import Costs
from epslots.units import PrefetchSetting, SlotsSetting, parse_bytes, parse_link, parse_prefetch, parse_slots

if TYPE_CHECKING:
    import torch

    from epslots.planner.cache_policy import Policy

HOST_COMPUTE_SETTINGS = ("auto", "on", "off")
EXPERT_FORMATS = ("int8", "int4")
SLOT_FORMATS = ("auto", "packed", "unpacked")
CACHE_SETTINGS = ("auto", "pages", "rows")
DEFAULT_KV_TOKENS = 4096
AUTO = "auto"
DEFAULT_BATCH_TOKENS = 512
"""Tokens of one step of an engine."""
DEFAULT_REQUESTS = 16
"""Requests of one step of an engine."""
LOAD_DEADLINE_S = 3600.0
"""Seconds that ranks wait for each other while they load: one may build the store that another has."""


@dataclass(frozen=True)
class ComparedAs:
    """Marks a setting that all ranks must have alike. They compare it under this name when they form a group."""

    name: str


@dataclass(frozen=True)
class ChangesOutputs:
    """Marks a setting that changes the model's outputs; with ``only_with``, while that switch is on."""

    only_with: str | None = None


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine keeps and batches its requests: the settings of ``LoadConfig`` that are an engine's."""

    kv_tokens: int | str = DEFAULT_KV_TOKENS
    max_requests: int = DEFAULT_REQUESTS
    max_batch_tokens: int = DEFAULT_BATCH_TOKENS
    cache: Annotated[str, ComparedAs("cache")] = "auto"
    prefix_cache: bool = True
    step_target_ms: float | None = None
    capture: bool = True

    def __post_init__(self) -> None:
        check_kv_tokens(self.kv_tokens)
        if self.exchanges_memory and self.cache == "pages":
            raise ConfigError("kv_tokens='auto' with cache='pages'; allowed: cache='rows' or 'auto', or a number of kv_tokens")
        for name in ("max_requests", "max_batch_tokens"):
            check_count(name, getattr(self, name))
        if self.cache not in CACHE_SETTINGS:
            raise ConfigError(f"cache={self.cache!r}: allowed: {', '.join(CACHE_SETTINGS)}")
        for name in ("prefix_cache", "capture"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: allowed: True, False")
        target = self.step_target_ms
        if target is not None and (not isinstance(target, int | float) or isinstance(target, bool) or not 0 < target < 1e6):
            raise ConfigError(f"step_target_ms={target!r}: allowed: None, or milliseconds, more than 0")

    @property
    def exchanges_memory(self) -> bool:
        """Whether the cache and the experts exchange memory while the engine runs (``models/cache_slots.py``)."""
        return self.kv_tokens == AUTO

    @property
    def planned_tokens(self) -> int:
        """``kv_tokens``; for "auto", the number by which sizes that are chosen once are planned: those of captured steps."""
        return DEFAULT_KV_TOKENS if isinstance(self.kv_tokens, str) else self.kv_tokens

    def step_tokens(self, whole_prompts: bool) -> int:
        """Tokens of one step, at most; ``whole_prompts``: a prompt of any length is computed in one step."""
        return self.planned_tokens if whole_prompts else max(self.max_batch_tokens, self.max_requests)


class LoadConfig(EngineConfig, frozen=True, kw_only=True):
    """Settings by which a checkpoint is loaded and run on each rank.

    Attributes:
        slots: expert slots: an int (per MoE layer), ``"25%"`` (of each layer's experts), ``"12GiB"`` (bytes of the whole pool)
            or ``"auto"`` (the memory that dense weights, KV cache, workspace, predictor and reserve leave). ``epslots plan``
            says what fits, ``epslots trace replay`` the hit rate of so many slots on recorded traffic.
        device: device of the model: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``; by default the current GPU, or the CPU without one.
        dtype: dtype of the computation; ``"auto"`` is the checkpoint's own, as in transformers (bfloat16 if it is quantised).
        policy: eviction policy: a name (``cache_policy.POLICIES``), or a function of a ``UseHistory`` in this process.
        host_store: ``"file"`` (a mapped file in ``cache_dir``, kept for the next start) or ``"memory"`` (shared memory of the
            node, freed with its last user). Default: memory on a GPU where it fits, because it can be pinned; else file.
        host_memory: RAM of each node for the host store, such as ``"64GiB"``, in equal shares for its ranks: it keeps the
            experts that are fetched most, and the others are read from the store's file ahead of their use. The rest of the
            RAM stays free of them. Default: as much as the operating system gives.
        slot_format: of a quantised checkpoint's experts in slots and host store: ``"packed"``, as they are stored, in a half
            to a quarter of bf16's bytes; ``"unpacked"``, in ``dtype``; or ``"auto"``, packed where a kernel of the device
            computes with their form. ``epslots plan`` says which.
        expert_format: quantise the experts of a checkpoint that isn't quantised: ``"int8"`` (a scale for each row) or
            ``"int4"`` (a scale and a zero for 32 weights), and keep them packed. **The outputs are no longer the model's
            own.**
        cache_dir: folder of the host store; by default the user's cache folder. A store is as large as the experts, one for
            each checkpoint and dtype, and built anew when a weight file or its mode changes. None is ever pruned: delete
            files there when no process uses them.
        kv_tokens: tokens that the cache of an ``Engine`` keeps of all requests together: the memory plan reserves their bytes.
            ``"auto"``: those of one step, and more in slots that experts cede while requests need the room. Experts keep a
            quarter of their slots; ``epslots plan`` says the bounds. Only with rows (``cache``).
        max_requests: requests that an ``Engine`` runs at a time. The memory plan reserves the logits of each, and the states
            that recurrent layers keep of it.
        max_batch_tokens: tokens of one step of an ``Engine``, at most; longer prompts take several steps. The memory plan
            reserves their activations.
        cache: how an ``Engine`` keeps requests: ``"pages"`` (keys and values of plain attention), ``"rows"`` (all that the
            model's layers keep: latents, windows, recurrent states) or ``"auto"``, the faster one that the model allows.
        prefix_cache: prompts that begin alike share what was computed for their common beginning.
        step_target_ms: choose the prompt tokens of a step so that it takes about this long, because decoding waits for it;
            None = only ``max_batch_tokens`` limits them.
        capture: on a GPU, let an ``Engine`` decode by CUDA graphs, where the model allows it.
        link: an emulated link between host and device, such as ``"8GB/s,20us"``, to see on a CPU how fetches overlap with
            compute. Default: the device's own link; on a CPU, fetches take no time of their own.
        prefetch: fetch the experts that the next layer is expected to need while this one computes: ``"auto"`` (where a link
            carries them meanwhile), ``"off"``, or the bytes that a rank may fetch in a step before prefetching pauses
            (``"64MiB"``).
        predictor: file of ``epslots predict fit``, which predicts the next layer's experts. Default: the file beside the
            checkpoint; without one, the next layer's router.
        execute_predicted: execute the predicted experts instead of those that the model's router chooses, in all layers but
            the first. **The outputs are no longer the model's own.**
        host_compute: let the host's CPU compute a missing expert, from the host store, where that costs less than fetching it:
            ``"auto"`` (with a GPU), ``"on"`` or ``"off"``. ``costs``, if given, must include its cost.
        attn_implementation: transformers' attention, by its name: ``"sdpa"``, ``"eager"``, ``"flash_attention_2"``. Flash
            attention is a package of its own, and reads the pages of an ``Engine`` in place. Default: the model's own choice.
        batch_invariant: compute each token in the same bits for any batch, slots, and number of ranks. Slower.
            Experts and dense layers hold it in every forward pass; attention holds it in an ``Engine``. The bits are those of
            one machine type, torch build and number of threads.
    """

    slots: int | str | SlotsSetting = "auto"
    device: Annotated[str | None, ComparedAs("device")] = None
    dtype: Annotated[str, ComparedAs("dtype"), ChangesOutputs()] = "auto"
    policy: Annotated[Any, ComparedAs("policy")] = DEFAULT_POLICY
    """str | Policy: a union that msgspec can't decode. A message carries only names."""
    host_store: str | None = None
    host_memory: str | None = None
    slot_format: Annotated[str, ComparedAs("slot_format")] = "auto"
    expert_format: Annotated[str | None, ComparedAs("expert_format"), ChangesOutputs()] = None
    cache_dir: str | None = None
    link: Annotated[str | None, ComparedAs("fetches")] = None
    prefetch: Annotated[str | bool | PrefetchSetting, ComparedAs("predictions")] = "auto"
    predictor: Annotated[str | None, ComparedAs("predictions"), ChangesOutputs(only_with="execute_predicted")] = None
    execute_predicted: Annotated[bool, ComparedAs("predictions"), ChangesOutputs()] = False
    host_compute: Annotated[str, ComparedAs("host_compute")] = "auto"
    attn_implementation: Annotated[str | None, ComparedAs("attention"), ChangesOutputs()] = None
    batch_invariant: Annotated[bool, ComparedAs("batch_invariant"), ChangesOutputs()] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_slots(self.slots)
        resolve_policy(self.policy)
        parse_prefetch(self.prefetch)
        if self.link is not None:
            parse_link(self.link)
        if not isinstance(self.attn_implementation, str | None):
            raise ConfigError(f"attn_implementation={self.attn_implementation!r}: allowed: None, or a name, such as 'sdpa'")
        for name in ("execute_predicted", "batch_invariant"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: allowed: True, False")
        if self.host_memory is not None:
            self._check_host_memory()
        if self.slot_format not in SLOT_FORMATS:
            raise ConfigError(f"slot_format={self.slot_format!r}: allowed: {', '.join(SLOT_FORMATS)}")
        if self.expert_format is not None and self.expert_format not in EXPERT_FORMATS:
            raise ConfigError(f"expert_format={self.expert_format!r}: allowed: None, {', '.join(EXPERT_FORMATS)}")
        if self.expert_format is not None and self.slot_format == "unpacked":
            raise ConfigError(
                "expert_format with slot_format='unpacked': quantised experts would take whole slots; leave one out"
            )
        if self.host_compute not in HOST_COMPUTE_SETTINGS:
            raise ConfigError(f"host_compute={self.host_compute!r}: allowed: {', '.join(HOST_COMPUTE_SETTINGS)}")
        if self.batch_invariant and self.execute_predicted:
            raise ConfigError(
                "batch_invariant with execute_predicted: the predicted experts may depend on the batch; leave one out"
            )

    def _check_host_memory(self) -> None:
        if not isinstance(self.host_memory, str):
            raise ConfigError(f"host_memory={self.host_memory!r}: allowed: None, or bytes such as '64GiB'")
        parse_bytes(self.host_memory, "host_memory")
        if self.host_store == "memory":
            raise ConfigError(
                f"host_memory={self.host_memory!r} with host_store='memory': that keeps all experts in RAM; leave one out"
            )

    @property
    def host_memory_bytes(self) -> int | None:
        """RAM of a node for the host store; None = not bounded."""
        return None if self.host_memory is None else parse_bytes(self.host_memory, "host_memory")

    @property
    def engine(self) -> EngineConfig:
        """The settings of an engine that serves the model."""
        return EngineConfig(**{name: getattr(self, name) for name in EngineConfig.__struct_fields__})

    def check_costs(self, costs: Costs | None) -> None:
        """Refuse costs without those that this configuration needs.

        Raises:
            ConfigError: experts are to be computed on the host, and the costs of that are missing.
        """
        if self.host_compute == "on" and costs is not None and not costs.computes_on_host:
            raise ConfigError(
                "host_compute='on', but costs don't say what it costs: give host_expert and host_pair, or no costs"
            )

    def check_device(self, device: str) -> None:
        """Refuse settings that contradict each other on a kind of device: ``"cpu"`` or ``"cuda"``.

        Raises:
            ConfigError: naming them.
        """
        if self.host_compute == "on" and self.batch_invariant and device == "cuda":
            raise ConfigError("batch_invariant with host_compute='on': the host's sums differ from the GPU's; leave one out")

    def computes_on_host(self, device: str) -> bool:
        """Whether the host's CPU may compute missing experts of a model on this kind of device."""
        if self.host_compute == "auto":
            return device == "cuda" and not self.batch_invariant
        return self.host_compute == "on"

    def has_link(self, device: str) -> bool:
        """Whether this kind of device computes while experts come from the host or the disk."""
        return device == "cuda" or self.link is not None or self.host_memory is not None

    def compared(self, effects: Mapping[str, str]) -> dict[str, str]:
        """The settings that all ranks must have alike, by the names of their ``ComparedAs``.

        Args:
            effects: values of settings that the machine decides on (``"auto"``); the others are compared as given.
        """
        return {mark.name: effects.get(mark.name, str(getattr(self, field))) for field, mark in _marked(ComparedAs)}

    @property
    def output_settings(self) -> dict[str, Any]:
        """The settings that change the model's outputs, by field: those of a job's digest."""
        return {
            field: getattr(self, field)
            for field, mark in _marked(ChangesOutputs)
            if mark.only_with is None or getattr(self, mark.only_with)
        }

    def keywords(self) -> dict[str, Any]:
        """The fields as keywords of ``load`` and ``Cluster``."""
        return msgspec.structs.asdict(self)


Mark = TypeVar("Mark", ComparedAs, ChangesOutputs)


def _marked(kind: type[Mark]) -> Iterator[tuple[str, Mark]]:
    """The fields of ``LoadConfig`` that carry a mark, with it."""
    for name, hint in get_type_hints(LoadConfig, include_extras=True).items():
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, kind):
                yield name, mark


class LoadSettings(TypedDict, total=False):
    """The fields of ``LoadConfig`` as users may write them: also as paths and as torch's own types."""

    slots: int | str | SlotsSetting
    device: str | torch.device | None
    dtype: str | torch.dtype
    policy: str | Policy
    host_store: str | None
    host_memory: str | None
    slot_format: str
    expert_format: str | None
    cache_dir: str | os.PathLike[str] | None
    kv_tokens: int | str
    max_requests: int
    max_batch_tokens: int
    cache: str
    prefix_cache: bool
    step_target_ms: float | None
    capture: bool
    link: str | None
    prefetch: str | bool | PrefetchSetting
    predictor: str | os.PathLike[str] | None
    execute_predicted: bool
    host_compute: str
    attn_implementation: str | None
    batch_invariant: bool


def load_config(**settings: Unpack[LoadSettings]) -> LoadConfig:
    """A ``LoadConfig`` of plain values: paths are absolute, because ranks have working folders of their own.

    Raises:
        ConfigError: a setting is unknown, or its value is not one of those allowed.
    """
    refuse_unknown(settings, tuple(LoadSettings.__annotations__))
    plain: dict[str, Any] = dict(settings)
    for name in ("device", "dtype"):
        if plain.get(name) is not None:
            plain[name] = str(plain[name]).removeprefix("torch.")
    for name in ("cache_dir", "predictor"):
        if plain.get(name) is not None:
            plain[name] = str(Path(plain[name]).absolute())
    return LoadConfig(**plain)


def refuse_unknown(given: Mapping[str, object], allowed: tuple[str, ...]) -> None:
    """Refuse keywords that nothing would read.

    Raises:
        ConfigError: naming them, and those that are allowed.
    """
    if unknown := sorted(set(given) - set(allowed)):
        raise ConfigError(
            f"{', '.join(unknown)}: epslots sets this itself, or has no such setting; allowed: {', '.join(allowed)}"
        )


def check_kv_tokens(given: object) -> None:
    """Refuse a ``kv_tokens`` that is neither a number nor "auto".

    Raises:
        ConfigError: naming it, and what is allowed.
    """
    counts = isinstance(given, int) and not isinstance(given, bool) and given >= 0
    if given != AUTO and not counts:
        raise ConfigError(f"kv_tokens={given!r}; allowed: an int, at least 0, or 'auto'")


def check_count(name: str, given: object) -> None:
    """Refuse a number that counts nothing.

    Raises:
        ConfigError: it isn't an int, or less than one.
    """
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise ConfigError(f"{name}={given!r}; allowed: an int, at least 1")


Target = TypeVar("Target", bound=Callable[..., Any])


def with_keywords(settings: type, *configs: type[msgspec.Struct]) -> Callable[[Target], Target]:
    """Show configurations' fields as keywords of a callable that takes ``**settings``: to ``help`` and notebooks.

    Its signature gets their names, types and defaults, before its own keywords; its docstring gets their meanings.

    Args:
        settings: the TypedDict of the keywords that users may write.
        configs: have the defaults, and docstrings with ``Attributes:`` at the end.
    """
    kind, types = inspect.Parameter.KEYWORD_ONLY, settings.__annotations__
    keywords = [
        inspect.Parameter(field.name, kind, default=field.default, annotation=types[field.name].__forward_arg__)
        for config in configs
        for field in msgspec.structs.fields(config)
        if field.name in types
    ]
    meanings = "\n".join((inspect.getdoc(config) or "").partition("Attributes:\n")[2] for config in configs)

    def decorate(target: Target) -> Target:
        signature = inspect.signature(target)
        own = signature.parameters.values()
        parameters = [*(p for p in own if p.kind < kind), *keywords, *(p for p in own if p.kind == kind)]
        setattr(target, "__signature__", signature.replace(parameters=parameters))  # noqa: B010
        target.__doc__ = f"{inspect.getdoc(target)}\n\nSettings:\n{meanings}"
        return target

    return decorate
