#!/usr/bin/env python3
"""Soak and overload of a router before two servers of a language model, the real programs on loopback.

Soak: 16 clients send requests of mixed lengths for `--seconds`; a third of them go away before the answer is complete, malformed requests
come in between, and the weights of the two revisions change as in a canary. No well-formed request may fail, no answer may count as an
error of a revision, the processes' memory and open files may not grow after the warm-up, and the gauges of running sequences and of the
cache return to zero.

Overload: requests at ten times the rate that the machine can serve. Each is answered 200 or 429 with Retry-After, the goodput is at least
90 % of the largest one measured before, and the latency of admitted requests has a bound.

`make test-soak` installs what it needs and runs it. Exits with 1 if a property does not hold.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
import urllib.request

import aiohttp

import local
import overload
from traffic import WORDS, Soak

CLIENTS, BATCH = 16, 16
# Sequences that wait at most in the soak, and seconds that a request may be expected to wait under overload.
QUEUE, WAIT = 32, 6
MODEL = "smollm2-135m"
REVISIONS = ("champion", "candidate")
# Shares of the candidate, in percent, one after the other.
CANARY = (0, 10, 25, 50, 75, 100, 60, 30)
# Part of the time that is warm-up, and the growth of memory after it that counts as flat: a part, and MiB.
WARM_UP, GROWTH, GROWTH_MIB = 0.25, 0.03, 8
# Memory for keys and values of each server, and prompts that fill it before the soak: it is taken as it is written.
CACHE, FILLING, FILLING_WORDS = 128 << 20, 12, 450


class Samples:
    """Memory and open files of processes, once a second."""

    def __init__(self, processes):
        self.processes = processes
        self.began = time.monotonic()
        self.rows = []

    async def follow(self):
        while True:
            row = {process.name: process.status("VmRSS") / 1024 for process in self.processes}
            self.rows.append((time.monotonic() - self.began, row))
            await asyncio.sleep(1)

    def growth(self, name, since):
        """Median memory in MiB of the first and of the last third after `since` seconds, and the slope in MiB a minute."""
        rows = [(at, row[name]) for at, row in self.rows if at >= since]
        third = max(len(rows) // 3, 1)
        median = lambda part: statistics.median(value for _, value in part)
        slope = statistics.linear_regression([at / 60 for at, _ in rows], [value for _, value in rows]).slope
        return median(rows[:third]), median(rows[-third:]), slope


async def fill(router):
    """Sends long prompts to each revision until its cache has been written."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        async def ask(revision, number):
            text = f"{number} " + " ".join(WORDS[(number + place) % len(WORDS)] for place in range(FILLING_WORDS))
            body, headers = {"prompt": text, "max_tokens": 1}, {"x-athanor-revision": revision}
            async with session.post(f"{router.base}/v1/completions", json=body, headers=headers) as answer:
                if answer.status != 200:
                    raise RuntimeError(f"{revision}: {answer.status} {await answer.text()}")

        for number in range(FILLING):
            await asyncio.gather(*(ask(revision, number) for revision in REVISIONS))


async def canary(file, seconds, shares):
    """Changes the weights, and records for how long each share held."""
    step = seconds / (2 * len(CANARY))
    while True:
        for share in CANARY:
            local.write_weights(file, {REVISIONS[0]: 100 - share, REVISIONS[1]: share})
            shares.append(share)
            await asyncio.sleep(step)


async def soak(router, servers, file, seconds, seed):
    """Results, and what is wrong with them."""
    await fill(router)
    clients, samples, shares = Soak(router.base, seed), Samples([router, *servers]), []
    files = {process.name: process.open_files() for process in samples.processes}
    tasks = [asyncio.create_task(samples.follow()), asyncio.create_task(canary(file, seconds, shares))]
    await clients.run(CLIENTS, seconds)
    for task in tasks:
        if task.done():
            task.result()
        task.cancel()
    wrong = list(clients.failures)
    # The engine sees at its next step that a client is gone.
    gauges = ("athanor_server_running_sequences", "athanor_server_waiting_sequences", "athanor_server_kv_cache_used_blocks")
    left = {}
    for _ in range(100):
        left = {(server.name, name): server.metric(name) for server in servers for name in gauges}
        if not any(left.values()):
            break
        await asyncio.sleep(0.1)
    wrong += [f"{server}: {name} is {value}, not 0" for (server, name), value in left.items() if value]
    memory = {}
    for process in samples.processes:
        first, last, slope = samples.growth(process.name, WARM_UP * seconds)
        memory[process.name] = {"first third, MiB": first, "last third, MiB": last, "slope, MiB/min": slope,
                                "peak, MiB": process.status("VmHWM") / 1024}
        if last > first * (1 + GROWTH) + GROWTH_MIB:
            wrong.append(f"{process.name}: resident memory grew from {first:.1f} to {last:.1f} MiB")
    # Connections that are kept for the next request may remain: one for each client and server.
    await asyncio.sleep(1)
    for process in samples.processes:
        now = process.open_files()
        if now > files[process.name] + 4 * CLIENTS:
            wrong.append(f"{process.name}: {now} open files, {files[process.name]} before")
    with urllib.request.urlopen(f"{router.ops}/analysis", timeout=10) as answer:
        analysis = json.load(answer)["revisions"]
    for name in REVISIONS:
        found = analysis.get(name, {"requests": 0, "errors": 0})
        if found["requests"] == 0 or found["errors"]:
            wrong.append(f"revision {name}: {found['requests']} requests, {found['errors']} errors in the canary's analysis")
    expected = statistics.mean(shares) / 100
    answered = max(sum(clients.revisions.values()), 1)
    share = clients.revisions[REVISIONS[1]] / answered
    # Five standard deviations, and something for the half second in which the router sees a change.
    if abs(share - expected) > 5 * (expected * (1 - expected) / answered) ** 0.5 + 0.03:
        wrong.append(f"the candidate answered {share:.1%} of the requests, its weights have a mean of {expected:.1%}")
    cancelled = sum(server.metric("athanor_server_cancelled_sequences_total") for server in servers)
    if cancelled == 0:
        wrong.append("no sequence was cancelled, though clients went away")
    results = {
        "seconds": seconds, "requests": dict(clients.counts), "candidate's share": share, "mean of its weights": expected,
        "cancelled sequences": cancelled, "memory": memory,
        "preemptions": sum(server.metric("athanor_server_preemptions_total") for server in servers),
    }
    print(json.dumps(results, indent=1), flush=True)
    return results, wrong


@contextlib.contextmanager
def deployment(work, limits):
    """A router before a server of each revision, with equal weights. Yields the router, the servers and the file of the weights.

    Servers have processors of their own, as pods with a static CPU policy: threads of a model wait for each other, so servers that share
    processors slow each other down by more than their share.
    """
    processors = sorted(os.sched_getaffinity(0))
    each = max(len(processors) // len(REVISIONS), 1)
    engine = {"weights": "Int4", "maxModelLength": 1024, "kvCacheMemory": CACHE}
    with contextlib.ExitStack() as stack:
        servers = {}
        for index, revision in enumerate(REVISIONS):
            servers[revision] = stack.enter_context(local.server(
                work, "soak", f"file://{local.MODELS}/{MODEL}", work / f"{revision}.log", revision,
                processors=processors[index * each:][:each],
                engine=engine, limits={"maxBatchInputs": BATCH} | limits,
            ))
        weights = dict.fromkeys(REVISIONS, 100 // len(REVISIONS))
        router, file = stack.enter_context(local.router(work, servers, weights, work / "router.log"))
        yield router, list(servers.values()), file


async def part(options, name, work):
    """Runs a part with processes of its own."""
    work.mkdir()
    with deployment(work, {"queueInputs": QUEUE} if name == "soak" else {"maxQueueSeconds": WAIT}) as (router, servers, file):
        if name == "soak":
            results, wrong = await soak(router, servers, file, options.seconds, options.seed)
        else:
            seconds = min(max(options.seconds / 8, 6), 30)
            results, wrong = await overload.run(
                router.base, [router, *servers], seconds, len(servers) * BATCH, WAIT, options.seed,
            )
    if wrong:
        for log in sorted(work.glob("*.log")):
            lines = [line for line in log.read_text().splitlines() if "ERROR" in line or "panicked" in line]
            print(f"{log.name}: {len(lines)} errors" + "".join(f"\n  {line[:400]}" for line in lines[:5]), file=sys.stderr)
    return results, wrong


async def run(options, work):
    results, wrong = {}, []
    for name in ("soak", "overload"):
        if options.only in (None, name):
            results[name], found = await part(options, name, work / name)
            wrong += found
    return results, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="duration of the soak (default: %(default)s; in short: 60)")
    parser.add_argument("--only", choices=["soak", "overload"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=pathlib.Path, help="file for the results")
    options = parser.parse_args()
    local.end_on_sigterm()
    with tempfile.TemporaryDirectory() as work:
        results, wrong = asyncio.run(run(options, pathlib.Path(work)))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    for line in wrong:
        print(f"FAILED: {line}", file=sys.stderr)
    sys.exit(1 if wrong else print("all properties hold"))


if __name__ == "__main__":
    main()
