"""Answers of trained classifiers to the test rows, by athanor-server, and intervals of differences by a paired bootstrap.

All models answer the same texts, so a resample takes the same texts for both sides of a difference: what is hard for both does not
widen the interval. Seeds are resampled too, since another seed trains another model.
"""

import json
import pathlib
import random
import sys
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests/clients"))
import local

BATCH = 64
RESAMPLES = 10_000


def correct(artifact, name, rows):
    """Whether the model's label is right, by row; `rows`: (text, label). Kept next to the artifact, since answers do not change."""
    kept = artifact.parent / "correct.json"
    key = [len(rows), name]
    if kept.exists() and (found := json.loads(kept.read_text()))["key"] == key:
        return found["correct"]
    right = []
    with local.server(artifact.parent, name, f"file://{artifact}", log=artifact.parent / "server.log") as server:
        for begin in range(0, len(rows), BATCH):
            part = rows[begin : begin + BATCH]
            body = json.dumps({"model": name, "input": [text for text, _ in part]}).encode()
            request = urllib.request.Request(f"{server.base}/v1/classify", body, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=600) as answer:
                data = json.load(answer)["data"]
            right += [one["label"] == label for one, (_, label) in zip(data, part, strict=True)]
    kept.write_text(json.dumps({"key": key, "correct": right}))
    return right


def interval(left, right, seed=0):
    """The mean difference in percentage points and its 95 % interval. Each side: the correct rows of each seed."""
    generator = random.Random(seed)
    count = len(left[0])
    differences = []
    for _ in range(RESAMPLES // 10):
        ours, theirs = generator.choices(left, k=len(left)), generator.choices(right, k=len(right))
        # Sums over seeds by row, so that rows are drawn once for all of them.
        by_row = [sum(run[i] for run in ours) / len(ours) - sum(run[i] for run in theirs) / len(theirs) for i in range(count)]
        differences += [sum(generator.choices(by_row, k=count)) / count * 100 for _ in range(10)]
    differences.sort()
    mean = lambda side: sum(sum(run) for run in side) / (len(side) * count)
    return (mean(left) - mean(right)) * 100, differences[len(differences) // 40], differences[-len(differences) // 40 - 1]
