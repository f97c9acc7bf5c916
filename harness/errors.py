"""What a user of the harness can get wrong."""


class HarnessError(ValueError):
    """Printed as one line, exit code 2: where, what came, what was expected, what to do."""
