import random
import string
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from model.chat.dsv32 import Dsv32Encoding
from model.chat.dsv32_parse import ASSISTANT, BOS, DSML, EOS, THINK, THINK_END, USER
from model.chat.tokenizer import read_tokenizer
from model.training.pieces import PieceEncoder, splits_between
from model.training.tokenizer import SPECIALS, train_tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "train" / "dsa-tiny"
ALPHABET = [
    *string.printable,
    "é",
    "Ж",
    "漢",
    "²",
    "½",
    "\u0301",
    "\u00a0",
    "\u2028",
    "“",
    "—",
    "😀",
    "_",
    "  ",
    "\x85",
]


@pytest.fixture(scope="module")
def encoder():
    return PieceEncoder(FOLDER / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def some_text(rng):
    return "".join(rng.choices([*ALPHABET, *SPECIALS], k=rng.randrange(1, 120)))


def test_ids_of_pieces_are_the_tokenizers_ids_of_the_whole_text(encoder, tokenizer):
    rng = random.Random(0)
    for _ in range(2000):
        text = some_text(rng)
        assert encoder.ids(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids, repr(text)


def test_texts_join_where_the_tokenizer_splits(encoder):
    rng = random.Random(1)
    joined = 0
    for _ in range(2000):
        one, two = "".join(rng.choices(ALPHABET, k=8)), "".join(rng.choices(ALPHABET, k=8))
        if splits_between(one[-1], two[0]):
            joined += 1
            assert encoder.ids(one + two).tolist() == [*encoder.ids(one).tolist(), *encoder.ids(two).tolist()]
    assert joined > 500
    assert not splits_between("a", "b") and not splits_between(" ", "b") and splits_between("b", " ")


def test_remembered_texts_have_the_same_ids(encoder):
    text = " The quiet baker sold 12 kettles."
    before = encoder.ids(text).tolist()
    encoder.remember([text])
    assert encoder.ids(text).tolist() == before


def test_every_text_comes_back_and_digits_stand_apart(encoder, tokenizer):
    rng = random.Random(2)
    for _ in range(200):
        text = some_text(rng)
        assert tokenizer.decode(encoder.ids(text).tolist(), skip_special_tokens=False) == text
    assert encoder.count(" 7668985") == 8


def test_the_folders_tokenizer_fits_deepseeks_chat_encoding():
    tokenizer = read_tokenizer(FOLDER)
    assert Dsv32Encoding.fits(tokenizer)
    for text in (BOS, EOS, USER, ASSISTANT, THINK, THINK_END, DSML):
        assert tokenizer.encode(text) == [SPECIALS.index(text)]
    assert tokenizer.eos_ids == (SPECIALS.index(EOS),)
    assert tokenizer.encode("plain") == tokenizer.encode(BOS + "plain")[1:]


def test_other_tokenizers_are_refused(tmp_path):
    from tokenizers import models, pre_tokenizers

    other = Tokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.ByteLevel()
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="expected a tokenizer trained by this project"):
        PieceEncoder(tmp_path / "tokenizer.json")


def test_training_twice_gives_the_same_bytes(tmp_path):
    rng = random.Random(3)
    texts = [" ".join("".join(rng.choices("abcde", k=4)) for _ in range(20)) for _ in range(100)]
    for name in ("one", "two"):
        train_tokenizer(iter(texts), tmp_path / name, vocab_size=400)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert Tokenizer.from_file(str(tmp_path / "one" / "tokenizer.json")).get_vocab_size() == 400
