"""Nodes that don't come back: killed with their directories, or standing still past their lease."""

import errno
import json
import os
import shutil
import signal
import threading
import time

from harness import check, cluster, wait_for


def nodes(c):
    return json.loads(c.ebb("node", "list", "--json").stdout)


def id_of(c, name):
    return json.loads((c.dir / "nodes" / name / "registered.json").read_text())["node"]


def lose(c, name):
    """kill -9, and nothing is left of its directory; the controller starts it again."""
    shutil.rmtree(c.dir / "nodes" / name)
    return c.kill9(name)


def healed(c, lost):
    found = nodes(c)
    return (len(found) == 2 and all(n["node"] != lost and n["cut_off_ms"] is None for n in found)
            and sum(n["groups"] for n in found) == 64)


def write(path, data):
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def test_a_cluster_heals_when_a_node_loses_its_directory():
    """What is in S3 is readable again by itself; a new store takes the lost one's place."""
    with cluster() as c:
        m = c.mount()
        for i in range(40):
            write(m / f"f{i}", bytes([i]) * (i * 5_000))
        c.ebb("flush", "/", "--wait")
        lost, began = id_of(c, "node-1"), time.monotonic()
        lose(c, "node-1")
        for i in range(40):
            check((m / f"f{i}").read_bytes() == bytes([i]) * (i * 5_000), f"f{i}")
        took = time.monotonic() - began
        check(took < 30, f"readable only after {took:.1f} s")
        wait_for("the new store to take its place", lambda: healed(c, lost), 60)
        write(m / "after", b"and on it goes")
        c.ebb("flush", "/", "--wait")
        check(c.bucket_sizes()["after"] == 14, "flushed")
        check(not c.status()["warnings"], f"warnings: {c.status()['warnings']}")
        return f"readable again after {took:.1f} s"


def test_what_only_a_lost_node_had_waits_until_it_is_given_up():
    """`ebb node abandon` names it, gives it up when told, and the cluster is whole again."""
    # Each is on one of two nodes, as chance has it: of so many some are on the one that is lost.
    dirty = 40
    with cluster() as c:
        m = c.mount()
        for i in range(20):
            write(m / f"clean{i}", b"clean %d" % i)
        write(m / "both", b"as it is in S3")
        c.ebb("flush", "/", "--wait")
        lost = id_of(c, "node-1")
        refused = c.ebb("node", "abandon", lost, "--yes", ok=False)
        check(refused.returncode != 0 and "not lost" in refused.stderr, f"alive: {refused.stderr}")
        for i in range(dirty):
            write(m / f"dirty{i}", b"dirty %d" % i)
        write(m / "both", b"and never will be")
        lose(c, "node-1")
        wait_for("it to be cut off", lambda: [n for n in nodes(c) if n["node"] == lost and n["cut_off_ms"] is not None])
        warned = wait_for("the status to say so", lambda: [w for w in c.status()["warnings"] if f"node abandon {lost}`" in w])
        dry = json.loads(c.ebb("node", "abandon", lost, "--json").stdout)
        named = {f["path"]: f["stored_bytes"] for f in dry["files"]}
        check(not dry["done"] and 0 < len(named) <= dirty + 1, f"{dry}")
        again = json.loads(c.ebb("node", "abandon", lost, "--json").stdout)
        check(again["files"] == dry["files"], "a dry run changes nothing")
        wait_for("the other groups to have a stand-in",
                 lambda: [n for n in nodes(c) if n["node"] == lost and n["groups"] == n["waiting_groups"] > 0])
        text = c.ebb("node", "abandon", lost, "--yes").stdout
        check(all(path in text for path in named), text)
        wait_for("the cluster to be whole", lambda: healed(c, lost), 60)
        for i in range(20):
            check((m / f"clean{i}").read_bytes() == b"clean %d" % i, f"clean{i}")
        for i in range(dirty):
            path = m / f"dirty{i}"
            if f"/dirty{i}" not in named:
                check(path.read_bytes() == b"dirty %d" % i, "the other node had it")
                continue
            try:
                check(False, f"read {path.read_bytes()!r} of a file that is lost")
            except OSError as e:
                check(e.errno == errno.EIO, f"{e}")
            if i % 2:
                path.unlink()
            write(path, b"written again")
            check(path.read_bytes() == b"written again", f"dirty{i}")
        want = b"as it is in S3" if "/both" in named else b"and never will be"
        check((m / "both").read_bytes() == want, "goes back to what is in S3")
        c.ebb("flush", "/", "--wait")
        check(not c.status()["warnings"], f"warnings: {c.status()['warnings']}")
        return f"{len(named)} of {dirty + 1} files given up; {warned[0]}"


def test_a_node_that_stood_still_serves_nothing_old():
    """kill -STOP past its lease: a stand-in takes over; after kill -CONT nobody reads what was before."""
    with cluster() as c:
        writer, reader = c.mount("writer"), c.mount("reader")
        files = [f"f{i}" for i in range(24)]
        for name in files:
            write(writer / name, b"old " + name.encode() * 1000)
        c.ebb("flush", "/", "--wait")
        for name in files:
            check((reader / name).read_bytes().startswith(b"old"), name)
        pid, still = c.pid("node-1"), id_of(c, "node-1")
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_for("stand-ins", lambda: [n for n in nodes(c) if n["node"] == still and n["groups"] == 0])
            for name in files:
                write(writer / name, b"new " + name.encode() * 1000)
        finally:
            os.kill(pid, signal.SIGCONT)
        stale = []

        def read(some):
            end = time.monotonic() + 3
            while time.monotonic() < end:
                for name in some:
                    fd = os.open(reader / name, os.O_RDONLY | os.O_DIRECT)
                    got = os.pread(fd, 4, 0)
                    os.close(fd)
                    if got != b"new ":
                        stale.append((name, got))

        threads = [threading.Thread(target=read, args=(files[i::3],)) for i in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(90)
            check(not t.is_alive(), "a reader hangs")
        check(not stale, f"old content was served: {stale[:3]}")
        wait_for("it to have groups again", lambda: [n for n in nodes(c) if n["node"] == still and n["groups"] > 20])
        for name in files:
            check((reader / name).read_bytes() == b"new " + name.encode() * 1000, name)
        c.ebb("flush", "/", "--wait")
        check(c.pid("node-1") == pid, "the same process all the while")
