"""The hit rate that decoding from slots needs, from the times of one token. Pure arithmetic, for ``bench timeline``.

A missing expert is fetched in one of two ways:

    on demand   before its layer computes, and nothing runs meanwhile: captured decoding as it is
    ahead       while the layer before computes, if it was predicted there. Unpredicted ones are waited for, and as many wrong
                prefetches cross the link. No copy waits for another here, so a real step takes at least so long
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenTimes:
    """The times of a token.

    Attributes:
        resident_s: seconds with all experts in slots.
        uses: experts that it uses, over all layers.
        record_s: seconds of the link for one expert.
        recall: share of the used experts that are predicted one layer before; None = on demand.
    """

    resident_s: float
    uses: int
    record_s: float
    recall: float | None = None

    def seconds(self, hit_rate: float) -> float:
        """Seconds of a token where this share of its experts is in slots."""
        fetched_s = self.uses * (1 - hit_rate) * self.record_s
        if self.recall is None:
            return self.resident_s + fetched_s
        waited_s = (1 - self.recall) * fetched_s
        return max(self.resident_s + waited_s, fetched_s + waited_s)

    def needed_hit_rate(self, share: float) -> float:
        """The least hit rate at which tokens come at this share of the rate with all experts in slots."""
        allowed_s = self.resident_s / share - self.resident_s
        if self.recall is not None:
            unpredicted = 1 - self.recall
            by_waits = allowed_s / unpredicted if unpredicted else float("inf")
            allowed_s = min(by_waits, self.resident_s / share / (1 + unpredicted))
        return max(0.0, 1 - allowed_s / (self.uses * self.record_s))
