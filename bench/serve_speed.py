"""Tokens a second of language models at several numbers of streams, prefill of long prompts, memory and time to start.

Imported by bench/serve.py.
"""

import concurrent.futures, statistics, time

from serve_processes import Sizes, ask, memory, ours, theirs

TOKENS, STREAMS, PROMPTS = 64, (1, 4, 16, 64), (512, 2048)
# Ratios of ours to llama.cpp's best that `make bench-serve` aims at.
TARGETS = {"1 stream, tokens/s": 1.1, "16 streams, tokens/s": 3, "prefill of 512, tokens/s": 3, "prefill of 2048, tokens/s": 3}


def measure(base, model, turn, streams, prompts):
    """Tokens a second at several numbers of streams, and of long prompts."""
    ask(base, model, 7000 + turn, 20, 8)
    found = {}
    for count in streams:
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            first = 100 * count + 10_000 * turn
            done = list(pool.map(lambda number: ask(base, model, first + number, 8, TOKENS)[1], range(count if count > 1 else 3)))
        found[f"{count} stream{'s' * (count > 1)}, tokens/s"] = sum(done) / (time.monotonic() - began)
    for length in prompts:
        began = time.monotonic()
        tokens, _ = ask(base, model, 9000 + turn + length, length - 4, 1)
        found[f"prefill of {length}, tokens/s"] = tokens / (time.monotonic() - began)
    return found


def run(model, files, options):
    """Entries for bench/results/serve.json."""
    streams, prompts = ((1, 4), (512,)) if options.quick else (STREAMS, PROMPTS)
    sizes = Sizes(max(streams), max(prompts) + 256)
    servers = {f"athanor {weights}": (ours, (model, weights, sizes)) for weights in ("Auto", "Int8", "Int4")}
    for name, file in files.of(model).items():
        for flash in ("enabled", "disabled"):
            servers[f"llama.cpp {name}, flash attention {flash}"] = (theirs, (file, flash, sizes))
    if options.quick:
        wanted = ("athanor Int4", "llama.cpp Q4_0, flash attention enabled")
        servers = {name: start for name, start in servers.items() if name in wanted}
    found = {}
    for turn in range(options.runs):
        order = list(servers) if turn % 2 == 0 else list(servers)[::-1]
        for name in order:
            start, arguments = servers[name]
            began = time.monotonic()
            with start(*arguments) as (base, served, process):
                ready = time.monotonic() - began
                values = measure(base, served, turn, streams, prompts)
                values |= {"resident memory, MiB": memory(process, "VmRSS"), "peak memory, MiB": memory(process, "VmHWM")}
                values["start to ready, s"] = ready
                for what, value in values.items():
                    found.setdefault(name, {}).setdefault(what, []).append(value)
            row = ", ".join(f"{what} {values[-1]:.1f}" for what, values in found[name].items())
            print(f"turn {turn + 1}, {model.name}, {name}: {row}", flush=True)
    return entries(model, found)


def entries(model, found):
    medians = {name: {what: statistics.median(values) for what, values in rows.items()} for name, rows in found.items()}
    results = []
    print(f"\n{model.name:24} {'ours':>10} {'llama.cpp':>10} {'ratio':>7}")
    for what in next(iter(medians.values())):
        pick = max if what.endswith("tokens/s") else min
        best = lambda whose: pick((name for name in medians if name.startswith(whose)), key=lambda name: medians[name][what])
        own, peer = best("athanor"), best("llama.cpp")
        ratio = medians[own][what] / medians[peer][what]
        print(f"{what:24} {medians[own][what]:10.1f} {medians[peer][what]:10.1f} {ratio:7.2f}  {own}, {peer}")
        results.append({
            "name": f"{model.name}, {what}", "ours": medians[own][what], "peer": medians[peer][what], "ours_name": own,
            "peer_name": peer, "unit": what.split(", ")[-1], "ratio": ratio,
            "target": TARGETS.get(what) if model.name.startswith("SmolLM2") else None,
            "runs": {name: rows[what] for name, rows in found.items()},
        })
    return results
