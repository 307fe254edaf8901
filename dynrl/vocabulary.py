"""A vocabulary says which token id a word has, so that a network can read texts."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

PADDING, UNKNOWN = 0, 1  # the ids of what stands behind the end of a text, and of a word that is not in the vocabulary
FIRST = 2  # the id of the first word
KNOWN = 2  # how often training texts have a word that is known: of others, nothing could be learned
MOST_WORDS, MOST_LENGTH = 20_000, 400
# Marks that end a clause, and those that end a sentence; behind the ASCII ones, dashes, the ellipsis, and CJK marks.
CLAUSE, SENTENCE = ",;:\u2013\u2014\uff0c\u3001\uff1b\uff1a", ".!?\u2026\u3002\uff01\uff1f"
_APOSTROPHE = "\u2019"
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff"  # of writing without spaces: each is a word
_LETTER = rf"[^\W{_IDEOGRAPHS}]"
_WORDS = re.compile(
    rf"\d+(?:[.,:]\d+)+|[{_IDEOGRAPHS}]|{_LETTER}+(?:['{_APOSTROPHE}-]{_LETTER}+)*|[{SENTENCE}]+|[^\w\s]"
)


def words_of(text: str) -> list[str]:
    """Return the words and marks of a text in turn, as they are written: "Don't go..." has "Don't", "go" and "...".

    A word is of letters, digits, and hyphens and apostrophes between them; a number may have a point. Marks that end a
    sentence are one word together, each other mark is a word.
    """
    return _WORDS.findall(unicodedata.normalize("NFC", text))


@lru_cache(maxsize=2**17)
def _key(word: str) -> str:
    """Return what a word is looked up by: small letters, and of marks that end a sentence, the first."""
    return word[0] if word[0] in SENTENCE else word.casefold().replace(_APOSTROPHE, "'")


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary makes token ids of texts: 0 behind the end of a text, 1 for any unknown word, then `words` in turn.

    Attributes:
        words: the words, in small letters.
        length: how many words of a text are read; what is behind them is cut off.
    """

    words: tuple[str, ...] = field(repr=False)
    length: int

    def __post_init__(self) -> None:
        words = tuple(self.words)  # JSON has lists
        if not all(isinstance(word, str) and word for word in words) or len(set(words)) < len(words):
            raise ValueError("expected different words")
        if type(self.length) is not int or self.length < 2:
            raise ValueError(f"expected a length of 2 words or more, got {self.length!r}")
        object.__setattr__(self, "words", words)
        object.__setattr__(self, "_ids", {word: FIRST + i for i, word in enumerate(words)})

    @classmethod
    def of(cls, texts: Iterable[str], length: int | None = None) -> Vocabulary:
        """Return the vocabulary of training texts: what they have twice or more, at most the 20,000 commonest words.

        Args:
            texts: the texts.
            length: how many words of a text are read; None takes the number of the longest, at most 400.
        """
        counts, longest = Counter[str](), 2
        for text in texts:
            found = words_of(text)
            counts.update(map(_key, found))
            longest = max(longest, len(found))
        common = sorted((word for word, count in counts.items() if count >= KNOWN), key=lambda w: (-counts[w], w))
        return cls(tuple(common[:MOST_WORDS]), min(longest, MOST_LENGTH) if length is None else length)

    @property
    def settings(self) -> dict[str, Any]:
        """What a network that reads such texts is told: how many ids there are, and which ones end its parts.

        `ends` has the ids of marks that end a clause or a sentence, then of those that end a sentence, as far as there
        are any.
        """
        kinds = [self._ids_of(marks) for marks in (CLAUSE + SENTENCE, SENTENCE)]
        return {"tokens": FIRST + len(self.words), "ends": tuple(dict.fromkeys(kind for kind in kinds if kind))}

    def _ids_of(self, marks: str) -> tuple[int, ...]:
        ids: dict[str, int] = self._ids  # type: ignore[attr-defined]
        return tuple(sorted(ids[mark] for mark in marks if mark in ids))

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the token ids of `texts`: [n, length] int64.

        Raises:
            ValueError: it is no list of texts, or one of them has no word.
        """
        wrong = [texts] if isinstance(texts, str) else [text for text in texts if not isinstance(text, str)]
        if wrong:
            raise ValueError(f"expected a list of texts, got {wrong[0]!r}")
        ids: dict[str, int] = self._ids  # type: ignore[attr-defined]
        rows = torch.full((len(texts), self.length), PADDING)
        for row, text in enumerate(texts):
            found = [ids.get(_key(word), UNKNOWN) for word in words_of(text)[: self.length]]
            if not found:
                raise ValueError(f"expected texts of one word or more, got {text!r} (text {row})")
            rows[row, : len(found)] = torch.tensor(found)
        return rows
