"""The command line: `python -m mmdiff train | sample | eval | configs | cache | convert | bench | aot`.

Nothing here imports jax before it is needed, so that help and mistakes answer at once.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Sequence

from mmdiff import arguments, commands, console, preflight
from mmdiff.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 for a mistake of the user, 130 for Ctrl-C, 141 for a closed pipe.

    A training that a signal stopped raises SystemExit with 128 + the signal.
    """
    console.open_standard_files()
    # TensorFlow only writes events here: its notes at start-up would be all that is seen of it.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a caption or a path that the terminal cannot show
    try:
        args = arguments.parse(sys.argv[1:] if argv is None else argv)
        (commands.COMMANDS[args.command] if getattr(args, "check", None) is None else preflight.check)(args)
    except (OSError, RuntimeError, ValueError) as error:
        text = str(error) if isinstance(error, UserError) else _of_the_system(error)
        if not text:
            raise
        console.say(f"mmdiff: error: {' '.join(text.split())}")
        return 2
    except KeyboardInterrupt:
        console.say("mmdiff: interrupted")
        return 130
    if (reason := console.failure()) == "pipe":
        return 128 + signal.SIGPIPE  # as of any program whose reader has seen enough; the work is done
    if reason:
        console.say(f"mmdiff: error: stdout cannot be written ({reason}), only the files are: see to it and run the same command again.")
        return 2
    return 0


def _of_the_system(error: BaseException) -> str:
    """What the operating system or jax said, if that is about a path or a setting of the user; else nothing."""
    if isinstance(error, (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)) and error.filename:
        return f"{error.filename} cannot be used ({error.strerror}): check the path and who may read and write it."
    if re.search(r"for (environment|config) '?JAX_\w+'?$", str(error)):
        return f"jax does not take an environment variable: {error}: correct it, or leave it out."
    if str(error).startswith("Unable to initialize backend") or "Unknown backend" in str(error):
        platforms = f" (JAX_PLATFORMS={os.environ['JAX_PLATFORMS']})" if os.environ.get("JAX_PLATFORMS") else ""
        return f"jax cannot start{platforms}: {str(error).partition(chr(10))[0].rstrip('.')}; correct JAX_PLATFORMS or the drivers."
    return ""


if __name__ == "__main__":
    sys.exit(main())
