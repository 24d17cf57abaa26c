"""Ten million short rows prepared as the trainer does: memory at most, and how long.

Prints a Markdown table and writes bench/results/data.json. The rows, 20 to 50 characters each and every tenth but for its last letter
another's, are made once by data/examples/prepare.rs and kept in the cache.
"""

import argparse
import json
import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 1.5
VARIANTS = [("plain", []), ("cleaned", ["--clean"]), ("cleaned, near duplicates at 0.8", ["--clean", "--near", "0.8"])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", default=str(pathlib.Path(os.environ["CARGO_TARGET_DIR"]) / "release/examples/prepare"))
    parser.add_argument("--rows", type=int, default=10_000_000)
    arguments = parser.parse_args()
    file = pathlib.Path(os.environ["ATHANOR_CACHE"]) / f"bench-data/{arguments.rows}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    make = ["--rows", str(arguments.rows), "--copies", "10", "--json"]
    print(f"{arguments.rows:,} rows\n")
    print("| what | near duplicates | read, s | clean, s | split, s | peak memory, GiB | target |\n|---|---|---|---|---|---|---|")
    entries = []
    for name, options in VARIANTS:
        run = subprocess.run([arguments.prepare, str(file), *make, *options], check=True, capture_output=True, text=True)
        found = json.loads(run.stdout)
        seconds = found["seconds"]
        peak = found["mebibytes"]["split"] / 1024
        met = "met" if peak <= LIMIT else "**missed**"
        near = "" if found["near"] is None else f"{found['near']:,}"
        print(f"| {name} | {near} | {seconds['read']:.0f} | {seconds['clean']:.0f} | {seconds['split']:.0f} | {peak:.2f} | <= {LIMIT} {met} |", flush=True)
        entries.append({
            "name": f"peak memory, {name}", "ours": peak, "peer": LIMIT, "peer_name": "limit", "unit": "GiB", "ratio": peak / LIMIT,
            "target": "<= 1", "rows": arguments.rows, "seconds": seconds, "runs": {"ours": [peak], "peer": [LIMIT]},
        })
    out = ROOT / "bench/results"
    out.mkdir(exist_ok=True)
    (out / "data.json").write_text(json.dumps(entries, indent=1) + "\n")


main()
