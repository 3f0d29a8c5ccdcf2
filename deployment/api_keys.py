"""The API keys that an endpoint accepts, from a file that may change while it serves.

    start     no key in the file, or the file cannot be read   -> ConfigError, nothing is served
    running   the file has changed                             -> its keys are valid in a second
              it has none any more, or cannot be read          -> the last ones stay; counted and
                                                                  tried again in every second

Keys are kept as SHA-256 hashes. A presented key is compared with every one of them, each time in
full, so that the time says nothing about them. None is ever logged.
"""

import hashlib
import hmac
import logging
import stat
import time
from collections.abc import Callable
from pathlib import Path

from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.errors import ConfigError

_LOOK_SECONDS = 1.0  # between two looks at the file, which cost a stat() of 2 us

logger = logging.getLogger(__name__)

_Version = tuple[int, int, int]


class ApiKeys:
    """Who may use the endpoint.

    Args:
        path: A file with one key per line; lines that begin with ``#`` are comments.
        metrics: Where attempts without a key, and failures to read the file, are counted.
        clock: Seconds; decides when the file is looked at again.

    Raises:
        ConfigError: The file cannot be read, has no key, or has something that is none.
    """

    def __init__(
        self,
        path: Path,
        metrics: IngressMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._clock = clock
        self._looked_at = clock()
        self._version = _version(path)
        self._problem = ""  # with the file as it is now
        self._hashes = read_key_file(path)
        self._metrics = metrics

    def refuses(self, authorization: str) -> str | None:
        """Say why a request is refused, for its ``Authorization`` header; None if it may pass."""
        self._look_at_file()
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            reason = "missing"
        elif self._knows(key.strip()):
            return None
        else:
            reason = "unknown"
        self._metrics.unauthorized(reason)
        return reason

    def _knows(self, key: str) -> bool:
        presented, is_known = _hash(key), False
        for accepted in self._hashes:
            is_known |= hmac.compare_digest(presented, accepted)
        return is_known

    def _look_at_file(self) -> None:
        if self._clock() - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = self._clock()
        version = _version(self._path)
        if version == self._version and not self._problem:
            return
        try:
            self._hashes = read_key_file(self._path)
        except ConfigError as error:
            self._metrics.key_file_failed()
            if str(error) != self._problem:
                logger.error("%s; the keys from before stay valid", error)
            self._problem = str(error)
        else:
            self._version, self._problem = version, ""
            logger.info("%d API keys are valid now", len(self._hashes))


def read_key_file(path: Path) -> list[bytes]:
    """Return the hash of each key in a file; warn if everybody on the machine can read it.

    Raises:
        ConfigError: The file cannot be read, has no key, or has something that is none.
    """
    try:
        text = path.read_text("ascii")
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"http.api_key_file: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"http.api_key_file: {path} is not ASCII text") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    keys = [(number, line) for number, line in lines if line and not line.startswith("#")]
    for number, key in keys:
        if " " in key or not key.isprintable():
            raise ConfigError(
                f"http.api_key_file: {path}, line {number}: a key has no blanks in it"
            )
    if not keys:
        raise ConfigError(f"http.api_key_file: {path} has no key; write one on each line")
    if mode & stat.S_IROTH:
        logger.warning("http.api_key_file: %s can be read by every user: chmod o-r", path)
    return [_hash(key) for _, key in keys]


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _version(path: Path) -> _Version | None:
    """What changes when the file does, through links too; None if it cannot be seen."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
