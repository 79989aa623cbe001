"""Files that are open in a mount without a handle in the log (docs/PROTOCOL.md, R59)."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

from harness import check, cluster, wait_for
from leases import counters, serving
from voters import leader

FILES = 40


def read_all(fd):
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    pieces, at = [], 0
    while piece := os.pread(fd, 1 << 20, at):
        pieces.append(piece)
        at += len(piece)
    return b"".join(pieces)


def test_what_is_open_is_read_on_whoever_leads_and_whoever_unlinks_it():
    """A strict mount has files open; the leader is killed, the mount stands still, or nothing; another mount unlinks or replaces them all."""
    rng = random.Random(59)
    with cluster(meta=3) as c:
        a, b = c.mount("a", "-o", "strict"), c.mount("b")
        (b / "d").mkdir()
        pid, first = serving(a)[0], c.status()["inodes"]
        killed, entries = 0, 0
        for n in range(9):
            content = [rng.randbytes(rng.choice([10, 5_000, 300_000])) for _ in range(FILES)]
            for i, data in enumerate(content):
                (b / f"d/f{i}").write_bytes(data)
            if n % 2:
                c.ebb("flush")
            os.listdir(a / "d")
            before = counters(c)["mutations"]
            fds = [os.open(a / f"d/f{i}", os.O_RDONLY) for i in range(FILES)]
            entries += counters(c)["mutations"] - before
            check(os.pread(fds[0], 10, 0) == content[0][:10], "the first bytes")
            if n % 3 == 1:
                name = leader(c)
                old = c.kill9(name)
                killed += 1
            elif n % 3 == 2:
                os.kill(pid, signal.SIGSTOP)
            for i in range(FILES):
                if i % 2:
                    os.unlink(b / f"d/f{i}")
                else:
                    (b / "d/new").write_bytes(b"another")
                    os.rename(b / "d/new", b / f"d/f{i}")
            if n % 3 == 2:
                # Its lease is over, its session is not.
                time.sleep(1.5)
                os.kill(pid, signal.SIGCONT)
            for _ in range(2):
                for i, fd in enumerate(fds):
                    check(read_all(fd) == content[i], f"round {n}: file {i} as it was opened")
                time.sleep(0.4)
            for fd in fds:
                os.close(fd)
            if n % 3 == 1:
                wait_for(f"{name} to be back", lambda name=name, old=old: c.pid(name) not in (None, old), 30)
            for i in range(0, FILES, 2):
                check((a / f"d/f{i}").read_bytes() == b"another", f"round {n}: the file in its place")
        left = len(os.listdir(b / "d")) + 1
        wait_for("what nobody has open is gone", lambda: c.status()["inodes"] - first <= left, 30)
        check(entries <= FILES, f"{entries} log entries for {9 * FILES} opens")
        return f"{9 * FILES} opens, {entries} entries, {killed} leaders killed"


def test_what_was_unlinked_does_not_come_back_though_somebody_had_it_open():
    """A mount dies, or stands still, with files open that another one unlinks; `ebb down` waits for nobody, and they are not in the bucket."""
    took = []
    for options, signum in (((), signal.SIGKILL), (("-o", "strict"), signal.SIGKILL), ((), signal.SIGSTOP), (("-o", "strict"), signal.SIGSTOP)):
        with cluster() as c:
            a, b = c.mount("a", *options), c.mount("b")
            (b / "kept").write_bytes(b"kept")
            (b / "gone").write_bytes(b"x" * 100_000)
            c.ebb("flush")
            pid = serving(a)[0]
            # Another process has it open: what this one has open each of its children would close, and wait.
            hold = "import sys; f = open(sys.argv[1], 'rb'); f.read(10); print('open', flush=True); sys.stdin.read()"
            reader = subprocess.Popen([sys.executable, "-c", hold, a / "gone"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            check(reader.stdout.readline() == b"open\n", "it is open")
            os.kill(pid, signum)
            os.unlink(b / "gone")
            c.umount(b)
            began = time.monotonic()
            c.ebb("down")
            took.append(time.monotonic() - began)
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
            reader.kill()
            reader.wait()
            c.up()
            names = c.ebb("ls", "ebb:/").stdout.split()
            check(names == ["kept"], f"{options}, {signum}: {names}")
    return "down took " + ", ".join(f"{t:.1f}" for t in took) + " s"
