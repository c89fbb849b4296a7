"""``GroupDeal``: which bundle belongs to which group, and how that changes when ranks and groups come and go. Pure.

    started with 2 groups of 2    0 0 1 1
    3 ranks a group               0 0 1 1 | 0 1
    a third group                 0 0 1 1 | 0 1 | 2 2 2

Bundles come and go only at the end, in blocks: a group, or further ranks for all groups. So what came last goes first, and a
group never has fewer ranks than it was started with. One group alone may have any number, until others come, of as many each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from epslots.errors import ConfigError


@dataclass(frozen=True)
class _BundleBlock:
    """Bundles that come and go together; ``groups`` and ``size`` are those with it."""

    bundles: tuple[int, ...]
    groups: int
    size: int


class GroupDeal:
    """The groups of a cluster's bundles.

    Args:
        groups: at the start.
        size: ranks of each; None = there is one group, which has all bundles, however many.
    """

    def __init__(self, groups: int, size: int | None) -> None:
        assert groups >= 1
        self._began_alone = size is None
        self._blocks = [] if size is None else [_BundleBlock((number,) * size, number + 1, size) for number in range(groups)]
        """None: one group has all bundles."""

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self._blocks[-1].groups if self._blocks else 1

    @property
    def size(self) -> int | None:
        """Ranks of a group; None if it may be any number."""
        return self._blocks[-1].size if self._blocks else None

    def group_of(self, bundle: int) -> int:
        """The number of a bundle's group; a bundle that isn't there yet belongs to a further group."""
        if self.size is None:
            return 0
        dealt = self.dealt
        return dealt[bundle] if bundle < len(dealt) else self.groups + (bundle - len(dealt)) // self.size

    @property
    def dealt(self) -> list[int]:
        """The group of each bundle, by number."""
        return [group for block in self._blocks for group in block.bundles]

    def with_size(self, ranks: int) -> GroupDeal:
        """This deal for so many ranks, with a size: further groups will have it, too."""
        return self if self._blocks else self._with([_BundleBlock((0,) * ranks, 1, ranks)])

    def _with(self, blocks: Sequence[_BundleBlock]) -> GroupDeal:
        found = GroupDeal(1, None)
        found._blocks, found._began_alone = list(blocks), self._began_alone
        return found

    def changed(self, ranks: int | None, groups: int | None) -> tuple[GroupDeal, int]:
        """The deal for so many ranks and groups, and the number of ranks. A further group needs a deal ``with_size``.

        Args:
            ranks: None = as many as the groups have.
            groups: None = as many as there are, or, if the ranks aren't those of so many, as many of this size as they make.

        Raises:
            ConfigError: the bundles can't be divided so.
        """
        if self._began_alone and self.groups == 1 and groups in (None, 1) and ranks is not None:
            return GroupDeal(1, None), ranks
        groups, size = self._wanted(ranks, groups)
        found = self._with(self._blocks)
        found._drop(groups, size)
        found._add(groups, size)
        return found, groups * size

    def common(self, other: GroupDeal) -> GroupDeal:
        """The deal of those bundles that both deal alike. With one group alone, that of one group."""
        pairs = zip(self._blocks, other._blocks, strict=False)
        return self._with([block for block, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)])

    def _wanted(self, ranks: int | None, groups: int | None) -> tuple[int, int]:
        assert self.size is not None
        if ranks is None and groups is None:
            raise ConfigError("scale() needs ranks or groups")
        if groups is None:
            assert ranks is not None
            if ranks % self.size:
                raise ConfigError(
                    f"ranks={ranks}; allowed: multiples of {self.size}, the size of a group; with groups=, multiples of that"
                )
            return ranks // self.size, self.size
        if ranks is None:
            return groups, self.size
        if ranks % groups:
            raise ConfigError(f"ranks={ranks}, groups={groups}; allowed: a number of ranks that the groups divide equally")
        return groups, ranks // groups

    def _drop(self, groups: int, size: int) -> None:
        while len(self._blocks) > 1 and (self._blocks[-1].groups > groups or self._blocks[-1].size > size):
            self._blocks.pop()
        least = self._blocks[0].size
        if size < least:
            raise ConfigError(
                f"{groups * size} ranks in {groups} groups; allowed: at least {least} ranks a group, as many as each was "
                f"started with"
            )

    def _add(self, groups: int, size: int) -> None:
        last = self._blocks[-1]
        if (further := size - last.size) > 0:
            bundles = tuple(number for number in range(last.groups) for _ in range(further))
            self._blocks.append(_BundleBlock(bundles, last.groups, size))
        for number in range(last.groups, groups):
            self._blocks.append(_BundleBlock((number,) * size, number + 1, size))


def runs(groups: Sequence[int]) -> list[tuple[int, int]]:
    """The number of bundles of each run of equal groups. ``0 0 1`` -> ``(0, 2), (1, 1)``."""
    found: list[tuple[int, int]] = []
    for group in groups:
        if found and found[-1][0] == group:
            found[-1] = group, found[-1][1] + 1
        else:
            found.append((group, 1))
    return found
