"""The process that renders chat templates: requests as JSON lines on standard input, answers on standard output.

``chat_template.py`` runs it as a script. It imports nothing of epslots: transformers' renderer and the standard library.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any


def main(cpu_s: float, memory_bytes: int) -> None:
    """Answer requests until standard input ends. The kernel ends the process when a request takes more than ``cpu_s``."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory(memory_bytes)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        most_chars, variables = request["most_chars"], request["variables"]
        try:
            (text,), _ = render_jinja_template(
                [request["messages"]],
                tools=request.get("tools"),
                chat_template=request["template"],
                add_generation_prompt=request.get("add_generation_prompt", True),
                continue_final_message=request.get("continue_final_message", False),
                **variables,
            )
        except TemplateSyntaxError as error:
            return {"broken": f"line {error.lineno}: {error.message}"}
        except TemplateError as error:  # of just this class where the template calls raise_exception
            return {"refused" if type(error) is TemplateError else "broken": str(error)[:1000]}
        except MemoryError:
            return {"memory": True}
        except Exception as error:
            return {"broken": f"{type(error).__name__}: {str(error)[:1000]}"}
        return {"text": text} if most_chars is None or len(text) <= most_chars else {"chars": len(text)}

    _write({"ready": True})
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # its signal ends the process, also in the middle of a C function
        found = answer(json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(found)
        if "memory" in found:  # the rest of the heap may be too little for the next request
            return


def _limit_memory(more_bytes: int) -> None:
    """Let this process have this much more address space than it has now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not on this system, where only CPU time is limited
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = now + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _write(message: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
