"""More requests than the machine can serve: what it completes, what it refuses, and how long what it admits takes."""

import asyncio
import collections
import random
import time

import aiohttp

from traffic import words

# Numbers of clients that send one request after the other, to find the largest goodput.
CLIENTS = (8, 16, 32, 64)
FACTOR = 10


def request(chance):
    return {
        "messages": [{"role": "user", "content": words(chance, 60)}], "temperature": 1.0, "seed": chance.randrange(1 << 31),
        "max_tokens": chance.choice([32, 64, 96]),
    }


class Measurement:
    """What is answered in a span of time.

    The span begins with the `skipped`th complete answer, when as many answers end as begin, and takes `seconds`.
    """

    def __init__(self, seconds, skipped):
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

    async def ask(self, session, base, body):
        began = time.monotonic()
        is_counted = lambda at: self.since <= at < self.until
        self.sent += is_counted(began)
        try:
            async with session.post(f"{base}/v1/chat/completions", json=body) as answer:
                status = answer.status
                found = await answer.json() if status == 200 else await answer.text()
                retry_after = answer.headers.get("retry-after", "")
        except (aiohttp.ClientError, TimeoutError) as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            return
        ended = time.monotonic()
        if status not in (200, 429):
            self.failures.append(f"{status} {found[:300]}")
        if status == 429:
            self.without_retry_after += not (retry_after.isdigit() and int(retry_after) > 0)
        self.completed += status == 200
        if self.completed == self.skipped and status == 200:
            self.since, self.until = ended, ended + self.seconds
        elif is_counted(ended):
            self.statuses[status] += 1
            if status == 200:
                self.tokens += found["usage"]["completion_tokens"]
                self.latencies.append(ended - began)
            else:
                self.refusals.append(ended - began)

    @property
    def goodput(self):
        """Tokens of complete answers in a second."""
        return self.tokens / self.seconds

    def latency(self, share, values=None):
        values = sorted(self.latencies if values is None else values)
        return values[min(int(len(values) * share), len(values) - 1)] if values else float("nan")


async def closed_loop(session, base, clients, seconds, seed):
    """Clients that send their next request when the last one is answered."""
    measured = Measurement(seconds, clients)

    async def client(number):
        chance = random.Random(seed * 1000 + number)
        while not measured.is_over():
            await measured.ask(session, base, request(chance))

    await asyncio.gather(*(client(number) for number in range(clients)))
    return measured


async def open_loop(session, base, rate, seconds, skipped, seed):
    """Requests at random times, so many in a second, whatever is answered."""
    measured = Measurement(seconds, skipped)
    chance = random.Random(seed)
    tasks = set()
    due = time.monotonic()
    while not measured.is_over():
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = asyncio.create_task(measured.ask(session, base, request(chance)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        due += chance.expovariate(rate)
    await asyncio.gather(*tasks)
    return measured


async def run(base, seconds, sequences, seed):
    """Measures, prints and returns the results and what is wrong with them.

    `sequences`: answers that run or wait at most at a time, which bounds the latency of admitted requests.
    """
    timeout = aiohttp.ClientTimeout(total=300)
    results, wrong = {"goodput, tokens/s": {}}, []
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        best, rate, mean = 0.0, 0.0, 0.0
        for clients in CLIENTS:
            measured = await closed_loop(session, base, clients, seconds, seed)
            wrong += measured.failures[:3]
            completed = measured.statuses[200]
            print(f"{clients:3} clients: {measured.goodput:7.1f} tokens/s, {completed / measured.seconds:6.2f} answers/s, "
                  f"p50 {measured.latency(0.5):.2f} s, p99 {measured.latency(0.99):.2f} s", flush=True)
            results["goodput, tokens/s"][f"{clients} clients"] = measured.goodput
            if measured.goodput > best:
                best, rate, mean = measured.goodput, completed / measured.seconds, measured.tokens / max(completed, 1)
        measured = await open_loop(session, base, FACTOR * rate, 2 * seconds, sequences, seed)
    offered, admitted = measured.sent / measured.seconds, measured.statuses[200]
    # Each admitted answer is behind at most `sequences` others; half as much again for chance.
    bound = 1.5 * sequences * mean / best
    results |= {
        "best goodput, tokens/s": best, "offered, requests/s": offered, "capacity, requests/s": rate,
        "goodput under overload, tokens/s": measured.goodput, "share of the best goodput": measured.goodput / best,
        "admitted": admitted, "refused with 429": measured.statuses[429],
        "latency of admitted, s": {"p50": measured.latency(0.5), "p99": measured.latency(0.99), "bound": bound},
        "latency of refusals, s": {"p50": measured.latency(0.5, measured.refusals), "p99": measured.latency(0.99, measured.refusals)},
    }
    refusals = [1000 * measured.latency(share, measured.refusals) for share in (0.5, 0.99)]
    print(f"overload: {offered:.1f} requests/s offered ({offered / rate:.1f} times the capacity of {rate:.2f}), {admitted} admitted, "
          f"{measured.statuses[429]} refused\n"
          f"goodput {measured.goodput:.1f} tokens/s, {measured.goodput / best:.1%} of {best:.1f}\n"
          f"latency of admitted p50 {measured.latency(0.5):.2f} s, p99 {measured.latency(0.99):.2f} s (bound {bound:.2f} s), "
          f"of refusals p50 {refusals[0]:.1f} ms, p99 {refusals[1]:.1f} ms", flush=True)
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
