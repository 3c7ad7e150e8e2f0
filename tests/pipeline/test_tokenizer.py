"""The tokenizer of a bundle against transformers' own on the same folder, token for token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from fastcache.demo import MODEL_DIRECTORY
from fastcache.pipeline.tokenizer import Tokenizer

TEXTS = (
    "",
    " ",
    "a large red circle",
    "A LARGE,   red\tcircle!\n",
    "(a (blue) ring:1.3) [square] ((star))",
    "it's they've we'll 2026 3.5x",
    "naïve café e\u0301 \u212b ﬁ İstanbul ǅ",
    "日本語の文 🟥🟦 \u200d👩\u200d🎨",
    "<|endoftext|> a <|startoftext|> circle <|endoftext|>",
    "a\x00b\x07c\ufeff\u00a0\u3000d",
    "circle " * 200,
    "x" * 5000,
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, CLIPTokenizer]:
    """Ours, of a folder saved as a build saves it, and transformers' of the same folder."""
    return _pair(CLIPTokenizer.from_pretrained(MODEL_DIRECTORY / "tokenizer"), tmp_path_factory.mktemp("tokenizer"))


def _pair(tokenizer: CLIPTokenizer, folder: Path) -> tuple[Tokenizer, CLIPTokenizer]:
    tokenizer.save_pretrained(folder)
    return Tokenizer(folder), CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def check_same(pair: tuple[Tokenizer, CLIPTokenizer], texts: list[str]) -> None:
    ours, theirs = pair
    length = theirs.model_max_length
    tokens, whole = ours(texts), [theirs(text).input_ids for text in texts]
    assert tokens.ids == theirs(texts, padding="max_length", max_length=length, truncation=True).input_ids
    assert tokens.is_cut == [len(ids) > length for ids in whole]
    assert [ours.ids(text) for text in texts] == whole


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:24]))
def test_it_gives_what_transformers_gives(pair: tuple[Tokenizer, CLIPTokenizer], text: str) -> None:
    check_same(pair, [text])


def test_several_texts_at_once(pair: tuple[Tokenizer, CLIPTokenizer]) -> None:
    check_same(pair, list(TEXTS))


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), min_size=1, max_size=3))
def test_any_text(pair: tuple[Tokenizer, CLIPTokenizer], texts: list[str]) -> None:
    check_same(pair, texts)


def test_another_token_pads(tmp_path: Path) -> None:
    """As in Stable Diffusion 2, whose second kind of padding is an exclamation mark."""
    letters = {letter: i for i, letter in enumerate("ab!")} | {"a</w>": 3, "b</w>": 4, "!</w>": 5}
    marks = {"<|startoftext|>": 6, "<|endoftext|>": 7}
    pair = _pair(CLIPTokenizer(letters | marks, [], model_max_length=9, pad_token="!"), tmp_path)
    check_same(pair, ["", "a", "ab ba", "abababababab", "a!"])
    assert pair[0]([""]).ids[0][-1] == pair[1].pad_token_id


def test_tokens_written_with_how_they_are_matched(pair: tuple[Tokenizer, CLIPTokenizer], tmp_path: Path) -> None:
    """As files of earlier versions of transformers have them."""
    pair[1].save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    token = {"__type": "AddedToken", "content": config["pad_token"], "normalized": False}
    file.write_text(json.dumps(config | {"pad_token": token}))
    assert Tokenizer(tmp_path)(["a ring"]) == pair[0](["a ring"])


def test_calls_leave_no_state(pair: tuple[Tokenizer, CLIPTokenizer]) -> None:
    ours, _ = pair
    before = ours(["a ring"]), ours.ids("a ring")
    ours(["circle " * 100])
    assert (ours(["a ring"]), ours.ids("a ring")) == before
