"""Requests of the soak: well-formed ones of mixed lengths, ones whose client goes away, and malformed ones, with what they must lead to."""

import asyncio
import collections
import contextlib
import json
import random
import time

import aiohttp

WORDS = "the bank will lend and the borrower will repay the principal with interest on the last day of each quarter".split()
PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "minimum": 0}},
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
JSON = {"content-type": "application/json"}
# Name, path, headers, body, status.
MALFORMED = [
    ("not JSON", "/v1/chat/completions", JSON, b'{"messages": [', 400),
    ("not UTF-8", "/v1/chat/completions", JSON, b'{"messages": [{"role": "user", "content": "\xff"}]}', 400),
    ("a list", "/v1/chat/completions", JSON, b"[1]", 400),
    ("no messages", "/v1/chat/completions", JSON, b"{}", 400),
    ("messages of numbers", "/v1/chat/completions", JSON, b'{"messages": [1]}', 400),
    ("a role that does not exist", "/v1/chat/completions", JSON, b'{"messages": [{"role": "robot", "content": "x"}]}', 400),
    ("a negative limit", "/v1/chat/completions", JSON, b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}', 400),
    ("an unknown field", "/v1/chat/completions", JSON, b'{"messages": [{"role": "user", "content": "x"}], "colour": "red"}', 400),
    ("a schema that is none", "/v1/chat/completions", JSON, json.dumps({
        "messages": [{"role": "user", "content": "x"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "thing"}}},
    }).encode(), 400),
    ("a deep nest", "/v1/chat/completions", JSON, b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400),
    ("token ids that do not exist", "/v1/completions", JSON, b'{"prompt": [999999999], "max_tokens": 2}', 400),
    ("a prompt that is too long", "/v1/completions", JSON, json.dumps({"prompt": "word " * 20000, "max_tokens": 2}).encode(), 400),
    ("another content type", "/v1/chat/completions", {"content-type": "text/plain"}, b"hello", 415),
    ("a body that is too large", "/v1/chat/completions", JSON, b" " * (3 << 20), 413),
    ("another path", "/v1/nothing", JSON, b"{}", 404),
]


def words(chance, most):
    """A text of up to so many words, more often a short one."""
    count = int(most ** chance.random())
    start = chance.randrange(1000)
    return f"{start} " + " ".join(WORDS[(start * 7 + place) % len(WORDS)] for place in range(count))


def well_formed(chance):
    """Path and body of a request, with its number of choices."""
    kind = chance.choice(["chat", "chat", "completion", "completion", "json"])
    body = {"max_tokens": chance.choice([4, 16, 48, 120]), "temperature": chance.choice([0, 0.7, 1.2]), "seed": chance.randrange(1 << 31)}
    if kind == "completion":
        prompts = [words(chance, 250) for _ in range(chance.choice([1, 1, 2]))]
        return "/v1/completions", body | {"prompt": prompts, "logprobs": chance.choice([None, 2])}, len(prompts)
    messages = [{"role": "user", "content": words(chance, 250)}]
    if kind == "json":
        schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE, "strict": True}}
        return "/v1/chat/completions", body | {"messages": messages, "response_format": schema}, 1
    choices = chance.choice([1, 1, 1, 2])
    return "/v1/chat/completions", body | {"messages": messages, "n": choices}, choices


class Soak:
    """Clients of one address, and what became of their requests."""

    def __init__(self, base, seed):
        self.base = base
        self.seed = seed
        self.counts = collections.Counter()
        self.revisions = collections.Counter()
        self.failures = []
        self.tokens = 0

    def fail(self, what):
        self.counts["failed"] += 1
        if len(self.failures) < 20:
            self.failures.append(what)

    async def run(self, clients, seconds):
        until = time.monotonic() + seconds
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(self.client(session, number, until) for number in range(clients)))

    async def client(self, session, number, until):
        chance = random.Random(self.seed * 1000 + number)
        while time.monotonic() < until:
            if chance.random() < 0.15:
                await self.malformed(session, chance)
                continue
            path, body, choices = well_formed(chance)
            goes = chance.random() < 1 / 3
            body["stream"] = chance.random() < 0.6
            # At once, in the middle, or (if the answer is whole by then) not at all.
            patience = chance.choice([0.003, 0.02, 0.1, 0.4]) if goes else None
            try:
                await asyncio.wait_for(self.whole(session, path, body, choices), patience)
            except TimeoutError:
                if patience is None:
                    self.fail(f"{path}: no answer in 120 s")
                else:
                    self.counts["went away"] += 1
            except (aiohttp.ClientError, ValueError, KeyError) as error:
                self.fail(f"{path}: {type(error).__name__}: {error}")

    async def whole(self, session, path, body, choices):
        """Sends a request and checks its whole answer. A cancellation closes the connection."""
        async with session.post(self.base + path, json=body) as answer:
            if answer.status != 200:
                self.fail(f"{path}: {answer.status} {(await answer.text())[:300]}")
                return
            self.revisions[answer.headers.get("x-athanor-revision")] += 1
            texts, reasons, done = collections.Counter(), {}, not body["stream"]
            parts = collections.defaultdict(str)
            if body["stream"]:
                async for line in answer.content:
                    if not line.startswith(b"data: "):
                        continue
                    if line.strip() == b"data: [DONE]":
                        done = True
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        self.fail(f"{path}: in a stream: {event['error']}")
                        return
                    found = event["choices"]
                    for choice in found:
                        parts[choice["index"]] += choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
                        texts[choice["index"]] += 1
                        reasons[choice["index"]] = choice["finish_reason"] or reasons.get(choice["index"])
            else:
                whole = await answer.json()
                self.tokens += whole["usage"]["completion_tokens"]
                for choice in whole["choices"]:
                    parts[choice["index"]] = choice["message"]["content"] if "message" in choice else choice["text"]
                    reasons[choice["index"]] = choice["finish_reason"]
        if not done or set(reasons) != set(range(choices)) or not set(reasons.values()) <= {"stop", "length"}:
            self.fail(f"{path}: an incomplete answer: done {done}, {reasons} of {choices} choices")
            return
        if "response_format" in body and reasons[0] == "stop":
            value = json.loads(parts[0])
            if set(value) != set(PLACE["required"]) or value["unit"] not in ("C", "F") or len(value["city"]) > 12 or value["days"] < 0:
                self.fail(f"{path}: JSON that its schema does not allow: {parts[0]!r}")
                return
            self.counts["JSON of a schema"] += 1
        self.counts["streams" if body["stream"] else "whole answers"] += 1

    async def malformed(self, session, chance):
        if chance.random() < 0.2:
            await self.cut(chance)
            return
        name, path, headers, body, status = chance.choice(MALFORMED)
        try:
            async with session.post(self.base + path, data=body, headers=headers) as answer:
                await answer.read()
                found = answer.status
        except aiohttp.ClientError as error:
            found = f"{type(error).__name__}: {error}"
        if found == status:
            self.counts["malformed"] += 1
        else:
            self.fail(f"malformed ({name}): {found}, expected {status}")

    async def cut(self, chance):
        """A head or a body that ends before its length, and bytes that are no HTTP: the connection is closed in their middle."""
        host, port = self.base.removeprefix("http://").split(":")
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n"
        sent = chance.choice([head + b'{"messages": [', head[:40], b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"GET\r\n\r\n"])
        with contextlib.suppress(ConnectionError):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(sent)
            await writer.drain()
            await asyncio.sleep(chance.random() * 0.05)
            writer.close()
            await writer.wait_closed()
        self.counts["cut connections"] += 1
