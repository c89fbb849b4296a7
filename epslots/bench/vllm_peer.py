"""vLLM's CPU backend as a peer of ``packed.py``: a script for another Python, in whose environment vLLM is installed.

It shares nothing with epslots but pipes: a question is a line of JSON on standard input, an answer one on the descriptor
``--fd``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time


def main() -> None:
    """Load the model, say so, and answer until standard input ends."""
    options = argparse.ArgumentParser()
    for name, kind in (("model", str), ("threads", int), ("requests", int), ("length", int), ("fd", int)):
        options.add_argument(f"--{name}", type=kind, required=True)
    given = options.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: given.threads]
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(given.threads),
    }
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    model = LLM(
        given.model,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=given.length,
        max_num_seqs=given.requests,
        max_num_batched_tokens=max(2048, given.length),
        enable_prefix_caching=False,
    )
    with os.fdopen(given.fd, "w") as answers:
        print("{}", file=answers, flush=True)
        for line in sys.stdin:
            question = json.loads(line)
            sampling = SamplingParams(temperature=0, max_tokens=question["new_tokens"], ignore_eos=True, detokenize=False)
            prompts = [{"prompt_token_ids": prompt} for prompt in question["prompts"]]
            began = time.perf_counter()
            outputs = model.generate(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - began
            tokens = [list(output.outputs[0].token_ids) for output in outputs]
            print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main()
