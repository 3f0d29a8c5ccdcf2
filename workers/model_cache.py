"""Converted models on disk: each is made once, whatever the number of processes that want it.

    <root>/<name>-<key>/            complete; ``manifest.json`` lists its files with their sizes
    <root>/<name>-<key>.lock        held while one process looks or makes
    <root>/<name>-<key>.part/       being made; whoever holds the lock may delete it

A folder appears under its final name by one rename, manifest and all. The manifest is checked at
every use, so a folder that was truncated or lost a file since is made again.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from antiphon.errors import ConfigError

_MANIFEST = "manifest.json"
_LOCK_TIMEOUT_SECONDS = 1800.0  # the largest conversions write hundreds of gigabytes


def cached_folder(
    root: Path,
    name: str,
    make: Callable[[Path], None],
    lock_timeout_seconds: float = _LOCK_TIMEOUT_SECONDS,
) -> Path:
    """Return ``root/name``, made by ``make(empty folder)`` unless it is there and whole.

    Raises:
        ConfigError: The cache cannot be written, or another process holds the lock for too long;
            also whatever ``make`` raises. No incomplete folder is left under the final name.
    """
    folder = root / name
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock", timeout=lock_timeout_seconds):
            if not is_whole(folder):
                _make(folder, make)
    except Timeout:
        raise ConfigError(
            f"{folder}: another process has been making it for over {lock_timeout_seconds:.0f} s; "
            "wait for it, or end it and try again"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{folder}: the model cache cannot be written: {error}; free some space there or "
            "choose another cache folder"
        ) from error
    return folder


def is_whole(folder: Path) -> bool:
    """Return whether every file of the manifest is there in its full size."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):  # absent or damaged: made again
        return False


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    part = folder.with_name(f"{folder.name}.part")
    for leftover in (part, folder):
        if leftover.exists():
            shutil.rmtree(leftover)
    part.mkdir()
    try:
        make(part)
        sizes = {path.name: path.stat().st_size for path in sorted(part.iterdir())}
        (part / _MANIFEST).write_text(json.dumps(sizes, indent=2) + "\n")
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
