# SPDX-License-Identifier: Apache-2.0
"""
Become a part: `python -I -S launch.py SIGNAL PARENT UID:GID|- program arguments…`.

Runs between the supervisor and each part, and is replaced by it (same pid). It asks Linux to send
SIGNAL when the supervisor dies however it dies, and gives up root for parts that must not have it.
A program of its own rather than code between fork and exec: the supervisor has threads.
Imports only the standard library, all of it while still root.
"""

from __future__ import annotations

import os
import signal
import sys

# Before root is given up: the other user may not be able to read the standard library.
try:
    import ctypes
except ImportError:  # some builds of Python lack it
    ctypes = None  # type: ignore[assignment]

#: From <linux/prctl.h>.
PR_SET_PDEATHSIG = 1
#: As the shell's: the program cannot be run.
CANNOT_RUN = 127


def main(arguments: list[str]) -> None:
    """Set up this process as the arguments say, then become the program."""
    death_signal, parent, account, *argv = arguments
    os.umask(0o077)
    # Python ignores SIGPIPE, and a shell's background job ignores SIGINT; the program inherits neither.
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    try:
        if account != "-":
            uid, _, gid = account.partition(":")
            os.setgroups([])
            os.setgid(int(gid))
            os.setuid(int(uid))
        # After the change of user, which clears it.
        _die_with_parent(int(death_signal), int(parent))
        os.execvpe(argv[0], argv, os.environ)
    except OSError as exc:
        sys.stderr.write(f"cannot run {argv[0]}: {exc.strerror}\n")
        sys.exit(CANNOT_RUN)


def _die_with_parent(death_signal: int, parent: int) -> None:
    if ctypes is None:
        return  # a supervisor killed with -9 then leaves this part to the next `up`
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        sys.exit(CANNOT_RUN)


if __name__ == "__main__":
    main(sys.argv[1:])
