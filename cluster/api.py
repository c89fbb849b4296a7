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
from typing import TYPE_CHECKING, Any, Self, Unpack

from cluster.config import ClusterConfig, ClusterSettings, cluster_config
from cluster.control import ClusterControl
from cluster.driver.backend import Backend
from cluster.driver.loop_thread import LoopThread
from cluster.driver.request_router import RequestRouter
from cluster.driver.supervisor import Supervisor
from cluster.driver.workers import Deadlines
from cluster.errors import Overloaded
from cluster.generation import Generation, PromptChoice, Result
from cluster.lasting.settings import origin_of
from cluster.messages.rank import Load
from cluster.queue_room import HeldPlaces, QueueRoom
from cluster.token_stream import TokenStream
from epslots.config import LoadConfig, with_keywords
from epslots.errors import ConfigError
from epslots.generation.chat_template import Chat
from epslots.generation.request_checker import RequestChecker
from epslots.generation.request_limits import ModelLimits
from epslots.generation.settings import GenerationSettings, Prompt, read_settings, with_own_settings
from epslots.generation.text import load_tokenizer
from epslots.models.checkpoint import find_checkpoint
from epslots.placement.placement import pack
from epslots.placement.placement_file import read_placement
from epslots.progress import StartDisplay

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_importing = threading.Lock()
"""transformers' modules import one another: of two threads that do so at once, one may find half of a module."""


@with_keywords(ClusterSettings, ClusterConfig, LoadConfig)
class Cluster(ClusterControl):
    """A model on many ranks; any number of threads send it requests.

    The constructor returns when the ranks serve. A rank that is lost later is replaced while the others go on and take over
    its requests; callers notice only the delay.

    With a ``name`` and an ``orphan_s``, the ranks outlive this process if it is killed or calls ``detach``. They keep their
    model and wait, and the next ``Cluster`` of that name, model and settings adopts them: it serves in seconds, and loads
    nothing. Requests that were running fail with the process. ``close`` and the end of the script end the ranks.

    Args:
        path_or_id: a checkpoint folder with safetensors, at the same path on all nodes; or a hub id.
        settings: fields of ``cluster.config.ClusterConfig`` and, for each rank's model, ``epslots.config.LoadConfig``.
        backend: runs the ranks, in place of Ray.

    Raises:
        ConfigError: a setting is not one of those allowed.
        CheckpointError: there is no such checkpoint here.
        UnsupportedModelError: the model predicts no tokens.
        ClusterError: the ranks don't come up: too few devices, a node without the model, a model that doesn't fit, ...; or a
            driver of this ``name`` lives, or its ranks were loaded with other settings.

    Attributes:
        tokenizer: the checkpoint's; None if none can be loaded from it: prompts are token ids then.
        timeline: seconds from the call to the end of each stage of the start, by name.
    """

    def __init__(
        self, path_or_id: str | os.PathLike[str], *, backend: Backend | None = None, **settings: Unpack[ClusterSettings]
    ) -> None:
        config = cluster_config(**settings)
        placement = None if config.placement is None else _first_placement(config.placement, config.ranks, config.groups)
        folder = find_checkpoint(path_or_id)
        if not config.outlives_driver:
            _check_model(folder)
        # Workers have working folders of their own.
        path = str(Path(path_or_id).absolute()) if Path(path_or_id).is_dir() else os.fspath(path_or_id)
        origin = origin_of(folder) if config.outlives_driver else None
        load = Load(
            path=path,
            config=config.model,
            neighbours=1,
            ranks=1,
            threads=0,
            window_steps=config.window_steps,
            groups=config.groups,
            origin=origin,
        )
        backend = _ray_backend(config, load) if backend is None else backend
        self._config = config
        self.tokenizer: PreTrainedTokenizerBase | None = None
        thread = LoopThread("epslots-supervisor")
        deadlines = Deadlines(operation_s=config.deadline_s, silence_s=config.silence_s, give_up_s=config.give_up_after_s)
        supervisor = Supervisor(
            thread,
            backend,
            load,
            costs=config.costs,
            deadlines=deadlines,
            display=StartDisplay(config.progress),
            make_router=lambda send: RequestRouter(send, lambda: self.tokenizer, deadlines),
            placement=placement,
        )
        super().__init__(thread, supervisor, QueueRoom(config.max_queue))
        self.timeline = supervisor.timeline
        atexit.register(self._close_at_exit)
        try:
            # Ranks that may be adopted have been checked, and a check takes a second or two.
            check = partial(_check_model, folder) if config.outlives_driver else None
            starting = self._thread.begin(
                self._supervisor.start(config.ranks, config.groups, check, prefill_ranks=config.prefill_ranks)
            )
            self.tokenizer, problem = _tokenizer_of(folder)  # meanwhile
            self._checker = RequestChecker(self._thread.wait(starting).limits, self.tokenizer, problem)
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: Iterable[Prompt], **settings: Any) -> Iterator[Result]:
        """Continue prompts, many at once; yields results as they finish, ``n`` for each prompt.

        Prompts are read in the caller's thread, as the queue has room for them; so there may be any number. A prompt that
        can't be served is one result with the reason "error". Closing or dropping the iterator cancels the unfinished ones.

        Args:
            prompts: text, token ids, or mappings with "prompt" and settings of its own.
            settings: of ``GenerationSettings``, for prompts that have none of their own.

        Raises:
            ConfigError: a setting is unknown or not allowed. It is raised by this call, not on first use.
            ClusterError: the cluster can't go on.
        """
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
            raise ConfigError(f"prompts={prompts!r:.100}; allowed: a list of prompts, or another iterable. submit() takes one")
        self._thread.check_process()
        return self._generate(iter(prompts), read_settings(settings))

    def _generate(self, prompts: Iterator[Prompt], settings: GenerationSettings) -> Iterator[Result]:
        done: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        running: dict[tuple[int, int], Generation] = {}
        coming = enumerate(prompts)
        following = next(coming, None)
        try:
            while following is not None or running:
                self._thread.check_process()  # the iterator may have been made before a fork
                while following is not None and done.empty():
                    index, prompt = following
                    try:
                        # A caller without running prompts waits until other callers' requests leave room.
                        sent = self._send(index, prompt, settings, on_done=done.put, wait=not running)
                        if not sent:
                            break
                        running |= {(index, generation.choice): generation for generation in sent}
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
        """Start to continue one prompt. Returns a generation: iterate it for text as it comes, or ask it for its ``result``.

        It is cancelled when it is closed or dropped, and when a loop over it is left and no other reader remains.

        Raises:
            ConfigError: the prompt or a setting is not allowed; ``n`` is more than 1.
            Overloaded: ``max_queue`` requests wait or run already.
            ClusterError: the cluster can't go on.
        """
        self._thread.check_process()
        read = read_settings(settings)
        if (n := with_own_settings(prompt, read)[1].n) > 1:
            raise ConfigError(f"n={n}; allowed here: 1; submit_choices(prompt, **settings) returns a list of n generations")
        (generation,) = self._submit(prompt, read)
        return generation

    def submit_choices(self, prompt: Prompt, *, places: HeldPlaces | None = None, **settings: Any) -> list[Generation]:
        """Start to continue one prompt ``n`` times; returns the generations, in the order of their choices.

        All are started, or none. Each is cancelled by itself, like a generation of ``submit``.

        Args:
            places: of ``hold``, for these requests; None = they get places now.

        Raises:
            ConfigError: the prompt or a setting is not allowed.
            Overloaded: with these, more than ``max_queue`` requests would wait or run, or more than there are ``places``.
            ClusterError: the cluster can't go on.
        """
        self._thread.check_process()
        return self._submit(prompt, read_settings(settings), places)

    def hold(self, requests: int) -> HeldPlaces | None:
        """Take places in the queue for requests that are yet to be made. A service does so before it reads a long prompt.

        Returns:
            The places, which are to be closed in the end; None if there aren't as many now.

        Raises:
            ConfigError: the queue is shorter.
            ClusterError: the cluster can't go on.
        """
        self._check_open()
        if requests > self._room.places:
            raise ConfigError(f"requests={requests}; allowed: up to max_queue, which is {self._room.places}")
        return self._room.hold(requests)

    def _submit(self, prompt: Prompt, settings: GenerationSettings, places: HeldPlaces | None = None) -> list[Generation]:
        sent = self._send(0, prompt, settings, places=places)
        if not sent and places is None:
            self._thread.flush()  # requests that were cancelled before this call leave room
            sent = self._send(0, prompt, settings)
        if not sent:
            raise Overloaded(
                f"{self._config.max_queue} requests wait or run already, or would with this prompt's, and max_queue allows no "
                f"more; wait for results, or use generate(), which waits"
            )
        return sent

    def _send(
        self,
        index: int,
        prompt: Prompt,
        settings: GenerationSettings,
        *,
        on_done: Callable[[tuple[int, int]], None] = lambda _: None,
        wait: bool = False,
        places: HeldPlaces | None = None,
    ) -> list[Generation]:
        """Send a prompt's choices; none if the queue has no room for all. The room of each is free again when it is done.

        Args:
            settings: where the prompt has none of its own.
            on_done: gets the index and the number of each choice that is done.
            wait: until the queue has room.
            places: those held for them; None = places of the queue.
        """
        bare, settings = with_own_settings(prompt, settings)
        if settings.n > self._room.places:
            raise ConfigError(f"n={settings.n}; allowed: up to max_queue, which is {self._room.places}")
        if not (self._room.take(settings.n, wait=wait) if places is None else places.use(settings.n)):
            return []
        try:
            self._check_open()
            requests = self._checker.requests(bare, settings)
        except BaseException:
            self._room.give(settings.n)
            raise
        choices = [PromptChoice(index, prompt, settings, number, request) for number, request in enumerate(requests)]
        streams = [TokenStream(partial(self._done, on_done, (index, choice.number))) for choice in choices]
        generations = [self._generation(choice, stream) for choice, stream in zip(choices, streams, strict=True)]
        self._thread.tell(self._supervisor.submit, list(zip(requests, streams, strict=True)), settings.stops)
        return generations

    def _done(self, on_done: Callable[[tuple[int, int]], None], which: tuple[int, int]) -> None:
        self._room.give()
        on_done(which)

    def _generation(self, choice: PromptChoice, stream: TokenStream) -> Generation:
        return Generation(
            choice,
            tokenizer=self.tokenizer,
            stream=stream,
            cancel=partial(self._thread.hint, self._supervisor.router.cancel, choice.request.id),
            check_process=self._thread.check_process,
        )

    @property
    def limits(self) -> ModelLimits:
        """The requests that the model and a rank's cache can serve."""
        return self._checker.limits

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text by default."""
        return self._checker.end_tokens

    def encode(self, prompt: str | Chat, *, special_tokens: bool = True, most_tokens: int | None = None) -> list[int]:
        """A prompt's tokens, for any thread.

        Args:
            prompt: text, or a chat for the chat template.
            special_tokens: add the tokenizer's special tokens to text; in a chat, they are the template's.
            most_tokens: tokens that fit, None for any. Text that certainly has more is refused early.

        Raises:
            ConfigError: the prompt isn't allowed, or there is no tokenizer.
        """
        return self._checker.encode(prompt, special_tokens=special_tokens, most_tokens=most_tokens)

    def close(self) -> None:
        """End all ranks, and Ray if it was started here. Unfinished requests fail. A second call does nothing.

        Raises:
            ClusterError: this process is a forked child of the cluster's, which may call no method of it.
        """
        self._end(leave_ranks=False)

    def detach(self) -> None:
        """Leave the ranks, with their model, to the next driver of this name. Unfinished requests fail.

        It is for a driver that is to be replaced. The ranks end if no driver adopts them within ``orphan_s``.

        Raises:
            ConfigError: the ranks can't outlive this driver: it has no ``name``, or ``orphan_s`` is 0.
            ClusterError: this process is a forked child of the cluster's, which may call no method of it.
        """
        if not self._config.outlives_driver:
            raise ConfigError("detach() needs a cluster with a name and orphan_s > 0: no other driver would find its ranks")
        self._end(leave_ranks=True)

    def _end(self, *, leave_ranks: bool) -> None:
        self._thread.check_process()
        self._closed = True
        if self._thread.ended:
            return
        self._thread.call(self._supervisor.close(leave_ranks=leave_ranks))
        self._thread.end()
        atexit.unregister(self._close_at_exit)

    def _close_at_exit(self) -> None:
        if not self._thread.forked:  # a child runs its parent's exit handlers
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not self._thread.forked:  # a forked child that exits within the block leaves the cluster alone
            self.close()


def _check_model(folder: Path) -> None:
    """Refuse a checkpoint of a model that can't be served.

    Raises:
        CheckpointError: its configuration can't be read, or is impossible.
        UnsupportedModelError: transformers doesn't know the model, or it predicts no tokens.
    """
    with _importing:
        from epslots.models.pretrained import read_language_config  # here: it imports torch, which a driver doesn't need

        read_language_config(folder)


def _ray_backend(config: ClusterConfig, load: Load) -> Backend:
    from cluster.ray_backend.adoption import Outliving
    from cluster.ray_backend.backend import RayBackend

    outliving = None
    if config.outlives_driver:
        assert config.name is not None
        outliving = Outliving(config.name, config.orphan_s, config.replace, load)
    return RayBackend(
        address=config.address,
        strategy=config.strategy,
        device=config.model.device,
        path=load.path,
        groups=config.groups,
        outliving=outliving,
    )


def _first_placement(file: str, ranks: int | None, groups: int) -> bytes:
    """The placement in a file, packed for the ranks of a group.

    Raises:
        ConfigError: the file holds no placement, or one for another number of ranks.
    """
    placement = read_placement(file)
    if ranks is not None and placement.ranks * groups != ranks:
        divided = f" are divided into groups={groups}" if groups > 1 else ""
        raise ConfigError(f"placement={file!r} is for {placement.ranks} ranks, and ranks={ranks}{divided}")
    return pack(placement)


def _tokenizer_of(folder: os.PathLike[str]) -> tuple[PreTrainedTokenizerBase | None, str]:
    """A checkpoint's tokenizer, or the reason why there is none: token ids are served without."""
    try:
        with _importing:
            return load_tokenizer(os.fspath(folder)), ""
    except ConfigError as error:
        return None, str(error)
