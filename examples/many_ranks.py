"""One model on several ranks of one machine: each rank its own prompts, all ranks one cache of experts.

    torchrun --nproc-per-node 2 examples/many_ranks.py            # a GPU per rank if there are any, else gloo on the CPU
    torchrun --nproc-per-node 8 examples/many_ranks.py --model ./Qwen3-30B-A3B --slots 25%

Every rank calls ``epslots.load``, which learns from torchrun's environment that there are others. From then on each forward
pass is a step that all ranks make together: inside ``sync_ranks``, ranks that are done take part in it without tokens.
"""

from __future__ import annotations

import argparse
import os

import torch
from transformers import AutoTokenizer

import epslots
from epslots.example import example_model

# Costs of large experts (9 MiB, over 8 GB/s to the host and 200 GB/s between ranks), in nanoseconds. The shipped model's
# experts are so small that by measured costs no rank would send a token where it can fetch.
LARGE_EXPERTS = epslots.Costs(
    host_fetch=1_180_000,
    peer_fetch=47_000,
    pair_transfer=20,
    pair_compute=30,
    expert_compute=3_000,
    exchange=30_000,
    gather=20_000,
)
PROMPTS = ("def read_json(path):\n", "class Parser:\n    def __init__(self", "import os\n\n", "for name, value in ")


def main() -> None:
    """Continue this rank's share of the prompts, and print its hit rate."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(example_model()), help="a checkpoint folder or hub id")
    parser.add_argument("--slots", default="25%", help='slots of each rank: a number per layer, "25%%", "12GiB" or "auto"')
    parser.add_argument("--new-tokens", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    costs = LARGE_EXPERTS if arguments.model == str(example_model()) else None
    model = epslots.load(arguments.model, slots=arguments.slots, costs=costs)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    with epslots.sync_ranks(model):
        for prompt in PROMPTS[rank::ranks]:  # on some ranks more than on others
            inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
            tokens = model.generate(**inputs, max_new_tokens=arguments.new_tokens, do_sample=False)
            print(f"--- rank {rank}\n{tokenizer.decode(tokens[0], skip_special_tokens=True)}", flush=True)
    stats = epslots.stats(model)
    sent = sum(layer.pairs_sent for layer in stats.layers)
    print(f"--- rank {rank}: {stats.hit_rate:.1%} hits, {sent} (token, k) pairs computed by other ranks", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
