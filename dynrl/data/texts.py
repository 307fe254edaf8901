"""These data sets have texts: token ids [n, length] int64. Zeros would follow a text that is shorter than others."""

from __future__ import annotations

import numpy as np
import torch

from dynrl.data.base import Dataset, Split, drawn


def find() -> Dataset:
    """Of 100 numbers in random order, the first one names the place of the answer; 20,000 / 1,000 / 2,000 rows.

    This is the number prediction of LSTM-Jump (Yu et al. 2017). A text has the numbers from 0 to 99, each once; the
    number k has the token id k + 1. The answer is the number at the place that the first number names, where places
    count from 0. So two reads are enough.
    """
    return _find("find", 100)


def find_small() -> Dataset:
    """The task of `find` with 10 numbers; 20,000 / 1,000 / 2,000 rows."""
    return _find("find-small", 10)


def _find(name: str, count: int) -> Dataset:
    def draw(rows: int, seed: int) -> Split:
        numbers = np.random.default_rng(seed).permuted(np.tile(np.arange(count), (rows, 1)), axis=1)
        texts = torch.from_numpy(numbers)
        return Split(texts + 1, texts.gather(1, texts[:, :1]).squeeze(1))

    return drawn(name, count, (20_000, 1_000, 2_000), [draw] * 3, dtype="int64")


# The words of `needle`, as token ids; 0 is the padding. A kind of word is a range (first, end).
COMMA, STOP, NOT = 1, 2, 3
OPENERS = (4, 10)  # each begins the sentence that tells the opinion
BEGINNINGS = (10, 30)  # each begins any other sentence
GRADED = (30, 50)  # praise and blame: four words for each grade, from the lowest on
FILLERS = (50, 200)
GRADES, SENTENCES, SPREAD = 5, 12, 5
LENGTH = 10 * SENTENCES


def needle() -> Dataset:
    """Texts of 12 sentences, one of which tells the writer's opinion, a grade of 5; 20,000 / 2,000 / 5,000 rows.

    A text is 120 token ids: words, commas and full stops. A sentence has 5 to 15 tokens; those of 8 and more have a
    comma. The sentence with the opinion begins with one of six words that begin no other sentence. One word in it tells
    the grade, and a "not" before that word turns the grade round: the lowest becomes the highest. Such words stand in
    three out of five other sentences, too, where they mean nothing. So who reads the first word of each sentence can
    leave most sentences there, and stop in the one that counts.
    """
    return drawn("needle", GRADES, (20_000, 2_000, 5_000), [_opinions] * 3, dtype="int64")


def _opinions(rows: int, seed: int) -> Split:
    rng = np.random.default_rng(seed)
    row, shape = np.arange(rows), (rows, SENTENCES)
    more = rng.integers(SPREAD + 1, size=(rows, SENTENCES // 2))
    lengths = 10 + rng.permuted(np.concatenate([more, -more], 1), axis=1)
    starts = lengths.cumsum(1) - lengths
    told = rng.integers(SENTENCES, size=rows)  # the sentence with the opinion

    def put(where: np.ndarray, at: np.ndarray | int, tokens: np.ndarray | int) -> None:
        """Put `tokens` at the places `at` of the sentences of `where`; all are [rows, sentences], or one number."""
        texts[np.nonzero(where)[0], (starts + at)[where]] = np.broadcast_to(tokens, shape)[where]

    every, opinion = np.ones(shape, bool), np.zeros(shape, bool)
    opinion[row, told] = True
    texts = rng.integers(*FILLERS, size=(rows, LENGTH))
    put(every, 0, rng.integers(*BEGINNINGS, size=shape))
    put(opinion, 0, rng.integers(*OPENERS, size=shape))
    put(every, lengths - 1, STOP)
    split = lengths >= 8
    comma = np.where(split, rng.integers(3, np.maximum(lengths - 3, 4)), LENGTH)
    put(split, comma, COMMA)
    # The word that tells a grade stands neither at the comma nor behind it, so that a "not" fits before it.
    place = rng.integers(2, lengths - 1)
    place = np.where((place == comma) | (place == comma + 1), comma + 2, place)
    grade, inverted = rng.integers(GRADES, size=shape), rng.random(shape) < 0.3
    graded = opinion | (rng.random(shape) < 0.6)
    words = (GRADED[1] - GRADED[0]) // GRADES
    put(graded, place, GRADED[0] + words * grade + rng.integers(words, size=shape))
    put(graded & inverted, place - 1, NOT)
    meant = np.where(inverted, GRADES - 1 - grade, grade)[row, told]
    difficulty = {"place of the opinion": torch.from_numpy((starts + place)[row, told] + 1).float()}
    return Split(torch.from_numpy(texts), torch.from_numpy(meant), difficulty=difficulty)
