"""The training corpus: dialogues drawn from seeds, as token rows with loss weights. See `harness.corpus.corpus`."""
