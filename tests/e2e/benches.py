"""`ebb bench engines`: every engine serves, or the program says what to build; nothing is left behind."""

import json

from harness import check, cluster


def test_engines_are_compared_or_it_says_what_to_build():
    """Our chunk server and the minimal ones answer the same reads; a build without the others says so."""
    with cluster(nodes=1) as c:
        p = c.ebb("--json", "bench", "engines", "--seconds", 1, "--runs", 1, "--file", "32MiB",
                  "--job", "64KiB:8", "--checksums-only", ok=False)
        if p.returncode:
            check("cargo build --release -p ebb --features engines" in p.stderr, p.stderr)
            return "without the engines"
        rows = json.loads(p.stdout)["engines"]["rows"]
        check([r["engine"] for r in rows] == ["ours", "ebb-ring", "tokio-uring", "glommio"], p.stdout)
        check(all(r["iops"] > 0 and r["peak_mib"] > 1 for r in rows), p.stdout)
        check(c.ebb("ls", "/").stdout.strip() == "", "its file is gone")
        check(not list(c.dir.glob(".ebb-bench-*")), "and the other one")
        return "with all engines"
