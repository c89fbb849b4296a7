"""A chat in the tokenizer's chat template, within limits of time and memory.

A template is a program that came with the checkpoint. transformers' sandbox shields the machine from it, but doesn't stop
endless loops or gigabytes of text, and Python can't end a thread. So templates are rendered in processes of their own
(``template_process.py``), which the kernel ends at a limit, also in the middle of one long operation. The first prompt starts
one, which serves all later ones; a prompt that comes while it is busy starts another, up to ``RENDERERS``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epslots.errors import ConfigError
from epslots.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_CPU_S = 2.0
"""Seconds of CPU time that a template may take for a prompt."""
TEMPLATE_MEMORY_BYTES = 512 * 1024**2
"""Memory that a template may take."""
RENDERERS = 2
"""Processes that render at a time: one that takes its time doesn't hold up the other."""
# Limit for a process that gets no CPU, or is stopped: its own limit counts only CPU time.
_WALL_S = 120.0
_WITHOUT = "allowed without it: chat=False (--no-chat)"


@dataclass(frozen=True)
class Chat:
    """A conversation, and how a template writes it.

    Attributes:
        messages: mappings with "role", "content" and all else that the template reads.
        tools: JSON schemas of functions, in OpenAI's form; None = none.
        template: in place of the tokenizer's.
        add_generation_prompt: end with the beginning of the assistant's next message.
        continue_final_message: end within the last message, which the text goes on with.
        variables: further variables of the template.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    template: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_user(cls, text: str) -> Chat:
        """A user's first message."""
        return cls(messages=({"role": "user", "content": text},))


def find_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that prompts are wrapped in; None if the tokenizer has none.

    Raises:
        ConfigError: there are several and none is the default, or it is no text.
    """
    given = getattr(tokenizer, "chat_template", None)
    found = given.get("default") if isinstance(given, dict) else given
    if isinstance(given, dict) and found is None and given:
        raise ConfigError(
            f"the tokenizer has the chat templates {', '.join(sorted(map(str, given)))[:200]}, and none is called 'default'; "
            f"name one of them so in the checkpoint; {_WITHOUT}"
        )
    if found is not None and not isinstance(found, str):
        raise ConfigError(f"the tokenizer's chat template is no text, but {type(found).__name__}; {_WITHOUT}")
    return found


def render(tokenizer: PreTrainedTokenizerBase, template: str, chat: Chat, *, most_chars: int | None) -> str:
    """A chat template's text for a chat.

    Args:
        tokenizer: its special tokens are the template's variables.
        template: the chat template.
        chat: the messages to write.
        most_chars: the longest useful text; None for any.

    Raises:
        ConfigError: the template is broken, refuses the prompt, or exceeds a limit; or it can't be run.
    """
    request = {
        "template": template,
        "messages": list(chat.messages),
        "tools": None if chat.tools is None else list(chat.tools),
        "add_generation_prompt": chat.add_generation_prompt,
        "continue_final_message": chat.continue_final_message,
        "variables": {**tokenizer.special_tokens_map, **chat.variables},
        "most_chars": most_chars,
    }
    answer = _renderers(os.getpid()).ask(request)
    if "refused" in answer:
        raise ConfigError(f"the chat template refuses the prompt: {answer['refused']}")
    if "broken" in answer:
        raise ConfigError(f"the chat template is broken: {answer['broken']}; {_WITHOUT}")
    if "memory" in answer:
        raise ConfigError(
            f"the chat template needs more memory than the {format_bytes(TEMPLATE_MEMORY_BYTES)} that it may have"
        )
    if "chars" in answer:
        raise ConfigError(f"the chat template makes {answer['chars']:,} characters of the prompt; at most {most_chars:,} fit")
    found = answer["text"]
    assert isinstance(found, str)
    return found


class Renderer:
    """Renders templates in a process of its own. For any thread.

    The process is started on first use, and again after it has ended.

    Args:
        cpu_s: seconds of CPU time that one request may take.
        memory_bytes: memory that one request may take.
    """

    def __init__(self, cpu_s: float = TEMPLATE_CPU_S, memory_bytes: int = TEMPLATE_MEMORY_BYTES) -> None:
        self._cpu_s, self._memory_bytes = cpu_s, memory_bytes
        self._asking = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The process's answer to a request.

        Raises:
            ConfigError: the process can't be started, or was ended: by its limit, or from outside.
        """
        with self._asking:
            if self._process is None:
                self._process = self._start()
                self._exchange(self._process, b"")
            answer = self._exchange(self._process, json.dumps(request).encode() + b"\n")
            if "memory" in answer:
                self._discard()
            return answer

    def _start(self) -> subprocess.Popen[bytes]:
        # Run by its path and without the working folder, where any module could have the name of one that it imports.
        script = Path(__file__).with_name("template_process.py")
        command = [sys.executable, "-P", str(script), str(self._cpu_s), str(self._memory_bytes)]
        few_threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | few_threads,
                start_new_session=True,  # Ctrl-C is for the calling process
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"the process for chat templates can't be started ({error}); {_WITHOUT}") from error
        self._end = weakref.finalize(self, _end, process, os.getpid())
        return process

    def _exchange(self, process: subprocess.Popen[bytes], message: bytes) -> dict[str, Any]:
        """Send a message, and wait for the next line that comes back."""
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(_WALL_S, process.kill)
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(message)
                process.stdin.flush()
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._discard()
        if process.returncode == -signal.SIGPROF:
            raise ConfigError(
                f"the chat template takes more than the {self._cpu_s:g} s of CPU time that it may take for a prompt"
            )
        raise ConfigError(f"the process for chat templates ended (exit code {process.returncode}); {_WITHOUT}")

    def _discard(self) -> None:
        self._process = None
        self._end()


class Renderers:
    """Several renderers, as many as render at once. For any thread.

    Args:
        all: the renderers.
    """

    def __init__(self, all: Sequence[Renderer]) -> None:
        # The last one used is the next: others needn't be started as long as one is enough.
        self._free: queue.LifoQueue[Renderer] = queue.LifoQueue()
        for renderer in all:
            self._free.put(renderer)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer of a renderer that is free; waits for one (``Renderer.ask``)."""
        renderer = self._free.get()
        try:
            return renderer.ask(request)
        finally:
            self._free.put(renderer)


@functools.cache
def _renderers(process_id: int) -> Renderers:
    """This process's renderers: a forked process can't share another's."""
    return Renderers([Renderer() for _ in range(RENDERERS)])


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """End a child process; also called when Python ends."""
    if os.getpid() != owner:
        return
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.stdout.close()
    process.kill()
    process.wait()
