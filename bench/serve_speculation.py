"""Tokens a second with and without speculation, of answers that repeat their prompt and of ordinary conversations.

Imported by bench/serve.py. Two servers with `Int4` run at the same time and are asked in turns, so that both have the same machine. Their
answers must be the same.
"""

import concurrent.futures, statistics, time

import requests

from serve_processes import Sizes, ours

TOKENS, STREAMS = 160, (1, 4, 16)
CODE = """def read_rows(path, limit):
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number >= limit:
                break
            fields = line.rstrip("\\n").split(",")
            if len(fields) != 3:
                raise ValueError(f"{path}, line {number + 1}: {len(fields)} fields")
            name, amount, currency = fields
            rows.append({"name": name, "amount": float(amount), "currency": currency})
    return rows
"""
QUESTIONS = (
    "Why is the sky blue?", "How does a bank earn money?", "Write a short letter to a neighbour about noise at night.",
    "What should I look at when I buy a used bicycle?", "Explain what a database index is.", "Tell me about the history of tea.",
    "How can I learn to cook?", "What is the difference between weather and climate?", "Plan a weekend in the mountains.",
    "Why do cats purr?", "Describe a busy market in the morning.", "What makes a good teacher?", "How do ships float?",
    "Give me ideas for a birthday party.", "What is inflation?", "Tell a story about a lighthouse keeper.",
)
# Ratios with to without speculation that `make bench-serve` aims at, by kind.
TARGETS = {"repeats its prompt": 1.5, "conversation": 0.97}


def body(kind, number):
    """A request. Each number has another prompt, so that no prefix is found in a cache."""
    if kind == "repeats its prompt":
        text = f"Write this code again with `rows` renamed to `rows_{number}`. Answer with the code only.\n```python\n{CODE}```"
        return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": TOKENS}
    text = f"({number}) {QUESTIONS[number % len(QUESTIONS)]}"
    return {"messages": [{"role": "user", "content": text}], "temperature": 0.7, "seed": number, "max_tokens": TOKENS}


def ask(base, model, kind, number):
    """Text and number of tokens of an answer."""
    answer = requests.post(f"{base}/v1/chat/completions", json={"model": model, **body(kind, number)}, timeout=600)
    answer.raise_for_status()
    answer = answer.json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]


def measure(base, model, kind, streams, first):
    """Answers, and tokens a second of all of them. Each stream asks twice."""
    numbers = range(first, first + 2 * streams)
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(streams) as pool:
        answers = list(pool.map(lambda number: ask(base, model, kind, number), numbers))
    return [text for text, _ in answers], sum(tokens for _, tokens in answers) / (time.monotonic() - began)


def accepted(base):
    """Proposed tokens so far, and those that were right."""
    lines = requests.get(f"{base}/metrics", timeout=60).text.splitlines()
    names = ("vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total")
    return [next((int(float(line.rsplit(" ", 1)[1])) for line in lines if line.startswith(name + "{")), 0) for name in names]


def run(model, _files, options):
    """Entries for bench/results/serve.json."""
    streams = (1, 4) if options.quick else STREAMS
    sizes = Sizes(max(streams), 1024)
    results = []
    with ours(model, "Int4", sizes) as (auto, name, _), ours(model, "Int4", sizes, speculation="Disabled") as (off, _, _):
        for kind in TARGETS:
            for count in streams:
                speeds = {auto: [], off: []}
                before = accepted(auto)
                for turn in range(options.runs):
                    texts = {}
                    for base in (auto, off) if turn % 2 == 0 else (off, auto):
                        texts[base], speed = measure(base, name, kind, count, 10_000 * count + 1_000 * turn)
                        speeds[base].append(speed)
                    assert texts[auto] == texts[off], f"other answers with speculation: {kind}, {count} streams"
                proposed, right = (after - was for after, was in zip(accepted(auto), before, strict=True))
                ratio = statistics.median(a / b for a, b in zip(speeds[auto], speeds[off], strict=True))
                what = f"{kind}, {count} stream{'s' * (count > 1)}"
                print(f"{model.name}, {what}: {statistics.median(speeds[auto]):.1f} with, {statistics.median(speeds[off]):.1f} without, "
                      f"ratio {ratio:.2f}; {right} of {proposed} proposed tokens were right", flush=True)
                results.append({
                    "name": f"{model.name}, {what}", "ours": statistics.median(speeds[auto]), "peer": statistics.median(speeds[off]),
                    "ours_name": "athanor Int4", "peer_name": "athanor Int4, speculation Disabled", "unit": "tokens/s", "ratio": ratio,
                    "target": TARGETS[kind], "proposed": proposed, "right": right,
                    "runs": {"Auto": speeds[auto], "Disabled": speeds[off]},
                })
    return results
