"""Writes minilm.json: what transformers computes for a few sentences, for models/tests/parity.rs.

Run with torch 2.11.0 and transformers 5.23: python models/tests/golden/make.py $ATHANOR_MODELS/minilm-l6 [ARTIFACT]
With ARTIFACT (a folder that athanor-trainer wrote) it prints that classifier's logits instead, to compare by eye.
"""

import json
import pathlib
import sys

import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

SENTENCES = [
    "The picture is sharp and the battery lasts all day.",
    "Broke after a week.",
    "",
    "Café naïve — “quotes”, 東京 and emoji 🙂!",
    "word " * 100,
]

folder = sys.argv[-1]
tokenizer = AutoTokenizer.from_pretrained(folder)
batch = tokenizer(SENTENCES, padding=True, truncation=True, max_length=64, return_tensors="pt")
torch.set_grad_enabled(False)
if len(sys.argv) > 2:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    print(json.dumps({"labels": model.config.id2label, "logits": model(**batch).logits.tolist()}))
    sys.exit()
model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
hidden = model(**batch).last_hidden_state
mask = batch["attention_mask"].unsqueeze(-1)
golden = {
    "transformers": __import__("transformers").__version__,
    "max_length": 64,
    "sentences": SENTENCES,
    "ids": [row[m.bool()].tolist() for row, m in zip(batch["input_ids"], batch["attention_mask"])],
    "cls": hidden[:, 0, :8].tolist(),
    "mean": ((hidden * mask).sum(1) / mask.sum(1))[:, :8].tolist(),
}
pathlib.Path(__file__).with_name("minilm.json").write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")
