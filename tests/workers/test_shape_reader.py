"""What is counted from config.json is what the loaded model has, for every family."""

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
from tiny_models import FAMILIES, REFUSED, tiny_model

from antiphon.errors import ConfigError, UnsupportedModelError
from antiphon.kernels.torch_kernels import TorchKernels
from antiphon.workers.paged_model import PagedModel
from antiphon.workers.shape_reader import read_shape

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted_as_it_is(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    paged = PagedModel(model, TorchKernels())
    shape = read_shape(tmp_path)
    assert (shape.family, shape.num_parameters) == (family, num_parameters)
    assert [astuple(layer)[1:] for layer in shape.layers] == [
        (layer.num_kv_heads, layer.k_head_dim, layer.v_head_dim) for layer in paged.layout.layers
    ]
    assert max(layer.num_q_heads for layer in shape.layers) == paged.num_q_heads
    assert shape.num_kv_elements * 4 == paged.layout.num_bytes_per_token
    assert shape.max_context_tokens == paged.max_context_tokens


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_workers_refuse_are_refused(tmp_path: Path, family: str) -> None:
    tiny_model(family).config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"model family '{family}' cannot be served"):
        read_shape(tmp_path)


def test_a_model_of_known_size(tmp_path: Path) -> None:
    shape = read_shape(write(tmp_path, LLAMA_8B))
    assert shape.dtype == "bfloat16"
    assert shape.num_parameters == 8_030_261_248  # as the model's publisher has it
    assert shape.num_lookup_parameters == shape.num_output_parameters == 128_256 * 4096
    assert shape.num_active_parameters == 8_030_261_248 - 128_256 * 4096
    assert shape.num_kv_elements == 65_536
    assert shape.attention_flops_per_pair == 2 * 32 * 256 * 32
    assert shape.max_context_tokens == 8192


def test_tied_embeddings_count_once_and_are_read_for_logits(tmp_path: Path) -> None:
    shape = read_shape(write(tmp_path, {**LLAMA_8B, "tie_word_embeddings": True}))
    assert shape.num_parameters == 8_030_261_248 - 128_256 * 4096
    assert shape.num_lookup_parameters == 0
    assert shape.num_active_parameters == shape.num_parameters


def test_a_token_uses_some_of_the_experts(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert shape.num_expert_parameters == 3 * 4 * 3 * 64 * 48  # layers, experts, matrices
    assert shape.expert_share == 0.5
    active = shape.num_parameters - shape.num_lookup_parameters - shape.num_expert_parameters / 2
    assert shape.num_active_parameters == active


def test_shared_experts_are_no_routed_ones(tmp_path: Path) -> None:
    tiny_model("deepseek_v3").config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert shape.num_expert_parameters == 2 * 4 * 3 * 64 * 48  # the first layer is dense


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({**LLAMA_8B, "quantization_config": {"quant_method": "awq"}}, "has quantization_config"),
        ({**LLAMA_8B, "model_type": "nonsense"}, "cannot be loaded as a causal language model"),
        ({}, "cannot be loaded as a causal language model"),
    ],
)
def test_what_cannot_be_counted_is_refused(
    tmp_path: Path, config: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_shape(write(tmp_path, config))


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        read_shape(tmp_path)
