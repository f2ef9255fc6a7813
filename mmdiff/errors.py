"""The one error type of the library's front door."""


class UserError(ValueError):
    """A mistake the user can mend: its message is one sentence that says what, where and the remedy.

    The command line prints the message alone and exits with status 2; any other exception is a bug and keeps its traceback.
    """
