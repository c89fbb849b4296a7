"""Sizes as people write them: bytes with units, a link's speed, and the ``slots`` and ``prefetch`` settings."""

from __future__ import annotations

import re
from dataclasses import dataclass

from epslots.errors import ConfigError, shown

_UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d+)?)\s*([KMGT]i?B|B)\s*", re.IGNORECASE)
_CANONICAL = {unit.lower(): unit for unit in _UNITS}


# Python refuses to read an int of some thousand digits, and floats end at 1e308; no byte or token is counted beyond int64.
_DIGITS = r"\d{1,18}"
_COUNT = re.compile(rf"\s*{_DIGITS}\s*", re.ASCII)


def parse_count(text: str) -> int | None:
    """A whole number from 0 as people write it; None if the text is none, or has over 18 digits."""
    return int(text) if _COUNT.fullmatch(text) else None


def parse_bytes(text: str, setting: str = "size") -> int:
    """Bytes in ``text``, such as ``"12GiB"`` (1024-based) or ``"80 GB"`` (1000-based).

    Raises:
        ConfigError: not a positive number followed by a unit.
    """
    match = _SIZE.fullmatch(text)
    size = int(float(match[1]) * _UNITS[_CANONICAL[match[2].lower()]]) if match else 0
    if not 0 < size < 2**63:
        raise ConfigError(f"{setting}={shown(text)} is not a size: give a number and a unit ({', '.join(_UNITS)}): 12GiB")
    return size


MOST_STEP_BYTES = 2**60
"""Bound of the bytes that may be fetched in a step: sums of budgets stay within int64."""


def format_bytes(size: float) -> str:
    """``size`` in bytes as text with a binary unit and three significant digits: ``1.17 GiB``."""
    sign, size = ("-", -size) if size < 0 else ("", size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1023.5:
            return f"{sign}{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{sign}{size:.3g} {unit}"
        size /= 1024
    return f"{sign}{size:.3g} TiB" if size < 999.5 else f"{sign}{size:,.0f} TiB"


def format_count(count: int) -> str:
    """A large number in words, to four significant digits: ``671 billion``."""
    for name, size in (("trillion", 10**12), ("billion", 10**9), ("million", 10**6)):
        if count >= size:
            return f"{count / size:.4g} {name}"
    return f"{count:,}"


@dataclass(frozen=True)
class LinkSpeed:
    """A link's bandwidth, and the latency of each transfer."""

    bytes_per_s: int
    latency_s: float = 0.0

    def seconds(self, size: int) -> float:
        """Seconds that a transfer of so many bytes takes."""
        return self.latency_s + size / self.bytes_per_s


_LINK = re.compile(r"([^,]+?)\s*/\s*s\s*(?:,\s*(\d{1,18}(?:\.\d+)?)\s*(us|ms|s)\s*)?", re.IGNORECASE)
_PER_SECOND = {"us": 1e6, "ms": 1e3, "s": 1.0}


def parse_link(text: str) -> LinkSpeed:
    """Read a link's speed: ``"8GB/s"``, or with the latency of each transfer ``"8GB/s,20us"``.

    Raises:
        ConfigError: anything else.
    """
    match = _LINK.fullmatch(text)
    if not match:
        raise ConfigError(
            f"link={shown(text)}: allowed: bytes a second, and the latency of a transfer if any: 8GB/s or 8GB/s,20us"
        )
    latency_s = float(match[2]) / _PER_SECOND[match[3].lower()] if match[2] else 0.0
    return LinkSpeed(parse_bytes(match[1], "link"), latency_s)


@dataclass(frozen=True)
class SlotsSetting:
    """Number of slots of a rank. At most one field is set; none means ``"auto"``.

    Attributes:
        per_layer: slots in each MoE layer.
        share: share of each layer's experts, in (0, 1].
        total_bytes: bytes of the whole pool of one rank.
    """

    per_layer: int | None = None
    share: float | None = None
    total_bytes: int | None = None

    @property
    def is_auto(self) -> bool:
        return self == SlotsSetting()

    def __str__(self) -> str:
        if self.per_layer is not None:
            return f"{self.per_layer} per layer"
        if self.share is not None:
            return f"{100 * self.share:g}%"
        return "auto" if self.total_bytes is None else format_bytes(self.total_bytes)


def parse_slots(value: int | str | SlotsSetting) -> SlotsSetting:
    """Read the public ``slots`` setting.

    Args:
        value: an int (slots per MoE layer and rank), ``"25%"`` (of each layer's experts), ``"12GiB"``
            (bytes of the whole pool) or ``"auto"`` (the memory left by everything else).

    Raises:
        ConfigError: anything else, zero, a negative number, or more than 100 %.
    """
    if isinstance(value, SlotsSetting):
        return value
    allowed = 'allowed: a positive int (slots per MoE layer), "25%" (over 0, up to 100), "12GiB" or "auto"'
    if isinstance(value, bool) or not isinstance(value, int | str) or (isinstance(value, int) and value >= 2**63):
        raise ConfigError(f"slots={shown(value)}: {allowed}")
    text = str(value).strip()
    if text == "auto":
        return SlotsSetting()
    if re.fullmatch(rf"[+-]?{_DIGITS}", text):
        if int(text) <= 0:
            raise ConfigError(f"slots={value!r} leaves no slot to compute in: {allowed}")
        return SlotsSetting(per_layer=int(text))
    if percent := re.fullmatch(r"([+-]?\d+(?:\.\d+)?)\s*%", text):
        share = float(percent[1]) / 100
        if not 0 < share <= 1:
            raise ConfigError(f"slots={shown(value)} is not a share of a layer's experts: {allowed}")
        return SlotsSetting(share=share)
    if _SIZE.fullmatch(text):
        return SlotsSetting(total_bytes=parse_bytes(text, "slots"))
    raise ConfigError(f"slots={shown(value)}: {allowed}")


@dataclass(frozen=True)
class PrefetchSetting:
    """The ``prefetch`` setting.

    Attributes:
        on: whether experts are fetched ahead, where copies run beside computing.
        bytes_per_step: bytes that a rank may fetch in a step before it stops fetching ahead; None = no bound.
    """

    on: bool = True
    bytes_per_step: int | None = None


def parse_prefetch(value: str | bool | PrefetchSetting) -> PrefetchSetting:
    """Read the public ``prefetch`` setting: ``"auto"``, ``"off"``, or bytes a step such as ``"64MiB"``.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(value, PrefetchSetting):
        return value
    if isinstance(value, bool):
        return PrefetchSetting(value)
    if value in ("auto", "off"):
        return PrefetchSetting(value == "auto")
    if not isinstance(value, str) or not value[:1].isdigit():
        raise ConfigError(f"prefetch={value!r}: allowed: auto, off, or the bytes that a step may fetch ahead: 64MiB")
    nbytes = parse_bytes(value, "prefetch")
    if nbytes >= MOST_STEP_BYTES:
        raise ConfigError(f"prefetch={value!r}: allowed: less than {format_bytes(MOST_STEP_BYTES)} a step")
    return PrefetchSetting(bytes_per_step=nbytes)


def parse_kv_tokens(text: str) -> int | str:
    """A ``kv_tokens`` as users write it: a number of tokens, or "auto".

    Raises:
        ConfigError: it is neither.
    """
    if text.strip() == "auto":
        return "auto"
    if (tokens := parse_count(text)) is None:
        raise ConfigError(f"kv_tokens={shown(text)}; allowed: a number of tokens, or 'auto'")
    return tokens
