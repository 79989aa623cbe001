"""The whole cycle: in through the mount, out to S3, down to zero, back from the bucket alone."""

import os
import shutil
import subprocess

from harness import check, cluster, digest, make_tree, same

FILES = int(os.environ.get("EBB_E2E_FILES", "1500"))


def test_tree_survives_flush_zero_and_wake():
    """A tree of files goes in, to S3, through scale 0, and comes back from the bucket alone."""
    with cluster() as c:
        tree = make_tree(c.dir.parent / "tree", FILES, seed=1)
        want = digest(tree)
        mnt = c.mount()
        subprocess.run(["cp", "-a", str(tree), str(mnt / "tree")], check=True)
        same(want, digest(mnt / "tree"), "after cp -a into the mount")
        c.ebb("flush", "/", "--wait")
        in_bucket = {k.removeprefix("tree/"): v for k, v in c.bucket_sizes().items()}
        sizes = {k: v[1] if v[0] == "file" else len(v[1].encode()) for k, v in want.items() if v[0] != "dir"}
        same(sizes, in_bucket, "names and sizes as s5cmd lists them")
        c.ebb("scale", 0, "--wait")
        check(not c.status()["map"]["nodes"], "no data node is left")
        c.ebb("scale", 2, "--wait")
        same(want, digest(mnt / "tree"), "after scale 0 and 2")
        # Write-back with dirt in place: a shrink takes it along, to S3.
        (mnt / "tree" / "late").write_bytes(b"late" * 5000)
        want["late"] = digest(mnt / "tree")["late"]
        c.ebb("scale", 0, "--wait")
        check((mnt / "tree" / "late").read_bytes() == b"late" * 5000, "the first read wakes the nodes")
        wanted = digest(mnt / "tree")
        c.down()
        for entry in c.dir.iterdir():
            if entry.name != "s3":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        c.up()
        mnt = c.mount()
        same(wanted, digest(mnt / "tree"), "after everything but the bucket was wiped")
        return f"{len(wanted)} entries"


def test_cp_copies_both_ways():
    """`ebb cp -r` in and out again, without a mount."""
    with cluster() as c:
        tree = make_tree(c.dir.parent / "tree", 200, seed=2)
        c.ebb("cp", "-r", tree, "ebb:/copy")
        c.ebb("cp", "-r", "ebb:/copy", c.dir.parent / "back")
        want, got = digest(tree), digest(c.dir.parent / "back")
        same(want, got, "out again")
        names = c.ebb("ls", "ebb:/copy").stdout.split("\n")
        check(len([n for n in names if n]) == len(list(tree.iterdir())), "ls lists the same names")
        c.ebb("mv", "ebb:/copy", "ebb:/moved")
        c.ebb("rm", "-r", "ebb:/moved")
        check(c.ebb("ls", "/").stdout.strip() == "", "nothing is left")


def test_large_file_goes_in_parts_and_comes_back():
    """A file of several runs: multipart, clean runs copied by S3, dirty ones uploaded."""
    with cluster() as c:
        mnt = c.mount()
        big = mnt / "big.bin"
        data = bytearray(os.urandom(1 << 20) * 50)
        big.write_bytes(data)
        c.ebb("flush", "/", "--wait")
        check(c.bucket_sizes() == {"big.bin": len(data)}, "the object has the file's size")
        with big.open("r+b") as f:
            f.seek(20 << 20)
            f.write(b"changed")
            f.flush()
            os.fsync(f.fileno())
        data[20 << 20:(20 << 20) + 7] = b"changed"
        c.ebb("flush", "/", "--wait")
        c.umount(mnt)
        c.ebb("scale", 0, "--wait")
        mnt = c.mount()
        check((mnt / "big.bin").read_bytes() == bytes(data), "the bytes after flush, zero and wake")
        got = c.dir.parent / "got.bin"
        c.s5cmd("cp", "s3://ebb/big.bin", got)
        check(got.read_bytes() == bytes(data), "the bytes as a foreign tool sees them")


def test_model_loads_through_the_mount_with_mmap():
    """mmap reads of a file that is only in the bucket."""
    import mmap
    with cluster() as c:
        data = os.urandom(8 << 20)
        local = c.dir.parent / "m.bin"
        local.write_bytes(data)
        c.s5cmd("cp", local, "s3://ebb/models/a/m.bin")
        mnt = c.mount()
        with open(mnt / "models/a/m.bin", "rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as m:
            for at in (0, 5 << 20, (8 << 20) - 100, 4095):
                check(m[at:at + 100] == data[at:at + 100], f"mmap at {at}")
            check(m[:] == data, "the whole of it")
