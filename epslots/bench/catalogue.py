"""All benches of ``epslots bench`` by name, with a line on each for its help. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bench:
    """One bench.

    Attributes:
        name: on the command line, and of its recorded files.
        measures: one sentence for the help.
        module: of ``epslots.bench``; it has the function ``bench_<name>``.
        takes_device: whether ``--device`` counts; other benches measure the CPU.
    """

    name: str
    measures: str
    module: str
    takes_device: bool = False

    @property
    def help_line(self) -> str:
        return f"{self.name}: {self.measures}{' Takes --device.' if self.takes_device else ''}"


_BENCHES = (
    Bench("overhead", "Steps with all experts resident, over plain transformers on the same weights.", "overhead"),
    Bench("start", "First and second load of a 1 GiB checkpoint, over from_pretrained; peak memory.", "start"),
    Bench("fetch", "One expert from host store to slot, against a plain copy of as many bytes.", "fetch", True),
    Bench("sweep", "Hit rate and tokens/s of the example model from 12.5 % slots to all.", "sweep"),
    Bench("exchange", "A layer's exchange and plan on 2 ranks, over bare collectives; the plan alone.", "exchange"),
    Bench("ranks", "Hit rate and bytes of 1, 2 and 4 ranks with one distributed cache, and with separate caches.", "ranks"),
    Bench("misses", "Modelled time and bytes of the ways to serve a miss, with emulated links.", "ranks"),
    Bench("placement", "The planner against EPLB: known loads, planning time, the next window of traffic.", "placement"),
    Bench("quotas", "Hit rates with slots dealt to layers by measured need, against equal ones and the optimum.", "quotas"),
    Bench("rebalance", "Step times of 4 ranks while a new placement is reached, over those of steady steps.", "rebalance"),
    Bench("simulate", "Speed of the simulator, up to 1,024 ranks; batch sizes on 8 simulated ranks.", "simulate"),
    Bench("eviction", "Hits of each policy as a share of the optimum's, over models, texts, sizes and batches.", "eviction"),
    Bench("predict", "Recall of the next layers' experts, calibration, cost; loss of the approximate mode.", "predict"),
    Bench("overlap", "Time per token at 25 % slots: fetches behind computing, over waiting for each.", "overlap"),
    Bench("latency", "P50/P95/P99 per token, to the first token, and tokens/s for 1 to 64 requests.", "latency"),
    Bench(
        "decode",
        "Tokens/s at 25 % slots and more, usual path and captured, over transformers resident and accelerate's CPU offload; "
        "copies into slots. On a GPU a model of Qwen3-30B-A3B's shape, on the CPU a small one.",
        "decode",
        True,
    ),
    Bench(
        "batch", "Requests together over one at a time, generate's steps, pages; latents, arrivals. Takes --parts.", "batch"
    ),
    Bench(
        "gpu",
        "For a GPU, in 8 minutes or --minutes: checks, costs, fetches, kernels, decoding against transformers and "
        "accelerate, two ranks and a kill, all beside what the timeline predicts. One JSON and one page.",
        "gpu",
        True,
    ),
    Bench(
        "timeline",
        "PREDICTED time a token on a GPU that isn't here, by the data sheets' costs of the real operations. Takes --gpu, "
        "--model, --slots.",
        "timeline",
    ),
    Bench("disk", "Decoding with RAM for half of the experts, over all in RAM; bytes read, against a plain read.", "disk"),
    Bench(
        "packed",
        "Packed experts: products over torch's and by slot format, requests over vLLM's backend, slots and losses by format. "
        "Takes --parts.",
        "packed",
    ),
    Bench("invariant", "Step times with batch_invariant, over those without.", "invariant"),
)
BENCHES = {bench.name: bench for bench in _BENCHES}
