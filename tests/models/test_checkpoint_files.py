"""One answer to which files a checkpoint is, read by dense part and experts alike: transformers' answer, or a refusal."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import epslots
from epslots import CheckpointError, ConfigError
from epslots.models.checkpoint import CheckpointSource, find_checkpoint, open_checkpoint
from epslots.models.opening import load_dense, open_model
from epslots.models.weight_files import INDEX_NAME, SINGLE_NAME, find_weight_files
from tests.support import zoo

NAME = "qwen3_moe"
Checkpoints = Callable[[str], Path]


@pytest.fixture
def folder(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A copy of a sharded checkpoint, to be changed."""
    return Path(shutil.copytree(checkpoint(NAME), tmp_path / "model"))


@pytest.fixture
def other(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A single file of other weights for the same model."""
    tensors = {key: tensor * 1.5 for key, tensor in zoo.read_tensors(checkpoint(NAME)).items()}
    return zoo.write_checkpoint(checkpoint(NAME), tmp_path / "other", tensors, shard_bytes=None)


def load(folder: Path, cache_dir: Path, **settings: Any) -> PreTrainedModel:
    settings = {"slots": 4, "device": "cpu", "dtype": "float32", "progress": False} | settings
    return epslots.load(folder, cache_dir=cache_dir, **settings)


@torch.no_grad()
def assert_same(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    ids = zoo.random_ids(2, 24)
    expected, actual = reference(ids).logits, model(ids).logits
    assert (expected - actual).abs().max() <= 2e-5 * expected.abs().max()


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def first_shard(folder: Path) -> Path:
    return folder / open_checkpoint(folder).files.names[0]


# --- sets of weights -------------------------------------------------------------------------------------------------


def test_a_single_file_beside_shards_is_a_second_set(folder: Path, other: Path):
    shutil.copy(other / SINGLE_NAME, folder)
    with pytest.raises(CheckpointError, match=r"two sets of weights: model\.safetensors, and model-00001"):
        open_model(folder, "float32")


def test_an_index_whose_files_are_gone_gives_way(folder: Path, other: Path, cache_dir: Path):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    shutil.copy(other / SINGLE_NAME, folder)
    assert_same(load(folder, cache_dir), zoo.reference(folder))


def test_an_index_of_the_single_file_is_no_second_set(other: Path, cache_dir: Path):
    keys = load_file(other / SINGLE_NAME)
    (other / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, SINGLE_NAME)}))
    assert_same(load(other, cache_dir), zoo.reference(other))


@pytest.mark.parametrize("resolved", ["index", "single"])
def test_shards_of_another_sharding_are_refused(resolved: str, folder: Path, other: Path):
    place = folder if resolved == "index" else other
    save_file({"lm_head.weight": torch.zeros(1)}, place / "model-00001-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"holds model-00001-of-00003\.safetensors, named like its weight files"):
        open_model(place, "float32")


def test_files_that_transformers_never_reads_are_no_obstacle(folder: Path, other: Path, cache_dir: Path):
    names = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "model.fp16.safetensors"]
    names += ["model.bf16-00001-of-00002.safetensors", "adapter_model.safetensors", "mtp.safetensors"]
    for name in names:
        shutil.copy(other / SINGLE_NAME, folder / name)
    shutil.copytree(other, folder / "original")
    assert_same(load(folder, cache_dir), zoo.reference(folder))


def test_a_tensor_in_two_files(folder: Path):
    first, second = open_checkpoint(folder).files.names[:2]
    key, tensor = next(iter(load_file(folder / first).items()))
    save_file(load_file(folder / second) | {key: tensor * 2}, folder / second)
    with pytest.raises(CheckpointError, match=rf"{first} and {second} both hold {key}"):
        open_model(folder, "float32")


def test_an_adapter_is_refused_by_name(folder: Path):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    with pytest.raises(CheckpointError, match="holds an adapter"):
        open_model(folder, "float32")


def test_weight_files_named_by_the_configuration(folder: Path):
    edit(folder / "config.json", transformers_weights="weights.safetensors")
    with pytest.raises(CheckpointError, match="transformers_weights"):
        open_model(folder, "float32")


@pytest.mark.parametrize("metadata", [None, [1], {"total_size": "much"}])
def test_an_index_needs_no_metadata(metadata: Any, folder: Path, cache_dir: Path):
    expected = zoo.reference(folder)
    edit(folder / INDEX_NAME, metadata=metadata)
    assert_same(load(folder, cache_dir), expected)


def test_an_index_that_names_a_tensor_twice(folder: Path):
    index = (folder / INDEX_NAME).read_text()
    (folder / INDEX_NAME).write_text(index.replace('"weight_map": {', '"weight_map": {"lm_head.weight": "x.safetensors",'))
    with pytest.raises(CheckpointError, match=r"names 'lm_head\.weight' twice"):
        open_model(folder, "float32")


def test_files_are_read_in_transformers_order(folder: Path):
    files = find_weight_files(folder)
    assert files.names == tuple(sorted(set(json.loads((folder / INDEX_NAME).read_text())["weight_map"].values())))
    assert tuple(open_checkpoint(folder).handles) == files.names


def test_dense_weights_come_from_the_files_that_were_opened(folder: Path):
    """transformers is handed tensors: with the files gone, or others in their place, it reads the same."""
    expected = zoo.reference(folder)
    opened = open_model(folder, "float32")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    model = load_dense(opened, device=torch.device("cpu"), show_progress=False)
    theirs = expected.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in model.state_dict().items())


# --- subfolder, variant, revision, token -------------------------------------------------------------------------------


def test_a_subfolder_holds_configuration_and_weights(folder: Path, other: Path, cache_dir: Path):
    shutil.copytree(other, folder / "a" / "b")
    assert_same(load(folder, cache_dir, subfolder="a/b"), zoo.reference(other))
    with pytest.raises(CheckpointError, match="holds no folder nowhere"):
        load(folder, cache_dir, subfolder="nowhere")


@pytest.mark.parametrize("subfolder", ["../other", "/etc", "a/../../b", 7])
def test_a_subfolder_is_inside(subfolder: Any, folder: Path, cache_dir: Path):
    with pytest.raises(ConfigError, match="subfolder="):
        load(folder, cache_dir, subfolder=subfolder)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_variant_is_dense_part_and_experts(sharded: bool, folder: Path, checkpoint: Checkpoints, cache_dir: Path):
    tensors = {key: tensor * 1.5 for key, tensor in zoo.read_tensors(checkpoint(NAME)).items()}
    if sharded:
        halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
        names = [f"model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
        weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
        (folder / "model.safetensors.index.fp16.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for name, half in zip(names, halves, strict=True):
            save_file(half, folder / name, metadata={"format": "pt"})
    else:
        save_file(tensors, folder / "model.fp16.safetensors", metadata={"format": "pt"})
    assert_same(load(folder, cache_dir, variant="fp16"), zoo.reference(folder, variant="fp16"))
    assert_same(load(folder, cache_dir), zoo.reference(folder))


@pytest.mark.parametrize("variant", ["fp32", "../x", "", 16])
def test_a_variant_that_is_none(variant: Any, folder: Path, cache_dir: Path):
    with pytest.raises((CheckpointError, ConfigError), match=r"neither model\.fp32\.safetensors|variant="):
        load(folder, cache_dir, variant=variant)


def test_an_empty_revision_is_not_main(folder: Path):
    with pytest.raises(ConfigError, match="revision=''"):
        CheckpointSource("some/model", revision="")


@pytest.mark.parametrize("settings", [{"revision": "main"}, {"token": "hf_x"}, {"token": False}])
def test_a_folder_has_no_revision(settings: dict[str, Any], folder: Path, cache_dir: Path):
    with pytest.raises(ConfigError, match="allowed for a hub id"):
        load(folder, cache_dir, **settings)


def test_the_hub_is_asked_for_what_was_asked(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def snapshot(model_id: str, **settings: Any) -> str:
        asked.update(settings, id=model_id)
        return str(folder.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    source = CheckpointSource("some/model", subfolder=folder.name, revision="v2", token="hf_x")
    assert find_checkpoint(source) == folder
    assert (asked["id"], asked["revision"], asked["token"]) == ("some/model", "v2", "hf_x")
    assert f"{folder.name}/*.safetensors" in asked["allow_patterns"]
    assert f"{folder.name}/*/*" in asked["ignore_patterns"]


@pytest.mark.parametrize("name", ["path_or_id", "subfolder", "variant"])
def test_a_name_that_is_too_long(name: str, folder: Path):
    source = CheckpointSource(**{"path_or_id": folder} | {name: "x" * 5000})
    with pytest.raises(CheckpointError, match="File name too long"):
        open_model(source, "float32")


def test_an_empty_name_is_no_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    assert find_checkpoint(".").samefile(folder)
    with pytest.raises(CheckpointError, match="name is empty"):
        find_checkpoint("")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_weights_that_are_no_file(make: Callable[[Path], None], other: Path):
    (other / SINGLE_NAME).unlink()
    make(other / SINGLE_NAME)
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json$"):
        open_model(other, "float32")


# --- keywords ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("torch_dtype", "force_download", "proxies", "mirror", "low_cpu_mem_usage", "local_files_only", "load_in_8bit"),
        *("adapter_kwargs", "key_mapping", "weights_only", "use_kernels", "device_map", "quantization_config", "state_dict"),
        *("gguf_file", "generation_config", "tp_plan", "rope_theta", "slot", "use_safetensors"),
    ],
)
@pytest.mark.parametrize("value", [None, True])
def test_no_keyword_is_ignored(name: str, value: Any, tmp_path: Path):
    with pytest.raises(ConfigError, match=f"{name}: epslots sets this itself, or has no such setting; allowed: .*subfolder"):
        epslots.load(tmp_path, **{name: value})


@pytest.mark.parametrize("settings", [{"batch_invariant": "no"}, {"execute_predicted": "off"}, {"attn_implementation": 5}])
def test_a_keyword_of_another_type(settings: dict[str, Any], tmp_path: Path):
    with pytest.raises(ConfigError, match=f"{next(iter(settings))}=.*: allowed: "):
        epslots.load(tmp_path, **settings)


def test_attention_is_the_one_that_was_asked_for(folder: Path, cache_dir: Path):
    assert load(folder, cache_dir, attn_implementation="eager").config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match="attn_implementation='flash_attention_9'"):
        load(folder, cache_dir, attn_implementation="flash_attention_9")


# --- dtype -------------------------------------------------------------------------------------------------------------


def save_as(source: Path, folder: Path, dtype_of: Callable[[str], torch.dtype], **config: Any) -> Path:
    tensors = {key: tensor.to(dtype_of(key)) for key, tensor in zoo.read_tensors(source).items()}
    zoo.write_checkpoint(source, folder, tensors)
    edit(folder / "config.json", **{"dtype": None, "torch_dtype": None} | config)
    return folder


@pytest.mark.parametrize("case", ["weights", "mixed", "index", "config"])
def test_auto_dtype_is_transformers_auto(case: str, checkpoint: Checkpoints, tmp_path: Path):
    """The configuration's; else the index's; else that of the first float in the first file."""
    kinds = {"mixed": lambda key: torch.bfloat16 if "experts" in key else torch.float16}
    config = {"dtype": "float16"} if case == "config" else {}
    folder = save_as(checkpoint(NAME), tmp_path / "model", kinds.get(case, lambda key: torch.bfloat16), **config)
    if case == "index":
        edit(folder / INDEX_NAME, metadata={"dtype": "float16"})
    expected = transformers.Qwen3MoeForCausalLM.from_pretrained(folder, dtype="auto").dtype
    assert open_model(folder, "auto").dtype == expected
    assert (expected == torch.float16) == (case in ("mixed", "index", "config"))


def test_auto_dtype_of_a_quantised_checkpoint_is_bfloat16(checkpoint: Checkpoints, tmp_path: Path):
    folder = zoo.make_fp8(checkpoint("deepseek_v3"), tmp_path / "fp8")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert open_model(folder, "auto").dtype == torch.bfloat16
    edit(folder / "config.json", dtype="float16")
    assert open_model(folder, "auto").dtype == torch.float16


# --- replaced files ----------------------------------------------------------------------------------------------------


def replace_in_place(path: Path, key: str, tensor: torch.Tensor) -> None:
    """Write one tensor over the file's, which keeps its size and its dates."""
    status, header = path.stat(), int.from_bytes(path.read_bytes()[:8], "little")
    begin = 8 + header + json.loads(path.read_bytes()[8 : 8 + header])[key]["data_offsets"][0]
    with open(path, "r+b") as file:
        file.seek(begin)
        file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_value_replaced_in_place_is_noticed(folder: Path, cache_dir: Path):
    """Size and dates stay, and no sample is touched: the time of the last change can't be set."""
    load(folder, cache_dir)
    before = open_checkpoint(folder)
    fingerprint, content = before.fingerprint, before.content
    key = "model.layers.1.mlp.experts.5.down_proj.weight"
    path = folder / before.tensors[key].file
    tensor = load_file(path)[key].clone()
    tensor[0] += 3
    replace_in_place(path, key, tensor)
    after = open_checkpoint(folder)
    assert after.content == content
    assert after.fingerprint != fingerprint
    assert_same(load(folder, cache_dir), zoo.reference(folder))


def test_copies_have_the_same_content(folder: Path, tmp_path: Path):
    copy = open_checkpoint(Path(shutil.copytree(folder, tmp_path / "copy")))
    original = open_checkpoint(folder)
    assert copy.content == original.content
    assert copy.fingerprint != original.fingerprint


def test_content_differs_with_any_tensor(other: Path):
    """Each is sampled: copies that differ in one expert are told apart, also with equal dates."""
    path = other / SINGLE_NAME
    before = open_checkpoint(other).content
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    for key, tensor in tensors.items():
        replace_in_place(path, key, -tensor)
        assert open_checkpoint(other).content != before, key
        replace_in_place(path, key, tensor)
    assert open_checkpoint(other).content == before
