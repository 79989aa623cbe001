"""Locks on files, fcntl's and flock's, among programs on several mounts (docs/PROTOCOL.md, R57)."""

import errno
import fcntl
import os
import signal
import struct
import subprocess
import sys
import time

from harness import check, cluster, wait_for
from leases import serving
from voters import complete, leader

# struct flock on 64-bit Linux: type, whence, start, length, pid.
FLOCK = "hhqqi4x"

COUNT = """
import fcntl, os, sys
path, rounds, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
fd = os.open(path, os.O_RDWR | os.O_CREAT)
take, give = {
    "flock": (lambda: fcntl.flock(fd, fcntl.LOCK_EX), lambda: fcntl.flock(fd, fcntl.LOCK_UN)),
    "fcntl": (lambda: fcntl.lockf(fd, fcntl.LOCK_EX, 10, 0), lambda: fcntl.lockf(fd, fcntl.LOCK_UN, 10, 0)),
}[kind]
for _ in range(rounds):
    take()
    n = int(os.pread(fd, 20, 0) or b"0")
    os.pwrite(fd, b"%020d" % (n + 1), 0)
    give()
"""

HOLD = """
import fcntl, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
print("has it", flush=True)
time.sleep(600)
"""


def program(text, *args):
    return subprocess.Popen([sys.executable, "-c", text, *map(str, args)], stdout=subprocess.PIPE, text=True)


def holder(path):
    p = program(HOLD, path)
    check(p.stdout.readline() == "has it\n", "a program has its lock")
    return p


def is_free(path):
    """Whether the whole file can be locked by a flock, which is given up again."""
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def refused(call, *args):
    try:
        call(*args)
    except OSError as e:
        return e.errno in (errno.EAGAIN, errno.EACCES)
    return False


def test_programs_on_two_mounts_exclude_each_other():
    """A counter in a file, read and written under a lock by programs on two mounts that keep it open."""
    with cluster() as c:
        mounts = [c.mount("a"), c.mount("b"), c.mount("c", "-o", "strict")]
        rounds, took = 40, {}
        for kind in ("flock", "fcntl"):
            begun = time.monotonic()
            at_work = [program(COUNT, m / kind, rounds, kind) for m in mounts * 2]
            check(all(p.wait(120) == 0 for p in at_work), f"{kind}: the programs end well")
            took[kind] = (time.monotonic() - begun) / (rounds * len(at_work))
            for m in mounts:
                check(int((m / kind).read_text()) == rounds * len(at_work), f"{kind}: {(m / kind).read_text()} increments seen at {m}")
        return ", ".join(f"{kind}: {rounds * 6} turns of 6 programs, {took[kind] * 1000:.1f} ms each" for kind in took)


def test_ranges_are_as_posix_has_them():
    with cluster() as c:
        a, b = c.mount("a"), c.mount("b")
        fa, fb = (os.open(m / "f", os.O_RDWR | os.O_CREAT) for m in (a, b))
        fcntl.lockf(fa, fcntl.LOCK_EX, 10, 0)
        check(refused(fcntl.lockf, fb, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 9), "the last byte is locked")
        fcntl.lockf(fb, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 10)
        asked = struct.pack(FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
        found = struct.unpack(FLOCK, fcntl.fcntl(fb, fcntl.F_GETLK, asked))
        check(found[0] == fcntl.F_WRLCK and found[2:4] == (0, 10), f"who is in the way: {found}")
        # One part shared, one free, one as it was.
        fcntl.lockf(fa, fcntl.LOCK_SH, 3, 0)
        fcntl.lockf(fa, fcntl.LOCK_UN, 3, 3)
        fcntl.lockf(fb, fcntl.LOCK_SH | fcntl.LOCK_NB, 3, 0)
        fcntl.lockf(fb, fcntl.LOCK_EX | fcntl.LOCK_NB, 3, 3)
        check(refused(fcntl.lockf, fb, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 6), "the rest is locked")
        # A close of any descriptor of the file ends its process's fcntl locks.
        os.close(os.open(a / "f", os.O_RDONLY))
        fcntl.lockf(fb, fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 0)
        os.close(fb)
        fcntl.lockf(fa, fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 0)
        os.close(fa)


def test_locks_end_with_their_programs_and_waits_with_a_signal():
    with cluster() as c:
        a, b = c.mount("a"), c.mount("b")
        first = holder(a / "f")
        check(not is_free(b / "f"), "it is locked on the other mount")
        check(not is_free(a / "f"), "and on the same")
        waiting = [program(HOLD, m / "f") for m in (a, b)]
        time.sleep(1)
        check(all(p.poll() is None for p in waiting), "they wait")
        ended = []
        for p in waiting:
            begun = time.monotonic()
            p.send_signal(signal.SIGTERM)
            p.wait(10)
            ended.append(time.monotonic() - begun)
        first.kill()
        first.wait()
        begun = time.monotonic()
        wait_for("the lock to end with its program", lambda: is_free(b / "f"), 10)
        freed = time.monotonic() - begun
        check(is_free(a / "f"), "nobody who gave up has it")
        # Who waits gets it.
        first = holder(a / "f")
        second = program(HOLD, b / "f")
        time.sleep(0.5)
        begun = time.monotonic()
        first.kill()
        check(second.stdout.readline() == "has it\n", "who waited has it")
        handed = time.monotonic() - begun
        second.kill()
        return f"a wait ends {max(ended):.1f} s after a signal, a dead program's lock after {freed:.1f} s, who waits has it after {handed:.2f} s"


def test_locks_outlive_leaders_and_end_with_their_mount():
    """The leader dies, twice; then the mount of a program that holds a lock does."""
    with cluster(meta=3) as c:
        a, b = c.mount("a"), c.mount("b")
        first = holder(a / "f")
        for _ in range(2):
            name = leader(c)
            old = c.kill9(name)
            check(not is_free(b / "f"), "the lock is still there")
            wait_for(f"{name} to be back", lambda: c.pid(name) not in (None, old), 30)
            complete(c)
        check(not is_free(b / "f"), "the lock is still there")
        for pid in serving(a):
            os.kill(pid, signal.SIGKILL)
        begun = time.monotonic()
        wait_for("the lock to end with its session", lambda: is_free(b / "f"), 90)
        took = time.monotonic() - begun
        first.kill()
        subprocess.run(["umount", "-l", a], check=False)
        c.mounts.remove(a)
        return f"free {took:.0f} s after its mount was killed"


def test_local_locks_are_local():
    with cluster() as c:
        a, b = c.mount("a"), c.mount("b", "-o", "local_locks")
        first = holder(b / "f")
        check(not is_free(b / "f"), "on that mount it is locked")
        check(is_free(a / "f"), "others don't see it")
        first.kill()
