"""The one exception for mistakes that the user can mend."""


class InputError(ValueError):
    """Bad input: the message says what was found, where, and what is allowed. Programs print it and exit 1."""
