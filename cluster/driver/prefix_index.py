"""``PrefixIndex``: which ranks have computed the beginning of a prompt. Bounded, and a hint: a rank may have dropped it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

BLOCK = 32
"""Tokens of a block: as many as a page of the paged cache, which shares whole pages."""
MOST_BLOCKS = 1024
"""Blocks of a prompt that are looked at: what follows them is seldom shared."""
MOST_HOLDERS = 8
"""Ranks remembered for a block, the latest ones: a system prompt that all ranks have costs no more than another."""


def block_hashes(prompt: Sequence[int]) -> tuple[int, ...]:
    """A hash for each whole block of a prompt, over all tokens up to the block's end.

    The last token is left out: a rank always computes at least that one, to have the next token's logits.
    """
    hashes = []
    last = 0
    for start in range(0, min((len(prompt) - 1) // BLOCK, MOST_BLOCKS) * BLOCK, BLOCK):
        last = hash((last, *prompt[start : start + BLOCK]))
        hashes.append(last)
    return tuple(hashes)


class PrefixIndex:
    """Blocks of prompts, by the ranks that computed them lately.

    A rank's blocks are bounded by its cache; of those beyond, the ones that were used longest ago are forgotten, and of one
    prompt the last block first, as the ranks' own caches do. SGLang's cache-aware router keeps an approximate tree for each
    worker to the same end; hashes of chained blocks (vLLM's prefix cache) need no tree.
    """

    def __init__(self) -> None:
        self._holders: dict[int, OrderedDict[Hashable, None]] = {}
        """By block: its ranks, the latest last."""
        self._blocks: dict[Hashable, OrderedDict[int, None]] = {}
        """By rank: its blocks, the latest last."""

    def __len__(self) -> int:
        """Pairs of a block and a rank that are remembered."""
        return sum(map(len, self._blocks.values()))

    def enter(self, worker: Hashable, hashes: Sequence[int], most: int) -> None:
        """A rank gets a prompt.

        Args:
            hashes: of the prompt (``block_hashes``).
            most: blocks that the rank's cache holds.
        """
        blocks = self._blocks.setdefault(worker, OrderedDict())
        for block in reversed(hashes[:most]):
            blocks[block] = None
            blocks.move_to_end(block)
            holders = self._holders.setdefault(block, OrderedDict())
            holders[worker] = None
            holders.move_to_end(worker)
            if len(holders) > MOST_HOLDERS:
                earliest, _ = holders.popitem(last=False)
                del self._blocks[earliest][block]
        while len(blocks) > most:
            block, _ = blocks.popitem(last=False)
            self._forget_holder(block, worker)

    def longest(self, hashes: Sequence[int]) -> tuple[int, tuple[Hashable, ...]]:
        """The tokens of the longest beginning of a prompt that some rank has computed, and its latest ranks."""
        for count in range(len(hashes), 0, -1):
            if holders := self._holders.get(hashes[count - 1]):
                return count * BLOCK, tuple(holders)
        return 0, ()

    def forget(self, worker: Hashable) -> None:
        """A rank is lost, and its cache with it."""
        for block in self._blocks.pop(worker, ()):
            self._forget_holder(block, worker)

    def _forget_holder(self, block: int, worker: Hashable) -> None:
        holders = self._holders[block]
        del holders[worker]
        if not holders:
            del self._holders[block]
