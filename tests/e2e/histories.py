"""Histories of concurrent clients, recorded while leaders die, stand still or are cut off, and checked for an order that explains them.

`ebb bench history` records and checks: clients of the library, hasty ones that send what is unanswered to the next voter, and readers at
each voter that go on asking it while another one leads. Those are the ones that would be told what is old.
"""

import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import time

import harness
from harness import check, cluster, wait_for
from partitions import in_namespaces, machines
from voters import complete, leader, process, voter_elsewhere, voters

ROUNDS = int(os.environ.get("EBB_SOAK", "1"))


class Recording:
    """`ebb bench history` at work."""

    def __init__(self, c, seconds, *args):
        self.c, self.out = c, c.dir.parent / "history.jsonl"
        self.seed = int(os.environ.get("EBB_SEED", random.randrange(1 << 32)))
        command = [harness.EBB, "bench", "history", "--seconds", seconds, "--seed", self.seed, "--out", self.out, "--json", *args]
        self.process = subprocess.Popen([*map(str, command)], env=c.env(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_for("the clients to begin", lambda: self.out.exists() or self.process.poll() is not None)

    def finish(self, operations):
        """What was recorded and checked: so many operations at least, all in order."""
        out, err = self.process.communicate(timeout=240)
        try:
            said = json.loads(out)
        except ValueError:
            raise harness.Failure(f"seed {self.seed}: no history: {err.strip()}") from None
        checked = said["checked"]
        if not checked["linearizable"]:
            self.keep()
        check(not checked["violations"], f"seed {self.seed}: NOT linearizable, {checked}:\n" + "\n".join(checked["violations"]))
        check(not checked["gave_up"], f"seed {self.seed}: the search was given up: {checked}")
        check(self.process.returncode == 0, f"seed {self.seed}: {err.strip()}")
        check(checked["operations"] >= operations, f"seed {self.seed}: too few operations: {checked}")
        return said

    def keep(self):
        """A history without an order is kept where EBB_KEEP says."""
        if keep := os.environ.get("EBB_KEEP"):
            os.makedirs(keep, exist_ok=True)
            (harness.Path(keep) / f"history-{self.seed}.jsonl").write_bytes(self.out.read_bytes())

    def is_over(self):
        return self.process.poll() is not None


@contextlib.contextmanager
def recording(c, seconds, *args):
    r = Recording(c, seconds, *args)
    try:
        yield r
    finally:
        r.process.kill()
        r.process.wait()


@contextlib.contextmanager
def standing_still(pid):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def told(said, changes):
    """What can be said of a history."""
    checked, recorded = said["checked"], said["recorded"]
    return (f"{changes} changes of leader, {checked['operations']} operations, {checked['unknown']} of them without an answer, "
            f"{checked['partitions']} trees, {checked['longest']} in the largest, {checked['concurrent']} at once; "
            f"{sum(recorded['read_at'].values())} reads at {len(recorded['read_at'])} voters, {recorded['read_behind'] + recorded['followed']} answers of voters that follow, {recorded['answered_late']} answers and {recorded['refused_late']} refusals late, "
            f"{recorded['asked_again']} requests asked again, the longest wait {recorded['longest_ms'] / 1000:.1f} s; "
            f"checked in {said['check_ms'] / 1000:.1f} s")


def test_histories_have_an_order_while_leaders_are_killed():
    """kill -9 of the leader, over and over."""
    with cluster(meta=3, flush_after=1000) as c:
        leaders = []
        with recording(c, 20 * ROUNDS) as r:
            while not r.is_over() and len(leaders) < 5 * ROUNDS:
                leaders.append(name := leader(c))
                old = c.kill9(name)
                wait_for(f"{name} to be back", lambda: c.pid(name) not in (None, old), 30)
                complete(c)
            said = r.finish(2_000 * ROUNDS)
        check(len(leaders) >= 2 * ROUNDS, f"only {leaders} led")
        check(said["recorded"]["asked_again"] > 0, "requests were asked again")
        return told(said, len(leaders))


def test_histories_have_an_order_while_leaders_stand_still():
    """SIGSTOP of the leader until others have gone on without it; then it finds reads in its sockets that were asked meanwhile."""
    with cluster(meta=3, flush_after=1000) as c:
        changes = 0
        with recording(c, 22 * ROUNDS, "--readers", 2) as r:
            while not r.is_over() and changes < 4 * ROUNDS:
                name = leader(c)
                with standing_still(c.pid(name)):
                    wait_for("another to lead", lambda: leader(c) != name, 30)
                    # That others write meanwhile is what is tried.
                    time.sleep(1)
                changes += 1
                complete(c)
            said = r.finish(2_000 * ROUNDS)
        check(changes >= 2 * ROUNDS, f"only {changes} changes of leader")
        check(said["recorded"]["refused_late"] >= 20, f"reads waited at the one that stood still: {said['recorded']}")
        check(len(said["recorded"]["read_at"]) >= 2, f"reads were answered by more than one: {said['recorded']}")
        return told(said, changes)


@contextlib.contextmanager
def voters_apart():
    """Three voters on machines of their own, none of them that of S3, as {id: (machine, process)}, and where they all are."""
    ids = [2, 3, 4]
    with machines(*(f"v{i}" for i in ids)) as (c, net), contextlib.ExitStack() as stack:
        servers = {i: (f"v{i}", stack.enter_context(voter_elsewhere(c, net, i))) for i in ids}
        complete(c, 4)
        addresses = ",".join(v["address"] for v in voters(c) if v["id"] in ids)
        c.ebb("--cluster", addresses, "meta", "remove", 1)
        look = functools.partial(listed, c, addresses)
        wait_for("all voters to be there", lambda: in_step(look()), 60)
        yield c, net, servers, addresses


def listed(c, addresses):
    return json.loads(c.ebb("--cluster", addresses, "meta", "list", "--json").stdout)


def in_step(voters, n=3):
    return len(voters) == n and all(v["role"] != "learner" and (v["heard_ms"] or 0) < 1000 and v["lag"] is not None and v["lag"] < 50 for v in voters)


def test_histories_have_an_order_while_followers_answer():
    """So they do, while leaders are killed and whoever leads or follows stands still."""
    with cluster(meta=3, flush_after=1000) as c:
        changes = 0
        with recording(c, 24 * ROUNDS, "--followers", "--readers", 2) as r:
            while not r.is_over() and changes < 6 * ROUNDS:
                name = leader(c)
                if changes % 3 == 0:
                    old = c.kill9(name)
                    wait_for(f"{name} to be back", lambda: c.pid(name) not in (None, old), 30)
                else:
                    # Every second time one that follows, and is behind when it goes on.
                    still = name if changes % 3 == 1 else next(n for n in map(process, voters(c)) if n != name)
                    with standing_still(c.pid(still)):
                        if still == name:
                            wait_for("another to lead", lambda: leader(c) != name, 30)
                        # That others write meanwhile is what is tried.
                        time.sleep(1)
                changes += 1
                complete(c)
            said = r.finish(2_000 * ROUNDS)
        check(changes >= 3 * ROUNDS, f"only {changes} troubles")
        check(said["recorded"]["read_behind"] >= 100, f"voters that follow answered readers: {said['recorded']}")
        check(said["recorded"]["followed"] >= 500, f"voters that follow answered the library: {said['recorded']}")
        return told(said, changes)


@in_namespaces
def test_histories_have_an_order_while_leaders_are_cut_off():
    """The leader and the other voters don't hear each other, in both directions or in one, or it stood still meanwhile; clients reach everybody,
    and go on reading there, also of who follows."""
    with voters_apart() as (c, net, servers, addresses):
        def leads():
            return next(v["id"] for v in listed(c, addresses) if v["role"] == "leader")
        changes = 0
        with recording(c, 24 * ROUNDS, "--readers", 3, "--voters", addresses, "--cluster", addresses, "--followers") as r:
            while not r.is_over() and changes < 5 * ROUNDS:
                first = leads()
                machine, server = servers[first]
                # What it hears when it wakes up is from its clients alone.
                with standing_still(server.pid) if changes % 2 == 0 else contextlib.nullcontext():
                    for other, _ in servers.values():
                        if other != machine:
                            net.cut(machine, other, changes % 4 != 3)
                    wait_for("another to lead", lambda: leads() != first, 60)
                    # That others write meanwhile is what is tried, and that it has not noticed yet when it wakes up.
                    time.sleep(0.1)
                time.sleep(1)
                changes += 1
                net.heal()
                wait_for("all voters to be there", lambda: in_step(listed(c, addresses)), 60)
            said = r.finish(2_000 * ROUNDS)
        check(changes >= 2 * ROUNDS, f"only {changes} changes of leader")
        check(said["recorded"]["refused_late"] >= 20, f"reads waited at the one that stood still: {said['recorded']}")
        check(said["recorded"]["read_behind"] >= 100, f"voters that follow answered readers: {said['recorded']}")
        check(len(said["recorded"]["read_at"]) >= 2, f"reads were answered by more than one: {said['recorded']}")
        return told(said, changes)
