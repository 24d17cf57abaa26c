"""`make bench-drift`: detection of drift and false alarms, next to evidently on the same streams.

A MiniLM classifier is trained on reviews (amazon, movies). 200 streams of its predictions on texts that it never saw: 100 of reviews
alone; from prediction 4,000 on, 34 of tweets and news, 33 in which their share grows from none to all over 4,000 predictions, and 33 of
reviews in which the share of positive texts differs by 0.3. Texts are drawn with replacement. A fifth of the predictions has feedback
with the true label; a second turn has none.

Athanor: the monitor's window with its default settings, record by record. evidently: DataDriftPreset on label and probability, and its
default test of accuracy on the labelled rows, against the same reference rows; a report for each 500 predictions, as many as the
monitor's window has, and an alarm by either.
"""

import argparse
import concurrent.futures
import csv
import hashlib
import json
import os
import pathlib
import platform
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
CACHE = pathlib.Path(os.environ["ATHANOR_CACHE"])
PROGRAMS = pathlib.Path(os.environ["CARGO_TARGET_DIR"]) / "release"
HOME, AWAY = ["amazon", "movies"], ["tweets", "nyt"]
LENGTH, CHANGE, GROWTH, WINDOW = 12_000, 4_000, 4_000, 500
COUNTS = {"none": 100, "abrupt": 34, "gradual": 33, "prior": 33}
LABELLED = 0.2
LABELS = ["negative", "positive"]


def texts(domain):
    """Texts with their labels."""
    content = (pathlib.Path(os.environ["ATHANOR_DATA"]) / "sentiment" / f"{domain}.txt").read_bytes().decode("utf-8", "replace")
    for line in content.splitlines():
        fields = line.split("\t", 2)
        if len(fields) == 3 and abs(float(fields[1])) >= 0.5 and fields[2].strip():
            yield fields[2].strip(), "positive" if float(fields[1]) > 0 else "negative"


def part(text):
    """Of reviews 60 % train, 10 % are the reference, and streams are drawn from 30 %."""
    percent = int(hashlib.sha256(text.lower().encode()).hexdigest()[:8], 16) % 100
    return "train" if percent < 60 else "reference" if percent < 70 else "stream"


def train(folder):
    """The folder of the classifier."""
    manifest = folder / "drift.json"
    for domain in HOME:
        with open(folder / f"{domain}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows(row for row in texts(domain) if part(row[0]) == "train")
    manifest.write_text(json.dumps({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "drift"},
        "spec": {
            "model": {"from": f"file://{os.environ['ATHANOR_MODELS']}/minilm-l6", "task": "TextClassification"},
            "data": {"sources": [{"name": domain, "uri": f"file://{folder}/{domain}.csv"} for domain in HOME]},
            "hyperparameters": {"epochs": 1, "batchSize": 32, "learningRate": 1e-4},
            "checkpoint": {"everySteps": 0}, "evaluate": {}, "output": {"to": f"file://{folder}/out"},
        },
    }))
    found = lambda: sorted(folder.glob("out/drift-*/artifact/manifest.json"))
    if not found():
        print("training the classifier ...", file=sys.stderr, flush=True)
        with open(folder / "train.log", "w") as log:
            subprocess.run([PROGRAMS / "athanor-trainer", "run", "-f", manifest], check=True, stdout=log, stderr=log)
    return found()[-1].parent


def score(model, folder):
    """The classifier's answers: {domain or "reference": [(predicted, probability, label)]}."""
    cached = folder / "scores.json"
    if cached.exists():
        return json.loads(cached.read_text())
    ports = []
    for _ in range(2):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            ports.append(str(listener.getsockname()[1]))
    with open(folder / "serve.log", "w") as log:
        config = folder / "serve.json"
        config.write_text(json.dumps({
            "modelName": "drift", "revision": "drift-1", "modelUri": f"file://{model}", "httpPort": int(ports[0]), "grpcPort": int(ports[1]),
        }))
        command = [PROGRAMS / "athanor-server", "--address", "127.0.0.1", "--config", config]
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            base, deadline = f"http://127.0.0.1:{ports[0]}", time.time() + 120
            while True:
                try:
                    urllib.request.urlopen(f"{base}/readyz", timeout=2).read()
                    break
                except OSError:
                    if server.poll() is not None or time.time() > deadline:
                        sys.exit(f"athanor-server did not start: {folder}/serve.log")
                    time.sleep(0.2)

            def classify(rows):
                answers = []
                for begin in range(0, len(rows), 64):
                    block = rows[begin:begin + 64]
                    body = json.dumps({"input": [text for text, _ in block]}).encode()
                    request = urllib.request.Request(f"{base}/v1/classify", body, {"content-type": "application/json"})
                    found = json.load(urllib.request.urlopen(request, timeout=120))["data"]
                    answers += [(one["label"], one["score"], label) for one, (_, label) in zip(found, block)]
                return answers

            print("scoring the texts ...", file=sys.stderr, flush=True)
            home = {domain: list(texts(domain)) for domain in HOME}
            scores = {domain: classify([row for row in rows if part(row[0]) == "stream"]) for domain, rows in home.items()}
            scores |= {domain: classify(list(texts(domain))) for domain in AWAY}
            scores["reference"] = classify([row for rows in home.values() for row in rows if part(row[0]) == "reference"])
        finally:
            server.terminate()
            server.wait()
    cached.write_text(json.dumps(scores))
    return scores


def stream(kind, seed, scores):
    """Rows (predicted, probability, label) in their order, and which of them have feedback."""
    random = np.random.default_rng([seed, list(COUNTS).index(kind)])
    at = np.arange(LENGTH)
    home = [row for domain in HOME for row in scores[domain]]
    away = [row for domain in AWAY for row in scores[domain]]
    share = {
        "none": np.zeros(LENGTH), "prior": np.zeros(LENGTH), "abrupt": (at >= CHANGE) * 1.0,
        "gradual": np.clip((at - CHANGE) / GROWTH, 0, 1),
    }[kind]
    if kind == "prior":
        natural = np.mean([label == "positive" for _, _, label in home])
        other = natural + (0.3 if seed % 2 == 0 else -0.3)
        wanted = np.where(random.random(LENGTH) < np.where(at < CHANGE, natural, other), "positive", "negative")
        by_label = {label: [row for row in home if row[2] == label] for label in LABELS}
        rows = [by_label[label][random.integers(len(by_label[label]))] for label in wanted]
    else:
        is_away = random.random(LENGTH) < share
        rows = [(away if it else home)[random.integers(len(away if it else home))] for it in is_away]
    return rows, random.random(LENGTH) < LABELLED


def reference_of(rows):
    return {
        "labels": LABELS, "predicted": [sum(predicted == label for predicted, _, _ in rows) for label in LABELS],
        "confidences": sorted(probability for _, probability, _ in rows)[:2048],
        "correct": sum(predicted == label for predicted, _, label in rows), "rows": len(rows),
    }


def ours(streams, reference, with_labels):
    """The first prediction at which the monitor says Drifted, for each stream, or None; with the seconds it took."""
    begun = time.time()
    process = subprocess.Popen([PROGRAMS / "examples" / "drift_streams"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    alarms = []
    for rows, has_feedback in streams:
        expected = [label if with_labels and fed else None for (_, _, label), fed in zip(rows, has_feedback)]
        process.stdin.write(json.dumps({"reference": reference, "predictions": [row[:2] for row in rows], "expected": expected}) + "\n")
        process.stdin.flush()
        changes = json.loads(process.stdout.readline())["changes"]
        alarms.append([at for at, verdict in changes if verdict == "Drifted"])
    process.stdin.close()
    process.wait()
    return alarms, time.time() - begun


def evidently_alarms(job):
    """The ends of the windows at which a report has an alarm: by distributions alone, and by accuracy as well. Windows after the
    alarm that counts are left out."""
    import warnings

    import pandas as pd
    from evidently import BinaryClassification, DataDefinition, Dataset, Report
    from evidently.metrics import Accuracy
    from evidently.presets import DataDriftPreset

    warnings.filterwarnings("ignore")
    kind, reference_rows, rows, has_feedback = job
    columns, labelled_columns = ["predicted", "probability"], ["predicted", "label"]
    drift = DataDefinition(numerical_columns=["probability"], categorical_columns=["predicted"])
    labelled = DataDefinition(
        classification=[BinaryClassification(target="label", prediction_labels="predicted", pos_label="positive")],
        categorical_columns=["label", "predicted"],
    )

    def frame(rows):
        return pd.DataFrame(rows, columns=["predicted", "probability", "label"])

    def distributions_differ(current):
        report = Report([DataDriftPreset()]).run(
            Dataset.from_pandas(current[columns], drift), Dataset.from_pandas(reference[columns], drift)
        )
        found = next(one["value"] for one in report.dict()["metrics"] if "DriftedColumnsCount" in json.dumps(one))
        return found["share"] >= 0.5

    def accuracy_differs(current):
        report = Report([Accuracy()], include_tests=True).run(
            Dataset.from_pandas(current[labelled_columns], labelled), Dataset.from_pandas(reference[labelled_columns], labelled)
        )
        return any(test["status"] == "FAIL" for test in report.dict()["tests"])

    def is_over(alarms):
        return any(kind == "none" or at > CHANGE for at in alarms)

    reference, alarms = frame(reference_rows), ([], [])
    for begin in range(0, LENGTH, WINDOW):
        if all(map(is_over, alarms)):
            break
        current, end = frame(rows[begin:begin + WINDOW]), begin + WINDOW
        differ = distributions_differ(current)
        if differ:
            alarms[0].append(end)
        if differ or (not is_over(alarms[1]) and accuracy_differs(current[has_feedback[begin:end]])):
            alarms[1].append(end)
    return alarms


def summary(kinds, alarms):
    """By kind: streams with an alarm before anything changed, streams found, and the delay in predictions."""
    table = {}
    for kind in COUNTS:
        of_kind = [found for name, found in zip(kinds, alarms) if name == kind]
        if kind == "none":
            table[kind] = {"streams": len(of_kind), "falseAlarms": sum(bool(found) for found in of_kind)}
            continue
        early = sum(any(at <= CHANGE for at in found) for found in of_kind)
        delays = [min(at for at in found if at > CHANGE) - CHANGE for found in of_kind if any(at > CHANGE for at in found)]
        table[kind] = {
            "streams": len(of_kind), "falseAlarms": early, "found": len(delays),
            "medianDelay": statistics.median(delays) if delays else None, "largestDelay": max(delays, default=None),
        }
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="share of the streams of each kind (default: all)")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="whether evidently runs too")
    arguments = parser.parse_args()
    folder = CACHE / "drift"
    folder.mkdir(parents=True, exist_ok=True)
    scores = score(train(folder), folder)
    reference = reference_of(scores["reference"])
    kinds = [kind for kind, count in COUNTS.items() for _ in range(max(1, round(count * arguments.share)))]
    seeds = [kinds[:index].count(kind) for index, kind in enumerate(kinds)]
    streams = [stream(kind, seed, scores) for kind, seed in zip(kinds, seeds)]
    accuracy = {name: round(statistics.mean(p == label for p, _, label in rows), 4) for name, rows in scores.items()}
    result = {"processor": platform.processor() or platform.machine(), "reference": len(scores["reference"]), "accuracy": accuracy, "turns": {}}
    for turn, with_labels in (("labels", True), ("noLabels", False)):
        alarms, seconds = ours(streams, reference, with_labels)
        result["turns"][turn] = {"athanor": {"seconds": round(seconds, 1), "kinds": summary(kinds, alarms)}}
    if arguments.peer:
        print("evidently ...", file=sys.stderr, flush=True)
        begun = time.time()
        jobs = [(kind, scores["reference"], *found) for kind, found in zip(kinds, streams)]
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
            alarms = list(pool.map(evidently_alarms, jobs))
        for turn, which in (("labels", 1), ("noLabels", 0)):
            table = summary(kinds, [found[which] for found in alarms])
            result["turns"][turn]["evidently"] = {"seconds": round(time.time() - begun, 1), "kinds": table}
    if arguments.share == 1.0 and arguments.peer:
        (ROOT / "bench/results/drift.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"accuracy: {', '.join(f'{name} {value}' for name, value in accuracy.items())}\n")
    print("| feedback | stream | system | alarm before a change | found | median delay | largest delay |")
    print("|---|---|---|---|---|---|---|")
    for turn, systems in result["turns"].items():
        for kind in COUNTS:
            for system, found in systems.items():
                row = found["kinds"][kind]
                rest = [f"{row['found']} of {row['streams']}", row["medianDelay"], row["largestDelay"]] if kind != "none" else ["", "", ""]
                shown = " | ".join("" if value is None else str(value) for value in rest)
                print(f"| {'20 %' if turn == 'labels' else 'none'} | {kind} | {system} | {row['falseAlarms']} of {row['streams']} | {shown} |")


if __name__ == "__main__":
    main()
