"""The one error type of the library's front door."""


class UserError(ValueError):
    """A mistake the user can fix: its message is one sentence that says what, where and the remedy.

    The command line prints the message alone and exits with status 2; any other exception is a bug and keeps its traceback. The message
    is one line whatever it quotes: what would break a line or a terminal is a question mark.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """A text without characters that break a line or a terminal: names of files and words of a user can hold anything."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))
