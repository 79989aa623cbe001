"""Nodes that are full of what is not in S3 yet."""

import hashlib
import time

from harness import check, cluster


def test_more_is_written_than_the_nodes_hold():
    """Long before it is due, dirty data goes to S3 when a node fills up: writers wait, none is refused."""
    with cluster(nodes=1, node_capacity="192MiB") as c:
        m = c.mount()
        began = time.monotonic()
        for i in range(20):
            (m / f"large{i}").write_bytes(bytes([i]) * (20 << 20))
        for i in range(20):
            check(hashlib.sha256((m / f"large{i}").read_bytes()).digest()
                  == hashlib.sha256(bytes([i]) * (20 << 20)).digest(), f"large{i}")
        return f"400 MiB through a node of 192 MiB in {time.monotonic() - began:.1f} s"


def test_many_small_files_fill_a_node():
    """The same where the index is full first: more files than it has room for."""
    with cluster(nodes=1, node_capacity="64MiB", index="16MiB") as c:
        m = c.mount()
        began, files = time.monotonic(), 9_000
        for d in range(90):
            (m / f"d{d}").mkdir()
            for i in range(files // 90):
                (m / f"d{d}" / f"f{i}").write_bytes(f"{d} {i} ".encode() * 600)
        for d in range(90):
            for i in range(0, files // 90, 10):
                check((m / f"d{d}" / f"f{i}").read_bytes() == f"{d} {i} ".encode() * 600, f"{d}/{i}")
        return f"{files} files in {time.monotonic() - began:.1f} s"
