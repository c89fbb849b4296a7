"""Captured decoding: a decode step of fixed shape, captured once as a CUDA graph and replayed.

A plain ``generate`` launches some thousand small kernels between two tokens, and waits for the host once a layer where experts
may be missing. Here keys and values lie in transformers' static cache (``static_cache.py``), inputs and outputs stay in place,
and the device decides about slots (``device_slots.py``). So a step is one call, and needs no host synchronisation.

    prefill    the prompt, on the usual path: it needs more experts than there are slots, and has no fixed shape
    1st step   on the device, uncaptured: kernels are compiled, workspaces allocated
    2nd step   captured, and replayed; all later ones are replayed

Without a GPU no step is captured; where ``DecodeGraph.obstacle`` is set, all steps take the usual path. Decision and copies
inside of the graph are an idea of FreeToken's; capturing follows PyTorch's notes on CUDA graphs.
"""

from __future__ import annotations

import inspect
import logging
from types import TracebackType

import torch
from transformers import PreTrainedModel

from epslots.cache.expert_loader import ExpertLoader
from epslots.cuda_graph.device_slots import (
    DEFAULT_DEVICE_POLICY,
    DEVICE_POLICIES,
    DeviceExperts,
    DeviceSlots,
    Kernels,
    TorchKernels,
    slots_obstacle,
)
from epslots.cuda_graph.missed_steps import MissedSteps
from epslots.cuda_graph.static_cache import make_static_cache, tensor_addresses
from epslots.errors import ConfigError
from epslots.generation.absorbed_attention import AbsorbedAttention
from epslots.moe.moe_layer import MoELayer
from epslots.runtime import Runtime, runtime_of

logger = logging.getLogger(__name__)


class DecodeGraph:
    """Decodes with one model, a fixed number of sequences at a time.

    Greedy, or with the tokens that ``step`` is given; on one rank, without prefetching or stop strings, outside of the engine.
    Experts that stay packed (FP8 and MXFP4 on a GPU) take the usual path.

    While it steps, it owns the model's slots: other use of the model is refused until ``close``, which also updates the host's
    tables, histories and counters. ``generate`` closes by itself; around ``step`` use ``with``.

    Args:
        model: loaded by ``epslots.load``, on one rank.
        batch: sequences.
        max_tokens: of each sequence, prompt and output together.
        policy: the eviction policy on the device: one of ``DEVICE_POLICIES``. No output depends on it.
        capture: whether steps are captured in a CUDA graph; by default on a GPU.

    Attributes:
        obstacle: the reason for taking the usual path, None for the device's; updated whenever a step begins without the
            slots.
        replays: replayed steps so far.

    Raises:
        ConfigError: no such policy, a model that can't decode from a static cache, sequences that are longer than the memory
            plan or the model's windows have room for, or no GPU to capture for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        max_tokens: int,
        *,
        policy: str = DEFAULT_DEVICE_POLICY,
        capture: bool | None = None,
    ) -> None:
        if batch < 1 or max_tokens < 2:
            raise ConfigError(f"batch={batch}, max_tokens={max_tokens}: allowed: at least one sequence of two tokens")
        if policy not in DEVICE_POLICIES:
            raise ConfigError(f"policy={policy!r}: the device knows {', '.join(DEVICE_POLICIES)}")
        self.model, self.batch, self.max_tokens = model, batch, max_tokens
        self._runtime = runtime = runtime_of(model)
        self._policy = policy
        self._check_room(runtime)
        device = model.device
        if capture and device.type != "cuda":
            raise ConfigError(f"capture={capture}: CUDA graphs need a GPU, and the model is on {device}")
        self.obstacle = _device_obstacle(runtime, batch)
        if self.obstacle is not None:
            if capture:
                raise ConfigError(f"capture={capture}: {self.obstacle}; allowed: capture=False")
            logger.warning("Decoding takes the usual path: %s.", self.obstacle)
        self._capture = device.type == "cuda" if capture is None else capture
        self._cache = make_static_cache(model, max_tokens, captured=self._capture)
        self._latents = AbsorbedAttention(model)
        self._ids = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._ids)
        self._mask = torch.ones((batch, max_tokens), dtype=torch.int64, device=device)
        self._logits: torch.Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False
        self._length = 0
        self.replays = 0
        self._counted = 0
        self._in_charge = False
        self._starts: list[tuple[int, ...]] = []
        self._slots: list[DeviceSlots | None] = []
        self._missed_steps: MissedSteps | None = None
        self._experts: list[DeviceExperts] = []

    def _check_room(self, runtime: Runtime) -> None:
        room = runtime.plan.engine.kv_tokens
        if self.batch * self.max_tokens > room:
            raise ConfigError(
                f"batch={self.batch} sequences of max_tokens={self.max_tokens}: the memory plan has a KV cache of {room} "
                f"tokens; load the model with kv_tokens={self.batch * self.max_tokens}"
            )

    @torch.no_grad()
    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the prompts of new sequences.

        Args:
            input_ids: int64 [batch, T], the prompts; shorter ones are padded on the left.
            attention_mask: int64 [batch, T], 0 at padding; by default there is none.

        Returns:
            The next token's logits, [batch, vocabulary].

        Raises:
            ConfigError: the shapes don't match ``batch`` and ``max_tokens``.
        """
        length = input_ids.shape[1]
        if input_ids.shape[0] != self.batch or not 1 <= length < self.max_tokens:
            raise ConfigError(
                f"input_ids of shape {tuple(input_ids.shape)}: allowed: {self.batch} prompts of 1 to {self.max_tokens - 1} "
                f"tokens"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape or not bool(mask[:, -1].all()):
            raise ConfigError(
                f"attention_mask of shape {tuple(mask.shape)}: allowed: the prompts' {tuple(input_ids.shape)}, padded on "
                f"the left"
            )
        self.close()
        self._cache.reset()
        self._mask.fill_(1)[:, :length] = mask
        positions = (self._mask[:, :length].cumsum(1) - 1).clamp(min=0)
        only_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        logits = self.model(
            input_ids=input_ids.to(self._ids.device),
            attention_mask=None if attention_mask is None else self._mask[:, :length],
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **only_last,
        ).logits[:, -1]
        self._positions.copy_(positions[:, -1:] + 1)
        self._length = length
        if self._logits is None:
            self._logits = torch.empty_like(logits)
        self._logits.copy_(logits)
        return self._logits

    @torch.no_grad()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append a token to each sequence.

        Args:
            tokens: int64 [batch].

        Returns:
            The next token's logits, [batch, vocabulary]; overwritten by the next step.

        Raises:
            ConfigError: before ``prefill``, the cache is full, or the step can't be captured.
        """
        self._ids.copy_(tokens.view(self.batch, 1))
        self._advance()
        assert self._logits is not None
        return self._logits

    @torch.no_grad()
    def generate(
        self, input_ids: torch.Tensor, max_new_tokens: int, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Greedy decoding, without a look at the tokens in between.

        Args:
            input_ids: int64 [batch, T], the prompts; shorter ones are padded on the left.
            max_new_tokens: tokens to append; no token ends a sequence before.
            attention_mask: int64 [batch, T], 0 at padding; by default there is none.

        Returns:
            int64 [batch, T + max_new_tokens], prompts included.

        Raises:
            ConfigError: the shapes or ``max_new_tokens`` don't match ``batch`` and ``max_tokens``, or the step can't be
                captured.
        """
        prompt = input_ids.shape[1]
        if max_new_tokens < 1 or prompt + max_new_tokens > self.max_tokens:
            raise ConfigError(
                f"max_new_tokens={max_new_tokens} after a prompt of {prompt}: allowed: 1 to {self.max_tokens - prompt}, "
                f"as max_tokens={self.max_tokens}"
            )
        tokens = torch.empty((self.batch, prompt + max_new_tokens), dtype=torch.int64, device=self._ids.device)
        tokens[:, :prompt] = input_ids
        self._ids.copy_(self.prefill(input_ids, attention_mask).argmax(-1, keepdim=True))
        tokens[:, prompt] = self._ids[:, 0]
        with self:
            for position in range(prompt + 1, prompt + max_new_tokens):
                self._advance()
                tokens[:, position] = self._ids[:, 0]
        return tokens

    def _advance(self) -> None:
        """Make one step: ``_ids`` holds the tokens to append, and afterwards the likeliest next tokens."""
        if self._logits is None:
            raise ConfigError("a step before the prompt: allowed: prefill first")
        if self._length >= self.max_tokens:
            raise ConfigError(f"the sequences have {self._length} tokens: allowed: max_tokens={self.max_tokens}")
        if not self._in_charge:
            self._take_over()
        by_hand = not self._capture or self.obstacle is not None
        try:
            if by_hand or any(runner.observed for runner in self._runtime.runners):
                self._forward()  # an observer of routes is called from Python
            elif not self._warm:
                self._forward_on_side_stream()
            else:
                if self._graph is None:
                    self._graph = self._capture_step()
                else:
                    self.replays += 1
                self._graph.replay()
        except BaseException:
            self.close()
            raise
        self._warm = True
        self._length += 1

    def _forward(self) -> None:
        """The step that is captured: it reads and writes tensors that stay in place."""
        assert self._logits is not None
        with self._latents.active():
            output = self.model(
                input_ids=self._ids,
                attention_mask=self._mask,
                position_ids=self._positions,
                past_key_values=self._cache,
                use_cache=True,
            )
        self._logits.copy_(output.logits[:, -1])
        self._ids.copy_(self._logits.argmax(-1, keepdim=True))
        self._positions.add_(1)
        if self._in_charge and self._missed_steps is not None:
            self._missed_steps.end_step()

    def _forward_on_side_stream(self) -> None:
        """Make a step on another stream than the default one: CUDA requires it before a capture."""
        stream, current = torch.cuda.Stream(self.model.device), torch.cuda.current_stream(self.model.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._forward()
        current.wait_stream(stream)

    def _capture_step(self) -> torch.cuda.CUDAGraph:
        """The step as a graph. Capturing runs nothing: the cache and the slots stay unchanged."""
        before = tensor_addresses(self._cache)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on using the GPU.
            with torch.cuda.device(self.model.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._forward()
        except RuntimeError as error:
            raise ConfigError(
                f"a decode step of {type(self.model).__name__} can't be captured in a CUDA graph ({error}); allowed for this "
                f"model: capture=False"
            ) from error
        if tensor_addresses(self._cache) != before:
            raise ConfigError(
                f"{type(self.model).__name__} keeps its state in new memory after each step, which a CUDA graph can't follow; "
                f"allowed for this model: capture=False"
            )
        return graph

    def _take_over(self) -> None:
        """Give the slots to the device until ``close``, if it can decide about them."""
        runners, loaders = self._runtime.runners, self._runtime.loaders
        if any(runner.slots_are_lent for runner in runners):
            raise ConfigError("another DecodeGraph has this model's slots; close it before")
        self.obstacle = _device_obstacle(self._runtime, self.batch)  # layers may have passed slots, or a group been joined
        if self.obstacle is not None:
            return
        starts = [loader.pool.starts for loader in loaders]
        if starts != self._starts:
            self._starts = starts
            self._graph, self._warm = None, False
            self._build()
        for slots, loader in zip(self._slots, loaders, strict=True):
            if slots is not None:
                rows = [runners[index] for index in loader.store_layers]
                slots.enter([row.history for row in rows], [row.steps for row in rows])
        self._in_charge = True
        for runner, experts in zip(runners, self._experts, strict=True):
            runner.lend_slots(experts)

    def _build(self) -> None:
        """Make the device's state, and a ``DeviceExperts`` for each layer, for the layers' present slots."""
        self._slots, stand_ins = [], {}
        for loader in self._runtime.loaders:
            pool = loader.pool
            misses = [layer for layer in range(len(pool.layers)) if not pool.holds_all_of(layer)]
            pairs = self.batch * self._runtime.plan.shape.top_k
            slots = DeviceSlots(loader, kernels_for(loader), pairs, policy=self._policy) if misses else None
            self._slots.append(slots)
            for layer, index in enumerate(loader.store_layers):
                inner = self._runtime.runners[index].experts
                stand_ins[index] = DeviceExperts(inner, slots if layer in misses else None, layer)
        self._experts = [stand_ins[index] for index in range(len(stand_ins))]
        counters = [slots.misses_L for slots in self._slots if slots is not None]
        self._missed_steps = MissedSteps(counters) if counters else None

    def close(self) -> None:
        """Give the slots back to the usual path; a no-op if they are there. The sequences can continue afterwards."""
        if not self._in_charge:
            return
        self._in_charge = False
        runners = self._runtime.runners
        for runner in runners:
            runner.take_slots_back()
        replays, self._counted = self.replays - self._counted, self.replays
        missed = 0 if self._missed_steps is None else self._missed_steps.take()
        self._runtime.telemetry.count_steps(steps=replays, missed=missed)
        for runner, experts in zip(runners, self._experts, strict=True):
            if experts.calls:
                self._runtime.telemetry.count(runner.index, steps=replays, passes=replays)
        for slots, loader in zip(self._slots, self._runtime.loaders, strict=True):
            if slots is not None:
                self._hand_back(slots, loader, [runners[index] for index in loader.store_layers])

    def _hand_back(self, slots: DeviceSlots, loader: ExpertLoader, rows: list[MoELayer]) -> None:
        """Copy the histories and counters of a pool's layers from the device."""
        telemetry = self._runtime.telemetry
        steps, tallies = slots.leave([row.history for row in rows])
        for row, step, tally in zip(rows, steps, tallies, strict=True):
            if not tally.steps:
                continue
            row.steps = step
            # While the graph replays, every use counts as a hit.
            telemetry.count(row.index, hits=-tally.misses, misses=tally.misses)
            telemetry.count(row.index, host_bytes=tally.misses * loader.pool.layout.nbytes, evictions=tally.evictions)

    def __enter__(self) -> DecodeGraph:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _device_obstacle(runtime: Runtime, batch: int) -> str | None:
    """Why the device can't decide about some slots, as a sentence's end; None if it can about all."""
    if any(runner.prefetcher is not None and runner.prefetcher.approximate for runner in runtime.runners):
        return "predicted experts are executed"
    if any(runner.experts.kernel.batch_invariant for runner in runtime.runners):
        return "batch-invariant products are laid out on the host"
    pairs = batch * runtime.plan.shape.top_k
    return next((why for loader in runtime.loaders if (why := slots_obstacle(loader, pairs)) is not None), None)


def kernels_for(loader: ExpertLoader) -> Kernels:
    """The kernels that decide about a pool's slots on its device."""
    if loader.pool.device.type == "cpu":
        return TorchKernels(loader)
    from epslots.cuda_graph.triton_kernels import TritonKernels  # optional, and used on GPUs alone

    return TritonKernels(loader)
