"""Which modules are replaced, and that nobody can tell from the outside."""

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model

from antiphon.kernels.torch_kernels import TorchKernels
from antiphon.workers.model_patches import patch_model
from antiphon.workers.paged_model import PagedModel

NORM, ADD, MLP, ROTATION = "rms_norm", "add_rms_norm", "silu_and_mul", "rotation"
# What each family gets of transformers' pinned release: a release that stops matching shows here.
PATCHED = {
    "llama": {NORM: 7, ADD: 3, MLP: 3, ROTATION: 3},
    "qwen2": {NORM: 7, ADD: 3, MLP: 3, ROTATION: 3},
    "qwen3": {NORM: 13, ADD: 3, MLP: 3, ROTATION: 3},
    "mistral": {NORM: 7, ADD: 3, MLP: 3, ROTATION: 3},
    "gemma": {NORM: 7, ROTATION: 3},
    "gemma2": {NORM: 13, ROTATION: 3},
    "gemma3_text": {NORM: 19, ROTATION: 3},
    "phi3": {NORM: 7, MLP: 3},
    "olmo2": {MLP: 3},
    "granite": {NORM: 7, MLP: 3, ROTATION: 3},
    "mixtral": {NORM: 7, ROTATION: 3},
    "qwen3_moe": {NORM: 13, ADD: 3, ROTATION: 3},
    "starcoder2": {ROTATION: 3},
    "smollm3": {NORM: 7, ADD: 3, MLP: 3},
    "deepseek_v3": {NORM: 13, ADD: 3, MLP: 3},
    # It normalises queries and keys after the rotation, so that must stay where it is.
    "hunyuan_v1_dense": {NORM: 13, ADD: 3, MLP: 3},
    "gpt_neox": {},
    "gpt2": {},
    "opt": {},
}


def never(cos: torch.Tensor, sin: torch.Tensor) -> bool:
    return False


def logits(model: Any) -> torch.Tensor:
    input_ids = torch.arange(24)[None] * 7 % VOCAB_SIZE
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_the_same(family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    patch_model(model, TorchKernels(), never)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", PATCHED)
def test_each_family_gets_what_fits(family: str) -> None:
    assert dict(PagedModel(tiny_model(family), TorchKernels()).patched) == PATCHED[family]


def test_the_merged_weight_is_held_once() -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch_model(model, TorchKernels(), never)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    mlp = model.model.layers[0].mlp
    gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
    assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()


def test_other_models_of_the_family_are_left_alone() -> None:
    patched, other = tiny_model("llama"), tiny_model("llama")
    asked = []
    patch_model(patched, TorchKernels(), lambda cos, sin: bool(asked.append(1)))
    logits(other)
    assert not asked
    logits(patched)
    assert asked
    assert "forward" not in vars(other.model.layers[0].self_attn)
