"""Turn a GGUF file into a folder that transformers loads: float32 safetensors, config, tokenizer.

A GGUF file says less than a checkpoint does, and a reader that guesses the rest is silently wrong.
So only what is known by name is converted (architectures, pre-tokenizers), and every tensor of the
file must find its parameter, and every parameter its tensor, in the right shape. Anything else
(scaled rotary embeddings, experts, an unknown pre-tokenizer) is refused.

Llama's q and k projections are stored with the rows of each head interleaved for llama.cpp's rotary
embedding; ``_undo_rotary_interleave`` puts them back.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from antiphon.errors import ConfigError
from antiphon.workers.gguf_tokenizer import write_tokenizer

_CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_MODEL_ARCHS = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_HINT = "use a folder with safetensors of this model instead"


def convert_gguf(source: Path, target: Path, progress: Callable[[str], None]) -> None:
    """Write ``source`` into the existing, empty folder ``target``.

    All weights are held in memory as float32 on the way.

    Raises:
        ConfigError: The file cannot be read, or holds something that is not known by name; what was
            written into ``target`` so far is incomplete.
        OSError: ``target`` cannot be written.
    """
    progress(f"reading {source.name}")
    reader, metadata = _read(source)
    config = _config(reader, metadata, source.name)
    config.save_pretrained(target)
    write_tokenizer(metadata, target, source.name)
    _write_generation_config(metadata, target)
    progress(f"dequantising {len(reader.tensors)} tensors of {source.name} to float32")
    weights = _weights(reader, config, source.name)
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    progress(f"writing {num_bytes / 1e6:.0f} MB of safetensors")
    weights_path = target / "model.safetensors"
    try:
        save_file(weights, weights_path, metadata={"format": "pt"})
    except SafetensorError as error:  # its own, also for what the operating system says
        raise OSError(str(error)) from error
    shutil.copymode(target / "config.json", weights_path)  # save_file makes it private to the user


def _read(source: Path) -> tuple[gguf.GGUFReader, dict[str, Any]]:
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError, IndexError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{source}: is not a readable GGUF file ({error}); download it again"
        ) from None
    return reader, {key: field.contents() for key, field in reader.fields.items()}


def _known_architecture(metadata: dict[str, Any], name: str) -> str:
    arch = metadata.get("general.architecture")
    if arch not in _MODEL_ARCHS:
        raise ConfigError(
            f"{name}: architecture {arch!r} cannot be converted (known: "
            f"{', '.join(_MODEL_ARCHS)}); {_HINT}"
        )
    scaling = metadata.get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none":
        raise ConfigError(
            f"{name}: rotary embeddings scaled by {scaling!r} cannot be converted; {_HINT}"
        )
    return str(arch)


def _config(reader: gguf.GGUFReader, metadata: dict[str, Any], name: str) -> Any:
    arch = _known_architecture(metadata, name)
    values = {
        theirs: _required(metadata, f"{arch}.{ours}", name) for ours, theirs in _CONFIG_KEYS.items()
    }
    heads = values["num_attention_heads"]
    head_dim = metadata.get(f"{arch}.attention.key_length", values["hidden_size"] // heads)
    names = {tensor.name for tensor in reader.tensors}
    return AutoConfig.for_model(
        arch,
        **values,
        head_dim=head_dim,
        rope_theta=metadata.get(f"{arch}.rope.freq_base", 10000.0),
        vocab_size=len(_required(metadata, "tokenizer.ggml.tokens", name)),
        tie_word_embeddings="output.weight" not in names,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        architectures=[f"{arch.capitalize()}ForCausalLM"],
        dtype="float32",
    )


def _required(metadata: dict[str, Any], key: str, name: str) -> Any:
    if key not in metadata:
        raise ConfigError(f"{name}: the GGUF file lacks {key}; {_HINT}")
    return metadata[key]


def _weights(reader: gguf.GGUFReader, config: Any, name: str) -> dict[str, np.ndarray]:
    """Dequantise every tensor under its parameter's name; one to one, or ``ConfigError``."""
    parameters = dict(_parameters(config))
    weights = {}
    for tensor in reader.tensors:
        parameter, shape = parameters.pop(tensor.name, (None, ()))
        if parameter is None:
            raise ConfigError(
                f"{name}: tensor {tensor.name} has no place in a {config.model_type} model; {_HINT}"
            )
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ConfigError(
                f"{name}: tensor {tensor.name} is quantised as {tensor.tensor_type.name}, which "
                f"cannot be dequantised; {_HINT}"
            ) from None
        if config.model_type == "llama":
            array = _undo_rotary_interleave(array, tensor.name, config)
        if array.shape != shape:
            raise ConfigError(
                f"{name}: tensor {tensor.name} has shape {array.shape}, the model's is {shape}"
            )
        weights[parameter] = np.ascontiguousarray(array, dtype=np.float32)
    if parameters:
        raise ConfigError(f"{name}: the GGUF file lacks {', '.join(sorted(parameters))}; {_HINT}")
    return weights


def _parameters(config: Any) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Yield (GGUF name, (parameter name, shape)) of everything a checkpoint must hold."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    names = gguf.get_tensor_name_map(_MODEL_ARCHS[config.model_type], config.num_hidden_layers)
    for parameter, value in model.state_dict().items():
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, suffix = parameter.rpartition(".")
        yield f"{names.get_name(module)}.{suffix}", (parameter, tuple(value.shape))


def _undo_rotary_interleave(array: np.ndarray, tensor_name: str, config: Any) -> np.ndarray:
    """Rows of a head: [pair, half] in GGUF, [half, pair] in transformers."""
    kind = tensor_name.rpartition(".weight")[0].rpartition(".")[2]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(kind)
    if heads is None:
        return array
    rows, columns = array.shape
    return array.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, -1)


def _write_generation_config(metadata: dict[str, Any], target: Path) -> None:
    ids = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(token_id for token_id in ids if token_id is not None))
    values = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    kept = {key: value for key, value in values.items() if value not in (None, [])}
    (target / "generation_config.json").write_text(json.dumps(kept, indent=2) + "\n")
