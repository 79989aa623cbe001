"""Mounts and clients that remember names and attributes under leases (docs/PROTOCOL.md, R52 to R55)."""

import os
import signal
import threading
import time

from harness import check, cluster, wait_for
from voters import leader


def counters(c):
    return dict(c.status()["counters"])


def serving(mount):
    """Processes that serve a mount."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            words = open(f"/proc/{entry}/cmdline", "rb").read().split(b"\0") if entry.isdigit() else []
        except OSError:
            continue
        if b"mount" in words and str(mount).encode() in words:
            found.append(int(entry))
    return found


def is_there(path):
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def test_strict_mounts_see_each_others_changes_at_once():
    """Two mounts, one after the other and both at once: whatever one has done, the other sees, without waiting and mostly without asking."""
    with cluster() as c:
        a, b = c.mount("a", "-o", "strict"), c.mount("b", "-o", "strict")
        (a / "d").mkdir()
        (a / "d/f").write_text("x")
        # What these show, the kernel asks for without a name.
        held = {m: os.open(m / "d/f", os.O_PATH) for m in (a, b)}
        for n in range(150):
            here, there = ((a, b), (b, a))[n % 2]
            os.chmod(here, 0o700 + n % 64)
            check(os.stat(there).st_mode & 0o777 == 0o700 + n % 64, f"{n}: the root's mode")
            check(os.stat(there).st_mode & 0o777 == 0o700 + n % 64, f"{n}: the root's mode, again")
            check(is_there(there / f"d/n{n}") is None, f"{n}: not there yet")
            os.chmod(here / "d/f", 0o400 + n)
            check(os.fstat(held[there]).st_mode & 0o777 == 0o400 + n, f"{n}: the mode of what is held")
            check(os.stat(there / "d/f").st_mode & 0o777 == 0o400 + n, f"{n}: the mode")
            check(os.fstat(held[here]).st_mode & 0o777 == 0o400 + n, f"{n}: the mode where it was changed")
            (here / f"d/n{n}").mkdir()
            check(is_there(there / f"d/n{n}") is not None, f"{n}: a new name")
            os.rename(here / f"d/n{n}", here / f"d/m{n}")
            check(is_there(there / f"d/n{n}") is None and is_there(there / f"d/m{n}") is not None, f"{n}: renamed")
            os.rmdir(here / f"d/m{n}")
            check(is_there(there / f"d/m{n}") is None, f"{n}: removed")
            (here / "d/f").write_text("x" * (n + 1))
            check(os.fstat(held[there]).st_size == n + 1, f"{n}: the size of what is held")
            check(os.stat(there / "d/f").st_size == n + 1, f"{n}: the size")
        for fd in held.values():
            os.close(fd)
        # What nobody changes is not asked for again.
        for i in range(50):
            (a / f"d/s{i}").write_text("")
        names = [b / "d" / name for name in os.listdir(b / "d")]
        for name in names:
            os.stat(name)
        before, looks, begun = counters(c)["queries"], 0, time.monotonic()
        while time.monotonic() - begun < 2.5:
            for name in names:
                os.stat(name)
                looks += 1
        asked = counters(c)["queries"] - before
        check(looks > 500 and asked < looks / 20, f"{looks} looks asked {asked} times")
        return f"{looks} looks in 2.5 s, {asked} requests"


def test_a_strict_mount_that_stands_still_holds_up_others_for_a_second():
    """SIGSTOP of a mount that remembers what another one changes; it is right again when it goes on."""
    with cluster() as c:
        a, b = c.mount("a", "-o", "strict"), c.mount("b", "-o", "strict")
        (a / "f").write_text("x")
        pids = serving(b)
        check(len(pids) == 1, f"one process serves {b}: {pids}")
        slowest = 0
        for n in range(3):
            check(os.stat(b / "f").st_mode & 0o777 == os.stat(a / "f").st_mode & 0o777, "both see the same")
            os.stat(b / "f")
            os.kill(pids[0], signal.SIGSTOP)
            try:
                begun = time.monotonic()
                os.chmod(a / "f", 0o600 + n)
                took = time.monotonic() - begun
                check(took < 5, f"{took:.1f} s for a chmod")
                slowest = max(slowest, took)
                begun = time.monotonic()
                os.chmod(a / "f", 0o610 + n)
                check(time.monotonic() - begun < 0.5, "held up twice")
                time.sleep(0.2)
            finally:
                os.kill(pids[0], signal.SIGCONT)
            check(os.stat(b / "f").st_mode & 0o777 == 0o610 + n, "what it remembered is over")
        check(slowest > 0.2, f"it was waited for: {slowest:.2f} s")
        return f"the slowest chmod took {slowest:.2f} s"


def test_strict_mounts_are_right_while_leaders_are_killed():
    """Two mounts hand a number to and fro by a file's mode, and a third looks on; the leader is killed meanwhile."""
    with cluster(meta=3) as c:
        mounts = [c.mount(name, "-o", "strict") for name in "abc"]
        (mounts[0] / "f").write_text("x")
        stop, wrong, looks, latest = threading.Event(), [], [0], [0]

        def look():
            seen = 0
            while not stop.is_set():
                known = latest[0]
                seen = os.stat(mounts[2] / "f").st_mode & 0o777
                if seen < known:
                    wrong.append(f"{seen} after {known} had been told")
                    return
                looks[0] += 1

        looker = threading.Thread(target=look)
        os.chmod(mounts[0] / "f", 0)
        looker.start()
        try:
            killed = []
            for n in range(1, 0o777):
                if n % 120 == 60:
                    killed.append(name := leader(c))
                    old = c.kill9(name)
                    if n > 60:
                        wait_for(f"{name} to be back", lambda name=name, old=old: c.pid(name) not in (None, old), 30)
                here = mounts[n % 2]
                check(os.stat(here / "f").st_mode & 0o777 == n - 1, f"{n}: as the other left it")
                os.chmod(here / "f", n)
                latest[0] = n
                check(not wrong, f"{wrong}")
        finally:
            stop.set()
            looker.join()
        check(not wrong, f"{wrong}")
        check(len(killed) >= 4 and looks[0] > 1000, f"{killed}, {looks[0]} looks")
        return f"{n} changes, {looks[0]} looks, {len(killed)} leaders killed"
