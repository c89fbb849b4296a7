"""lm-eval over HTTP (``local-completions``): on the shipped model, the figures of its own transformers backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.api import Cluster
from epslots.example import example_model
from tests.support.fake_backend import FakeBackend
from tests.support.http_service import serving
from tests.support.rank_helpers import PATIENCE_S

lm_eval = pytest.importorskip("lm_eval", reason='lm-eval isn\'t installed: pip install "epslots[clients]"')
pytestmark = pytest.mark.filterwarnings("default")  # of lm-eval's and its libraries' own

CHOICES = [
    ("import os\nimport ", [" the", "sys"], 1),
    ("def f(self", ["):", " banana"], 0),
    ("for i in ", ["range", "zebra"], 0),
    ("return ", ["None", "purple"], 0),
    ("if x is not ", ["None", "Tuesday"], 0),
    ("class Foo(", ["seven", "object"], 0),  # which no model should choose: an accuracy of 1 would show less
]
TEXTS = ["import os\nimport sys\n\ndef main():\n    return 0\n", "class A:\n    def __init__(self):\n        self.x = 1\n"]
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "tiny_choices": (
        [{"q": question, "choices": choices, "answer": answer} for question, choices, answer in CHOICES],
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
    ),
    "tiny_texts": (
        [{"text": text} for text in TEXTS],
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    ),
    "tiny_lines": (
        [{"q": "def f(", "a": "x"}, {"q": "import os\nimport ", "a": "sys"}, {"q": "class A:", "a": ""}],
        {
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{a}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "temperature": 0},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
}


def write_tasks(folder: Path) -> None:
    """Tasks as lm-eval finds them: JSON is YAML, too."""
    for name, (rows, task) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **where, **task}))


def evaluate(folder: Path, model: str, arguments: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The figures of all tasks, and the texts that were generated."""
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(TASKS),
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        batch_size=1,
    )
    figures = {
        f"{task} {name}": value
        for task, result in found["results"].items()
        for name, value in result.items()
        if isinstance(value, float)
    }
    return figures, [sample["resps"][0][0] for sample in found["samples"]["tiny_lines"]]


def test_figures_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Accuracies and texts equal, bits per byte to five digits."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    write_tasks(tmp_path)
    source = str(example_model())
    settings: dict[str, Any] = {"slots": 4, "dtype": "float32", "kv_tokens": 4096, "silence_s": PATIENCE_S}
    with (
        Cluster(source, ranks=1, backend=FakeBackend(), cache_dir=tmp_path / "stores", progress=False, **settings) as cluster,
        serving(cluster) as client,
    ):
        address = {"base_url": f"{client.url}/v1/completions", "model": "scripted", "tokenizer": source}
        ours, texts = evaluate(tmp_path, "local-completions", address | {"num_concurrent": 4, "max_length": 512})
    theirs, right = evaluate(tmp_path, "hf", {"pretrained": source, "dtype": "float32", "device": "cpu", "max_length": 512})
    assert texts == right
    assert ours.keys() == theirs.keys()
    assert 0 < ours["tiny_choices acc,none"] < 1
    assert ours == pytest.approx(theirs, rel=1e-5)
