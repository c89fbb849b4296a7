"""Traffic of the example model over different kinds of text: what placements are judged on beside the generator's.

The texts are those that every installation has: Python's standard library, and what the installed packages come with.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

import epslots
from epslots.arrays import IntArray
from epslots.example import example_model
from epslots.progress import ProgressDisplay

TOKENS = 192  # of each sequence
BATCH = 16


def kinds_of_text(most: int) -> dict[str, list[str]]:
    """Up to ``most`` passages of each kind of text that the installation holds."""
    library, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    python = [path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts]
    modules = [path for path in python if not {"test", "tests", "idlelib", "lib2to3", "encodings"} & set(path.parts)]
    sources = {
        "code": (passage for path in modules for passage in _passages(_read(path))),
        "tests": (passage for path in python if "test" in path.parts for passage in _passages(_read(path))),
        "tables": (passage for path in python if "encodings" in path.parts for passage in _passages(_read(path))),
        "prose": (passage for path in modules for text in _docstrings(path) for passage in _passages(text)),
        "json": (passage for path in sorted(packages.rglob("*.json")) for passage in _passages(_plain_json(path))),
        "headers": (passage for path in sorted(packages.rglob("*.h")) for passage in _passages(_read(path))),
        "web": (
            p for end in ("html", "js", "css") for path in sorted(packages.rglob(f"*.{end}")) for p in _passages(_read(path))
        ),
    }
    return {kind: _spread(passages, most) for kind, passages in sources.items()}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _passages(text: str, letters: int = 1500, most: int = 4) -> Iterator[str]:
    """The first few stretches of a text that fill a sequence."""
    for start in range(0, min(len(text) - letters, most * letters), letters):
        yield text[start : start + letters]


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(_read(path))
    except (SyntaxError, ValueError):
        return
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, nodes)]
    yield "\n\n".join(found)


def _plain_json(path: Path) -> str:
    try:
        return json.dumps(json.loads(_read(path)), indent=1)[:20_000]
    except ValueError:
        return ""


def _spread(passages: Iterator[str], most: int) -> list[str]:
    """``most`` of the passages, evenly from all files."""
    found = list(passages)
    return [found[number * len(found) // most] for number in range(min(most, len(found)))] if found else []


def record_kinds(cache_dir: Path, sequences: int) -> dict[str, IntArray]:
    """Pairs of each passage for each (layer, expert), by kind of text: int64 [passages, layers, experts]."""
    texts = kinds_of_text(sequences)
    model = epslots.load(example_model(), slots="100%", device="cpu", dtype="float32", cache_dir=cache_dir, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(example_model())
    experts = int(model.config.num_experts)
    counts: dict[str, IntArray] = {}
    with ProgressDisplay()("routing of texts", sum(map(len, texts.values()))) as advance, torch.no_grad():
        for kind, passages in texts.items():
            rows = []
            for start in range(0, len(passages), BATCH):
                ids = [tokenizer(text).input_ids[:TOKENS] for text in passages[start : start + BATCH]]
                ids = [row for row in ids if len(row) == TOKENS]
                if ids:
                    with epslots.record_trace(model) as recorder:
                        model(input_ids=torch.tensor(ids), use_cache=False)
                    ids_SLK = recorder.trace().expert_ids
                    rows.append(_counts(ids_SLK.reshape(len(ids), TOKENS, *ids_SLK.shape[1:]), experts))
                advance(len(passages[start : start + BATCH]))
            if rows:
                counts[kind] = np.concatenate(rows)
    return counts


def _counts(ids_STLK: np.ndarray, experts: int) -> IntArray:
    """Pairs of each sequence, int64 [sequences, layers, experts]."""
    layers = ids_STLK.shape[2]
    rows = [
        np.bincount((ids_TLK + experts * np.arange(layers)[:, None]).ravel(), minlength=layers * experts).reshape(
            layers, experts
        )
        for ids_TLK in ids_STLK.astype(np.int64)
    ]
    return np.stack(rows)


def switching_windows(texts: dict[str, IntArray], windows: int, passages: int, pace: int, seed: int = 0) -> IntArray:
    """Windows of passages of one kind, another kind every ``pace`` windows: int64 [windows, layers, experts]."""
    random = np.random.default_rng(seed)
    kinds, kind, found = list(texts), "", []
    for window in range(windows):
        if window % pace == 0:
            kind = str(random.choice([other for other in kinds if other != kind]))
        found.append(texts[kind][random.integers(len(texts[kind]), size=passages)].sum(0))
    return np.stack(found)


def mixed_windows(texts: dict[str, IntArray], windows: int, passages: int, seed: int = 0) -> IntArray:
    """Windows of passages of all kinds: int64 [windows, layers, experts]."""
    random = np.random.default_rng(seed)
    every = np.concatenate(list(texts.values()))
    return np.stack([every[random.integers(len(every), size=passages)].sum(0) for _ in range(windows)])
