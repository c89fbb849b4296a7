"""A model larger than the memory that its process may have; the kernel holds it to that (cgroups). As root, and on demand.

The limit counts all that the process takes: its own memory, and the pages of files that the kernel caches for it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CGROUPS = Path("/sys/fs/cgroup")
LIMIT = 1250 << 20
EXPERTS = 60 * 10 * 3 * 768 * 1024 * 2  # bytes in bf16, of the model below

MAKE = r"""
import sys, torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=512, hidden_size=1024, num_hidden_layers=10, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
    moe_intermediate_size=768, num_experts=60, num_experts_per_tok=4, intermediate_size=768)
model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
model.get_input_embeddings().weight.data.normal_(0, 1)
model.save_pretrained(sys.argv[1], max_shard_size="100MB")
"""
RUN = r"""
import os, sys
if group := sys.argv[3]:
    with open(group, "w") as file:
        file.write(str(os.getpid()))
import json, torch
torch.set_num_threads(1)
import epslots
from epslots.runtime import runtime_of
model = epslots.load(sys.argv[1], cache_dir=sys.argv[2], slots=4, device="cpu", **json.loads(sys.argv[4]))
ids = torch.randint(512, (1, 24), generator=torch.Generator().manual_seed(1))
tokens = model.generate(ids, max_new_tokens=24, do_sample=False)[0].tolist()
stats = epslots.stats(model)
print(json.dumps({"tokens": tokens, "store": runtime_of(model).store.nbytes, "read": stats.total("disk_bytes")}))
"""
GREEDY = r"""
import os, sys
with open(sys.argv[1], "w") as file:
    file.write(str(os.getpid()))
bytearray(int(sys.argv[2]))
"""

pytestmark = pytest.mark.skipif(
    not os.environ.get("EPSLOTS_CGROUP"), reason="EPSLOTS_CGROUP=1: makes a cgroup, as root, and a model of 2.8 GB on the disk"
)


@pytest.fixture
def group() -> Iterator[Path]:
    """A group of processes that together have ``LIMIT`` bytes; version 1 or 2 of cgroups."""
    first = (CGROUPS / "memory" / "memory.limit_in_bytes").exists()
    folder = (CGROUPS / "memory" if first else CGROUPS) / f"epslots-test-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(LIMIT))
        yield folder / "cgroup.procs"
    finally:
        folder.rmdir()


def run(folder: Path, stores: Path, group: Path | None, **settings: str) -> subprocess.CompletedProcess[str]:
    given = [str(folder), str(stores), str(group or ""), json.dumps(settings)]
    return subprocess.run([sys.executable, "-c", RUN, *given], capture_output=True, text=True, check=False)


def test_a_model_larger_than_memory(group: Path, tmp_path: Path):
    model, stores = tmp_path / "model", tmp_path / "stores"
    subprocess.run([sys.executable, "-c", MAKE, str(model)], check=True)
    here = run(model, stores, group, host_memory="100MiB")  # the store is made within the limit, too
    assert here.returncode == 0, here.stderr
    found, right = json.loads(here.stdout), json.loads(run(model, stores, None, host_store="memory").stdout)
    assert found["tokens"] == right["tokens"]
    assert found["store"] >= EXPERTS > 2 * LIMIT, "the store is twice what there is"
    assert found["read"] > LIMIT
    refused = run(model, tmp_path / "others", group, host_store="memory")
    assert refused.returncode == 1 and "no room for the host store in memory: it needs" in refused.stderr
    greedy = subprocess.run([sys.executable, "-c", GREEDY, str(group), str(LIMIT)], check=False)
    assert greedy.returncode == -signal.SIGKILL, "the kernel holds processes to the limit"
