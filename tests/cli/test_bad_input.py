"""Bad input gets an error that says what was given and what is allowed, before any harm is done."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import epslots
from epslots import CheckpointError, ConfigError, DoesNotFitError, StoreError, UnsupportedModelError
from epslots.host_limits import MemoryLimit
from epslots.layout import LayerSpec
from epslots.models.checkpoint import Checkpoint, open_checkpoint
from epslots.models.expert_reader import ExpertReader
from epslots.models.experts import SPEC
from epslots.runtime import runtime_of
from epslots.verify_store import check_store
from tests.support import zoo
from tests.support.store_helpers import without_privileges

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a sharded qwen3_moe checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "damaged"))


def load(folder: Path | str, tmp_path: Path, **settings: Any) -> Any:
    settings = {"slots": 2, "device": "cpu", "dtype": "float32", "progress": False} | settings
    return epslots.load(folder, cache_dir=tmp_path / "cache", **settings)


def refused(folder: Path, tmp_path: Path, error: type[Exception], message: str, **settings: Any) -> None:
    with pytest.raises(error, match=message):
        load(folder, tmp_path, **settings)
    assert not list((tmp_path / "cache").glob("*.experts")), "no store was left behind"


def shard_with(folder: Path, part: str) -> Path:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    return folder / next(file for key, file in weight_map.items() if part in key)


def rewrite(folder: Path, part: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of the shard that holds ``part``, and bring the index up to date."""
    path = shard_with(folder, part)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {key: file for key, file in index["weight_map"].items() if file != path.name or key in tensors}
    (folder / INDEX).write_text(json.dumps(index))


def dropping(key: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """A change for ``rewrite``: the tensor isn't there."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[key]

    return change


@pytest.mark.parametrize("slots", [0, -1, "0%", "101%", "a few", "1.5"])
def test_slots(slots: int | str, folder: Path, tmp_path: Path):
    refused(folder, tmp_path, ConfigError, "slots=", slots=slots)


def test_more_slots_than_experts(folder: Path, tmp_path: Path):
    refused(folder, tmp_path, ConfigError, "16", slots=17)


def test_a_misfit_is_refused_with_its_sum_before_any_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("epslots.load_plan.memory_limit", lambda device: MemoryLimit("this test", "", 1 << 20, 1 << 20))
    monkeypatch.setattr("epslots.loading.load_dense", lambda *args, **kwargs: pytest.fail("weights were read"))
    refused(folder, tmp_path, DoesNotFitError, r"(?s)dense.*slots.*KV cache.*workspace", slots="100%")
    with pytest.raises(DoesNotFitError, match="slot"):
        load(folder, tmp_path, slots="100B")


def test_a_full_disk_is_said_before_any_weight_is_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=4096))
    monkeypatch.setattr("epslots.loading.load_dense", lambda *args, **kwargs: pytest.fail("weights were read"))
    refused(folder, tmp_path, StoreError, "no room for the host store")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "device='tpu': allowed: cpu, cuda, cuda:N"),
        ({"device": "cuda:99"}, "device='cuda:99', but"),
        ({"dtype": "int8"}, "dtype='int8': allowed: auto"),
        ({"policy": "fifo"}, "policy='fifo': allowed"),
        ({"host_store": "disk"}, "host_store='disk': allowed: file, memory"),
        ({"trust_remote_code": True}, "never runs code"),
        ({"device_map": "auto"}, "device_map: epslots sets this itself"),
    ],
)
def test_settings(settings: dict[str, Any], message: str, folder: Path, tmp_path: Path):
    refused(folder, tmp_path, ConfigError, message, **settings)


def test_a_truncated_shard(folder: Path, tmp_path: Path):
    path = shard_with(folder, "experts.3.")
    os.truncate(path, path.stat().st_size - 100)
    refused(folder, tmp_path, CheckpointError, f"{path.name} is damaged or cut short")


def test_a_bit_flipped_in_a_shards_header(folder: Path, tmp_path: Path):
    path = shard_with(folder, "experts.3.")
    data = bytearray(path.read_bytes())
    data[data.index(b"shape")] ^= 1
    path.write_bytes(data)
    refused(folder, tmp_path, CheckpointError, f"{path.name} is damaged")


def test_a_bit_flipped_in_a_shards_weights_is_found_by_verify(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """safetensors has no digests: the store keeps serving what it was built from, and the comparison names the expert."""
    cache = tmp_path / "cache"
    assert check_store(folder, cache_dir=cache, against_checkpoint=True, progress=False) == (48, [])
    path = shard_with(folder, "layers.1.mlp.experts.5.down_proj")
    key = "model.layers.1.mlp.experts.5.down_proj.weight"
    header = int.from_bytes(path.read_bytes()[:8], "little")
    offset = 8 + header + json.loads(path.read_bytes()[8 : 8 + header])[key]["data_offsets"][0]
    fingerprint = open_checkpoint(folder).fingerprint
    with open(path, "r+b") as file:
        file.seek(offset + 2)
        byte = file.read(1)[0]
        file.seek(offset + 2)
        file.write(bytes([byte ^ 16]))
    # A disk's bit flips without a date, and between the samples.
    monkeypatch.setattr(Checkpoint, "fingerprint", fingerprint)
    count, problems = check_store(folder, cache_dir=cache, against_checkpoint=True, progress=False)
    assert count == 48
    assert problems == ["expert 5 of model.layers.1.mlp.experts: the checkpoint differs from the host store"]


def test_a_bit_flipped_in_the_host_store_is_never_served(folder: Path, tmp_path: Path):
    model = load(folder, tmp_path, slots="100%")
    shape = epslots.runtime.runtime_of(model).store.shape
    del model
    (store,) = (tmp_path / "cache").glob("*.experts")
    with open(store, "r+b") as file:
        file.seek(shape.offset(2, 7) + 100)
        byte = file.read(1)[0]
        file.seek(shape.offset(2, 7) + 100)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(StoreError, match=r"expert 7 of model\.layers\.2\.mlp\.experts is corrupt"):
        load(folder, tmp_path, slots="100%")
    bounded = load(folder, tmp_path, slots=2)  # nothing is fetched yet
    with pytest.raises(StoreError, match="expert 7"):
        bounded(zoo.random_ids(32, 64))
    epslots.runtime.runtime_of(bounded).loaders[0].pool.check_integrity()
    assert len(epslots.verify(bounded, progress=False)) == 1


def test_a_mis_shaped_expert(folder: Path, tmp_path: Path):
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        key = next(k for k in tensors if "experts.3.down_proj" in k)
        tensors[key] = tensors[key][:-1].contiguous()

    rewrite(folder, "experts.3.down_proj", shorten)
    refused(folder, tmp_path, CheckpointError, r"down_proj, expert 3: the checkpoint's tensors give shape \[63, 32\]")


def test_a_mis_shaped_dense_tensor(folder: Path, tmp_path: Path):
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].contiguous()

    rewrite(folder, "model.norm.weight", shorten)
    refused(folder, tmp_path, CheckpointError, r"model\.norm\.weight has shape \[63\], the model expects \[64\]")


def test_missing_expert_keys(folder: Path, tmp_path: Path):
    key = "model.layers.1.mlp.experts.5.up_proj.weight"
    rewrite(folder, key, dropping(key))
    refused(folder, tmp_path, CheckpointError, r"layers\.1\.mlp\.experts\.gate_up_proj: the checkpoint lacks expert 5 of 16")


@pytest.mark.parametrize("layout", ["per expert", "fused"])
@pytest.mark.parametrize("experts", [8, 24])
def test_another_number_of_experts_than_the_model_has(layout: str, experts: int, folder: Path, tmp_path: Path):
    if layout == "fused":
        folder = zoo.make_fused(folder, tmp_path / "fused")
    change_config(folder, num_experts=experts, num_local_experts=experts)
    with pytest.raises(CheckpointError, match=r"shape|lacks expert 16, 17|has 16 experts, the model 8|holds 16 experts"):
        load(folder, tmp_path)


@pytest.mark.parametrize("layout", ["per expert", "fused"])
@pytest.mark.parametrize("experts", [8, 24])
def test_the_reader_itself_counts_experts(layout: str, experts: int, folder: Path, tmp_path: Path):
    """The router's shape gives such a checkpoint away before; the reader doesn't lean on that."""
    model = load(folder, tmp_path)
    if layout == "fused":
        folder = zoo.make_fused(folder, tmp_path / "fused")
        model = load(folder, tmp_path)
    for module in model.modules():
        if hasattr(module, SPEC):
            setattr(module, SPEC, {name: (experts, *shape[1:]) for name, shape in getattr(module, SPEC).items()})
    layers = tuple(LayerSpec(x.name, experts, x.layout) for x in runtime_of(model).layers)
    with pytest.raises(CheckpointError, match=r"lacks expert 16, 17|has 16 experts, the model 8|holds 16 experts"):
        ExpertReader(open_checkpoint(folder), model, layers)


def test_fp8_experts_without_their_scales(checkpoint: Callable[[str], Path], tmp_path: Path):
    folder = zoo.make_fp8(checkpoint("deepseek_v3"), tmp_path / "fp8")
    tensors = {k: t for k, t in zoo.read_tensors(folder).items() if not (".experts." in k and k.endswith("_scale_inv"))}
    stripped = zoo.write_checkpoint(folder, tmp_path / "stripped", tensors)
    refused(stripped, tmp_path, CheckpointError, r"no tensor like .*weight_scale_inv")


def test_two_models_of_one_name_and_date_are_told_apart(checkpoint: Callable[[str], Path], tmp_path: Path):
    """Archives and container layers give every file the same date; the sizes of two fine-tunes are equal anyway."""
    first = Path(shutil.copytree(checkpoint("mixtral"), tmp_path / "a" / "model"))
    second = Path(shutil.copytree(first, tmp_path / "b" / "model"))
    for path in second.glob("*.safetensors"):
        save_file({k: t * 2 for k, t in load_file(path).items()}, path, metadata={"format": "pt"})
    for path in [*first.iterdir(), *second.iterdir()]:
        os.utime(path, ns=(10**18, 10**18))
    load(first, tmp_path)
    ids = zoo.random_ids()
    with torch.no_grad():
        expected, actual = zoo.reference(second)(ids).logits, load(second, tmp_path)(ids).logits
    assert (expected - actual).abs().max() < 1e-4 * expected.abs().max()


def test_a_whole_projection_missing(folder: Path, tmp_path: Path):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    for key in [k for k in weight_map if "layers.2" in k and "up_proj" in k]:
        rewrite(folder, key, dropping(key))
    refused(folder, tmp_path, CheckpointError, "no tensor like .*up_proj")


def test_a_missing_dense_key(folder: Path, tmp_path: Path):
    rewrite(folder, "model.norm.weight", dropping("model.norm.weight"))
    refused(folder, tmp_path, CheckpointError, "lacks 1 tensors that the model needs: model.norm.weight")


def test_a_missing_shard(folder: Path, tmp_path: Path):
    path = shard_with(folder, "experts.3.")
    path.unlink()
    refused(folder, tmp_path, CheckpointError, f"names files that aren't there: {path.name}")


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors", "model.bin", 7])
def test_an_index_that_names_other_places(name: object, folder: Path, tmp_path: Path):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, tmp_path, CheckpointError, "in the same folder")


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', "{"])
def test_an_index_that_is_none(text: str, folder: Path, tmp_path: Path):
    (folder / INDEX).write_text(text)
    refused(folder, tmp_path, CheckpointError, r"index\.json (is not|holds a JSON list)")


def test_an_index_that_lies(folder: Path, tmp_path: Path):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.9.nothing.weight"] = next(iter(index["weight_map"].values()))
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, tmp_path, CheckpointError, "says that .* holds model.layers.9.nothing.weight, and it doesn't")


def test_a_pickle(folder: Path, tmp_path: Path):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    refused(folder, tmp_path, CheckpointError, "pytorch_model.bin, which is a pickle")


def test_no_weights_at_all(folder: Path, tmp_path: Path):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    refused(folder, tmp_path, CheckpointError, "holds neither")


@pytest.mark.parametrize("what", [INDEX, "config.json", "shard", "."])
def test_no_read_permission(what: str, folder: Path, tmp_path: Path):
    path = shard_with(folder, "experts.3.") if what == "shard" else folder / what
    for parent in [tmp_path, *tmp_path.parents[:3]]:  # pytest's folders are its user's own
        if parent.owner() == "root" and parent != Path("/tmp"):
            parent.chmod(0o755)
    path.chmod(0)
    with without_privileges(), pytest.raises(CheckpointError, match=r"[Pp]ermission"):
        load(folder, tmp_path)


def test_no_such_folder(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"doesn't exist; give a checkpoint folder or a hub id"):
        load(str(tmp_path / "nowhere"), tmp_path)
    with pytest.raises(CheckpointError, match="no local folder some/model, and the hub"):
        load("some/model", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        load(tmp_path / "file", tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"model_type": "no_such_model"}', "{}"])
def test_a_bad_config(text: str | None, folder: Path, tmp_path: Path):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=r"config\.json"):
        load(folder, tmp_path)


def change_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def test_remote_code_is_never_run(folder: Path, tmp_path: Path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    change_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(UnsupportedModelError, match="never runs code from a checkpoint"):
        load(folder, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_architecture(folder: Path, tmp_path: Path):
    change_config(folder, architectures=["Qwen9ForCausalLM"])
    refused(folder, tmp_path, UnsupportedModelError, "Qwen9ForCausalLM, which transformers")


def test_an_unknown_quantisation(folder: Path, tmp_path: Path):
    change_config(folder, quantization_config={"quant_method": "exl3", "bits": 4})
    refused(folder, tmp_path, UnsupportedModelError, "quantised with 'exl3'; epslots reads fp8, mxfp4")


def test_gguf_files_are_refused_by_name(folder: Path, tmp_path: Path):
    for path in folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".gguf"))
    refused(folder, tmp_path, UnsupportedModelError, "'gguf'; epslots reads .* GGUF files are llama.cpp's")


def test_a_dense_model_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path):
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no experts: it is a dense model"):
        load(checkpoint("llama"), tmp_path)


def test_stats_of_a_stranger(checkpoint: Callable[[str], Path]):
    with pytest.raises(ConfigError, match=r"was not loaded by epslots\.load"):
        epslots.stats(zoo.reference(checkpoint("mixtral")))
