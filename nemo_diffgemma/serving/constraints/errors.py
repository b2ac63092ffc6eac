"""What a constraint may be refused for."""

from nemo_diffgemma.errors import UserError


class ConstraintError(UserError):
    """A regex, schema or list of choices that cannot be a constraint; the message names the part that cannot."""


class ConstraintViolation(RuntimeError):
    """A finished text that its own constraint does not allow: a defect, found by an independent library."""
