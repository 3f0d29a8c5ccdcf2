"""A model folder as users have them, with random weights and the default model's tokenizer."""

import shutil
from pathlib import Path

from tiny_models import tiny_model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def save_tiny_model(folder: Path, tokenizer_folder: Path, family: str = "llama") -> Path:
    """Write config, safetensors and tokenizer; the vocabulary is the tokenizer's."""
    tiny_model(family, vocab_size=49152).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).exists():
            shutil.copy(tokenizer_folder / name, folder / name)
    return folder
