"""A text encoder's tokenizer, as its folder in a bundle holds it -> token ids.

What `CLIPTokenizer` of transformers gives, token for token, by the library beneath it, whose import takes a thousandth
of the time. Knows text and ids; knows nothing about encoders.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as _Tokenizer


@dataclass(frozen=True)
class Tokens:
    """Of each text `length` ids, marks of start and end included, and whether words of it had to be left out."""

    ids: list[list[int]]
    is_cut: list[bool]


class Tokenizer:
    """Texts -> ids, for several threads at once: it keeps no state between calls."""

    def __init__(self, folder: Path) -> None:
        config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.model_max_length = int(config["model_max_length"])
        file = str(folder / "tokenizer.json")
        self._plain, self._padded = _Tokenizer.from_file(file), _Tokenizer.from_file(file)
        self._plain.no_truncation()
        self._plain.no_padding()
        pad = _content(config.get("pad_token") or "<|endoftext|>")  # as CLIPTokenizer has it
        self._padded.enable_truncation(self.model_max_length, direction=config.get("truncation_side", "right"))
        self._padded.enable_padding(
            direction=config.get("padding_side", "right"),
            pad_id=self._padded.token_to_id(pad),
            pad_token=pad,
            length=self.model_max_length,
        )

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Ids of `model_max_length` tokens, the end of longer texts left out."""
        found: list[Encoding] = self._padded.encode_batch(list(texts))
        return Tokens([one.ids for one in found], [bool(one.overflowing) for one in found])

    def ids(self, text: str) -> list[int]:
        """All ids of a text, however many, marks of start and end included."""
        return self._plain.encode(text).ids


def _content(token: str | dict[str, Any]) -> str:
    """A token as configurations write it, with or without how it is matched."""
    return token if isinstance(token, str) else str(token["content"])
