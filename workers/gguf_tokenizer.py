"""Rebuild a byte-level BPE tokenizer from the metadata of a GGUF file.

GGUF holds the vocabulary, the merges and the *name* of the pre-tokenizer, not its rules. The rules
below are those of the checkpoints that the names stand for (llama.cpp's src/llama-vocab.cpp maps
them); with wrong ones numbers and whitespace tokenise into ids the model has never seen, so other
names are refused.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import TemplateProcessing

from antiphon.errors import ConfigError

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Rules:
    pre_tokenizer: pre.PreTokenizer
    normalizer: normalizers.Normalizer | None = None
    ignore_merges: bool = False  # a word that is a token is taken whole
    add_bos: bool = False  # where the file doesn't say


def _split(pattern: str) -> pre.PreTokenizer:
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre.Sequence([pre.Split(Regex(pattern), behavior="isolated"), byte_level])


_GPT2 = pre.ByteLevel(add_prefix_space=False, use_regex=True)
_RULES = {
    "gpt-2": _Rules(_GPT2),
    "smollm": _Rules(pre.Sequence([pre.Digits(individual_digits=True), _GPT2])),
    "llama-bpe": _Rules(_split(_WORDS % "{1,3}"), ignore_merges=True, add_bos=True),
    "qwen2": _Rules(_split(_WORDS % ""), normalizer=normalizers.NFC()),
}


def write_tokenizer(metadata: dict[str, Any], target: Path, name: str) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template into ``target``.

    Raises:
        ConfigError: The tokenizer is of a kind that is not known by name; nothing was written.
    """
    tokenizer = _build(metadata, name)
    tokenizer.save(str(target / "tokenizer.json"))
    # Not the model's own tokenizer class: those rebuild the pre-tokenizer from their defaults.
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata[f"{metadata['general.architecture']}.context_length"],
    }
    for token, kind in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if token_id is not None:
            config[f"{token}_token"] = metadata["tokenizer.ggml.tokens"][token_id]
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        (target / "chat_template.jinja").write_text(template)


def _build(metadata: dict[str, Any], name: str) -> Tokenizer:
    rules = _rules(metadata, name)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    model = models.BPE(
        vocab={token: token_id for token_id, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
        ignore_merges=rules.ignore_merges,
    )
    tokenizer = Tokenizer(model)
    if rules.normalizer is not None:
        tokenizer.normalizer = rules.normalizer
    tokenizer.pre_tokenizer = rules.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        # zip without strict: files without kinds have no added tokens
        found = [
            token for token, token_kind in zip(tokens, kinds, strict=False) if token_kind == kind
        ]
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=special) for t in found])
    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    if bos_id is not None and metadata.get("tokenizer.ggml.add_bos_token", rules.add_bos):
        tokenizer.post_processor = TemplateProcessing(
            single=[tokens[bos_id], "$A"], special_tokens=[(tokens[bos_id], bos_id)]
        )
    return tokenizer


def _rules(metadata: dict[str, Any], name: str) -> _Rules:
    hint = "use a folder with safetensors and tokenizer.json of this model instead"
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ConfigError(
            f"{name}: its tokenizer is of kind {model!r}, and only byte-level BPE ('gpt2') can be "
            f"rebuilt from a GGUF file; {hint}"
        )
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        if key not in metadata:
            raise ConfigError(f"{name}: the GGUF file lacks {key}; {hint}")
    rules = _RULES.get(metadata.get("tokenizer.ggml.pre", ""))
    if rules is None:
        raise ConfigError(
            f"{name}: its pre-tokenizer is {metadata.get('tokenizer.ggml.pre')!r}, whose rules are "
            f"not in the file (known: {', '.join(_RULES)}); {hint}"
        )
    return rules
