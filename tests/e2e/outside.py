"""Others write to the bucket, too."""

import os

from harness import check, cluster, wait_for


def test_an_overwritten_object_is_seen_at_the_next_open():
    """s5cmd replaces an object; the mount shows it."""
    with cluster() as c:
        m = c.mount()
        (m / "f").write_text("ours")
        c.ebb("flush", "/", "--wait")
        for i in range(5):
            c.s5cmd("pipe", "s3://ebb/f", data=f"theirs {i}" * (i + 1))
            wait_for("the new content", lambda: (m / "f").read_text() == f"theirs {i}" * (i + 1), 10)


def test_existing_objects_appear_lazily():
    """A bucket that was full before."""
    with cluster() as c:
        local = c.dir.parent / "many"
        local.mkdir()
        for i in range(1200):
            (local / f"k{i:05}").write_text(str(i))
        c.s5cmd("cp", f"{local}/", "s3://ebb/deep/er/")
        m = c.mount()
        check((m / "deep/er/k00777").read_text() == "777", "a name, before anything was listed")
        check(len(os.listdir(m / "deep/er")) == 1200, "all of them")
        check(not (m / "deep/er/nope").exists(), "and no others")


def test_a_conflict_ends_as_two_files():
    """A local dirty file whose object changed underneath: neither is lost."""
    with cluster() as c:
        m = c.mount()
        (m / "f").write_text("first")
        c.ebb("flush", "/", "--wait")
        (m / "f").write_text("ours, dirty")
        c.s5cmd("pipe", "s3://ebb/f", data="theirs, meanwhile")
        c.ebb("flush", "/", "--wait", ok=False)
        c.ebb("flush", "/", "--wait")

        def names():
            return sorted(os.listdir(m))
        wait_for("two names", lambda: len(names()) == 2, 10)
        contents = {n: (m / n).read_text() for n in names()}
        check(contents.pop("f") == "theirs, meanwhile", "the foreign object keeps the name")
        (name, text), = contents.items()
        check(name.startswith("f.conflict-") and text == "ours, dirty", f"ours is beside it: {name}")
        check(len(c.bucket_sizes()) == 2, "and both are in the bucket")
