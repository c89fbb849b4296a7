"""``epslots predict`` as its users meet it, and the predictor that is shipped beside the example model."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import epslots
from epslots.cli.predict import read_texts
from epslots.errors import ConfigError
from epslots.example import example_model
from epslots.example_text import library_texts
from epslots.generation.text import load_tokenizer
from epslots.models.experts import experts_modules
from epslots.prefetch.fit import count_recalled
from epslots.prefetch.predictor import Predictor
from epslots.prefetch.predictor_file import PREDICTOR_FILE_NAME, load_predictor, read_predictor
from epslots.prefetch.recording import record

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with some of the library's text, and a file that isn't to be read."""
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    for number, text in enumerate(library_texts(held_out=False)[:3]):
        (folder / "inner" / f"{number}.txt").write_text(text[:20_000])
    (folder / "binary.bin").write_bytes(b"\xff\xfe\x00")
    return folder


def test_fit_and_show(run: Run, texts: Path, tmp_path: Path, cache_dir: Path):
    path = tmp_path / "p.safetensors"
    options = ("--tokens", 4000, "--window", 32, "--hidden", 8, "--epochs", 1, "--dtype", "float32", "--device", "cpu")
    code, out, err = run("predict", "fit", texts, "-o", path, *options, "--cache-dir", cache_dir)
    assert code == 0, err
    assert f"{path}: 0." in out and "recall 1 layer ahead" in out
    code, shown, _ = run("predict", "show", path)
    assert code == 0 and shown.strip() == out[: out.index(str(path))].strip()
    about = json.loads(run("predict", "show", path, "--json")[1])
    assert about["experts"] == [32] * 6 and about["tokens"] <= 4000 and about["settings"]["hidden"] == 8
    assert [quality is None for quality in about["quality"]] == [False] * 6
    for quality in about["quality"][:-1]:
        assert quality["fitted"] >= quality["naive"], "no layer is told of worse than by its router"
    model = epslots.load(example_model(), slots=4, device="cpu", dtype="float32", cache_dir=cache_dir, progress=False)
    assert load_predictor(path, model).predicts(4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("missing.txt",), "missing.txt: No such file or directory"),
        (("--model", "x"), "no text: give files or folders"),
        (("-o", "/no/folder/p"), "/no/folder/p: give a file in a folder that exists"),
        (("--memory", "much"), "much"),
    ],
)
def test_what_can_not_be(run: Run, options: tuple[str, ...], message: str):
    code, out, err = run("predict", "fit", *options)
    assert code == 2 and not out
    assert message in err and "Traceback" not in err


def test_text_that_is_none(run: Run, texts: Path, tmp_path: Path, cache_dir: Path):
    (tmp_path / "short.txt").write_text("import os\n")
    for arguments, message in (
        ((texts, "--pattern", "*.md"), "no text in"),
        ((texts, "--pattern", "*.bin"), "binary.bin is not UTF-8 text"),
        ((tmp_path / "short.txt", "--device", "cpu", "--cache-dir", cache_dir), "a fit needs 10,240 at least"),
    ):
        code, _, err = run("predict", "fit", *arguments, "-o", tmp_path / "p")
        assert code == 2 and message in err
    assert not (tmp_path / "p").exists()


def test_texts_are_read_in_order_and_no_further_than_needed(tmp_path: Path):
    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(name * 10)
    assert read_texts([tmp_path], "*.txt", 1000) == ["a" * 10, "b" * 10, "c" * 10]
    assert read_texts([tmp_path / "c.txt", tmp_path], "*.txt", 15) == ["c" * 10, "a" * 10]
    with pytest.raises(ConfigError, match="no text in"):
        read_texts([], "*", 10)


def test_files_that_are_no_predictors(run: Run, tmp_path: Path):
    (tmp_path / "text").write_text("none")
    for path, message in ((tmp_path / "text", "is not a predictor"), (tmp_path / "x", "no such file")):
        code, _, err = run("predict", "show", path)
        assert code == 2 and message in err


# --- as shipped


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache_dir = tmp_path_factory.mktemp("cache")
    return epslots.load(example_model(), slots="100%", device="cpu", dtype="float32", cache_dir=cache_dir, progress=False)


@pytest.fixture(scope="module")
def held_out(example: Any) -> torch.Tensor:
    """Windows of text that neither the model nor its predictor has seen, from all of its files: int64 [32, 128]."""
    tokenizer = load_tokenizer(example.name_or_path)
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in library_texts(held_out=True)]
    joined = torch.tensor([token for text in ids for token in text])
    starts = np.linspace(0, len(joined) - 128, 32).astype(int)
    return torch.stack([joined[start : start + 128] for start in starts.tolist()])


def test_the_texts_are_parted():
    known, held = set(library_texts(held_out=False)), set(library_texts(held_out=True))
    assert len(known) > 10 * len(held) > 0 and not known & held


def test_recall_of_the_shipped_predictor(example: Any, held_out: torch.Tensor):
    """The project's promise for the example model; ``epslots bench predict`` measures it on more text."""
    seen = record(example, held_out, range(6), lambda done: None)
    fits, _ = read_predictor(example_model() / PREDICTOR_FILE_NAME)
    recall = []
    for layer, fitted in enumerate(fits[:-1]):
        assert fitted is not None
        rows = seen[layer].hidden_NH.float()
        if fitted.history:
            before = torch.nn.functional.pad(rows.unflatten(0, (-1, 128)), (0, 0, 1, 0))[:, :-1].flatten(0, 1)
            rows = torch.cat([rows, before], 1)
        logits = fitted.to(torch.device("cpu"), torch.float32).scores(rows)
        recall.append(count_recalled(logits, seen[layer + 1].index_NK) / seen[layer + 1].index_NK.numel())
    at_k, at_2k = torch.stack(recall).mean(0).tolist()
    assert at_k >= 0.82 and at_2k >= 0.96
    assert (example_model() / PREDICTOR_FILE_NAME).stat().st_size < 1_000_000


def running_recall(model: Any, windows: torch.Tensor, predictor: Predictor, *, forgetful: bool) -> float:
    """Recall at k of what is told in each step of a running model: prompts, then a token for each sequence at a time."""
    told: dict[int, torch.Tensor] = {}
    found, chosen = 0, 0

    def watch(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            nonlocal found, chosen
            hidden, index = args[:2]
            if layer in told and len(hidden) == len(windows):
                hits = (told[layer][:, :, None] == index[:, None, :]).any(-1)
                found, chosen = found + int(hits.sum()), chosen + hits.numel()
            if forgetful:
                predictor.forget()
            if predictor.predicts(layer):
                told[layer + 1] = predictor.ids(layer, hidden, index.shape[1])

        return hook

    with ExitStack() as stack, torch.inference_mode():
        for layer, module in enumerate(experts_modules(model).values()):
            stack.callback(module.register_forward_pre_hook(watch(layer)).remove)
        cache = model(input_ids=windows[:, :16], use_cache=True).past_key_values
        for position in range(16, windows.shape[1]):
            cache = model(input_ids=windows[:, position : position + 1], past_key_values=cache).past_key_values
    assert chosen == (windows.shape[1] - 16) * windows.shape[0] * 5 * 4
    return found / chosen


def test_a_running_model_is_told_of_as_well_as_recorded_text(example: Any, held_out: torch.Tensor):
    """The token before each token is found again in the step before: the first layer's estimator lives on it."""
    predictor = load_predictor(example_model() / PREDICTOR_FILE_NAME, example)
    recall = running_recall(example, held_out[:6, :48], predictor, forgetful=False)
    assert recall > 0.8
    assert recall > running_recall(example, held_out[:6, :48], predictor, forgetful=True) + 0.01
