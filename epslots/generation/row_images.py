"""``CacheImage``s of rows: tokens and states in pools, and the objects that layers of other kinds keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from epslots.errors import RankMismatchError
from epslots.generation.cache_image import CacheImage, Places, TensorPlace
from epslots.generation.cache_layout import CacheLayout, Fact, KeptTensor, sequence_digest
from epslots.generation.row_cache import Row, RowCache

_PLAIN = bool | int | float | str | None


def image_of_row(cache: RowCache, row: Row, tokens: Sequence[int]) -> CacheImage:
    """The image of a row that holds these tokens. It is true until the row's next step."""
    kept, places = _pooled(cache, row, row.length)
    facts: dict[str, Fact] = {}
    for name, value in _own_values(row):
        if isinstance(value, torch.Tensor):
            kept.append(KeptTensor(name, _name_of(value.dtype), value.numel(), whole=tuple(value.shape)))
            places.append(TensorPlace(value.contiguous().view(-1)))
        elif isinstance(value, torch.dtype):
            facts[name] = _name_of(value)
        elif isinstance(value, _PLAIN):
            facts[name] = value
    layout = CacheLayout("rows", row.length, sequence_digest(tokens), tuple(kept), facts)
    return CacheImage(layout, places)


def growing_image(cache: RowCache, row: Row, tokens: Sequence[int], steps_stand: Callable[[], bool]) -> CacheImage:
    """The image of a row that will hold these tokens, some of which it holds now.

    Only if the cache ``keeps_objects`` of no layer. The row must have no other number while the image isn't gone.

    Args:
        steps_stand: whether no step has to be repeated.
    """

    def look() -> tuple[int, Places] | None:
        return (row.length, _pooled(cache, row, row.length)[1]) if steps_stand() else None

    kept, places = _pooled(cache, row, len(tokens))
    return CacheImage(CacheLayout("rows", len(tokens), sequence_digest(tokens), tuple(kept)), places, look=look)


def room_for_row(cache: RowCache, layout: CacheLayout) -> tuple[Row, CacheImage]:
    """A new row for a layout's tokens, and its image to write into; a row and cells must be free.

    Raises:
        RankMismatchError: the layout is that of another model, or of other settings.
    """
    row = cache.open_for(layout.tokens)
    kept, places = _pooled(cache, row, layout.tokens)
    others = layout.tensors[len(kept) :]
    if layout.kind != "rows" or layout.tensors[: len(kept)] != tuple(kept) or any(part.whole is None for part in others):
        cache.close(row)
        raise RankMismatchError(f"a request's cache has tensors that this rank doesn't keep: {_difference(layout, kept)}")
    memory = {part.name: torch.empty(part.entries, dtype=getattr(torch, part.dtype), device=cache.device) for part in others}
    places += [TensorPlace(memory[part.name]) for part in others]

    def complete() -> None:
        values: dict[str, Any] = layout.facts | {part.name: memory[part.name].view(part.whole or ()) for part in others}
        for name, value in values.items():
            _set_own(cache, row, name, value)

    return row, CacheImage(layout, places, on_complete=complete)


def _pooled(cache: RowCache, row: Row, tokens: int) -> tuple[list[KeptTensor], list[TensorPlace]]:
    """The tensors of a row that will have so many tokens, and their places now."""
    found = list(cache.places(row))
    return [place.kept(name, tokens) for name, place in found], [place for _, place in found]


def _own_values(row: Row) -> Iterator[tuple[str, Any]]:
    """The attributes of a row's own layers, and the items of those that are dicts."""
    for index, layer in sorted(row.own.items()):
        for attribute, value in sorted(vars(layer).items()):
            items = value.items() if isinstance(value, dict) else [("", value)]
            for key, item in items:
                yield f"{index}.{attribute}.{key}" if key else f"{index}.{attribute}", item


def _set_own(cache: RowCache, row: Row, name: str, value: Any) -> None:
    index, attribute, *key = name.split(".")
    if int(index) not in row.own:
        row.own[int(index)] = cache.empty_layer(int(index))
    layer = row.own[int(index)]
    if key:
        vars(layer).setdefault(attribute, {})[key[0]] = value
    elif attribute == "dtype":
        layer.dtype, layer.device = getattr(torch, value), cache.device
    else:
        setattr(layer, attribute, value)


def _difference(layout: CacheLayout, kept: Sequence[KeptTensor]) -> str:
    given, own = layout.tensors[: len(kept)], tuple(kept)
    found = next(((one, other) for one, other in zip(given, own, strict=False) if one != other), None)
    return f"{layout.kind}, {len(layout.tensors)} tensors for {len(own)}" if found is None else f"{found[0]}, own {found[1]}"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
