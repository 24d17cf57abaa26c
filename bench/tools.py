#!/usr/bin/env python3
"""Calls of functions side by side with llama.cpp's server: the Berkeley Function Calling Leaderboard (bfcl-eval) with Qwen2.5-Coder-1.5B.

Both servers load the same GGUF file and get the same chats with `tools`, `tool_choice: auto` and temperature 0, one server after the other.
Two scores, both by bfcl-eval's checkers:
  served   what a client gets: the calls in `tool_calls`
  written  what the model wrote: also the calls in the text of an answer, found in the same way for both servers

Answers are kept in the cache, so an interrupted run continues, and a larger one asks only for what is new. Prints a table, writes
bench/results/tools.json, and fails if ours is below llama.cpp's with 95 % confidence: `served` over all categories, `written` in any.
`served` of irrelevance alone does not fail it: a server that finds no call at all is always right there.
"""

import argparse, collections, concurrent.futures, contextlib, hashlib, importlib.metadata, json, os, pathlib, signal, sys, time

import numpy as np
import openai

import tools_bfcl
from serve_processes import SERVER, Model, Sizes, ours, theirs

RESULTS = pathlib.Path(__file__).parent / "results/tools.json"
CACHE = pathlib.Path(os.environ["ATHANOR_CACHE"]) / "bfcl"
MODEL = Model("Qwen2.5-Coder-1.5B", "qwen2.5-coder-1.5b", ())
SETTINGS = {"tool_choice": "auto", "temperature": 0, "max_tokens": 512}
CONTEXT = 4096
# Of one answer. An idle machine needs some seconds.
SECONDS = 3600
SCORES = {"served": tools_bfcl.served_calls, "written": tools_bfcl.all_calls}
RESAMPLES = 10_000


def digest(file):
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


class Answers:
    """The answers of one server, kept in a file whose name depends on the program and its settings."""

    def __init__(self, server, program, options):
        settings = {"program": program, "model": MODEL.gguf.name, "streams": options.streams, **SETTINGS}
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        CACHE.mkdir(parents=True, exist_ok=True)
        self.server, self.file, self.by_id = server, CACHE / f"{server}-{key}.jsonl", {}
        for line in self.file.read_text().splitlines() if self.file.exists() else []:
            # The last line of an interrupted run may be cut off.
            if line.endswith("}"):
                self.by_id.update([json.loads(line).values()])

    def ask(self, cases, base, model, streams):
        """Asks for the cases that have no answer yet."""
        client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=SECONDS)
        started, count = time.monotonic(), len(cases)

        def one(case):
            try:
                return case, client.chat.completions.create(model=model, **case.request(), **SETTINGS).model_dump()
            except openai.APIStatusError as error:
                # A busy or slow server has not answered: the next run asks it again.
                if error.status_code in (429, 503, 504):
                    raise
                return case, {"error": f"{error.status_code}: {error.message}"}

        with contextlib.ExitStack() as stack:
            kept = stack.enter_context(open(self.file, "a"))
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(streams))
            # Closed before the pool, so that an interrupted run waits for no request that has not begun.
            answers = stack.enter_context(contextlib.closing(pool.map(one, cases)))
            for done, (case, answer) in enumerate(answers, 1):
                self.by_id[case.id] = answer
                kept.write(json.dumps({"id": case.id, "answer": answer}) + "\n")
                kept.flush()
                print(f"tools: {self.server} {done}/{count} {case.id}, {time.monotonic() - started:.0f} s", file=sys.stderr)

    def missing(self, cases):
        return [case for case in cases if case.id not in self.by_id]

    def error(self, case, calls):
        """What is wrong with the answer to a case, None if it is right. `calls`: the calls of an answer."""
        answer = self.by_id[case.id]
        # No call is right for some cases, but a refused request is not.
        return answer["error"] if "error" in answer else case.check(calls(answer))

    def kind(self, case):
        """How the server answered a case."""
        answer = self.by_id[case.id]
        if "error" in answer:
            return "error"
        choice = answer["choices"][0]
        if choice["message"].get("tool_calls"):
            return "tool_calls"
        if tools_bfcl.calls_in_text(choice["message"].get("content") or ""):
            return "call in the text"
        return "cut off" if choice["finish_reason"] == "length" else "text"


def same_prompts(mine, other, cases):
    """Number of cases whose prompt has the same number of tokens in both servers, and number of cases that both answered."""
    pairs = [(mine.by_id[case.id], other.by_id[case.id]) for case in cases]
    answered = [(a, b) for a, b in pairs if "usage" in a and "usage" in b]
    return sum(a["usage"]["prompt_tokens"] == b["usage"]["prompt_tokens"] for a, b in answered), len(answered)


def interval(differences):
    """95 % interval of the mean of paired differences, by bootstrap within each category; each category has the same weight."""
    generator = np.random.default_rng(0)
    means = [generator.choice(part, (RESAMPLES, len(part))).mean(axis=1) for part in map(np.asarray, differences)]
    return [round(float(bound), 4) for bound in np.percentile(np.mean(means, axis=0), [2.5, 97.5])]


def compared(mine, other, cases):
    """Entries of the results: accuracy of both by score and category, and over all categories."""
    entries = []
    for score, calls in SCORES.items():
        right = {case.id: [float(server.error(case, calls) is None) for server in (mine, other)] for case in cases}
        by_category = {name: np.array([right[case.id] for case in cases if case.category == name]) for name in tools_bfcl.CATEGORIES}
        groups = {name: [pairs] for name, pairs in by_category.items()} | {"all": list(by_category.values())}
        for category, parts in groups.items():
            accuracy = np.mean([pairs.mean(axis=0) for pairs in parts], axis=0)
            differences = [pairs[:, 0] - pairs[:, 1] for pairs in parts]
            entries.append({
                "score": score, "category": category, "cases": sum(map(len, parts)),
                "ours": round(float(accuracy[0]), 4), "llama.cpp": round(float(accuracy[1]), 4),
                "difference": round(float(accuracy[0] - accuracy[1]), 4), "interval": interval(differences),
            })
    return entries


def only_theirs(mine, other, cases):
    """Cases that only llama.cpp's server has right, by score, with what is wrong with our answer."""
    return {
        score: {case.id: error for case in cases if (error := mine.error(case, calls)) and other.error(case, calls) is None}
        for score, calls in SCORES.items()
    }


def show(entries, kinds, wrong):
    print(f"\n{'score':8} {'category':12} {'cases':>5} {'ours':>7} {'llama.cpp':>9} {'difference':>10}  95 % interval")
    for entry in entries:
        low, high = entry["interval"]
        note = "  SIGNIFICANTLY BELOW" if high < 0 else "  below" if entry["difference"] < 0 else ""
        print(f"{entry['score']:8} {entry['category']:12} {entry['cases']:5} {entry['ours']:7.1%} {entry['llama.cpp']:9.1%} "
              f"{entry['difference']:+10.1%}  {low:+.1%} to {high:+.1%}{note}")
    for server, counts in kinds.items():
        for category, by_kind in counts.items():
            print(f"answers of {server}, {category}: " + ", ".join(f"{count} {kind}" for kind, count in by_kind.items()))
    for score, errors in wrong.items():
        for name, error in errors.items():
            print(f"only llama.cpp is right ({score}): {name}: {error[:300]}")
    below = [f"{entry['category']} ({entry['score']})" for entry in entries if entry["difference"] < 0]
    print("ours is below llama.cpp in: " + (", ".join(below) or "nothing"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=40, help="cases of each category (default: %(default)s)")
    parser.add_argument("--weights", default="Int4", choices=["Int4", "Int8"], help="weights of our server (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=2, help="requests at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of llama.cpp's server (default: one a core, slow next to other work)")
    parser.add_argument("--only", choices=["ours", "llama.cpp"], help="asks one server and compares nothing")
    parser.add_argument("--no-results", action="store_true", help="leaves bench/results/tools.json as it is")
    options = parser.parse_args()

    # As an exception, so that the servers are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    drawn = {name: tools_bfcl.cases(name, options.cases) for name in tools_bfcl.CATEGORIES}
    # An interrupted run has about as many cases of each category.
    cases = [drawn[name][at] for at in range(options.cases) for name in drawn if at < len(drawn[name])]
    sizes = Sizes(options.streams, CONTEXT)
    peer = f"xllamacpp {importlib.metadata.version('xllamacpp')}"
    servers = {}
    if options.only != "llama.cpp":
        servers["ours"] = f"{digest(SERVER)} {options.weights}", lambda: ours(MODEL, options.weights, sizes, {"maxRequestSeconds": SECONDS})
    if options.only != "ours":
        servers["llama.cpp"] = peer, lambda: theirs(MODEL.gguf, "enabled", sizes, options.threads)
    answers = {}
    for name, (program, start) in servers.items():
        answers[name] = Answers(name, program, options)
        if missing := answers[name].missing(cases):
            with start() as (base, model, _):
                answers[name].ask(missing, base, model, options.streams)
    if options.only:
        return 0

    pair = answers["ours"], answers["llama.cpp"]
    entries, wrong = compared(*pair, cases), only_theirs(*pair, cases)
    count = lambda server, category: collections.Counter(server.kind(case) for case in cases if case.category == category)
    kinds = {server.server: {category: dict(count(server, category)) for category in drawn} for server in pair}
    same, both = same_prompts(*pair, cases)
    show(entries, kinds, wrong)
    print(f"prompts with the same number of tokens: {same} of {both}")
    if not options.no_results:
        about = {"model": MODEL.gguf.name, "weights": options.weights, "peer": peer, "streams": options.streams, **SETTINGS}
        results = {**about, "accuracy": entries, "same_prompt_tokens": [same, both], "answers": kinds, "only_llama.cpp_right": wrong}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    failed = any(entry["interval"][1] < 0 for entry in entries if entry["score"] == "written" or entry["category"] == "all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
