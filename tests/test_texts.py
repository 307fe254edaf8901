"""Data sets of texts: by their rules, recomputed from the token ids alone."""

from __future__ import annotations

import pytest
import torch

from dynrl.data import load_dataset
from dynrl.data.texts import COMMA, GRADED, NOT, OPENERS, STOP


def test_token_ids_stay_what_they_are():
    data = load_dataset("find-small")
    assert data.test.to(torch.device("cpu"), torch.bfloat16).inputs.dtype is torch.int64
    known = data.provenance
    assert torch.equal(known.preprocess(data.test.inputs), data.test.inputs)
    with pytest.raises(ValueError, match="expected raw inputs of torch.int64"):
        known.preprocess(data.test.inputs.float())


def test_the_first_number_names_the_place_of_the_answer():
    data = load_dataset("find-small")
    for split in (data.test.head(50), data.anew(0).head(50)):
        for text, target in zip(split.inputs.tolist(), split.targets.tolist(), strict=True):
            assert sorted(text) == list(range(1, 11)) and text[text[0] - 1] - 1 == target


def test_one_sentence_tells_the_opinion():
    data = load_dataset("needle")
    elsewhere = 0
    for row in range(300):
        text = data.test.inputs[row].tolist()
        sentences, sentence = [], []
        for token in text:
            sentence.append(token)
            if token == STOP:
                sentences.append(sentence)
                sentence = []
        assert len(sentences) == 12 and not sentence and all(5 <= len(each) <= 15 for each in sentences)
        assert all((COMMA in each) == (len(each) >= 8) for each in sentences)
        (told,) = (each for each in sentences if each[0] in range(*OPENERS))
        ((place, word),) = ((i, token) for i, token in enumerate(told) if token in range(*GRADED))
        grade = (word - GRADED[0]) // 4
        assert data.test.targets[row] == (4 - grade if told[place - 1] == NOT else grade)
        where = sum(len(each) for each in sentences[: sentences.index(told)]) + place + 1
        assert data.test.difficulty["place of the opinion"][row] == where
        elsewhere += sum(token in range(*GRADED) for token in text) - 1
    assert 0.5 < elsewhere / (300 * 11) < 0.7
