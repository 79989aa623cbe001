"""`ebb bench`: every figure and ratio is there, or it is said what is missing; nothing is left behind."""

import json
import shutil

from harness import check, cluster, wait_for


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


def test_a_chunk_bench_tells_how_writes_were_grouped():
    """Ratios of writes come with the group of the journal, beside fio where it is installed; no file is left."""
    with cluster(nodes=1) as c:
        tools = [t for t in ("fio", "iperf3") if shutil.which(t)]
        p = c.ebb("--json", "bench", "chunk", "--size", "4KiB", "--depth", "16", "--seconds", 1, "--runs", 1,
                  "--file", "16MiB", "--baseline")
        out = json.loads(p.stdout)
        ours = {r["operation"]: r for r in out["rows"] if r["tool"] == "ours"}
        check(set(ours) == {"read", "write", "write+fsync"}, p.stdout)
        check(ours["read"]["journal"] is None and ours["read"]["iops"] > 0, p.stdout)
        for operation in ("write", "write+fsync"):
            group = ours[operation]["journal"]
            # Never more in a batch than there are in flight; and what is journaled is at least what is asked.
            check(1 <= group["requests_per_batch"] <= 17, p.stdout)
            check(group["mutations_per_batch"] >= 0.9 * group["requests_per_batch"], p.stdout)
        if "fio" in tools:
            found = {(v["operation"], v["against"]) for v in out["verdicts"]}
            check({("read", "fio"), ("write", "fio_batched"), ("write", "fio_single_times_group")} <= found, p.stdout)
            scaled = next(v for v in out["verdicts"] if v["against"] == "fio_single_times_group")
            check(scaled["group"] >= 1 and scaled["ratio"] > 0 and scaled["bar"]["limit"] == 0.5, p.stdout)
            batch = next(r for r in out["rows"] if r["tool"] == "fio" and r["sync"] == "batch" and r["depth"] == 16)
            check(abs(batch["writes_per_sync"] - max(1, round(scaled["group"]))) < 0.5, p.stdout)
        check(c.ebb("ls", "/").stdout.strip() == "", "its file is gone")
        check(not list(c.dir.glob(".ebb-bench-*")), "and the other one")
        return f"with {' and '.join(tools) or 'neither fio nor iperf3'}"


def test_two_clusters_are_measured_in_turn():
    """Two copies beside one: a ratio of each run, and a bar; neither keeps a file. What can't be compared is refused."""
    with cluster(nodes=2, replicas=2, min_in_sync=2) as two, cluster(nodes=1) as one:
        wait_for("copies", lambda: two.status()["groups"]["in_sync"] == len(two.status()["map"]["pgs"]))
        args = ["bench", "chunk", "--size", "4KiB", "--depth", "1,16", "--seconds", 1, "--runs", 2, "--file", "16MiB",
                "--only", "write"]
        out = json.loads(two.ebb("--json", *args, "--beside", one.dir).stdout)["beside"]
        check(out["replicas"] == [2, 1] and out["runs"] == 2, str(out))
        check([p["depth"] for p in out["pairs"]] == [1, 16], str(out))
        for p in out["pairs"]:
            check(len(p["ratio_runs"]) == 2 and p["iops"] > 0 and p["other_iops"] > 0, str(p))
            check((p["bar"] or {}).get("limit") == (0.45 if p["depth"] == 16 else None), str(p))
        for c in (one, two):
            check(c.ebb("ls", "/").stdout.strip() == "", "its file is gone")
        text = one.ebb(*args, "--beside", two.dir).stdout
        check("the other cluster: 2" in text and "bar" not in text, text)
        p = one.ebb(*args, "--beside", one.dir, ok=False)
        check(p.returncode == 2 and "same cluster" in p.stderr, p.stderr)
        p = one.ebb(*args, "--beside", one.dir.parent, ok=False)
        check(p.returncode == 3 and "no cluster" in p.stderr, p.stderr)
        ratios = " and ".join(f"{p['ratio']:.2f}" for p in out["pairs"])
        return f"two copies of one: {ratios}, depth 1 and 16"


def test_a_recovery_bench_opens_what_it_filled_and_leaves_nothing():
    """A shard in every shape is opened as it was; less than 20 GiB is told in proportion; the file is removed."""
    with cluster(start=False) as c:
        c.dir.mkdir(parents=True, exist_ok=True)
        p = c.ebb("--json", "bench", "recovery", c.dir, "--capacity", "128MiB", "--runs", 2)
        rows = json.loads(p.stdout)["recovery"]
        check([r["shape"] for r in rows] == ["whole_chunks", "fragmented", "small_files", "tiny_files"], p.stdout)
        for r in rows:
            check(len(r["seconds_runs"]) == 2 and r["seconds"] > 0 and r["bar"] is None, p.stdout)
            check(r["seconds_in_proportion"] > r["seconds"] and r["index_per_cached_byte"] > 0, p.stdout)
        check(not list(c.dir.glob(".ebb-bench-*")), "the shard is removed")


def test_a_meta_bench_compares_and_leaves_nothing():
    """Every operation has its row, beside the local file system and Redis where it is installed; nothing is left."""
    with cluster(nodes=1) as c:
        p = c.ebb("--json", "bench", "meta", "--clients", 4, "--files", 50, "--runs", 1, "--entries", 300, "--baseline")
        out = json.loads(p.stdout)["meta"]
        operations = ["create", "stat", "readdir", "rename", "unlink"]
        rows = {(r["operation"], r["side"], r["clients"]): r for r in out["rows"]}
        check(out["voters"] == 1, p.stdout)
        for clients in (4, 1):
            for side in ("ours", "local"):
                check(all(rows[o, side, clients]["per_s"] > 0 for o in operations), p.stdout)
            if shutil.which("redis-server"):
                check(rows["create", "redis", clients]["per_s"] > 0, p.stdout)
        alone = rows["create", "ours", 1]
        # One after the other: the latency says how many there are in a second.
        check(0.3 < alone["per_s"] * alone["p50_us"] / 1e6 < 3, p.stdout)
        check(rows["unlink", "library", 4]["per_s"] > 0, p.stdout)
        check(out["large"]["entries"] == 300 and out["large"]["list_s"] > 0, p.stdout)
        check(c.ebb("ls", "/").stdout.strip() == "", "its directories are gone")
        check(not list(c.dir.glob(".ebb-bench-*")), "and the other ones")
        status = json.loads(c.ebb("--json", "status").stdout)
        check(not [s for s in status.get("sessions", []) if "bench" in str(s)], "its sessions are closed")
        return f"{alone['per_s']:.0f} creates/s by one client"
