"""How a model's rows are encoded: the fast path of our own tokenizer, or any model's tokenizer and chat format."""

from pathlib import Path

from harness.corpus.chat_rows import ChatRows
from harness.corpus.rows import OwnRows, RowEncoder
from model.chat.encoding import load_encoding
from model.training.pieces import PieceEncoder


def open_encoder(tokenizer: Path) -> RowEncoder:
    """tokenizer: a tokenizer.json, or a model's folder (a GGUF file serves too). Raises ModelError with one line."""
    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if file.is_file():
        try:
            return OwnRows(PieceEncoder(file))
        except Exception:  # tokenizers raises bare Exception for a broken file; another model's is a ValueError
            pass
    return ChatRows(load_encoding(file.parent))
