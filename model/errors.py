"""What a user of the model package can get wrong."""


class ModelError(ValueError):
    """A checkpoint, tokenizer or request that cannot be served; the message is one line for the user."""


class DeviceLostError(Exception):
    """The GPU's context is gone with everything in it: no request of this process can be served any more."""
