"""Tests of Triton kernels by Triton's interpreter, in a process of their own.

Triton reads ``TRITON_INTERPRET`` when it is imported. So ``pass_under_the_interpreter`` runs test modules in a process where
the variable is set: tests marked ``interpreted`` run there alone, those marked ``outside`` everywhere else.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import ROOT

# Triton warns of its default's change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
interpreted = pytest.mark.skipif(not INTERPRETER, reason="runs in the interpreter's process")
outside = pytest.mark.skipif(INTERPRETER, reason="runs outside of the interpreter's process")


def pass_under_the_interpreter(*modules: str, tests: int) -> None:
    """Fail unless exactly so many tests of these modules, paths from the root, pass in the interpreter's process."""
    if importlib.metadata.version("triton").startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton 3.6's interpreter takes arrays for numbers, which NumPy 2.4 refuses")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", *(ROOT / module for module in modules)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert re.search(rf"\b{tests} passed", found.stdout), found.stdout[-2000:]


Types = dict[str, str | tuple[str, ...]]


def compiled(kernel: Any, types: Types, constants: dict[str, Any], capability: int, **options: int) -> Any:
    """A kernel as Triton compiles it for a GPU that needn't be here.

    Args:
        types: of each argument by its name, such as "*bf16" or "i32", or of a tuple of them; a trailing "16" marks one that
            is a multiple of 16, as "i32:16", which the launcher finds out by itself.
        constants: the ``constexpr`` arguments.
        capability: major and minor as one number, such as 90.
        options: ``num_warps`` and ``num_stages``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned, signature = {}, {}
    for place, name in enumerate(kernel.arg_names):
        kinds = types.get(name, "constexpr")
        paths = {(place,): kinds} if isinstance(kinds, str) else {(place, i): kind for i, kind in enumerate(kinds)}
        aligned |= {path: [["tt.divisibility", 16]] for path, kind in paths.items() if kind.endswith(":16")}
        plain = tuple(kind.removesuffix(":16") for kind in paths.values())
        signature[name] = plain[0] if isinstance(kinds, str) else plain
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def assembled(binary: Any, capability: int, folder: Path) -> str:
    """The report of NVIDIA's assembler about a compiled kernel: registers, stack and spills."""
    import triton

    code = folder / "kernel.ptx"
    code.write_text(binary.asm["ptx"])
    ptxas = triton.knobs.nvidia.ptxas_blackwell if capability >= 100 else triton.knobs.nvidia.ptxas
    suffix = "a" if capability >= 90 else ""
    command = [
        ptxas.path,
        "-v",
        f"--gpu-name=sm_{capability}{suffix}",
        "-o",
        folder / "kernel.cubin",
        code,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr
