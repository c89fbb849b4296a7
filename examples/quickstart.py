"""A model with a bounded slot pool, in five lines, and its cache's hit rates.

python examples/quickstart.py                       # the small model shipped here
python examples/quickstart.py ./Qwen3-30B-A3B 25%   # your own
"""

from __future__ import annotations

import sys

from transformers import AutoTokenizer

import epslots
from epslots.example import example_model


def main() -> None:
    """Continue one prompt, and print the hit rate of each MoE layer."""
    path, slots = (sys.argv[1:] + [str(example_model()), "25%"][len(sys.argv) - 1 :])[:2]
    model = epslots.load(path, slots=slots)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)

    inputs = tokenizer("import os\nimport sys\n\n\nclass ", return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=120, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))

    for layer in epslots.stats(model).layers:
        print(f"{layer.layer}: {layer.slots} of {layer.num_experts} slots, {layer.hit_rate:.1%} hits")


if __name__ == "__main__":
    main()
