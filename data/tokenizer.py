"""Text <-> token ids: a `tiktoken.Encoding` built from a vocabulary, without the network.

A vocabulary is a list of tokens, or a file with a token a line, its id being the line's number from
0. A name in angle brackets, such as `<think>`, is a special token and any other is a single
character, so every digit is a token of its own, as in Qwen. `<end>` closes a response; `<pad>` only
fills rows, so that the end of a response is never mistaken for padding and is learned like any
other token.
"""
import re
from pathlib import Path

import tiktoken


def read(path: Path) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").split()           # without a BOM
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as that") from None


class Tokenizer:
    """ValueError for a vocabulary that has no <end> or no <pad>, or a token twice."""
    def __init__(self, vocabulary: Path | list[str] = Path(__file__).parent / "vocabulary.txt"):
        in_file = isinstance(vocabulary, Path)
        self.tokens = read(vocabulary) if in_file else list(vocabulary)
        path = vocabulary if in_file else "the task's vocabulary"
        if not all(isinstance(token, str) and token for token in self.tokens):
            raise ValueError(f"{path} has a token that is no text, or empty: {self.tokens}")
        for token in self.tokens:
            if self.tokens.count(token) > 1:
                raise ValueError(f"{path} has the token {token} more than once; leave one")
            if len(token) > 1 and not (token[0] == "<" and token[-1] == ">"):
                raise ValueError(f"{path} has the token {token}; one of several characters stands "
                                 "in angle brackets")
        for token in ("<end>", "<pad>"):
            if token not in self.tokens:
                raise ValueError(f"{path} has no token {token}; add it")
        if max(map(len, self.tokens)) == min(map(len, self.tokens)):
            raise ValueError(f"{path} has no token of a single character; add some")
        special = {token: i for i, token in enumerate(self.tokens) if len(token) > 1}
        characters = {token: i for i, token in enumerate(self.tokens) if len(token) == 1}
        self.encoding = tiktoken.Encoding(
            "small", pat_str=r"(?s:.)", special_tokens=special,
            mergeable_ranks={token.encode(): i for token, i in characters.items()})
        self.eos_id = special["<end>"]
        self.pad_id = special["<pad>"]
        self.characters = set(characters)
        self.special_pattern = "|".join(map(re.escape, special))

    def encode(self, text: str) -> list[int]:
        """Text -> token ids. ValueError, naming the character, for one that has no token."""
        # Checked first, because tiktoken panics on a byte that it does not know.
        for character in re.sub(self.special_pattern, "", text):
            if character not in self.characters:
                raise ValueError(f"{character!r} in {text!r} is not in the vocabulary; "
                                 f"use {' '.join(sorted(self.characters))}")
        return self.encoding.encode(text, allowed_special="all")

    def decode(self, ids: list[int]) -> str:
        """Token ids -> text, special tokens spelled out."""
        return self.encoding.decode(ids)
