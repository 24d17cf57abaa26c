"""More requests than the machine can serve: what it completes, what it refuses, and how long what it admits takes."""

import asyncio
import collections
import json
import os
import pathlib
import random
import time

import local
from connections import Connections, Lost
from traffic import words

# Numbers of clients that send one request after the other, to find the largest goodput.
CLIENTS = (8, 16, 32, 64)
FACTOR = 10
# Longest time until an answer, in seconds.
TIMEOUT = 300
# Added to the nice value of this process: clients are not on the server's machine, and should not take its threads' places.
NICER = 5


def request(chance):
    body = {
        "messages": [{"role": "user", "content": words(chance, 60)}], "temperature": 1.0, "seed": chance.randrange(1 << 31),
        "max_tokens": chance.choice([32, 64, 96]),
    }
    return json.dumps(body).encode()


class Processors:
    """Shares of the machine's processors, in a span of time: those of our processes, of this one (`clients`), and of the rest."""

    def __init__(self, processes):
        self.processes = processes
        self.began = self.found = None

    def read(self):
        seconds = {process.name: process.cpu_seconds() for process in self.processes}
        # user, nice, system, idle, iowait, irq, softirq, steal; guests are part of user.
        ticks = [int(field) for field in pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        total = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), seconds | {"clients": local.cpu_seconds("self"), "all": total}

    def begin(self):
        self.began = self.read()

    def end(self):
        self.found = self.read()

    def shares(self):
        if not (self.began and self.found):
            return {}
        (since, before), (until, after) = self.began, self.found
        available = (until - since) * os.cpu_count()
        shares = {name: (after[name] - before[name]) / available for name in after}
        total = shares.pop("all")
        return shares | {"others": max(total - sum(shares.values()), 0.0), "idle": max(1 - total, 0.0)}

    def __str__(self):
        return "processors: " + ", ".join(f"{name} {share:.1%}" for name, share in self.shares().items())


class Measurement:
    """What is answered in a span of time, and who took the processors meanwhile.

    The span begins with the `skipped`th complete answer, when as many answers end as begin, and takes `seconds`.
    """

    def __init__(self, processes, seconds, skipped):
        self.processors = Processors(processes)
        self.seconds = seconds
        self.skipped = skipped
        self.completed = 0
        self.since = self.until = float("inf")
        self.statuses = collections.Counter()
        self.latencies = []
        self.refusals = []
        self.tokens = 0
        self.without_retry_after = 0
        self.sent = 0
        self.failures = []

    def is_over(self):
        return time.monotonic() >= self.until or len(self.failures) > 20

    async def ask(self, connections, body):
        """Sends a request. Returns the seconds after which the server wants to see it again; 0 if it was not refused."""
        began = time.monotonic()
        is_counted = lambda at: self.since <= at < self.until
        self.sent += is_counted(began)
        try:
            answer = await connections.post("/v1/chat/completions", body, TIMEOUT)
        except (Lost, OSError) as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            return 0
        ended, status, retry_after = time.monotonic(), answer.status, answer.header("retry-after")
        if status not in (200, 429):
            self.failures.append(f"{status} {answer.body[:300]!r}")
        later = int(retry_after) if status == 429 and retry_after.isdigit() else 0
        self.without_retry_after += status == 429 and later == 0
        self.completed += status == 200
        if self.completed == self.skipped and status == 200:
            self.since, self.until = ended, ended + self.seconds
            self.processors.begin()
            # The event loop's clock is the monotonic one.
            asyncio.get_running_loop().call_at(self.until, self.processors.end)
        elif is_counted(ended):
            self.statuses[status] += 1
            if status == 200:
                self.tokens += json.loads(answer.body)["usage"]["completion_tokens"]
                self.latencies.append(ended - began)
            else:
                self.refusals.append(ended - began)
        return later

    @property
    def goodput(self):
        """Tokens of complete answers in a second."""
        return self.tokens / self.seconds

    def latency(self, share, values=None):
        values = sorted(self.latencies if values is None else values)
        return values[min(int(len(values) * share), len(values) - 1)] if values else float("nan")


async def closed_loop(connections, processes, clients, seconds, seed):
    """Clients that send their next request when the last one is answered, or at the time that a refusal says."""
    measured = Measurement(processes, seconds, clients)

    async def client(number):
        chance = random.Random(seed * 1000 + number)
        while not measured.is_over():
            await asyncio.sleep(await measured.ask(connections, request(chance)))

    await asyncio.gather(*(client(number) for number in range(clients)))
    return measured


async def open_loop(connections, processes, rate, seconds, skipped, seed):
    """Requests at random times, so many in a second, whatever is answered."""
    measured = Measurement(processes, seconds, skipped)
    chance = random.Random(seed)
    tasks = set()
    due = time.monotonic()
    while not measured.is_over():
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = asyncio.create_task(measured.ask(connections, request(chance)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        due += chance.expovariate(rate)
    await asyncio.gather(*tasks)
    return measured


async def run(base, processes, seconds, running, wait, seed):
    """Measures, prints and returns the results and what is wrong with them.

    `processes`: the router and the servers; `running`: answers that run at a time; `wait`: longest expected wait in seconds. The last
    two bound the latency of admitted requests.
    """
    os.nice(NICER)
    results, wrong = {"goodput, tokens/s": {}}, []
    connections = Connections(base)
    best, rate, mean = 0.0, 0.0, 0.0
    for clients in CLIENTS:
        measured = await closed_loop(connections, processes, clients, seconds, seed)
        wrong += measured.failures[:3]
        completed = measured.statuses[200]
        print(f"{clients:3} clients: {measured.goodput:7.1f} tokens/s, {completed / measured.seconds:6.2f} answers/s, "
              f"p50 {measured.latency(0.5):.2f} s, p99 {measured.latency(0.99):.2f} s\n    {measured.processors}", flush=True)
        results["goodput, tokens/s"][f"{clients} clients"] = measured.goodput
        if measured.goodput > best:
            best, rate, mean = measured.goodput, completed / measured.seconds, measured.tokens / max(completed, 1)
            results["processors at the best goodput"] = measured.processors.shares()
    # By then the queues are full.
    skipped = running + int(wait * rate)
    measured = await open_loop(connections, processes, FACTOR * rate, 2 * seconds, skipped, seed)
    connections.close()
    offered, admitted = measured.sent / measured.seconds, measured.statuses[200]
    # The longest expected wait, and the time in which as many answers as run end; half as much again for chance.
    bound = 1.5 * (wait + running * mean / best)
    results |= {
        "best goodput, tokens/s": best, "offered, requests/s": offered, "capacity, requests/s": rate,
        "goodput under overload, tokens/s": measured.goodput, "share of the best goodput": measured.goodput / best,
        "admitted": admitted, "refused with 429": measured.statuses[429],
        "latency of admitted, s": {"p50": measured.latency(0.5), "p99": measured.latency(0.99), "bound": bound},
        "processors under overload": measured.processors.shares(),
        "latency of refusals, s": {"p50": measured.latency(0.5, measured.refusals), "p99": measured.latency(0.99, measured.refusals)},
    }
    refusals = [1000 * measured.latency(share, measured.refusals) for share in (0.5, 0.99)]
    print(f"overload: {offered:.1f} requests/s offered ({offered / rate:.1f} times the capacity of {rate:.2f}), {admitted} admitted, "
          f"{measured.statuses[429]} refused\n"
          f"goodput {measured.goodput:.1f} tokens/s, {measured.goodput / best:.1%} of {best:.1f}\n"
          f"latency of admitted p50 {measured.latency(0.5):.2f} s, p99 {measured.latency(0.99):.2f} s (bound {bound:.2f} s), "
          f"of refusals p50 {refusals[0]:.1f} ms, p99 {refusals[1]:.1f} ms\n{measured.processors}", flush=True)
    wrong += measured.failures[:5]
    if measured.without_retry_after:
        wrong.append(f"{measured.without_retry_after} answers with 429 have no Retry-After")
    if measured.statuses[429] == 0:
        wrong.append("no request was refused: this was no overload")
    if offered < 0.9 * FACTOR * rate:
        wrong.append(f"only {offered:.1f} requests/s could be offered")
    if measured.goodput < 0.9 * best:
        wrong.append(f"goodput under overload is {measured.goodput / best:.1%} of the best, less than 90 %")
    if not measured.latency(0.99) <= bound:
        wrong.append(f"the 99th percentile of admitted requests is {measured.latency(0.99):.2f} s, more than {bound:.2f} s")
    return results, wrong
