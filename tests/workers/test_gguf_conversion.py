"""GGUF to safetensors, on tiny files that are written here from models with known logits."""

import json

import gguf
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from antiphon.errors import ConfigError
from antiphon.workers import gguf_conversion
from antiphon.workers.gguf_conversion import convert_gguf
from antiphon.workers.tokenizer import Tokenizer

ALPHABET = list(bytes_to_unicode().values())
MERGES = ["1 2", "Ġ a", "l l", "' ll", "12 3", "Ġ 12", "! Ċ"]
SPECIAL = ["<bos>", "<eos>", "<eot>"]
TOKENS = [*SPECIAL, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES), "<think>", "zq"]
TYPES = [3] * 3 + [1] * (len(ALPHABET) + len(MERGES)) + [4, 1]
ARCHS = ["llama", "qwen2", "qwen3"]


def _model(arch, tie=False):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        arch,
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12 if arch == "qwen3" else 8,
        max_position_embeddings=96,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
        tie_word_embeddings=tie,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _interleave(weight, num_heads):
    """As llama.cpp's convert_hf_to_gguf.py permutes llama's q and k."""
    rows, columns = weight.shape
    return (
        weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
        .swapaxes(1, 2)
        .reshape(rows, columns)
    )


class Writer:
    """Writes a model as GGUF; ``change`` may edit the fields and tensors before."""

    def __init__(self, path):
        self.path = path

    def write(self, model, change=lambda fields, tensors: None):
        config = model.config
        arch = config.model_type
        fields = {
            f"{arch}.context_length": config.max_position_embeddings,
            f"{arch}.block_count": config.num_hidden_layers,
            f"{arch}.embedding_length": config.hidden_size,
            f"{arch}.feed_forward_length": config.intermediate_size,
            f"{arch}.attention.head_count": config.num_attention_heads,
            f"{arch}.attention.head_count_kv": config.num_key_value_heads,
            f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            f"{arch}.rope.freq_base": 5000.0,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": TOKENS,
            "tokenizer.ggml.token_type": TYPES,
            "tokenizer.ggml.merges": MERGES,
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.eot_token_id": 2,
        }
        if arch == "qwen3":
            fields["qwen3.attention.key_length"] = config.head_dim
        tensors = self._tensors(model)
        change(fields, tensors)
        self._write(fields.pop("general.architecture", arch), fields, tensors)
        return self.path

    def _tensors(self, model):
        config = model.config
        keys = {arch: enum for enum, arch in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(keys[config.model_type], config.num_hidden_layers)
        tensors = {}
        for name, value in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            module, _, suffix = name.rpartition(".")
            array = value.numpy()
            if config.model_type == "llama" and "q_proj" in name:
                array = _interleave(array, config.num_attention_heads)
            if config.model_type == "llama" and "k_proj" in name:
                array = _interleave(array, config.num_key_value_heads)
            tensors[f"{names.get_name(module)}.{suffix}"] = array
        return tensors

    def _write(self, arch, fields, tensors):
        writer = gguf.GGUFWriter(self.path, arch)
        for key, value in fields.items():
            add = {
                list: writer.add_array,
                str: writer.add_string,
                bool: writer.add_bool,
                int: writer.add_uint32,
                float: writer.add_float32,
            }[type(value)]
            add(key, value)
        for name, array in tensors.items():
            writer.add_tensor(name, array.copy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


@pytest.fixture
def writer(tmp_path):
    return Writer(tmp_path / "tiny.gguf")


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "converted"
    folder.mkdir()
    return folder


def _ignore(message):
    """Take progress messages."""


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tie", [False, True])
def test_the_converted_model_is_the_same_model(writer, target, arch, tie):
    model = _model(arch, tie)
    convert_gguf(writer.write(model), target, _ignore)
    converted = AutoModelForCausalLM.from_pretrained(target)
    input_ids = torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(converted(input_ids).logits, model(input_ids).logits)
    assert converted.dtype == torch.float32
    assert converted.config.tie_word_embeddings is tie
    assert converted.config.max_position_embeddings == 96
    assert converted.generation_config.eos_token_id == [1, 2]


def test_quantised_weights_are_dequantised(writer, target):
    model = _model("llama")
    original = model.model.layers[0].mlp.up_proj.weight.detach().numpy()

    def quantise(fields, tensors):
        tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"].astype("float16")

    convert_gguf(writer.write(model, quantise), target, _ignore)
    converted = AutoModelForCausalLM.from_pretrained(target).model.layers[0].mlp.up_proj.weight
    assert (converted.detach().numpy() == original.astype("float16")).all()


def test_progress_names_every_long_step(writer, target):
    lines = []
    convert_gguf(writer.write(_model("llama")), target, lines.append)
    assert [line.split()[0] for line in lines] == ["reading", "dequantising", "writing"]


def test_weights_that_cannot_be_written_are_an_error_of_the_disk(writer, target, monkeypatch):
    def save_file(*_, **__):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(gguf_conversion, "save_file", save_file)
    with pytest.raises(OSError, match="No space left"):
        convert_gguf(writer.write(_model("llama")), target, _ignore)


PRE_TOKENIZERS = {
    # What tells the rules apart: digits, a space before them, a line's end after punctuation, a
    # word that is a token but not the product of merges, BOS.
    "gpt-2": "123 Ġ Ġa 'll Ġ12 ! Ċ z q",
    "smollm": "1 2 3 Ġ Ġa 'll Ġ 1 2 ! Ċ z q",
    "llama-bpe": "<bos> 123 Ġ Ġa 'll Ġ 12 !Ċ zq",
    "qwen2": "1 2 3 Ġ Ġa 'll Ġ 1 2 !Ċ z q",
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_by_name(writer, target, name):
    def set_pre(fields, tensors):
        fields["tokenizer.ggml.pre"] = name

    convert_gguf(writer.write(_model("llama"), set_pre), target, _ignore)
    tokenizer = Tokenizer(target)
    reference = AutoTokenizer.from_pretrained(target)
    text = "123  a'll 12!\nzq"
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert [TOKENS[token_id] for token_id in ids] == PRE_TOKENIZERS[name].split()
    assert tokenizer.encode("<eos><think>", add_special_tokens=False) == [1, len(TOKENS) - 2]
    assert tokenizer.decode(ids) == text


def _set(key, value):
    def change(fields, tensors):
        fields[key] = value

    return change


def _drop(key):
    def change(fields, tensors):
        fields.pop(key, None)
        tensors.pop(key, None)

    return change


def _add_tensor(name):
    def change(fields, tensors):
        tensors[name] = tensors["output_norm.weight"]

    return change


def _cut_tensor(name):
    def change(fields, tensors):
        tensors[name] = tensors[name][:-2]

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set("general.architecture", "mamba"), "architecture 'mamba'"),
        (_set("tokenizer.ggml.model", "llama"), "kind 'llama'"),
        (_set("tokenizer.ggml.pre", "deepseek-llm"), "'deepseek-llm', whose rules are not"),
        (_drop("tokenizer.ggml.pre"), "pre-tokenizer is None"),
        (_drop("tokenizer.ggml.merges"), "lacks tokenizer.ggml.merges"),
        (_drop("llama.block_count"), "lacks llama.block_count"),
        (_set("llama.rope.scaling.type", "yarn"), "scaled by 'yarn'"),
        (_add_tensor("rope_freqs.weight"), "rope_freqs.weight has no place"),
        (_add_tensor("blk.0.attn_q.bias"), "attn_q.bias has no place"),
        (_drop("blk.1.ffn_up.weight"), "lacks blk.1.ffn_up.weight"),
        (_cut_tensor("blk.1.ffn_up.weight"), "has shape"),
    ],
)
def test_what_is_not_known_by_name_is_refused(writer, target, change, reason):
    path = writer.write(_model("llama"), change)
    with pytest.raises(ConfigError, match=reason) as caught:
        convert_gguf(path, target, _ignore)
    assert str(caught.value).startswith("tiny.gguf: ")


@pytest.mark.parametrize("keep", [8, 100, 5000, 0.9])
def test_a_cut_file_is_refused(writer, target, keep):
    path = writer.write(_model("llama"))
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(ConfigError, match=r"not a readable GGUF file .* download it again"):
        convert_gguf(path, target, _ignore)


def test_the_default_model_kept_what_the_file_says(smollm2_path):
    config = json.loads((smollm2_path / "config.json").read_text())
    assert config["max_position_embeddings"] == 8192
    assert config["tie_word_embeddings"] is True
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    generation = json.loads((smollm2_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    assert "<|im_start|>" in (smollm2_path / "chat_template.jinja").read_text()
