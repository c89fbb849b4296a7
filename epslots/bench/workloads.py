"""Traffic that caches and placements are judged on: routing of the example model over kinds of text, and made-up patterns.

The texts are found in every installation: Python's standard library, and files of the installed packages. A made-up pattern
contains one reason for reuse, and no other.

Legend of shape suffixes: T steps, L layers, E experts, K choices of a step, S passages.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedModel

import epslots
from epslots.arrays import FloatArray, IntArray
from epslots.example import example_model
from epslots.progress import counting
from epslots.trace import Trace

PASSAGE_TOKENS = 192
_LETTERS = 1500  # enough for as many tokens
_PASSAGES_OF_A_FILE = 4
_BUILT_FROM_DATA = {"test", "tests", "idlelib", "lib2to3", "encodings"}

Passages = Mapping[str, Sequence[Sequence[int]]]
"""Token ids of passages of ``PASSAGE_TOKENS`` each, by kind of text."""


# --- text


def passages_of_kinds(count: int) -> Passages:
    """Up to ``count`` passages of each kind of text; kinds without one are left out."""
    tokenizer = AutoTokenizer.from_pretrained(example_model())
    found = {}
    for kind, texts in _texts_of_kinds(count).items():
        ids = [tokenizer(text).input_ids[:PASSAGE_TOKENS] for text in texts]
        found[kind] = [row for row in ids if len(row) == PASSAGE_TOKENS]
    return {kind: passages for kind, passages in found.items() if passages}


def _texts_of_kinds(count: int) -> dict[str, list[str]]:
    library, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    python = [path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts]
    modules = [path for path in python if not _BUILT_FROM_DATA & set(path.parts)]

    def packaged(*ends: str) -> Iterator[Path]:
        return (path for end in ends for path in sorted(packages.rglob(f"*.{end}")))

    texts: dict[str, Iterable[str]] = {
        "code": map(_read, modules),
        "tests": (_read(path) for path in python if "test" in path.parts),
        "tables": (_read(path) for path in python if "encodings" in path.parts),
        "prose": map(_docstrings, modules),
        "json": map(_plain_json, packaged("json")),
        "headers": map(_read, packaged("h")),
        "web": map(_read, packaged("html", "js", "css")),
    }
    return {kind: _some(several, count) for kind, several in texts.items()}


def _some(texts: Iterable[str], count: int) -> list[str]:
    """Up to ``count`` passages, evenly from all texts; of each text only its first few."""
    found = [
        text[start : start + _LETTERS]
        for text in texts
        for start in range(0, min(len(text) - _LETTERS, _PASSAGES_OF_A_FILE * _LETTERS), _LETTERS)
    ]
    return [found[number * len(found) // count] for number in range(min(count, len(found)))]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(_read(path))
    except (SyntaxError, ValueError):
        return ""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return "\n\n".join(ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, nodes))


def _plain_json(path: Path) -> str:
    try:
        return json.dumps(json.loads(_read(path)), indent=1)[:20_000]
    except ValueError:
        return ""


# --- routing of text


@torch.no_grad()
def record_routing(model: PreTrainedModel, passages: Sequence[Sequence[int]], at_once: int = 1) -> Trace:
    """The routing of passages, each a sequence of its own.

    Args:
        passages: token ids; those that run together are of one length.
        at_once: passages of one forward pass.
    """
    with epslots.record_trace(model) as recorder, counting("routing of texts", len(passages)) as advance:
        for start in range(0, len(passages), at_once):
            model(input_ids=torch.tensor(passages[start : start + at_once]), use_cache=False)
            advance(len(passages[start : start + at_once]))
    return recorder.trace()


def pairs_of_passages(trace: Trace) -> IntArray:
    """(token, k) pairs of each passage for each expert, int64 [S, L, E], of layers with as many experts each."""
    layers, experts = len(trace.num_experts), int(trace.num_experts[0])
    cells_TLK = trace.expert_ids.astype(np.int64) + experts * np.arange(layers)[:, None]
    rows = [np.bincount(cells.ravel(), minlength=layers * experts) for cells in np.split(cells_TLK, trace.starts[1:])]
    return np.stack(rows).reshape(-1, layers, experts)


def switching_windows(pairs_of_kinds: Mapping[str, IntArray], windows: int, passages: int, pace: int) -> IntArray:
    """Windows of passages of one kind, another kind every ``pace`` windows: int64 [windows, L, E]."""
    random = np.random.default_rng(0)
    kinds, kind, found = list(pairs_of_kinds), "", []
    for window in range(windows):
        if window % pace == 0:
            kind = str(random.choice([other for other in kinds if other != kind]))
        found.append(pairs_of_kinds[kind][random.integers(len(pairs_of_kinds[kind]), size=passages)].sum(0))
    return np.stack(found)


def mixed_windows(pairs_of_kinds: Mapping[str, IntArray], windows: int, passages: int) -> IntArray:
    """Windows of passages of all kinds: int64 [windows, L, E]."""
    random = np.random.default_rng(0)
    every = np.concatenate(list(pairs_of_kinds.values()))
    return np.stack([every[random.integers(len(every), size=passages)].sum(0) for _ in range(windows)])


# --- made-up patterns, of one layer

Ids = NDArray[np.int16]
Pattern = Callable[[np.random.Generator, int, int, int], Ids]
"""Takes a generator, experts, k and steps; returns choices int16 [T, K]. Rows end in -1 where steps choose fewer."""


def static(random: np.random.Generator, experts: int, top_k: int, steps: int) -> Ids:
    """Zipf's law, with the same popular experts throughout."""
    return _draw(random, np.broadcast_to(_zipf(random, experts, 1.0), (steps, experts)), top_k)


def drifting(random: np.random.Generator, experts: int, top_k: int, steps: int) -> Ids:
    """Each expert's popularity (its logarithm) wanders, and comes back within some thousand steps."""
    log_TE = np.empty((steps, experts))
    now_E = 1.2 * random.normal(size=experts)
    for step in range(steps):
        log_TE[step] = now_E
        now_E = 0.9992 * now_E + 0.05 * random.normal(size=experts)
    return _draw(random, np.exp(log_TE), top_k)


def topics(random: np.random.Generator, experts: int, top_k: int, steps: int) -> Ids:
    """Five topics, each with a Zipf distribution of its own; another topic every 150 steps."""
    share_SE = np.array([_zipf(random, experts, 1.3) for _ in range(5)])
    return _draw(random, share_SE[random.integers(5, size=steps // 150 + 1).repeat(150)[:steps]], top_k)


def in_turn(random: np.random.Generator, experts: int, top_k: int, steps: int) -> Ids:
    """Six tenths of the experts in a fixed cycle, as when a model repeats itself."""
    several = random.permutation(experts)[: max(top_k, int(0.6 * experts))]
    return several[np.arange(steps * top_k).reshape(steps, top_k) % len(several)].astype(np.int16)


def scans(random: np.random.Generator, experts: int, top_k: int, steps: int) -> Ids:
    """Zipf's law, and in every third stretch of 150 steps one choice that goes through all experts."""
    ids_TK = static(random, experts, top_k, steps)
    scanned_T = (np.arange(steps) // 2 % experts).astype(np.int16)
    free_T = (np.arange(steps) // 150 % 3 == 0) & ~(ids_TK == scanned_T[:, None]).any(1)
    ids_TK[free_T, 0] = scanned_T[free_T]
    return ids_TK


def walking(random: np.random.Generator, experts: int, top_k: int, steps: int) -> Ids:
    """A neighbourhood of experts that moves on: recently used experts are used again, and later no more."""
    centre_T = np.cumsum(random.random(steps) < 0.15) * 2 % experts
    away_TE = np.abs((np.arange(experts) - centre_T[:, None] + experts // 2) % experts - experts // 2)
    return _draw(random, np.exp(-away_TE / (top_k + 2)), top_k)


def phases(random: np.random.Generator, experts: int, top_k: int, steps: int) -> Ids:
    """500 steps of one pattern, then of another, with popularities and orders drawn anew."""
    parts = (static, in_turn, walking)
    return np.concatenate([parts[n % 3](random, experts, top_k, 500) for n in range(-(-steps // 500))])[:steps]


def prompts(random: np.random.Generator, experts: int, top_k: int, steps: int) -> Ids:
    """Requests one after the other, each with its own Zipf distribution.

    Each is a prompt of 50 tokens in one step, then 99 steps.
    """
    ids_TK = np.full((steps, 50 * top_k), -1, np.int16)
    for start in range(0, steps, 100):
        end = min(start + 100, steps)
        tokens_TK = _draw(random, np.broadcast_to(_zipf(random, experts, 1.3), (50 + end - start, experts)), top_k)
        ids_TK[start] = tokens_TK[:50].ravel()
        ids_TK[start + 1 : end, :top_k] = tokens_TK[51:]
    return ids_TK


PATTERNS: dict[str, Pattern] = {
    "static": static,
    "drifting": drifting,
    "topics": topics,
    "in turn": in_turn,
    "scans": scans,
    "walking": walking,
    "phases": phases,
    "prompts": prompts,
}
# Patterns whose steps are drawn at random: with several tokens a step they keep their meaning.
DRAWN = ("static", "drifting", "topics", "walking")


def _zipf(random: np.random.Generator, experts: int, exponent: float) -> FloatArray:
    shares: FloatArray = random.permutation(1 / np.arange(1, experts + 1) ** exponent)
    return shares


def _draw(random: np.random.Generator, share_TE: FloatArray, top_k: int) -> Ids:
    """``top_k`` different experts a step, by their shares (Gumbel's trick), int16 [T, K]."""
    keys_TE = np.log(share_TE) + random.gumbel(size=share_TE.shape)
    return np.argsort(-keys_TE, axis=1)[:, :top_k].astype(np.int16)
