"""Text to tokens and back, against ids from llama.cpp, transformers and the whole-text decoder."""

import json
import subprocess
import sys
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from antiphon.errors import ConfigError, InvalidParameterError
from antiphon.workers.chat_template import ChatTemplate
from antiphon.workers.tokenizer import Tokenizer

# From llama.cpp's tokenizer (llama-cpp-python 0.3.36) on the GGUF file, which agreed with ours on
# 7,115 texts of 484,467 tokens: documentation, source code and random Unicode.
# fmt: off
EXPECTED = {
    'Hello, world!': [19556, 28, 905, 17],
    '12345': [33, 34, 35, 36, 37],
    'In 2024, 3.14159 and 1e-10': [
        788, 216, 34, 32, 34, 36, 28, 216, 35, 30, 33, 36, 33, 37, 41, 284, 216, 33, 85, 29, 33, 32,
    ],
    'x = 0xFF + 10_000': [104, 446, 216, 32, 104, 10209, 1232, 216, 33, 32, 79, 32, 32, 32],
    'two  spaces   three    four': [11355, 216, 5600, 256, 1296, 333, 1876],
    '\ttab\n\nnewlines\r\n': [197, 15999, 198, 198, 2241, 5110, 2738],
    '  leading and trailing  ': [216, 2899, 284, 35079, 256],
    "don't I'LL we've it's": [12420, 982, 339, 23, 16421, 392, 3543, 357, 506],
    'def f(x: int) -> int:\n    return x ** 2\n': [
        1604, 275, 24, 104, 42, 464, 25, 4722, 464, 42, 472, 1003, 1792, 1903, 216, 34, 198,
    ],
    'for (int i=0; i<10; i++) { a[i] = i; }': [
        1710, 365, 591, 2056, 45, 32, 43, 2056, 44, 33, 32, 43, 2056, 11444, 25, 1662, 253, 75, 89,
        77, 446, 2056, 43, 4029,
    ],
    '<|im_start|>user\nHi<|im_end|>\n<|endoftext|>': [1, 4093, 198, 26843, 2, 198, 0],
    'naïve café Ünïcödé': [3546, 46494, 37366, 5549, 246, 94, 25972, 83, 7466, 84, 2756],
    'Привет, мир': [155, 249, 46879, 16464, 32547, 28, 41337, 7872, 9175],
    'γειά σου Κόσμε': [
        23098, 14240, 12001, 26112, 32437, 39963, 5664, 244, 36180, 18751, 16674, 14240,
    ],
    '你好,世界': [18645, 250, 48392, 138, 28, 7906, 240, 178, 239, 230],
    'こんにちは世界': [
        7365, 237, 10391, 237, 41152, 7365, 111, 7365, 124, 7906, 240, 178, 239, 230,
    ],
    '안녕하세요': [183, 239, 226, 182, 223, 239, 33085, 242, 183, 222, 133, 183, 244, 238],
    'مرحبا بالعالم': [21706, 20602, 44626, 31462, 10805, 45726, 22208, 34966, 22208, 21706],
    'שלום עולם': [38229, 31838, 23970, 162, 247, 12960, 112, 23970, 31838, 162, 247],
    'नमस्ते दुनिया': [
        30658, 35090, 38770, 16525, 26293, 30581, 12335, 116, 42990, 30658, 27011, 32932, 18075,
    ],
    'สวัสดีชาวโลก': [
        10283, 120, 10283, 117, 10283, 126, 10283, 120, 10283, 238, 10283, 130, 10283, 228, 43662,
        10283, 117, 31933, 220, 10283, 115, 10283, 219,
    ],
    '👍🏽👨\u200d👩\u200d👧\u200d👦🇩🇪': [
        10813, 235, 231, 10813, 233, 138, 10813, 235, 118, 321, 231, 10813, 235, 119, 321, 231,
        10813, 235, 117, 321, 231, 10813, 235, 116, 10813, 225, 119, 10813, 225, 120,
    ],
    '½ Ⅷ ² ٣': [16738, 216, 173, 223, 117, 216, 19133, 216, 164, 113],
    'a\xa0b\u3000c': [81, 15442, 82, 12109, 218, 83],
    '{"key": [1, 2.5, null], "ok": true}': [
        39428, 2393, 1799, 933, 33, 28, 216, 34, 30, 37, 28, 10034, 1750, 476, 2231, 1799, 2629,
        109,
    ],
    'https://example.com/a?b=1&c=%20': [
        4687, 1742, 7434, 30, 824, 31, 81, 47, 82, 45, 33, 22, 83, 23446, 34, 32,
    ],
}
# fmt: on
MESSAGES = [
    [{"role": "user", "content": "What is 12 + 30?"}],
    [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": " Hi\t你好 "}],
    [
        {"role": "user", "content": "<|im_end|> <b>&amp;</b> {{ 1 }}"},
        {"role": "assistant", "content": "", "tool_calls": None},
        {"role": "user", "content": "👍🏽"},
    ],
]
# SmolLM2's vocabulary lacks a few bytes and drops them: six control characters, and the first byte
# of the planes 4 to 11, in which Unicode has assigned nothing.
NO_TOKEN = "\x04\x06\x13\x14\x16\x1d"
SCRIPTS = st.text(
    st.one_of(
        st.characters(max_codepoint=0x7F, exclude_characters=NO_TOKEN),
        st.characters(
            max_codepoint=0x3FFFF, exclude_categories=("Cs",), exclude_characters=NO_TOKEN
        ),
        st.sampled_from("\n\t  '0½Ⅷ٣中あ한नสم👍🏽\u200d\ufe0f\ufffd"),
    ),
    max_size=60,
)


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    return Tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def reference(smollm2_path):
    return AutoTokenizer.from_pretrained(smollm2_path)


@pytest.mark.parametrize("text", EXPECTED)
def test_ids_are_those_of_llama_cpp(tokenizer, text):
    assert tokenizer.encode(text) == EXPECTED[text]


def test_each_digit_is_a_token(tokenizer):
    ids = tokenizer.encode("9081726354")
    assert [tokenizer.decode([token_id]) for token_id in ids] == list("9081726354")


def test_special_tokens(tokenizer):
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.vocab_size == 49152
    assert tokenizer.decode([1, *tokenizer.encode("Hi"), 2]) == "Hi"


@settings(deadline=None)
@given(text=SCRIPTS)
def test_round_trip_and_transformers_agree(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("messages", MESSAGES)
def test_chat_is_that_of_transformers(tokenizer, reference, messages):
    expected = reference.apply_chat_template(messages, add_generation_prompt=True)
    assert tokenizer.encode_chat(messages) == expected["input_ids"]


TEMPLATES = [
    "{% for m in messages %}\n  {% if m.role %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n",
    "{%- for m in messages %}\n  {{- bos_token + m.content | trim }}\n{% endfor %}{{ eos_token }}",
    "{{ messages | tojson(indent=2) }}{{ tools is none }}{{ documents is none }}{{ pad_token }}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{% generation %}{% set x = 1 %}{{ messages[-1]['content'] }}{% endgeneration %}{{ x }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }} {{ dict(a=1) }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("messages", MESSAGES)
def test_other_templates_render_as_in_transformers(reference, source, messages):
    template = ChatTemplate(source, reference.special_tokens_map)
    expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert template.render(messages) == expected


def test_templates_see_the_clock_they_were_given():
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, lambda: datetime(2024, 7, 26))
    assert template.render([{"role": "user"}]) == "26 Jul 2024"


@pytest.mark.parametrize(
    ("source", "messages", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", [{}], "roles must alternate"),
        ("{{ messages[0]['content'] + '!' }}", [{"content": [{"type": "text"}]}], "concatenate"),
        ("{{ messages[0]['content'].strip() }}", [{"content": None}], "content"),
        ("{{ messages[0].__class__.__mro__ }}", [{}], "unsafe"),
        ("", [], "at least one message"),
    ],
)
def test_messages_that_cannot_be_rendered_are_the_clients_fault(source, messages, reason):
    with pytest.raises(InvalidParameterError, match=reason) as caught:
        ChatTemplate(source, {}).render(messages)
    assert caught.value.parameter == "messages"


def test_text_that_is_not_unicode_is_refused(tokenizer):
    with pytest.raises(InvalidParameterError, match="not Unicode"):
        tokenizer.encode_chat([{"role": "user", "content": "\ud800"}])


def test_a_broken_template_is_the_operators_fault():
    with pytest.raises(ConfigError, match="chat template is not valid"):
        ChatTemplate("{% for %}", {})


def _stream(tokenizer, ids, chunk_sizes):
    """Push ``ids`` in chunks of the given sizes, repeated; return the pushes and the flush."""
    detokenizer = tokenizer.detokenizer()
    pieces, position = [], 0
    while position < len(ids):
        size = chunk_sizes[len(pieces) % len(chunk_sizes)]
        pieces.append(detokenizer.push(ids[position : position + size]))
        position += size
    return pieces, detokenizer.flush()


CHUNKS = st.lists(st.integers(1, 7), min_size=1, max_size=4)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=60), chunk_sizes=CHUNKS)
def test_streamed_random_tokens_are_the_whole_text(tokenizer, ids, chunk_sizes):
    pieces, rest = _stream(tokenizer, ids, chunk_sizes)
    assert "".join(pieces) + rest == tokenizer.decode(ids)
    assert not any(piece.endswith("\ufffd") for piece in pieces)


@settings(deadline=None)
@given(text=SCRIPTS.filter(lambda text: "\ufffd" not in text), chunk_sizes=CHUNKS)
def test_streamed_text_never_holds_half_a_character(tokenizer, text, chunk_sizes):
    pieces, rest = _stream(tokenizer, tokenizer.encode(text), chunk_sizes)
    assert "".join(pieces) == text
    assert rest == ""
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_before_an_incomplete_character_is_not_held_back(tokenizer):
    ids = tokenizer.encode("ok 👍")
    pieces, rest = _stream(tokenizer, ids, [len(ids) - 1, 1])
    assert pieces == ["ok ", "👍"]
    assert rest == ""


def test_an_incomplete_end_comes_with_the_flush(tokenizer):
    ids = tokenizer.encode("👍")[:-1]
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.push(ids) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_special_tokens_are_not_streamed(tokenizer):
    ids = [1, *tokenizer.encode("Hi"), 2, *tokenizer.encode(" there"), 0]
    assert _stream(tokenizer, ids, [1]) == (["", "Hi", "", " there", ""], "")


def test_a_run_of_special_tokens_is_not_decoded_again_with_each(tokenizer, monkeypatch):
    """A model that goes on after its last token, because it must, repeats it a thousand times."""
    decoded = []

    def decode(token_ids):
        decoded.append(len(token_ids))
        return Tokenizer.decode(tokenizer, token_ids)

    monkeypatch.setattr(tokenizer, "decode", decode)
    ids = [*tokenizer.encode("Hi"), *[2] * 2000, *tokenizer.encode(" there")]
    pieces, rest = _stream(tokenizer, ids, [1])
    assert "".join(pieces) + rest == "Hi there"
    assert sum(decoded) < 20


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory):
    """A tokenizer in SentencePiece's manner: a leading space is stripped, bytes are tokens."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁b", "b"]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    fast = FastTokenizer(models.BPE(vocab, [("▁", "b")], unk_token="<unk>", byte_fallback=True))
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast.add_special_tokens(["<s>"])
    fast.enable_truncation(2)
    folder = tmp_path_factory.mktemp("sentencepiece")
    fast.save(str(folder / "tokenizer.json"))
    config = {
        "eos_token": {"content": "b"},
        "chat_template": [{"name": "default", "template": "b"}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    return folder


@given(text=st.text("ab é中👍", max_size=30), chunk_sizes=CHUNKS)
def test_streaming_keeps_the_spaces_between_words(sentencepiece_folder, text, chunk_sizes):
    tokenizer = Tokenizer(sentencepiece_folder)
    words = {"a": 258, " ": 257, "b": 260}
    ids = []
    for char in text:
        ids += [words[char]] if char in words else [byte + 1 for byte in char.encode()]
    pieces, rest = _stream(tokenizer, ids, chunk_sizes)
    assert "".join(pieces) + rest == tokenizer.decode(ids)
    assert rest == ""


def test_special_tokens_do_not_eat_the_space_after_them(sentencepiece_folder):
    pieces, _ = _stream(Tokenizer(sentencepiece_folder), [260, 261, 258], [1])
    assert pieces == ["b", "", " a"]


def test_bytes_that_were_emitted_are_not_taken_back(sentencepiece_folder):
    ids = [byte + 1 for byte in "é".encode()] + [0xFF + 1, 258]
    assert _stream(Tokenizer(sentencepiece_folder), ids, [2, 1, 1])[0][0] == "é"


def test_files_of_other_makers(sentencepiece_folder):
    tokenizer = Tokenizer(sentencepiece_folder)
    assert tokenizer.eos_token_ids == (5, 7, 260)
    assert tokenizer.encode("bbbb") == [260] * 4  # not truncated to 2
    assert tokenizer.encode_chat([{"role": "user", "content": "x"}]) == [260]


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_bos_is_as_in_transformers_and_a_doubt_is_logged(tmp_path, caplog, add_bos_token):
    """DeepSeek's folders ask for a BOS beside a tokenizer.json that adds none."""
    fast = FastTokenizer(models.BPE({"a": 0, "b": 1}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.post_processor = processors.ByteLevel()
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<s>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>"}
    config |= {"add_bos_token": add_bos_token}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("ab") == AutoTokenizer.from_pretrained(tmp_path).encode("ab") == [0, 1]
    assert tokenizer.encode("<s>ab") == [2, 0, 1]
    assert ("begin without <s>" in caplog.text) == add_bos_token


def test_answers_in_channels_are_warned_of(sentencepiece_folder, tmp_path, caplog):
    (tmp_path / "tokenizer.json").write_bytes(
        (sentencepiece_folder / "tokenizer.json").read_bytes()
    )
    (tmp_path / "chat_template.jinja").write_text("<|channel|>final<|message|>")
    Tokenizer(tmp_path)
    assert "answers in channels" in caplog.text


def test_without_a_chat_template_completions_are_named(smollm2_path, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((smollm2_path / "tokenizer.json").read_bytes())
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_token_ids == ()
    with pytest.raises(InvalidParameterError, match="/v1/completions"):
        tokenizer.encode_chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("content", [None, "{}", "[1"])
def test_a_missing_or_broken_tokenizer_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_torch_and_transformers_are_not_imported():
    code = (
        "import sys, antiphon.workers.tokenizer, antiphon.workers.model_source;"
        "print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert output.strip() == "[]"
