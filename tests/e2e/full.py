"""A node that is full of what is not in S3 yet."""

import hashlib
import time

from harness import check, cluster


def test_more_is_written_than_a_node_holds_long_before_it_is_due():
    """Dirty data goes to S3 when it fills a node, however long --flush-after is: writers wait, none is refused."""
    with cluster(nodes=1, node_capacity="256MiB", flush_after=3_600_000) as c:
        m = c.mount()
        began = time.monotonic()
        data = [bytes([i]) * (20 << 20) for i in range(25)]
        for i, d in enumerate(data):
            (m / f"large{i}").write_bytes(d)
        took = time.monotonic() - began
        for i, d in enumerate(data):
            found = (m / f"large{i}").read_bytes()
            check(hashlib.sha256(found).digest() == hashlib.sha256(d).digest(), f"large{i}")
        return f"500 MiB through a node of 256 MiB in {took:.1f} s"
