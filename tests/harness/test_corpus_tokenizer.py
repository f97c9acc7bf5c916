from pathlib import Path

from harness.corpus.config import CorpusConfig
from harness.corpus.tokenizer_texts import write_tokenizer

COMMITTED = Path(__file__).resolve().parents[2] / "configs" / "train" / "dsa-tiny"


def test_training_on_the_books_gives_the_committed_tokenizer_byte_for_byte(shared, tmp_path):
    config = CorpusConfig.model_validate({"books": shared / "data" / "haystack", "lengths": {}})
    write_tokenizer(config, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (COMMITTED / name).read_bytes()
