"""Train the small Mixture-of-Experts model that epslots uses as its embedded default.

The model is a Qwen3-MoE (6 layers, 32 experts, top-4, 3.5 M parameters) with a byte-level BPE
tokenizer of its own, both learned from the one text that every Python installation carries: the
source of the standard library. It writes recognisable Python. Its router is skewed as those of large
models are; an expert cache depends on that skew.

    python examples/python_moe/train.py                # about an hour on two CPU cores
    python examples/python_moe/train.py --steps 200    # a quick look

The checkpoint goes to ``examples/python_moe/model``, beside ``training.json`` (loss curve, corpus,
versions). One file in twenty is held out and never seen in training; its loss is the one reported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

HERE = Path(__file__).resolve().parent
END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 2048
CONTEXT = 256
# Newline with its indentation is one piece: indentation is what Python is made of.
PIECES = r"\n[ ]*| ?[A-Za-z]+|_+| ?[0-9]| ?[^\sA-Za-z0-9_]+|\s+"
# Generated tables and test suites teach little Python for their size.
SKIPPED_FOLDERS = {"test", "tests", "encodings", "site-packages", "__pycache__", "idlelib", "turtledemo"}


def stdlib_files() -> list[Path]:
    """Sorted source files of the running interpreter's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(root).parts))
    return sorted(p for p in files if p.stat().st_size > 512)


def is_held_out(path: Path) -> bool:
    """One file in twenty, by name, so that the split survives a different installation path."""
    return hashlib.sha256(path.name.encode()).digest()[0] < 256 / 20


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_model() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        moe_intermediate_size=40,
        num_experts=32,
        num_experts_per_tok=4,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=0.002,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text), tokenizer.eos_token_id]
    return torch.tensor(ids)


@torch.no_grad()
def held_out_loss(model: Qwen3MoeForCausalLM, tokens: torch.Tensor) -> float:
    """Mean next-token loss in nats over evenly spaced windows, without the auxiliary loss."""
    model.eval()
    starts = torch.linspace(0, len(tokens) - CONTEXT - 1, 24 * 8).long()
    losses = []
    for group in starts.split(8):
        window = torch.stack([tokens[s : s + CONTEXT + 1] for s in group])
        logits = model(input_ids=window[:, :-1]).logits
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()))
    model.train()
    return float(torch.stack(losses).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=8, help="sequences of 256 tokens a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "model")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    files = stdlib_files()
    texts = {p: p.read_text(encoding="utf-8", errors="replace") for p in files}
    train_texts = [t for p, t in texts.items() if not is_held_out(p)]
    tokenizer = train_tokenizer(train_texts)
    train_tokens = encode(tokenizer, train_texts)
    held_tokens = encode(tokenizer, [t for p, t in texts.items() if is_held_out(p)])
    print(f"{len(files)} files, {len(train_tokens):,} training and {len(held_tokens):,} held-out tokens", flush=True)

    model = build_model()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    warmup = max(1, min(200, args.steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (
            (s + 1) / warmup
            if s < warmup
            else 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (s - warmup) / max(1, args.steps - warmup)))
        ),
    )
    curve = []
    began = time.monotonic()
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(train_tokens) - CONTEXT, (args.batch,))
        window = torch.stack([train_tokens[s : s + CONTEXT] for s in starts])
        loss = model(input_ids=window, labels=window).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 250 == 0 or step == args.steps:
            held = held_out_loss(model, held_tokens)
            curve.append({"step": step, "train": round(float(loss), 4), "held_out": round(held, 4)})
            print(f"step {step}: train {loss:.3f}, held out {held:.3f}, {time.monotonic() - began:.0f} s", flush=True)

    model.config.output_router_logits = False
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    report = {
        "steps": args.steps,
        "tokens_per_step": args.batch * CONTEXT,
        "seconds": round(time.monotonic() - began),
        "train_tokens": len(train_tokens),
        "held_out_tokens": len(held_tokens),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "curve": curve,
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
