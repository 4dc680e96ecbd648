"""What the tools make of what goes wrong: one message that says what to do, and an exit status."""
from __future__ import annotations

import sys
from collections.abc import Callable

from visionkit.engine.distributed import end_processes, is_first_process
from visionkit.engine.hooks import Diverged, Stopped, resume_command
from visionkit.registry import ConfigError
from visionkit.transforms import BrokenImageError


def run_command(command: Callable[[], int], traceback: bool = False) -> int:
    """Run a tool and return its exit status.

    Args:
        command: the tool's work; returns 0, or 1 when it did its work and found something wrong.
        traceback: let errors through instead of telling them in one message.

    Returns:
        what `command` returns; 2 for a wrong setting, 1 for an image that cannot be read or a run that diverged, what the signal
        asks for where training was stopped, 130 where it was stopped at once.
    """
    try:
        return command()
    except (ConfigError, BrokenImageError, Diverged) as error:
        if traceback:
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except Stopped as stopped:
        if is_first_process():
            print(f"{stopped}\nTo go on: {resume_command()}", flush=True)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("\nstopped at once, without saving", file=sys.stderr)
        return 130
    finally:
        end_processes()


def _message(error: Exception) -> str:
    said = str(error)
    if isinstance(error, BrokenImageError):                  # from a data worker the message comes at the end of its traceback
        said = said.strip().splitlines()[-1].rpartition("BrokenImageError: ")[2]
    if isinstance(error, BrokenImageError) or isinstance(error.__cause__, BrokenImageError):
        said += "\ntools/check.py lists all such files; on_error=\"skip\" in a training data set passes over them"
    return said
