# SPDX-License-Identifier: Apache-2.0
"""Which process is meant, who holds a port, how a process is ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from control.laptop.errors import Trouble
from control.laptop.processes import (
    PortNeed,
    ProcessId,
    check_ports,
    end,
    free_port,
    identify,
    is_alive,
    is_free,
    port_holder,
    read_usage,
    wait_until,
)

_DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"


@contextmanager
def running(*argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with the test."""
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def listening() -> Iterator[int]:
    """A port that this process holds."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def identity_of(process: subprocess.Popen[bytes]) -> ProcessId:
    """The identity of a process that runs."""
    identity = identify(process.pid)
    assert identity is not None
    return identity


def test_a_process_is_its_pid_and_its_start() -> None:
    """The same pid with another start is another process."""
    with running("/bin/sleep", "600") as process:
        identity = identity_of(process)

        assert is_alive(identity)
        assert not is_alive(ProcessId(pid=identity.pid, started_ticks=identity.started_ticks + 1))


def test_a_process_that_only_waits_to_be_reaped_is_not_alive() -> None:
    """A zombie holds nothing."""
    with running("/bin/sleep", "600") as process:
        identity = identity_of(process)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

        assert not is_alive(identity)
        assert identify(process.pid) is None


def test_a_name_with_brackets_and_spaces_is_read(tmp_path: object) -> None:
    """The kernel puts it in the middle of what is parsed."""
    name = "a) R (b"
    with running(sys.executable, "-c", f"import ctypes, time; ctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0); print('named', flush=True); time.sleep(600)") as process:
        assert process.stdout is not None
        process.stdout.readline()

        assert identity_of(process).pid == process.pid


def test_end_asks_first() -> None:
    """A process that listens is not killed."""
    with running("/bin/sleep", "600") as process:
        ended = end([identity_of(process)], grace_seconds=30)

        assert [process.pid] == [one.pid for one in ended]
        assert -signal.SIGTERM == process.wait()


def test_end_kills_what_does_not_listen() -> None:
    """Once the grace is over."""
    with running(sys.executable, "-c", _DEAF) as process:
        assert process.stdout is not None
        process.stdout.readline()

        end([identity_of(process)], grace_seconds=0.1)

        assert -signal.SIGKILL == process.wait()


def test_end_leaves_others_alone() -> None:
    """A pid that was given to somebody else since is not touched."""
    with running("/bin/sleep", "600") as process:
        identity = identity_of(process)

        ended = end([ProcessId(pid=identity.pid, started_ticks=identity.started_ticks - 1)], grace_seconds=0.1)

        assert [] == ended
        assert is_alive(identity)


def test_usage_counts_descendants() -> None:
    """What a part has started is the part's."""
    with running("/bin/sh", "-c", "sleep 600 & echo started; wait") as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = [int(pid) for pid in _children(process.pid)]

        usage = read_usage([process.pid, *children, 2**22 + 1])

        assert 1 == len(children)
        assert usage[process.pid].rss_bytes > usage[children[0]].rss_bytes > 0
        assert 0 == usage[2**22 + 1].rss_bytes
        os.kill(children[0], signal.SIGKILL)


def test_a_free_port_is_free_until_somebody_listens() -> None:
    """On loopback."""
    assert is_free(free_port())
    with listening() as port:
        assert not is_free(port)


def test_a_port_in_the_wake_of_a_connection_is_free() -> None:
    """TIME_WAIT of an earlier run does not keep the next from starting."""
    with listening() as port:
        pass
    server = socket.create_server(("127.0.0.1", port))
    client = socket.create_connection(("127.0.0.1", port))
    accepted, _ = server.accept()
    accepted.close()  # the side that closes first waits
    client.close()
    server.close()

    assert is_free(port)


def test_the_holder_of_a_port_is_named() -> None:
    """By pid and name; nobody for a free one."""
    with listening() as port:
        holder = port_holder(port)

        assert holder is not None
        assert holder.startswith(f"pid {os.getpid()} (")
    assert port_holder(port) is None


def test_the_first_port_that_is_taken_is_refused_with_its_holder_and_the_option() -> None:
    """Before anything is started."""
    with listening() as port:
        needs = [
            PortNeed(number=free_port(), purpose="the tenants' endpoint", option="--port"),
            PortNeed(number=port, purpose="the control API", option="--control-port"),
        ]

        with pytest.raises(Trouble) as refused:
            check_ports(needs)

    assert f"Port {port} (the control API) is taken by pid {os.getpid()} (" in str(refused.value)
    assert str(refused.value).endswith("Stop that, or choose another port with --control-port.")


def test_waiting_ends_with_the_condition_or_the_time() -> None:
    """True if it came to hold."""
    answers = iter([False, True])

    assert wait_until(lambda: next(answers), seconds=30)
    assert not wait_until(lambda: False, seconds=0)


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
