"""Others write to the bucket, too."""

import errno
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

            def shows():
                try:
                    return (m / "f").read_text() == f"theirs {i}" * (i + 1)
                except OSError as e:
                    # Opened within the second in which nobody looks, and no byte of it was cached.
                    check(e.errno == errno.ESTALE, f"an error of a read: {e}")
                    return False
            wait_for("the new content", shows, 10)


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


def test_what_others_put_into_a_listed_directory_is_seen():
    """s5cmd puts and removes objects in a directory that was listed to its end."""
    with cluster() as c:
        m = c.mount()
        (m / "d").mkdir()
        (m / "d/ours").write_text("ours")
        c.ebb("flush", "/", "--wait")
        check(os.listdir(m / "d") == ["ours"], "listed")
        c.s5cmd("pipe", "s3://ebb/d/theirs", data="theirs")
        c.s5cmd("pipe", "s3://ebb/d/sub/deep", data="deep")
        wait_for("the new names", lambda: sorted(os.listdir(m / "d")) == ["ours", "sub", "theirs"], 20)
        check((m / "d/theirs").read_text() == "theirs", "a new file")
        check((m / "d/sub/deep").read_text() == "deep", "a new directory")
        c.s5cmd("pipe", "s3://ebb/d/named", data="named")
        wait_for("a new name, asked for", lambda: (m / "d/named").exists(), 20)
        c.s5cmd("rm", "s3://ebb/d/theirs")
        wait_for("the removal", lambda: "theirs" not in os.listdir(m / "d"), 20)
        check((m / "d/ours").read_text() == "ours", "nothing else goes")


def test_a_partly_dirty_file_whose_object_is_replaced_ends_as_both():
    """What is dirty of it is stored beside the stranger's object; nothing stays dirty."""
    with cluster() as c:
        m = c.mount()
        size, at, length = 100 << 20, 50 << 20, 1 << 20
        with open(m / "f", "wb") as f:
            for _ in range(size >> 20):
                f.write(os.urandom(1 << 20))
        c.ebb("flush", "/", "--wait")
        c.ebb("evict", "/")
        ours = os.urandom(length)
        with open(m / "f", "r+b") as f:
            f.seek(at)
            f.write(ours)
            f.flush()
            os.fsync(f.fileno())
        c.s5cmd("pipe", "s3://ebb/f", data="theirs")
        c.ebb("flush", "/", "--wait", ok=False)
        c.ebb("flush", "/", "--wait")
        wait_for("two names", lambda: len(os.listdir(m)) == 2, 20)
        check((m / "f").read_text() == "theirs", "the stranger's object keeps the name")
        conflict, = [n for n in os.listdir(m) if n != "f"]
        check(conflict.startswith("f.conflict-"), conflict)
        check(os.listdir(m / conflict) == [f"{at}-{length}"], "the dirty range is below it")
        check((m / conflict / f"{at}-{length}").read_bytes() == ours, "byte for byte")
        check(c.bucket_sizes().get(f"{conflict}/{at}-{length}") == length, "and in the bucket")
        c.down()
