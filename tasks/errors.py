"""What a user of a task can get wrong."""


class TaskError(ValueError):
    """Data or options that a task cannot use; the message is one line for the user."""
