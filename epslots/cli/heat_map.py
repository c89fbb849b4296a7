"""Pictures of a placement, as text and as a PNG. They show each rank's experts, and the ranks' loads before and after.

Legend of shape suffixes: R ranks, E experts of a layer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from epslots.arrays import BoolArray, FloatArray, IntArray
from epslots.placement.balance import balancedness, holders, rank_loads
from epslots.placement.placement import Placement, default_placement

SHADES = " ░▒▓█"
_BAR = 28  # letters of the longest bar


def shares(holds_RE: BoolArray, tokens_E: IntArray | FloatArray) -> FloatArray:
    """Each rank's load from each expert over the mean rank load, float64 [R, E]. These are the colours of the map."""
    mean = max(float(np.sum(tokens_E)) / len(holds_RE), 1e-12)
    result: FloatArray = holds_RE * (tokens_E / np.maximum(holds_RE.sum(0), 1)) / mean
    return result


def layer_of(placement: Placement, layer: int) -> tuple[BoolArray, BoolArray]:
    """Holders of a layer's experts, bool [R, E]: dealt by slots without knowledge of loads; and as placed."""
    experts = int(placement.num_experts_L[layer])
    dealt = default_placement(placement.num_experts_L.tolist(), placement.quota_LR)
    return holders(dealt)[layer, :, :experts], holders(placement)[layer, :, :experts]


def text_map(placement: Placement, layer: int, tokens_E: IntArray | FloatArray, width: int = 100) -> list[str]:
    """Lines for a terminal: experts x ranks, hottest expert first, and each rank's load before and after.

    With more experts than columns, neighbours share a column, which has the shade of the heaviest.

    Args:
        tokens_E: load of the layer's experts.
        width: columns for experts.
    """
    dealt_RE, holds_RE = layer_of(placement, layer)
    order = np.argsort(-np.asarray(tokens_E), kind="stable")
    share_RE = shares(holds_RE, tokens_E)[:, order]
    starts = np.unique(np.arange(min(width, len(order))) * len(order) // min(width, len(order)))
    cells_RC = np.maximum.reduceat(share_RE, starts, axis=1)
    any_RC = np.maximum.reduceat(holds_RE[:, order].astype(np.int64), starts, axis=1)
    top = max(float(cells_RC.max()), 1e-12)
    level_RC = np.where(any_RC > 0, np.clip(np.ceil(cells_RC / top * (len(SHADES) - 1)), 1, len(SHADES) - 1), 0).astype(int)
    before_R, after_R = (rank_loads(held[None], np.asarray(tokens_E, np.float64)[None])[0] for held in (dealt_RE, holds_RE))
    lines = [f"layer {layer}: {len(order)} experts, hottest first (columns), on {len(holds_RE)} ranks (rows)"]
    for rank, levels in enumerate(level_RC.tolist()):
        lines.append(f"{rank:5d} |{''.join(SHADES[value] for value in levels)}| {int(holds_RE[rank].sum()):3d} copies")
    lines += ["", f"{'rank':>5}  {'dealt by slots':<{_BAR + 7}} {'as placed':<{_BAR + 7}}  (load / mean)"]
    mean = max(float(before_R.mean()), 1e-12)
    most = max(float(before_R.max()), float(after_R.max()), 1e-12)
    for rank, (before, after) in enumerate(zip(before_R.tolist(), after_R.tolist(), strict=True)):
        bars = [f"{'█' * round(_BAR * load / most):<{_BAR}} {load / mean:5.2f} " for load in (before, after)]
        lines.append(f"{rank:5d}  {' '.join(bars)}".rstrip())
    lines.append(f"balance {balancedness(before_R[None]):.3f} -> {balancedness(after_R[None]):.3f} (mean / largest load)")
    return lines


def plot_map(placement: Placement, layer: int, tokens_E: IntArray | FloatArray, path: Path) -> None:
    """Draw a PNG: the map as dealt by slots and as placed, and the ranks' loads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    order = np.argsort(-np.asarray(tokens_E), kind="stable")
    held = dict(zip(("dealt by slots", "as placed"), layer_of(placement, layer), strict=True))
    maps = {name: np.where(holds_RE, shares(holds_RE, tokens_E), np.nan)[:, order] for name, holds_RE in held.items()}
    top = max(float(np.nanmax(part)) for part in maps.values())
    figure, axes = pyplot.subplots(3, 1, figsize=(10, 8), layout="constrained")
    for axis, (name, part) in zip(axes, maps.items(), strict=False):
        image = axis.imshow(part, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=max(top, 1e-12))
        axis.set(title=f"layer {layer}, {name}", xlabel="experts, hottest first", ylabel="rank")
        figure.colorbar(image, ax=axis, label="load / mean of ranks")
    ranks = np.arange(placement.ranks)
    for number, (name, holds_RE) in enumerate(held.items()):
        load_R = rank_loads(holds_RE[None], np.asarray(tokens_E, np.float64)[None])[0]
        mean = max(float(load_R.mean()), 1e-12)
        label = f"{name}: balance {balancedness(load_R[None]):.3f}"
        axes[2].bar(ranks + 0.4 * number - 0.2, load_R / mean, width=0.4, label=label)
    axes[2].axhline(1.0, color="black", linewidth=0.8)
    axes[2].set(xlabel="rank", ylabel="load / mean")
    for whole in (axes[0].yaxis, axes[1].yaxis, axes[2].xaxis):
        whole.set_major_locator(MaxNLocator(integer=True))
    axes[2].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
