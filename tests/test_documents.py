"""Texts of a user's own: their words, which are known, which part they are in, and which ones a policy reads."""

from __future__ import annotations

import json
import random

import pytest
import torch

import dynrl
from dynrl.data import load_dataset, text_folder
from dynrl.evaluation import report_text
from dynrl.provenance import Provenance
from dynrl.recipes import defaults
from dynrl.vocabulary import Vocabulary, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't go...", ["Don't", "go", "..."]),
        ("It costs 3.50, (or so)?!", ["It", "costs", "3.50", ",", "(", "or", "so", ")", "?!"]),
        ("The e\u0301t\u00e9 is well-known.Yes", ["The", "\u00e9t\u00e9", "is", "well-known", ".", "Yes"]),
        ("\u597d\u5403\u3002ok", ["\u597d", "\u5403", "\u3002", "ok"]),
        (" \t", []),
    ],
)
def test_words_are_as_they_are_written(text, words):
    assert words_of(text) == words


def test_a_vocabulary_knows_what_was_there_twice_and_the_marks_that_end_parts():
    vocabulary = Vocabulary.of(["Red, red wine.", "White wine! Rare..."])
    assert vocabulary.words == (".", "red", "wine") and vocabulary.length == 5
    assert vocabulary.encode(["WINE? Red.", "a b c d wine wine"]).tolist() == [[4, 1, 3, 2, 0], [1, 1, 1, 1, 4]]
    assert vocabulary.settings == {"tokens": 5, "ends": ((2,),)}
    both = Vocabulary(("a", ",", "!", ".", ":"), 4)
    assert both.settings == {"tokens": 7, "ends": ((3, 4, 5, 6), (4, 5))}
    assert Vocabulary.of(["a a"], 7).settings["ends"] == ()
    for bad, reason in (("a", "got 'a'"), (["a", 3], "got 3"), (["a", " "], "text 1")):
        with pytest.raises(ValueError, match=reason):
            vocabulary.encode(bad)
    with pytest.raises(ValueError, match="length of 2 words"):
        Vocabulary(("a",), 1)


def write(folder, **classes):
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in classes.items():
        (folder / f"{name}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return folder


def reviews(count, start=0):
    """Texts of three sentences, the second of which tells the opinion."""
    rng = random.Random(start)

    def sentence(words):
        return " ".join(rng.choices(words.split(), k=4)).capitalize() + ". "

    def told(opinion):
        return [
            sentence("we sat there it rained")
            + f"Verdict: {opinion}! "
            + sentence("music played outside")
            + f"No{i}{opinion}"
            for i in range(start, start + count)
        ]

    return {"good": told("great"), "bad": told("awful")}


def test_texts_that_may_be_classes_or_parts_are_refused(tmp_path):
    write(tmp_path / "files", **{name: ["one", "two", "three"] for name in ("train", "test")})
    write(tmp_path / "sides" / "train", **reviews(5))
    write(tmp_path / "sides" / "val", **reviews(5))
    write(tmp_path / "strays" / "train", **reviews(5))
    write(tmp_path / "strays", notes=["made in spring"])
    for place, message in (("files", r"but test\.txt, train\.txt, so"), ("sides", "beside it val, so")):
        with pytest.raises(ValueError, match=message):
            load_dataset(str(tmp_path / place))
    with pytest.warns(UserWarning, match=r"1 files beside the parts of .*, such as .*notes\.txt"):
        load_dataset(str(tmp_path / "strays"))


@pytest.mark.parametrize("given", [(), ("train", "test")])
def test_equal_texts_are_in_one_part(given, tmp_path):
    """However few there are, so that a draw by hashes alone would take too few or too many."""
    for seed in range(30):
        drawn = random.Random(seed)
        for part in given or ("",):
            several = {
                name: [f"{part} {seed} {name} {number}" for number in (0, 1, 2, *drawn.choices(range(7), k=9))]
                for name in ("good", "bad")
            }
            write(tmp_path / f"{seed}" / part, **several)
        data = text_folder(str(tmp_path / f"{seed}"))
        texts = {part: set(data.split(part).texts) for part in ("train", "validation", "test")}
        assert all(texts.values()) and sum(map(len, texts.values())) == len(set.union(*texts.values()))
        assert sum(len(data.split(part)) for part in texts) == 24 * (len(given) or 1)


def test_a_folder_of_texts_is_a_data_set(tmp_path):
    texts = reviews(40)
    data = load_dataset(str(write(tmp_path / "reviews", **texts)))
    assert (data.names, data.dtype, data.input_shape) == (("bad", "good"), "int64", (15,))
    seen = []
    for part in ("train", "validation", "test"):
        split = data.split(part)
        assert split.targets.unique().tolist() == [0, 1]
        for row, text in enumerate(split.texts):
            assert text.strip() in texts[data.names[split.targets[row]]]
            ids = {word.lower(): i for i, word in enumerate(data.vocabulary.words, 2)}
            known = [ids.get(word.lower(), 1) for word in split.words(row)]
            assert split.inputs[row].tolist() == known + [0] * (15 - len(known))
        assert (split.inputs == 1).sum(1).tolist() == [1] * len(split)  # No17great stands in one text only
        seen += split.texts
    assert sorted(seen) == sorted(text for each in texts.values() for text in each)
    assert data.train.tail(3).words(0) == words_of(data.train.texts[-3])
    short = text_folder(f"{tmp_path / 'reviews'}@6")
    assert torch.equal(short.test.inputs, data.test.inputs[:, :6]) and len(short.test.words(0)) == 6
    built = defaults("jump", data).build(data, 0)
    assert built.config["ends"] == [list(marks) for marks in data.vocabulary.settings["ends"]]
    assert {data.vocabulary.words[i - 2] for i in built.config["ends"][0]} == {".", ":", "!"}
    built.check_inputs(data.test.inputs)
    defaults("hidden-update", data).build(data, 0).check_inputs(data.test.inputs)


def test_texts_keep_their_part_when_others_come(tmp_path):
    def parts():
        data = text_folder(str(tmp_path))
        return {text: part for part in ("train", "validation", "test") for text in data.split(part).texts}

    write(tmp_path, **reviews(60))
    before, learned = parts(), set(text_folder(str(tmp_path)).for_backbone.train.texts)
    assert 4 <= list(before.values()).count("test") <= 24
    more = reviews(60, 100)
    write(tmp_path, **{name: [*texts, *more[name]] for name, texts in reviews(60).items()})
    after = parts()
    assert len(after) == 240 and {text: after[text] for text in before} == before
    unseen = text_folder(str(tmp_path)).unseen
    assert 0 < len(unseen) < 60 and not learned & set(unseen.texts)


def test_words_are_known_from_the_training_part_only(tmp_path):
    write(tmp_path / "train", a=[f"{i} one one two" for i in range(9)], b=[f"{i}9 two two" for i in range(9)])
    write(tmp_path / "test", a=["four four one two three five"], b=["two"])
    data = text_folder(str(tmp_path))
    assert data.vocabulary.words == ("two", "one") and len(data.test) == 2
    assert sorted(data.test.inputs.tolist()) == [[1, 1, 3, 2], [2, 0, 0, 0]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"", r"bad\.txt holds no word"), ("bad.txt", b"!?\n--\n", r"bad\.txt holds no word"),
        ("bad.txt", b"fine\n\xe9t\xe9\n", r"bad\.txt is no text in UTF-8 .* at byte 5"),
        ("bad.TXT", b"one\ntwo\n", r"two files of the class 'bad', one of them bad\.txt; join them"),
        ("bad.txt", b"a\0b\n", r"bad\.txt holds bytes of 0"), ("bad.txt", b"one\ntwo\n", r"'bad' has too few different texts"),
        ("bad.txt", b"one\ntwo\n" * 20, r"too few different texts .* at least 3, got 2"),
        ("bad.txt", None, r"a text file \(\.txt\) for each of two classes or more in .*, found \['good'\]"),
    ],
)  # fmt: skip
def test_bad_texts_are_refused(name, content, message, tmp_path):
    write(tmp_path, **reviews(10))
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_dataset(str(tmp_path))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write(folder / "reviews", **reviews(40))
    return dynrl.train(
        "jump", folder / "reviews", out=folder / "run", agent="sb3-ppo", steps=400, num_envs=8, plain=False, epochs=1,
        price_range=(0.1, 1.0), network=("width=4", "hidden=4"),
    )  # fmt: skip


def test_a_plugged_model_takes_texts(run):
    """The vocabulary is read from the run's files alone."""
    data, model = run.dataset(), dynrl.load(run.path)
    ids = model.preprocess(list(data.test.texts))
    assert torch.equal(ids, data.test.inputs)
    assert model(ids).shape == (len(ids), 2) and model.classes == ("bad", "good")
    known = json.loads(run.data_file.read_text())
    assert tuple(known["vocabulary"]["words"]) == data.vocabulary.words
    assert Provenance.read(known, "it").vocabulary == data.vocabulary


def test_a_report_shows_the_words_that_were_read(run, tmp_path):
    report = dynrl.evaluate(run, out=tmp_path, batch_size=8, budgets=(0.5,))
    usage, test = report["usage"], run.dataset().test
    rows = [*usage["cheapest"], *usage["dearest"]]
    assert usage["words"] == [words_of(test.texts[row]) for row in rows]
    assert (tmp_path / "words.png").read_bytes()[:4] == b"\x89PNG" and not (tmp_path / "regions.png").exists()
    read = {place for ((_, place, _, _),) in usage["regions"][len(usage["cheapest"])]}
    words = usage["words"][len(usage["cheapest"])]
    assert f"read {len(read)} of {len(words)} words: {words[0]}" in report_text(report)
    assert " words: " not in report_text(report | {"usage": usage | {"words": [[]] * len(rows)}}), "images have none"


def test_texts_that_come_later_change_no_token(run, tmp_path):
    """Longer ones are cut, and new words are unknown, though the folder's own vocabulary would know them."""
    known, old = run.backbone.trained_on, run.dataset()
    more = {name: ["Brand new words came, again and again. " * 3] * 20 for name in ("good", "bad")}
    write(tmp_path, **{name: [*texts, *more[name]] for name, texts in reviews(40).items()})
    new = text_folder(str(tmp_path))
    assert "brand" in new.vocabulary.words and new.fingerprint != known.fingerprint
    seen = new.seen_by(known)
    assert seen.input_shape == old.input_shape and seen.fingerprint == new.fingerprint
    for row, text in enumerate(old.test.texts):
        assert torch.equal(seen.test.inputs[seen.test.texts.index(text)], old.test.inputs[row])
    assert seen.train.inputs[seen.train.texts.index(more["bad"][0].strip())].tolist()[:3] == [1, 1, 1]
    with pytest.raises(ValueError, match="expected texts, as the network was trained on, got inputs that are no texts"):
        load_dataset("needle").seen_by(known)
