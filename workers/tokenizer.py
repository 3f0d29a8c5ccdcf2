"""Text to tokens and back, for processes that must not import torch or transformers.

Reads the files of a resolved model folder: tokenizer.json alone decides how text is split, and
whether a prompt begins with BOS (as in transformers 5, which drops add_bos_token where there is a
tokenizer.json); tokenizer_config.json, generation_config.json and the chat template add the special
tokens.

Streaming keeps a window of tokens since the last point where the text was complete, with the piece
before it as context (SentencePiece decoders strip a leading space). Text is emitted up to the first
replacement character at its end, since that may be half a UTF-8 sequence; once the window's text is
complete, the window moves on. What was emitted is never taken back. Special tokens stay out of the
window: they have no text, so it would grow by each of a run of them, and be decoded again for each.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from antiphon.errors import ConfigError, InvalidParameterError
from antiphon.workers.chat_template import ChatTemplate
from antiphon.workers.model_files import read_json

logger = logging.getLogger(__name__)

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_CHANNEL = "<|channel|>"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token")


class Tokenizer:
    """The tokenizer of a resolved model; its methods may be called from several threads.

    Args:
        folder: As returned by ``resolve_model``.

    Raises:
        ConfigError: A file of the tokenizer is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = _load(folder / "tokenizer.json")
        config = _read_optional_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(config)
        source = _template_source(folder, config)
        self._template = None if source is None else ChatTemplate(source, special_tokens)
        self._eos_token_ids = self._find_eos_token_ids(folder, special_tokens.get("eos_token"))
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_token_ids = frozenset(i for i, token in added.items() if token.special)
        if config.get("add_bos_token") and not self.encode(""):
            logger.warning(
                "prompts of /v1/completions begin without %s: tokenizer_config.json has "
                "add_bos_token, but tokenizer.json adds none, and decides; a prompt may contain it",
                special_tokens.get("bos_token"),
            )
        if _CHANNEL in (source or ""):
            logger.warning(
                "this model answers in channels (%s), which are not told apart: a reply's text is "
                "reasoning, the names of channels and the answer in one", _CHANNEL,
            )  # fmt: skip

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included; the model's logits may be wider."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer, ascending."""
        return self._eos_token_ids

    @property
    def special_token_ids(self) -> frozenset[int]:
        """The tokens that ``decode`` leaves out."""
        return self._special_token_ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokenise ``text``; the names of special tokens in it become those tokens."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Apply the chat template and tokenise.

        Raises:
            InvalidParameterError: The model has no chat template, or it refuses the messages.
        """
        if self._template is None:
            raise InvalidParameterError(
                "messages", "this model has no chat template; send a prompt to /v1/completions"
            )
        text = self._template.render(messages)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidParameterError("messages", "hold text that is not Unicode") from None
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ``token_ids`` without special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def detokenizer(self) -> "IncrementalDetokenizer":
        """Return a fresh detokenizer for one stream of tokens."""
        return IncrementalDetokenizer(self)

    def _find_eos_token_ids(self, folder: Path, eos_token: str | None) -> tuple[int, ...]:
        found: int | list[int] | None = None
        for name in ("generation_config.json", "config.json"):
            if found is None:
                found = _read_optional_json(folder / name).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if eos_token is not None:
            ids = [*ids, self._tokenizer.token_to_id(eos_token)]
        return tuple(sorted({token_id for token_id in ids if token_id is not None}))


class IncrementalDetokenizer:
    """Text of a growing sequence of tokens; only ever whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # context, then tokens whose text is not complete yet
        self._num_context = 0  # tokens
        self._num_emitted = 0  # characters of the window's text

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that became certain with ``token_ids``."""
        special = self._tokenizer.special_token_ids
        visible = [token_id for token_id in token_ids if token_id not in special]
        if not visible:
            return ""
        self._window += visible
        text = self._tokenizer.decode(self._window)
        certain = text.rstrip(_INCOMPLETE)
        new = certain[self._num_emitted :]
        self._num_emitted = max(self._num_emitted, len(certain))
        if new and len(certain) == len(text):
            self._window = self._window[self._num_context :]
            self._num_context = len(self._window)
            self._num_emitted = len(self._tokenizer.decode(self._window))
        return new

    def flush(self) -> str:
        """Return what was held back; call it when no more tokens will come."""
        text = self._tokenizer.decode(self._window)
        new = text[self._num_emitted :]
        self._num_emitted = max(self._num_emitted, len(text))
        return new


def _load(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; the model folder must hold a tokenizer.json")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{path}: cannot be loaded: {error}") from None
    tokenizer.no_truncation()  # some checkpoints ship what they were trained with
    tokenizer.no_padding()
    return tokenizer


def _read_optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        if isinstance(token, dict):  # a serialised AddedToken
            token = token.get("content")
        if token is not None:
            tokens[name] = token
    return tokens


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):  # several templates by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return source
