"""What a user of the model package can get wrong."""


class ModelError(ValueError):
    """A checkpoint, tokenizer or request that cannot be served; the message is one line for the user."""
