from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from tafkir.data.tokenizer import DOCUMENT_END, THINK_END, THINK_START, TURN_END, TURN_START, Tokenizer
from tafkir.errors import DataError

SPECIAL = (DOCUMENT_END, TURN_START, TURN_END, THINK_START, THINK_END)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    for allow_special in (True, False):
        assert tokenizer.decode(tokenizer.encode(text, allow_special=allow_special), skip_special=False) == text


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_the_fast_path_for_ascii_gives_the_library_s_tokens(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text, allow_special=False) == tokenizer._encode_slowly(text)


@pytest.mark.parametrize(
    "text",
    [
        "كم تفاحة مع أحمد؟ ١٢٫٥",
        "  two  spaces\n\n\ttabs \r\n",
        "don't Tom’s",
        "\\boxed{72} <b> a<c",
        "🤖👩‍👩‍👧 e\u0301",
        "\ufeff\u200b\u00a0x",
    ],
)
def test_texts_with_traps_come_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_lone_surrogate_becomes_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_every_digit_and_operator_is_a_token_of_its_own(tokenizer: Tokenizer) -> None:
    text = "1234/5=2.75+60*7-8"
    assert [tokenizer.decode([id]) for id in tokenizer.encode(text)] == list(text)
    # the same digit is the same token wherever it stands
    assert tokenizer.encode(" 7")[-1] == tokenizer.encode("7")[0] == tokenizer.encode("$7")[-1]


def test_special_tokens_are_one_token_where_they_are_meant(tokenizer: Tokenizer) -> None:
    for token in SPECIAL:
        assert tokenizer.encode(token) == [tokenizer.special_id(token)]
        plain = tokenizer.encode(token, allow_special=False)
        assert len(plain) > 1 and not set(plain) & {tokenizer.special_id(t) for t in SPECIAL}
        assert tokenizer.decode(plain) == token
    assert tokenizer.eos_id == tokenizer.turn_end_id == tokenizer.special_id(TURN_END)
    assert tokenizer.pad_id == tokenizer.document_end_id == tokenizer.special_id(DOCUMENT_END)


def test_skipping_special_tokens_keeps_the_limits_of_the_chain(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>assistant\n<think>\n1+1=2\n</think>\n\\boxed{2}<|im_end|><|endoftext|>")
    assert tokenizer.decode(ids) == "assistant\n<think>\n1+1=2\n</think>\n\\boxed{2}"


def test_training_twice_gives_the_same_tokenizer_of_the_size_asked_for(tmp_path: Path) -> None:
    texts = [f"word{i % 7} and {i} apples in the basket of number {i}" for i in range(300)]
    for name in ("a", "b"):
        Tokenizer.train(texts, 300).save(tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    assert Tokenizer.load(tmp_path / "a").vocab_size <= 300
    with pytest.raises(DataError, match="at least 261"):
        Tokenizer.train(texts, 200)


def test_a_saved_tokenizer_loads_as_it_was(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    text = "Tom has 12 apples <think> ٣"
    for loaded in (Tokenizer.load(tmp_path), Tokenizer.load(tmp_path / "tokenizer.json")):
        assert loaded.encode(text) == tokenizer.encode(text) and loaded.vocab_size == tokenizer.vocab_size
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_transformers_reads_the_folder_the_same_way(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nTom’s 12 apples cost $3.50 each.\n<think>\n3.5*12=42\n</think><|im_end|>"
    assert theirs(text, add_special_tokens=True)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.decode(tokenizer.encode(text), skip_special_tokens=True) == tokenizer.decode(tokenizer.encode(text))
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert len(theirs) == tokenizer.vocab_size


def test_what_is_no_tokenizer_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="there is no tokenizer"):
        Tokenizer.load(tmp_path)
    path = tmp_path / "tokenizer.json"
    for content in ("", "{", "[]", "{}", json.dumps({"model": {"type": "nonsense"}})):
        path.write_text(content)
        with pytest.raises(DataError, match=r"tokenizer.json: the tokenizer cannot be read"):
            Tokenizer.load(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(tmp_path)
    from tokenizers import models

    Backend(models.BPE(vocab={"a": 0}, merges=[])).save(str(path))
    with pytest.raises(DataError, match=r"has no token <\|endoftext\|>"):
        Tokenizer.load(tmp_path)
