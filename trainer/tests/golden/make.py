"""Tiny random models and what a plain PyTorch loop over transformers makes of them, for trainer/tests/trajectory.rs and
models/tests/tiny.rs.

Run with torch 2.11.0 and transformers 5.23: python trainer/tests/golden/make.py
It writes the models once (delete them to draw new ones), then forward.json, and trajectories.json from batches.json, which
`cargo test -p athanor-trainer --test trajectory -- --ignored write_batches` writes.
"""

import json
import pathlib

import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    MPNetConfig,
    MPNetForMaskedLM,
    MPNetForSequenceClassification,
)

HERE = pathlib.Path(__file__).parent
SHAPE = dict(
    vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, initializer_range=0.2,
    max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)
NAMES = dict(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}, problem_type="single_label_classification")
MODELS = {
    "tiny-bert": (BertForSequenceClassification, BertConfig(**SHAPE, **NAMES)),
    "tiny-mpnet": (MPNetForSequenceClassification, MPNetConfig(**SHAPE, **NAMES, pad_token_id=1)),
    "tiny-bert-mlm": (BertForMaskedLM, BertConfig(**SHAPE)),
    "tiny-mpnet-mlm": (MPNetForMaskedLM, MPNetConfig(**SHAPE, pad_token_id=1)),
}
# No tokenizer is used; a folder has to have one, and a student's and a teacher's vocabulary are compared by it.
TOKENIZER = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}, "added_tokens": []}


def load(name):
    kind, config = MODELS[name]
    folder = HERE / name
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(sorted(MODELS).index(name))
        model = kind(config)
        with torch.no_grad():
            # transformers begins norms and biases at ones and zeros, which would hide a mistake in them.
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def padded(rows, pad):
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def forward():
    """Hidden states, outputs and gradients of one batch with padding."""
    golden = {}
    rows = [[0, 7, 9, 30, 2], [0, 11, 2], [0] + [(17 * i) % 110 + 5 for i in range(36)] + [2]]
    for name, (_, config) in MODELS.items():
        model = load(name)
        ids, mask = padded(rows, config.pad_token_id)
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        if name.endswith("mlm"):
            labels = ids.masked_fill((mask == 0) | (ids % 3 != 0), -100)
            loss = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
        else:
            loss = F.cross_entropy(out.logits, torch.tensor([0, 1, 1]))
        loss.backward()
        golden[name] = {
            "rows": rows,
            "hidden": [[state[row, 1].tolist() for row in range(3)] for state in out.hidden_states],
            "logits": (out.logits[:, 1] if name.endswith("mlm") else out.logits).tolist(),
            "loss": loss.item(),
            "gradients": {
                key: [p.grad.norm().item(), *p.grad.flatten()[: 4 * 7 : 7].tolist()]
                for key, p in model.named_parameters()
                if p.grad is not None
            },
        }
    (HERE / "forward.json").write_text(json.dumps(golden) + "\n")


def train(name, batches, teacher=None):
    model = load(name)
    pad = model.config.pad_token_id
    decayed = [p for key, p in model.named_parameters() if p.dim() > 1]
    exempt = [p for key, p in model.named_parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": exempt, "weight_decay": 0.0}], lr=1.0, betas=(0.9, 0.999), eps=1e-8
    )
    losses, norms = [], []
    for step in batches["steps"]:
        rows = [batches["ids"][row] for row in step["rows"]]
        if name.endswith("mlm"):
            ids, mask = padded([masked for masked, _ in step["masked"]], pad)
            truth, _ = padded(rows, pad)
            labels = torch.full_like(ids, -100)
            for index, (_, places) in enumerate(step["masked"]):
                labels[index, places] = truth[index, places]
            logits = model(input_ids=ids, attention_mask=mask).logits
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        else:
            ids, mask = padded(rows, pad)
            logits = model(input_ids=ids, attention_mask=mask).logits
            loss = F.cross_entropy(logits, torch.tensor([batches["labels"][row] for row in step["rows"]]))
            if teacher is not None:
                with torch.no_grad():
                    ids, mask = padded(rows, teacher.config.pad_token_id)
                    wanted = teacher(input_ids=ids, attention_mask=mask).logits
                soft = F.kl_div(F.log_softmax(logits / 2, -1), F.softmax(wanted / 2, -1), reduction="batchmean") * 4
                loss = 0.5 * loss + 0.5 * soft
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = step["learning_rate"]
        optimizer.step()
        losses.append(loss.item())
    return {"loss": losses, "gradient_norm": norms}


forward()
if (HERE / "batches.json").exists():
    batches = json.loads((HERE / "batches.json").read_text())
    golden = {
        "fine-tuning bert": train("tiny-bert", batches),
        "fine-tuning mpnet": train("tiny-mpnet", batches),
        "soft label bert": train("tiny-bert", batches, load("tiny-mpnet")),
        "masked bert": train("tiny-bert-mlm", batches),
        "masked mpnet": train("tiny-mpnet-mlm", batches),
    }
    (HERE / "trajectories.json").write_text(json.dumps(golden) + "\n")
