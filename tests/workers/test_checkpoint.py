"""A folder whose weights are not all of its model's, or whose code is its own, is not served."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from antiphon.errors import ConfigError
from antiphon.kernels.torch_kernels import TorchKernels
from antiphon.workers.checkpoint import load_model
from antiphon.workers.paged_model import PagedModel
from antiphon.workers.shape_reader import read_shape


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def load(folder: Path) -> PagedModel:
    return load_model(folder, None, torch.device("cpu"), TorchKernels())


def change_weights(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_whole_model_is_loaded(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(folder).family == "llama"
    assert not [record for record in caplog.records if record.name.startswith("antiphon")]


def test_what_a_checkpoint_lacks_is_not_filled_in(folder: Path) -> None:
    """As of an embedding model, which has no head."""
    change_weights(folder, lambda old: {k: v for k, v in old.items() if k != "lm_head.weight"})
    with pytest.raises(ConfigError, match=r"not those of the model .* it has no lm_head\.weight$"):
        load(folder)


def test_weights_under_other_names_are_not_served(folder: Path) -> None:
    change_weights(folder, lambda old: {f"wrapped.{name}": old[name] for name in old})
    with pytest.raises(ConfigError, match=r"no lm_head\.weight, no .* and \d+ more$"):
        load(folder)


def test_weights_of_another_shape_are_named(folder: Path) -> None:
    """As of a fine-tune with added tokens and the configuration of before."""
    change_config(folder, vocab_size=140)
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight of shape \(131, 64\) in place of"):
        load(folder)


def test_weights_that_nobody_reads_are_logged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_weights(folder, lambda old: old | {"score.weight": torch.zeros(2, 64)})
    load(folder)
    assert "no place for these weights of its folder: score.weight" in caplog.text


@pytest.mark.parametrize("read", [load, read_shape])
def test_code_in_a_folder_is_not_run_and_nobody_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
) -> None:
    def ask(*_: object) -> str:
        pytest.fail("asked")

    monkeypatch.setattr(builtins, "input", ask)
    (folder / "theirs.py").write_text("raise SystemExit\n")
    auto_map = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    change_config(folder, model_type="nonsense", auto_map=auto_map)
    with pytest.raises(ConfigError, match=r"comes with the checkpoint .* is not run"):
        read(folder)
