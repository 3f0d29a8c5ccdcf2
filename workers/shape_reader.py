"""Learns what a model costs from its config.json alone.

The model is built on torch's ``meta`` device, where tensors have shapes and no contents, and run on
a few tokens through an attention that records what it is given. So every family that can be served
is counted by its own code, and not by formulas of ours; weights are neither needed nor read.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers import AutoModelForCausalLM as AutoModel

from antiphon.errors import ConfigError, UnsupportedModelError
from antiphon.workers.checkpoint import read_family, telling_why
from antiphon.workers.model_files import read_config
from antiphon.workers.model_shape import LayerShape, ModelShape
from antiphon.workers.paged_model import max_context_tokens, refuse_state, refuse_untold_windows

_ATTENTION_NAME = "antiphon_shapes"
_PROBE_TOKENS = 4
_NUM_EXPERTS_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


def read_shape(folder: Path) -> ModelShape:
    """Read the shape of the model whose config.json lies in a folder.

    Raises:
        ConfigError: There is no config.json, or it describes nothing that can be counted.
        UnsupportedModelError: The family cannot be served.
    """
    raw = read_config(folder)
    with telling_why(folder), torch.device("meta"):
        make: Any = AutoModel.from_config
        model = make(read_family(folder), dtype=torch.bfloat16, trust_remote_code=False).eval()
    refuse_state(model)
    return _measure(model, raw.get("dtype") or raw.get("torch_dtype"))


def _measure(model: Any, dtype: str | None) -> ModelShape:
    config = model.config.get_text_config()
    parameters = dict(model.named_parameters())  # tied ones once
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    experts = sum(value.numel() for name, value in parameters.items() if ".experts." in name)
    return ModelShape(
        family=model.config.model_type,
        dtype=dtype,
        max_context_tokens=max_context_tokens(config),
        num_parameters=sum(value.numel() for value in parameters.values()),
        num_lookup_parameters=0 if inputs is outputs else inputs.numel(),
        num_output_parameters=outputs.numel(),
        num_expert_parameters=experts,
        expert_share=_expert_share(config) if experts else 1.0,
        layers=_layers(model),
    )


def _expert_share(config: Any) -> float:
    totals = [getattr(config, key, None) for key in _NUM_EXPERTS_KEYS]
    total = next((value for value in totals if value), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    if not total or not chosen:
        raise ConfigError(
            f"config.json of family {config.model_type!r} has experts, but does not say with "
            f"{' or '.join(_NUM_EXPERTS_KEYS)} and num_experts_per_tok how many a token uses"
        )
    return float(chosen / total)


def _layers(model: Any) -> tuple[LayerShape, ...]:
    seen: dict[int, LayerShape] = {}
    windows: dict[int, int | None] = {}

    def record(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **features: Any
    ) -> tuple[Tensor, None]:
        windows[module.layer_idx] = features.get("sliding_window")
        seen[module.layer_idx] = LayerShape(
            query.shape[1], key.shape[1], key.shape[3], value.shape[3]
        )
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register(_ATTENTION_NAME, record)
    positions = torch.arange(_PROBE_TOKENS, device="meta")[None]
    reason = ""
    try:
        model.set_attn_implementation(_ATTENTION_NAME)
        with torch.inference_mode():
            # A mask of four dimensions is handed on as it is; without one, contents are looked at.
            mask = torch.empty(1, 1, 1, 1, device="meta")
            model(input_ids=positions, position_ids=positions, attention_mask=mask, use_cache=False)
    except Exception as error:  # whatever the model's code raises: it cannot be run this way
        reason = f": {error}"
    num_layers = model.config.get_text_config().num_hidden_layers
    if reason or sorted(seen) != list(range(num_layers)):
        raise UnsupportedModelError(
            f"model family {model.config.model_type!r} cannot be served: {len(seen)} of its "
            f"{num_layers} layers use transformers' attention interface{reason}"
        )
    refuse_untold_windows(model, windows)
    return tuple(seen[layer] for layer in range(num_layers))
