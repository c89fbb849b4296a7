"""The table of the quantised formats that can be read, and what to do about the others."""

from __future__ import annotations

from epslots.errors import CheckpointError, UnsupportedModelError
from epslots.formats import awq, compressed_tensors, fp8, gptq, modelopt, mxfp4
from epslots.formats.stored_format import Settings, StoredFormat

FORMATS: dict[str, StoredFormat] = {
    module.FORMAT.method: module.FORMAT for module in (fp8, mxfp4, compressed_tensors, modelopt, awq, gptq)
}

_INSTEAD = "use a checkpoint of the same model in one of these formats, or the unquantised one"
# Methods that aren't read, and the reason.
_REFUSED = {
    "bitsandbytes": "bitsandbytes quantises dense layers while a model is loaded, and leaves fused experts as they are: use "
    "the unquantised checkpoint that it was made from",
    "gguf": f"GGUF files are llama.cpp's: {_INSTEAD}",
    "exl3": f"EXL3 codes are decoded only by exllamav3's kernels: {_INSTEAD}",
}


def find_format(settings: Settings, where: object) -> StoredFormat:
    """The format of a checkpoint with these settings.

    Args:
        where: the checkpoint, in messages.

    Raises:
        UnsupportedModelError: it isn't known, by name and with what to do.
        CheckpointError: the settings contradict themselves.
    """
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    found = FORMATS.get(method) if isinstance(method, str) else None
    if found is None:
        hint = _REFUSED.get(method, _INSTEAD) if isinstance(method, str) else _INSTEAD
        raise UnsupportedModelError(
            f"{where} is quantised with {method!r}; epslots reads {', '.join(FORMATS)} and unquantised checkpoints. {hint}"
        )
    try:
        found.check(settings)
    except (CheckpointError, UnsupportedModelError) as error:
        raise type(error)(f"{where}: {error}") from error
    return found
