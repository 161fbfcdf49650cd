"""The exceptions that the command line ends with one line for, without a traceback."""


class InputError(ValueError):
    """Bad input or usage: the user's input, not our code, is at fault.

    The command line prints its message as one line and exits with `exit_code`. A good message says what
    was found, where, what was expected and how to mend it.
    """

    exit_code = 2


class MachineError(InputError):
    """The input is fine and the machine is not: a full disk, too little memory, a worker that died.

    What was finished is kept, and the same command goes on once the machine is mended. Exit code 1.
    """

    exit_code = 1
