"""Several copies of what S3 does not have: nodes are lost with their devices while programs write."""

import hashlib
import json
import os
import random
import shutil
import time

from harness import check, cluster, wait_for
from kills import Writer

ROUNDS = int(os.environ.get("EBB_SOAK", "5"))
GROUPS = 64


def id_of(c, name):
    return json.loads((c.dir / "nodes" / name / "registered.json").read_text())["node"]


def whole(c, nodes, without=()):
    """Every group has all its members, on these many nodes, and nobody is on the way."""
    s = c.status()
    ids = [n["id"] for n in s["map"]["nodes"]]
    return (len(ids) == nodes and not set(ids) & set(without) and s["groups"]["in_sync"] == GROUPS
            and not any(g["syncing"] for g in s["map"]["pgs"])
            and all(len(g["members"]) == s["replicas"] for g in s["map"]["pgs"]))


class Timed(Writer):
    """A writer that knows its longest step, and how much it had acknowledged and checked."""

    def __init__(self, root, seed, names=40):
        super().__init__(root, seed, names)
        self.longest, self.checks, self.since = 0.0, 0, time.monotonic()

    def step(self):
        self.since = time.monotonic()
        super().step()
        self.longest = max(self.longest, time.monotonic() - self.since)

    def verify(self, name):
        super().verify(name)
        self.checks += 1


def writers(m, count, seed, names=40):
    found = []
    for i in range(count):
        (m / f"w{i}").mkdir()
        found.append(Timed(m / f"w{i}", seed + i, names))
        found[-1].start()
    return found


def read_back(m, found):
    """By another client, which has nothing in memory."""
    files = size = 0
    for w in found:
        for name, want in sorted(w.acked.items()):
            data = (m / w.root.name / name).read_bytes()
            check(hashlib.sha256(data).hexdigest() == want, f"{w.root.name}/{name}: acked content is lost")
            files, size = files + 1, size + len(data)
    return files, size


def test_a_lost_device_takes_nothing_acked_along():
    """kill -9 of a node, and its device removed, under a load that fsyncs; a fresh one comes back each time."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    with cluster(nodes=3, replicas=2) as c:
        m = c.mount()
        found = writers(m, 3, seed)
        wait_for("all groups to have two members", lambda: whole(c, 3))
        slowest = 0.0
        for turn in range(ROUNDS):
            before = [w.writes for w in found]
            name = f"node-{rng.randrange(3) + 1}"
            lost, began = id_of(c, name), time.monotonic()
            # In one step: the process may be writing there.
            gone = (c.dir / "nodes" / name).rename(c.dir.parent / "lost")
            c.kill9(name)
            shutil.rmtree(gone)
            wait_for(f"round {turn}: the groups to have two members without node {lost}",
                     lambda: whole(c, 3, [lost]) or any(w.error for w in found), 120)
            slowest = max(slowest, time.monotonic() - began)
            wait_for(f"round {turn}: everybody to write on",
                     lambda: any(w.error for w in found)
                     or all(w.writes > n + 3 for w, n in zip(found, before)), 60)
            for w in found:
                check(not w.error, f"round {turn}: a client's call failed: {w.error!r}")
        for w in found:
            w.finish()
        files, size = read_back(c.mount("other"), found)
        check(c.bucket_sizes() == {}, "nothing was saved by S3")
        counters = dict(c.status()["counters"])
        check(counters["take_overs"] > 0 and counters["stand_ins"] == 0, f"{counters}")
        c.ebb("flush", "/", "--wait")
        sizes = c.bucket_sizes()
        check(len(sizes) >= files, f"{len(sizes)} objects of {files} files")
        return (f"{ROUNDS} nodes killed and their devices removed, {sum(w.writes for w in found)} fsynced writes, "
                f"{sum(w.checks for w in found)} files checked meanwhile; {files} files, {size} bytes read back; whole again "
                f"after {slowest:.1f} s at most, the longest stall {max(w.longest for w in found):.1f} s; "
                f"{counters['take_overs']} take-overs, {counters['members_in_sync']} copies")


def test_scaling_with_copies_keeps_everything():
    """Out, in, to zero and back, and a node that is killed meanwhile; the dirty data moves by being copied."""
    with cluster(nodes=2, replicas=2, min_in_sync=2) as c:
        m = c.mount()
        wait_for("all groups to have two members", lambda: whole(c, 2))
        found = writers(m, 2, 7)
        c.ebb("scale", "3")
        wait_for("a third node with its share", lambda: whole(c, 3), 120)
        c.kill9("node-1")
        wait_for("node-1 to be back", lambda: whole(c, 3), 120)
        c.ebb("scale", "2")
        wait_for("two nodes to have everything", lambda: whole(c, 2), 120)
        check(c.bucket_sizes() == {}, "nothing had to be flushed for it")
        refused = c.ebb("scale", "1", ok=False)
        check(refused.returncode != 0 and "min-in-sync" in refused.stderr, refused.stderr)
        for w in found:
            w.finish()
        read_back(c.mount("other"), found)
        c.ebb("scale", "0", "--wait")
        check(len(c.bucket_sizes()) >= sum(len(w.acked) for w in found), "S3 has all of it")
        read_back(m, found)
        wait_for("two members again", lambda: whole(c, 2), 120)
        text = c.ebb("status").stdout
        check(f"{GROUPS} groups in-sync, 0 syncing, 0 degraded" in text, text)
        return f"{sum(w.writes for w in found)} fsynced writes"
