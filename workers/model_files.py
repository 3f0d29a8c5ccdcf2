"""The files of a model's folder: what they must hold, and which weights they are.

The check looks at what loading would trip over minutes later: configuration, tokenizer, every
weights file and its size against its header (a Git LFS pointer or a cut download is too short).
Quantised weights are refused: those of which config.json does not tell would be loaded without
their scales.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from antiphon.errors import ConfigError

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_NARROW_FLOAT = re.compile(r"F[468](_|$)")  # of safetensors, such as F8_E4M3, and not F64
_BYTES = ("I8", "U8")
_UNQUANTISED = "only float32, bfloat16 and float16 are served: name the unquantised model"
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 4096


def fingerprint(folder: Path) -> str:
    """Return 16 hex digits that identify a model's weights, wherever its folder lies.

    Covers config.json, and of every weights file its name, size, header and evenly spaced samples.
    """
    digest = hashlib.blake2b(digest_size=8)
    config = read_json(folder / "config.json")
    for key in ("transformers_version", "_name_or_path"):
        config.pop(key, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in _weight_files(folder):
        digest.update(path.name.encode() + b"\0" + _header(path)[0])
        digest.update(sample_of(path))
    return digest.hexdigest()


def check_folder(folder: Path) -> None:
    """See that everything that loading needs is there and whole.

    Raises:
        ConfigError: It is not, or the weights are quantised.
    """
    read_config(folder)
    for path in _weight_files(folder):
        for name, tensor in _header(path)[1].items():
            _check_dtype(path, name, tensor.get("dtype", ""))
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"{folder}: has no tokenizer.json; write one with transformers' "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers would load, in order of name."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        names = {"model.safetensors"}
    elif index.is_file():
        names = set(read_json(index).get("weight_map", {}).values())
    else:
        names = set()
    if not names:
        found = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
        hint = f"; found {', '.join(found)}" if found else ""
        hint += ", which can be named itself" if any(n.endswith(".gguf") for n in found) else ""
        raise ConfigError(
            f"{folder}: has neither model.safetensors nor model.safetensors.index.json{hint}"
        )
    return [folder / name for name in sorted(names)]


def _check_dtype(path: Path, name: str, dtype: str) -> None:
    """Integers may be buffers of old checkpoints, such as masks; weights are not."""
    if _NARROW_FLOAT.match(dtype) or (dtype in _BYTES and name.endswith("weight")):
        raise ConfigError(f"{path}: {name} is quantised ({dtype}); {_UNQUANTISED}")


def _header(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Return the header of a safetensors file whose size agrees with it, and its tensors."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            num_bytes = int.from_bytes(file.read(8), "little")
            header = file.read(num_bytes) if num_bytes < size else b""
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        ends = [tensor["data_offsets"][1] for tensor in tensors.values()]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{path}: is not a safetensors file but cut short, damaged or a Git LFS pointer; "
            "download it again"
        ) from None
    expected = 8 + num_bytes + max(ends, default=0)
    if size != expected:
        raise ConfigError(
            f"{path}: has {size} bytes, its header says {expected}; download it again"
        )
    return header, tensors


def sample_of(path: Path) -> bytes:
    """Return size and evenly spaced pieces of a file, the first and the last bytes among them."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        last = max(size - _SAMPLE_BYTES, 0)
        pieces = [str(size).encode()]
        for index in range(_NUM_SAMPLES):
            file.seek(last * index // (_NUM_SAMPLES - 1))
            pieces.append(file.read(_SAMPLE_BYTES))
    return b"\0".join(pieces)


def read_config(folder: Path) -> dict[str, Any]:
    """Return a model's config.json.

    Raises:
        ConfigError: There is none, or it tells of quantised weights.
    """
    config = read_json(folder / "config.json")
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and (quantised := part.get("quantization_config")):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise ConfigError(
                f"{folder}/config.json: has quantization_config ({method}); {_UNQUANTISED}"
            )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises:
        ConfigError: The file is missing, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent}: has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
