"""``Cluster``: a model on many ranks, from Python.

with Cluster("path/or/id", ranks=8, slots="25%") as cluster:
    for result in cluster.generate(["def f(", "import "], max_new_tokens=64):
        print(result.index, result.text)
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from cluster.driver.backend import Backend
from cluster.driver.controller_client import ControllerClient
from cluster.driver.loop_thread import CLOSED, LoopThread
from cluster.driver.request_router import RequestRouter
from cluster.driver.supervisor import Supervisor
from cluster.driver.workers import Deadlines
from cluster.errors import ClusterError, Overloaded, raised_anew
from cluster.generation import Generation, GenerationSettings, Prompt, Result, read_settings
from cluster.messages.controller import Explanation
from cluster.messages.rank import Load
from cluster.reports import ClusterStats, PlacementReport, rank_stats
from cluster.request_checker import RequestChecker
from cluster.token_stream import TokenStream
from epslots.engine.paged_batcher import DEFAULT_BATCH_TOKENS
from epslots.engine.text import load_tokenizer
from epslots.errors import ConfigError
from epslots.loading import DEFAULT_KV_TOKENS, HOST_COMPUTE_SETTINGS
from epslots.models.checkpoint import find_checkpoint
from epslots.models.pretrained import read_language_config
from epslots.placement.placement import pack
from epslots.placement.placement_file import read_placement
from epslots.planner.cache_policy import DEFAULT_POLICY, resolve_policy
from epslots.planner.cost_model import Costs
from epslots.progress import StartDisplay
from epslots.telemetry import sum_over_ranks
from epslots.units import parse_link, parse_prefetch, parse_slots

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
DEFAULT_QUEUE = 1024
DEFAULT_WINDOW = 64
_MOST_S = 7 * 24 * 3600


class Cluster:
    """Ranks that are one model, and requests to it from any number of threads.

    Returns when the ranks serve. A rank that is lost later is replaced while the others go on, and its requests with them; no
    caller notices but by the time it takes.

    Args:
        path_or_id: a checkpoint folder with safetensors, at the same path on all nodes; or a hub id.
        ranks: one for each GPU or CPU slot; None = all GPUs of the cluster, or one rank if it has none.
        slots: of each rank, as in ``epslots.load``.
        address: the Ray cluster to run in: "auto" for the running one, "host:port", or None to start Ray on this machine.
        strategy: how ranks are placed: "PACK" (on few nodes), "SPREAD" (over many), or the same strictly: "STRICT_PACK" (one
            node), "STRICT_SPREAD" (a node each).
        device: "cuda" or "cpu"; None = GPUs if the cluster has any.
        dtype, policy, host_store, cache_dir, link, prefetch, predictor, execute_predicted, host_compute, batch_invariant: as
            in ``epslots.load``, on every node.
        kv_tokens: tokens that each rank's KV cache keeps.
        max_batch_tokens: the most tokens of one step of a rank.
        max_queue: requests that may wait or run at once.
        costs: as in ``epslots.load``.
        deadline_s: seconds that one operation between ranks may take before they give each other up.
        silence_s: seconds in which a rank must answer while there is work; it is replaced otherwise.
        give_up_after_s: seconds after which a rank that can't be replaced, or a Ray that doesn't come back, is given up; with
            the last rank the cluster ends. None = it is tried without an end, twice a minute.
        progress: show how the start goes; None = if standard error is a terminal.
        placement: a file (of ``epslots placement plan``) that says where experts are to live at first, for as many ranks and
            slots.
        window_steps: steps after which ranks tell the controller what they measured; 0 = there is no controller, and the
            placement stays.
        backend: what to run ranks on, in place of Ray.

    Raises:
        ConfigError: a setting is not one of those allowed.
        CheckpointError: there is no such checkpoint here.
        UnsupportedModelError: the model predicts no tokens.
        ClusterError: the ranks don't come up: too few devices, a node without the model, a model that doesn't fit, ...

    Attributes:
        tokenizer: the checkpoint's; None if it has none that can be loaded: prompts are token ids then.
        timeline: seconds from the call to the end of each stage of the start, by name.
    """

    def __init__(
        self,
        path_or_id: str | os.PathLike[str],
        *,
        ranks: int | None = None,
        slots: int | str = "auto",
        address: str | None = None,
        strategy: str = "PACK",
        device: str | None = None,
        dtype: str = "auto",
        policy: str = DEFAULT_POLICY,
        host_store: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        kv_tokens: int = DEFAULT_KV_TOKENS,
        max_batch_tokens: int = DEFAULT_BATCH_TOKENS,
        max_queue: int = DEFAULT_QUEUE,
        costs: Costs | None = None,
        deadline_s: float = 60.0,
        silence_s: float = 10.0,
        give_up_after_s: float | None = None,
        progress: bool | None = None,
        placement: str | os.PathLike[str] | None = None,
        link: str | None = None,
        prefetch: str = "auto",
        predictor: str | os.PathLike[str] | None = None,
        execute_predicted: bool = False,
        host_compute: str = "auto",
        batch_invariant: bool = False,
        window_steps: int = DEFAULT_WINDOW,
        backend: Backend | None = None,
    ) -> None:
        parse_slots(slots)
        resolve_policy(policy)
        parse_prefetch(prefetch)
        if host_compute not in HOST_COMPUTE_SETTINGS:
            raise ConfigError(f"host_compute={host_compute!r}: allowed: {', '.join(HOST_COMPUTE_SETTINGS)}")
        if host_compute == "on" and costs is not None and not costs.computes_on_host:
            raise ConfigError(
                "host_compute='on', but costs don't say what it costs: give host_expert and host_pair, or no costs"
            )
        if link is not None:
            parse_link(link)
        if strategy not in STRATEGIES:
            raise ConfigError(f"strategy={strategy!r}; allowed: {', '.join(STRATEGIES)}")
        for name, number in (("kv_tokens", kv_tokens), ("max_batch_tokens", max_batch_tokens), ("max_queue", max_queue)):
            _check_count(name, number)
        for name, seconds in (("deadline_s", deadline_s), ("silence_s", silence_s)):
            _check_seconds(name, seconds)
        if give_up_after_s is not None:
            _check_seconds("give_up_after_s", give_up_after_s)
        if ranks is not None:
            _check_count("ranks", ranks)
        if window_steps != 0:
            _check_count("window_steps", window_steps)
        first = None if placement is None else _first_placement(placement, ranks)
        folder = find_checkpoint(path_or_id)
        read_language_config(folder)
        # Workers have working folders of their own.
        path = str(Path(path_or_id).absolute()) if Path(path_or_id).is_dir() else os.fspath(path_or_id)
        if backend is None:
            from cluster.ray_backend.backend import RayBackend

            backend = RayBackend(address=address, strategy=strategy, device=device, path=path)
        self._room = threading.Semaphore(max_queue)
        self._max_queue = max_queue
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._thread = LoopThread("epslots-supervisor")
        self._supervisor = Supervisor(
            self._thread,
            backend,
            Load(
                path=path,
                slots=slots,
                device=device,
                dtype=dtype,
                policy=policy,
                host_store=host_store,
                cache_dir=None if cache_dir is None else str(Path(cache_dir).absolute()),
                kv_tokens=kv_tokens,
                max_batch_tokens=max_batch_tokens,
                neighbours=1,
                threads=0,
                window_steps=window_steps,
                link=link,
                prefetch=prefetch,
                predictor=None if predictor is None else str(Path(predictor).absolute()),
                execute_predicted=execute_predicted,
                host_compute=host_compute,
                batch_invariant=batch_invariant,
            ),
            costs=costs,
            deadlines=Deadlines(operation_s=deadline_s, silence_s=silence_s, give_up_s=give_up_after_s),
            display=StartDisplay(progress),
            make_router=lambda send: RequestRouter(send, lambda: self.tokenizer),
            placement=first,
        )
        self.timeline = self._supervisor.timeline
        self._closed = False
        atexit.register(self._close_at_exit)
        try:
            starting = self._thread.begin(self._supervisor.start(ranks))
            self.tokenizer, problem = _tokenizer_of(folder)  # meanwhile
            self._checker = RequestChecker(self._thread.wait(starting), self.tokenizer, problem)
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: Iterable[Prompt], **settings: Any) -> Iterator[Result]:
        """Continue prompts, many at once; yields results as they finish.

        Prompts are taken as there is room for them, in the caller's thread, so there may be any number. A prompt that can't be
        served is a result with the reason "error". Closing or dropping the iterator cancels all that isn't done.

        Args:
            prompts: text, token ids, or mappings with "prompt" and settings that differ from the others'.
            settings: of ``GenerationSettings``.

        Raises:
            ConfigError: a setting is unknown or not allowed. (Now, not on first use.)
            ClusterError: the cluster can't go on.
        """
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
            raise ConfigError(f"prompts={prompts!r:.100}; allowed: a list of prompts, or another iterable. submit() takes one")
        self._thread.check_process()
        return self._generate(iter(prompts), read_settings(settings))

    def _generate(self, prompts: Iterator[Prompt], settings: GenerationSettings) -> Iterator[Result]:
        done: queue.SimpleQueue[int] = queue.SimpleQueue()
        running: dict[int, Generation] = {}
        coming = enumerate(prompts)
        following = next(coming, None)
        try:
            while following is not None or running:
                self._thread.check_process()  # the iterator may have been made before a fork
                # With nothing of its own to wait for, a caller waits until others leave room.
                while following is not None and done.empty() and self._room.acquire(blocking=not running):
                    index, prompt = following
                    try:
                        running[index] = self._send(index, prompt, settings, done.put)
                    except ConfigError as error:
                        yield Result(index, prompt, (), None, "error", str(error))
                        self._thread.check_process()
                    following = next(coming, None)
                if running:
                    yield running.pop(done.get()).result()
        finally:
            for generation in running.values():
                generation.give_up()

    def submit(self, prompt: Prompt, **settings: Any) -> Generation:
        """Start to continue one prompt. Iterate what is returned for its text as it comes, or ask it for its ``result``.

        It is cancelled when it is closed or dropped, and when a loop over it is left and no one else reads it.

        Raises:
            ConfigError: the prompt or a setting is not allowed.
            Overloaded: ``max_queue`` requests wait or run already.
            ClusterError: the cluster can't go on.
        """
        self._thread.check_process()
        read = read_settings(settings)
        if not self._room.acquire(blocking=False):
            self._thread.flush()  # requests that were cancelled before this call leave room
            if not self._room.acquire(blocking=False):
                raise Overloaded(
                    f"{self._max_queue} requests wait or run already, which is all that max_queue allows; wait for results, "
                    f"or use generate(), which does"
                )
        return self._send(0, prompt, read, lambda _: None)

    def _send(self, index: int, prompt: Prompt, settings: GenerationSettings, on_done: Callable[[int], None]) -> Generation:
        """Send a request whose room is taken; gives it back if that fails, and when the request is done."""

        def done() -> None:
            self._room.release()
            on_done(index)

        try:
            self._check_open()
            request, settings = self._checker.request(prompt, settings)
        except BaseException:
            self._room.release()
            raise
        stream = TokenStream(done)
        generation = Generation(
            index,
            prompt,
            stop=settings.stops,
            tokenizer=self.tokenizer,
            stream=stream,
            cancel=partial(self._thread.hint, self._supervisor.router.cancel, request.id),
            check_process=self._thread.check_process,
        )
        self._thread.tell(self._supervisor.submit, request, stream, settings.stops)
        return generation

    @property
    def ranks(self) -> int:
        """Ranks that serve now."""
        self._thread.check_process()
        return self._supervisor.group.serving

    def stats(self) -> ClusterStats:
        """Counters of all ranks since each was loaded, when the step under way is done."""
        self._check_open()

        async def ask() -> ClusterStats:
            router, reports = self._supervisor.router, await self._supervisor.reports()
            ranks = tuple(rank_stats(worker, report, router.count_served(worker)) for worker, report in reports)
            total = sum_over_ranks([rank.stats for rank in ranks])
            controller_client = self._supervisor.controller_client
            controller = None if controller_client is None else controller_client.stats()
            missing = self._supervisor.pool.missing()
            return ClusterStats(self._supervisor.group.epoch, router.queued, ranks, total, controller, missing)

        return self._thread.call(ask())

    def placement(self) -> PlacementReport:
        """Which rank holds which expert, and which should, when the step under way is done."""
        self._check_open()
        reports = self._thread.call(self._supervisor.reports())
        newest = max((report for _, report in reports), key=lambda report: report.epoch, default=None)
        ranks = tuple(worker.handle.where for worker, _ in reports)
        return PlacementReport(
            epoch=self._supervisor.group.epoch,
            ranks=ranks,
            layers=() if newest is None else newest.layers,
            placement_version=-1 if newest is None else newest.placement,
            pending_migrations=0 if newest is None else newest.pending_migrations,
        )

    def explain(self) -> Explanation:
        """Why the placement is what it is, in numbers; as text, for people. From the controller, when it has answered.

        Raises:
            ConfigError: there is to be no controller.
            ClusterError: none can be had.
        """
        return self._thread.call(self._need_controller().explain())

    def rebalance(self) -> Explanation:
        """Plan a placement now, and follow it if anything at all is gained, frozen or not. Requests go on meanwhile.

        Returns:
            What came of it (``latest``), when the ranks have been told: they get there step by step.

        Raises:
            ConfigError, ClusterError: as ``explain``.
        """
        return self._thread.call(self._need_controller().rebalance())

    def freeze(self) -> None:
        """Keep the placement, whatever the traffic, until ``unfreeze``. What is being moved for it goes on being moved.

        Raises:
            ConfigError: there is to be no controller.
        """
        self._thread.call(self._need_controller().freeze(True))

    def unfreeze(self) -> None:
        """Let the placement follow the traffic again.

        Raises:
            ConfigError: there is to be no controller.
        """
        self._thread.call(self._need_controller().freeze(False))

    def _need_controller(self) -> ControllerClient:
        self._check_open()
        if self._supervisor.controller_client is None:
            raise ConfigError("window_steps=0, so there is no controller; allowed for this: at least 1")
        return self._supervisor.controller_client

    def scale(self, ranks: int) -> None:
        """Change the number of ranks while requests go on; returns when that many serve.

        Raises:
            ConfigError: ``ranks`` is less than 1.
            ClusterError: there are no devices for them, or they don't come up; the others go on.
        """
        _check_count("ranks", ranks)
        self._check_open()
        self._thread.call(self._supervisor.scale(ranks))

    def close(self) -> None:
        """End all ranks, and Ray if it was started here. Requests that aren't done fail. Twice is once.

        Raises:
            ClusterError: this is a forked child of the process that made the cluster; there, nothing can be called.
        """
        self._thread.check_process()
        self._closed = True
        if self._thread.ended:
            return
        self._thread.call(self._supervisor.close())
        self._thread.end()
        atexit.unregister(self._close_at_exit)

    def _close_at_exit(self) -> None:
        if not self._thread.forked:  # a child runs its parent's exit handlers
            self.close()

    def _check_open(self) -> None:
        self._thread.check_process()
        if self._closed:
            raise ClusterError(CLOSED)
        if self._supervisor.failure is not None:
            raise raised_anew(self._supervisor.failure)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not self._thread.forked:  # a child that exits within the block does just that
            self.close()


def _check_count(name: str, given: object) -> None:
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise ConfigError(f"{name}={given!r}; allowed: an int, at least 1")


def _check_seconds(name: str, given: object) -> None:
    if not isinstance(given, int | float) or isinstance(given, bool) or not 0 < given <= _MOST_S:
        raise ConfigError(f"{name}={given!r}; allowed: seconds, more than 0, at most {_MOST_S}")


def _first_placement(file: str | os.PathLike[str], ranks: int | None) -> bytes:
    """A placement's file, as it is sent to the ranks.

    Raises:
        ConfigError: it is none, or for another number of ranks.
    """
    placement = read_placement(file)
    if ranks is not None and placement.ranks != ranks:
        raise ConfigError(f"placement={os.fspath(file)!r} is for {placement.ranks} ranks, and ranks={ranks}")
    return pack(placement)


def _tokenizer_of(folder: os.PathLike[str]) -> tuple[PreTrainedTokenizerBase | None, str]:
    """A checkpoint's tokenizer, or why there is none: token ids can be served without."""
    try:
        return load_tokenizer(os.fspath(folder)), ""
    except ConfigError as error:
        return None, str(error)
