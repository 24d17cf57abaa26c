#!/usr/bin/env python3
"""Training side by side: athanor-trainer, transformers' Trainer and sentence-transformers, same model, rows, precision, batch and
steps, in turns.

Prints a table and writes bench/results/train.json. `make bench-train` installs what it needs and runs it.
"""
import argparse, csv, importlib.util, json, mmap, os, pathlib, resource, statistics, subprocess, sys, tempfile, threading, time

STEPS, WARM_UP = 160, 40
# The allocator that the trainer is linked with statically, as a library for the peers. scripts/setup installs both.
ALLOCATOR = "libtcmalloc_minimal.so"
RATE = 1e-4
PEERS = ["Trainer, best (length groups, dynamic padding, fused AdamW)", "Trainer, default (fp32, padded to 128)",
         "sentence-transformers (length groups, fused AdamW)"]
# Set by the arguments: rows of a step, folder of the base model, whether to train on a GPU, our program, BF16 or FP32.
BATCH, MODEL, CUDA, TRAINER, PRECISION = 32, "", False, "", "BF16"


def rows(file):
    """Amazon and movie sentences with a clear sentiment."""
    data = pathlib.Path(os.environ["ATHANOR_DATA"]) / "sentiment"
    with open(file, "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["text", "label", "first", "second"])
        for domain in ("amazon", "movies"):
            for line in open(data / f"{domain}.txt", encoding="utf-8", errors="replace"):
                _, rating, text = line.rstrip("\n").split("\t", 2)
                if abs(float(rating)) >= 0.5 and text.strip():
                    # The two halves of a text are the pair that an embedding is to bring together.
                    words = text.split()
                    first, second = " ".join(words[: len(words) // 2]) or text, " ".join(words[len(words) // 2 :])
                    writer.writerow([text, "positive" if float(rating) > 0 else "negative", first, second])


def ours(file, work, settings):
    """Runs the trainer: seconds to the first step, and rows a second after the warm-up."""
    source = {"name": "rows", "uri": f"file://{file}"}
    if settings["task"] == "Embedding":
        source["columns"] = {"text": "first", "pair": "second"}
    spec = {
        "model": {"from": f"file://{MODEL}", "task": settings["task"]},
        "data": {"sources": [source]},
        "hyperparameters": {"maxSteps": STEPS, "batchSize": BATCH, "learningRate": RATE, "precision": settings["precision"]},
        "checkpoint": {"everySteps": 0},
        "distributed": {"backend": "NCCL" if CUDA else "Gloo"},
        "output": {"to": f"file://{work}/out"},
    }
    job = {"apiVersion": "athanor.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bench"}, "spec": spec}
    manifest = pathlib.Path(work) / "job.json"
    manifest.write_text(json.dumps(job))
    losses = pathlib.Path(work) / "losses"
    environment = {**os.environ, "ATHANOR_LOSS_LOG": str(losses)}
    began = time.monotonic()
    with open(pathlib.Path(work) / "log", "w") as log:
        process = subprocess.Popen([TRAINER, "run", "-f", manifest], stdout=log, stderr=log, env=environment)
        marks = {}
        while process.poll() is None:
            done = losses.read_bytes().count(b"\n") if losses.exists() else 0
            for step in (1, WARM_UP, STEPS):
                if done >= step:
                    marks.setdefault(step, time.monotonic())
            time.sleep(0.005)
    if process.returncode != 0:
        sys.exit(f"athanor-trainer failed: {work}/log\n" + (pathlib.Path(work) / "log").read_text()[-2000:])
    return {"first": marks[1] - began, "rate": BATCH * (STEPS - WARM_UP) / (marks[STEPS] - marks[WARM_UP])}


class Clock:
    """Times of the steps that a peer has taken."""

    def __init__(self):
        self.began, self.marks = float(os.environ["BENCH_BEGAN"]), {}

    def callback(self):
        from transformers import TrainerCallback

        class Marks(TrainerCallback):
            def on_step_end(_, arguments, state, control, **__):
                self.marks[state.global_step] = time.monotonic()

        return Marks()

    def print(self):
        rate = BATCH * (STEPS - WARM_UP) / (self.marks[STEPS] - self.marks[WARM_UP])
        print(json.dumps({"first": self.marks[1] - self.began, "rate": rate}))


def options(out):
    return dict(output_dir=out, per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=RATE, warmup_steps=STEPS // 10,
                save_strategy="no", report_to=[], logging_strategy="no", use_cpu=not CUDA, disable_tqdm=True)


def has_allocator_linked(program):
    """Whether tcmalloc is a part of the program: it reads its settings from variables whose names are in the file."""
    with open(program, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"TCMALLOC_SKIP_SBRK") >= 0


def require_allocator():
    """Ends this process if tcmalloc is not loaded: a name in LD_PRELOAD that the loader does not find is only a warning."""
    if ALLOCATOR.removesuffix(".so") not in pathlib.Path("/proc/self/maps").read_text():
        sys.exit(f"{ALLOCATOR} is not loaded: run scripts/setup")


def grouped_by_length(lengths):
    """A batch sampler for sentence-transformers with the sampler of transformers' group_by_length."""
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from transformers.trainer_pt_utils import LengthGroupedSampler

    def sampler(dataset, batch_size, generator=None, **others):
        by_length = LengthGroupedSampler(batch_size, lengths=lengths, generator=generator)
        return DefaultBatchSampler(by_length, batch_size=batch_size, generator=generator, **others)

    return sampler


def embedding_peer(file):
    """sentence-transformers in this process, with its usual loss for pairs; prints one JSON line."""
    clock = Clock()
    require_allocator()
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.models import Pooling, Transformer
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    read = list(csv.DictReader(open(file)))
    pairs = Dataset.from_dict({"anchor": [row["first"] for row in read], "positive": [row["second"] for row in read]})
    # The folder's own list of modules names a pooling that it does not have.
    encoder = Transformer(MODEL, max_seq_length=128)
    model = SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension())], device="cuda" if CUDA else "cpu")
    with tempfile.TemporaryDirectory() as out:
        # Characters: it tokenizes batch by batch, so that tokens would have to be counted before the first step.
        sampler = grouped_by_length([len(row["first"]) + len(row["second"]) for row in read])
        arguments = SentenceTransformerTrainingArguments(**options(out), bf16=PRECISION == "BF16", optim="adamw_torch_fused",
                                                         batch_sampler=sampler)
        SentenceTransformerTrainer(model=model, args=arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model),
                                   callbacks=[clock.callback()]).train()
    clock.print()


def peer(file, best):
    """transformers' Trainer in this process; prints one JSON line."""
    clock = Clock()
    require_allocator()
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    read = list(csv.DictReader(open(file)))
    padding = False if best else "max_length"
    encoded = tokenizer([row["text"] for row in read], truncation=True, max_length=128, padding=padding)
    items = [{"input_ids": ids, "attention_mask": mask, "labels": int(row["label"] == "positive")}
             for ids, mask, row in zip(encoded["input_ids"], encoded["attention_mask"], read)]
    with tempfile.TemporaryDirectory() as out:
        chosen = options(out)
        if best:
            chosen |= dict(bf16=PRECISION == "BF16", train_sampling_strategy="group_by_length", optim="adamw_torch_fused")
        model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)
        Trainer(model=model, args=TrainingArguments(**chosen), train_dataset=items,
                data_collator=DataCollatorWithPadding(tokenizer), callbacks=[clock.callback()]).train()
    clock.print()


def has_bfloat16():
    """Whether the CPU multiplies bfloat16 in hardware: elsewhere it is slower than fp32, for us and for the peers."""
    flags = pathlib.Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def watch_gpu(done, most):
    """Keeps the most memory in use on the GPU, in GiB; nothing else may run there."""
    while not done.wait(0.1):
        used = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], stdout=subprocess.PIPE, text=True)
        most[0] = max(most[0], float(used.stdout.split()[0]) / 1024)


def in_child(function, *arguments):
    """Runs a function in a forked child; its dictionary, with the peak memory of the largest process it started, or of the GPU, in GiB."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        ended, most = threading.Event(), [0.0]
        if CUDA:
            threading.Thread(target=watch_gpu, args=(ended, most)).start()
        try:
            result = function(*arguments)
        finally:
            ended.set()
        result["memory"] = most[0] if CUDA else resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    text = b"".join(iter(lambda: os.read(reader, 65536), b""))
    os.waitpid(child, 0)
    if not text:
        sys.exit("a run failed, see above")
    return json.loads(text)


def run_ours(file, settings):
    with tempfile.TemporaryDirectory() as work:
        return ours(file, work, settings)


def run_peer(file, which):
    environment = {**os.environ, "BENCH_BEGAN": str(time.monotonic()), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    environment.pop("LD_LIBRARY_PATH", None)
    environment["LD_PRELOAD"] = ALLOCATOR
    command = [sys.executable, __file__, "--peer", which, "--model", MODEL, "--batch", str(BATCH), "--precision", PRECISION,
               *["--cuda"] * CUDA, file]
    done = subprocess.run(command, env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"the peer failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--batch", type=int, default=32, help="rows of a step (default %(default)s)")
    parser.add_argument("--model", default=f"{os.environ.get('ATHANOR_MODELS')}/minilm-l6", help="folder of the base model (default MiniLM)")
    parser.add_argument("--cuda", action="store_true", help="train on the GPU, and measure its memory instead of the process's")
    parser.add_argument("--trainer", default=f"{os.environ.get('CARGO_TARGET_DIR')}/release/athanor-trainer", help="our program")
    parser.add_argument("--quick", action="store_true", help="leave the Trainer's default out, which takes longer than all others together")
    parser.add_argument("--precision", choices=["BF16", "FP32"],
                        help="of ours and of the peers at their best (default BF16 on a GPU and where the CPU multiplies bfloat16)")
    parser.add_argument("--peer", choices=["best", "default", "embedding"], help=argparse.SUPPRESS)
    parser.add_argument("file", nargs="?", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    global BATCH, MODEL, CUDA, TRAINER, PRECISION
    BATCH, MODEL, CUDA, TRAINER = arguments.batch, arguments.model, arguments.cuda, arguments.trainer
    PRECISION = arguments.precision or ("BF16" if CUDA or has_bfloat16() else "FP32")
    if arguments.peer == "embedding":
        return embedding_peer(arguments.file)
    if arguments.peer:
        return peer(arguments.file, arguments.peer == "best")

    if not has_allocator_linked(TRAINER):
        sys.exit(f"{TRAINER} is not linked with tcmalloc")
    file = tempfile.NamedTemporaryFile(suffix=".csv", delete=False).name
    rows(file)
    subjects = {
        "ours": (run_ours, {"precision": PRECISION, "task": "TextClassification"}),
        "ours, fp32": (run_ours, {"precision": "FP32", "task": "TextClassification"}),
        "ours, pairs": (run_ours, {"precision": PRECISION, "task": "Embedding"}),
        PEERS[0]: (run_peer, "best"),
        PEERS[1]: (run_peer, "default"),
        PEERS[2]: (run_peer, "embedding"),
    }
    if arguments.quick:
        del subjects[PEERS[1]], subjects["ours, fp32"]
    if importlib.util.find_spec("datasets") is None:
        print("sentence-transformers is left out: it needs the package datasets", flush=True)
        subjects = {name: subject for name, subject in subjects.items() if subject[1] != "embedding"}
    found = {name: [] for name in subjects}
    for turn in range(arguments.runs):
        # There and back, so that none always runs when the machine has rested, or has not.
        order = list(subjects.items())
        for name, (function, setting) in order if turn % 2 == 0 else reversed(order):
            result = in_child(function, file, setting)
            found[name].append(result)
            print(f"turn {turn + 1}  {name:<68} {result['rate']:7.1f} rows/s  {result['memory']:5.2f} GiB  "
                  f"first step {result['first']:5.2f} s", flush=True)
    os.unlink(file)
    median = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    best, default, pairs = PEERS
    lines = []
    for label, mine, other, key, unit, target in [
        (f"speed, {PRECISION.lower()}", "ours", best, "rate", "rows/s", ">= 1.5"),
        ("speed, fp32, default", "ours, fp32", default, "rate", "rows/s", ""),
        ("peak memory", "ours", best, "memory", "GiB", "<= 0.6"),
        ("start to first step", "ours", best, "first", "s", "<= 0.2"),
        (f"speed, pairs, {PRECISION.lower()}", "ours, pairs", pairs, "rate", "pairs/s", ">= 1.5"),
        ("peak memory, pairs", "ours, pairs", pairs, "memory", "GiB", "<= 0.6"),
        ("start, pairs", "ours, pairs", pairs, "first", "s", "<= 0.2"),
    ]:
        if mine not in median or other not in median:
            continue
        a, b = median[mine][key], median[other][key]
        lines.append({"name": label, "ours": a, "peer": b, "peer_name": other, "unit": unit, "ratio": a / b, "target": target,
                      "runs": {"ours": [run[key] for run in found[mine]], "peer": [run[key] for run in found[other]]}})
    print(f"\n{'':<22}{'ours':>9}{'peer':>9}  {'unit':<7}{'ratio':>7}  target    peer")
    for line in lines:
        print(f"{line['name']:<22}{line['ours']:>9.2f}{line['peer']:>9.2f}  {line['unit']:<7}{line['ratio']:>7.2f}  {line['target']:<8}  {line['peer_name']}")
    results = pathlib.Path(__file__).parent / f"results/train{'-cuda' * CUDA}.json"
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(lines, indent=1) + "\n")
    print(f"\nwritten: {results}")


if __name__ == "__main__":
    main()
