"""The one kind of error that a user can mend: bad input, a bad setting, a file that is not what it should be."""


class UserError(ValueError):
    """What was given, what was expected, what to type instead. Commands print one paragraph and exit with 2.

    Every other exception is a defect, or a fault of the machine. It is a ValueError for callers who catch what Python's
    own functions raise.
    """


class ConfigurationError(UserError):
    """A run configuration that cannot be used; the message names the key and what to write."""
