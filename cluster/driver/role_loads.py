"""``RoleLoads``: the ranks' loads by role: which ranks a prompt may go to, and which one decodes it afterwards. Pure.

``mixed`` and ``prefill`` ranks compute prompts, ``decode`` ranks go on with them. A role is a preference: where no rank of the
one kind serves, those of the other do all. But prompts wait for a group that soon serves again, or they would hold up all that
is being decoded each time that it forms anew.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

from cluster.driver.hand_over_costs import HandOverCosts
from cluster.driver.rank_loads import Costly, RankCapacity, RankLoads

if TYPE_CHECKING:
    from collections.abc import Callable


class RoleLoads:
    """All ranks that serve or have requests.

    Attributes:
        costs: by which short prompts stay where decoding is.
    """

    def __init__(self) -> None:
        self.costs = HandOverCosts()
        self._prompts, self._decoding = RankLoads(), RankLoads()
        self._returning: set[Hashable] = set()
        """Ranks for prompts that are paused, and will soon serve again."""

    def __contains__(self, worker: Hashable) -> bool:
        return worker in self._prompts or worker in self._decoding

    @property
    def divided(self) -> bool:
        """Whether some ranks compute prompts and others decode."""
        return len(self._prompts) > 0 and len(self._decoding) > 0

    def of(self, worker: Hashable) -> RankLoads:
        """The loads of the rank's kind."""
        return self._decoding if worker in self._decoding else self._prompts

    def serve(self, worker: Hashable, capacity: RankCapacity, place: int = 0) -> None:
        """A rank takes requests from now on, with this capacity; ``place`` is that in its group."""
        self._returning.discard(worker)
        (self._decoding if capacity.role == "decode" else self._prompts).serve(worker, capacity, place)

    def pause(self, worker: Hashable, *, soon: bool = False) -> None:
        """A rank keeps its requests, and takes no further ones until it serves again, which is expected ``soon`` or isn't."""
        self.of(worker).pause(worker)
        if soon and worker in self._prompts:
            self._returning.add(worker)
        else:
            self._returning.discard(worker)

    def remove(self, worker: Hashable) -> None:
        """A rank is lost."""
        self._returning.discard(worker)
        self.of(worker).remove(worker)

    def for_prompt(self, request: Costly, decoding_holds: Callable[[RankLoads], int]) -> RankLoads:
        """The ranks that may take a request from the queue.

        Args:
            decoding_holds: tokens of its beginning that a rank of the given ones has in its cache.
        """
        if not self._decoding.serving:
            return self._prompts
        if not self._prompts.serving and not self._returning:
            return self._decoding
        worker = self._decoding.least_loaded(request)
        if worker is None:
            return self._prompts
        to_compute = request.held_tokens - decoding_holds(self._decoding)
        first = self._prompts.least_loaded(request)
        before = self._prompts.mean_cost if first is None else self._prompts.cost(first)
        streams, near = self._decoding.requests(worker), self._way(request, first)
        stays = self.costs.stays(to_compute, request.held_tokens, streams, near, before)
        return self._decoding if stays else self._prompts

    def may_stay(self, request: Costly, decoding_holds: Callable[[RankLoads], int]) -> bool:
        """Whether a prompt would be computed where its request decodes, if nothing else did.

        Args:
            decoding_holds: tokens of its beginning that a rank of the given ones has in its cache.
        """
        to_compute = request.held_tokens - decoding_holds(self._decoding)
        way = self._way(request, self._prompts.least_loaded(request))
        return self.costs.stays(to_compute, request.held_tokens, 0, way)

    def _way(self, request: Costly, source: Hashable | None) -> bool:
        """Whether a request would be handed over through shared memory, as far as can be told before it has any rank."""
        target = self._decoding.freest(request)
        if source is None or target is None:
            return self.costs.latest_near
        return self.share_memory(source, target)

    def share_memory(self, one: Hashable, other: Hashable) -> bool:
        """Whether two ranks can share memory."""
        machines = [self.of(worker).capacity(worker).machine for worker in (one, other)]
        return machines[0] == machines[1] != ""

    def hands_over(self, worker: Hashable) -> bool:
        """Whether a rank hands its requests over when their prompts are computed, or once a decode rank serves again."""
        known = worker in self._prompts and self._prompts.capacity(worker).role == "prefill"
        return known and len(self._decoding) > 0

    def for_decoding(self, request: Costly) -> Hashable | None:
        """The decode rank with the most free cache; None if none has room."""
        return self._decoding.freest(request)

    def check(self, served: Iterable[tuple[Hashable, Costly]]) -> None:
        """Assert that the sums are those of the requests that ranks have."""
        listed = list(served)
        for loads in (self._prompts, self._decoding):
            loads.check((worker, request) for worker, request in listed if worker in loads)
