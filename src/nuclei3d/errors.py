"""The one exception that means: the user's input, not our code, is at fault."""


class InputError(ValueError):
    """Bad input or usage.

    The command line prints its message as one line and exits with code 2. A good message says what
    was found, where, what was expected and how to mend it.
    """
