"""Makes smollm2-logits.json (qwen-coder-0.5b-logits.json if that model is there) for models/tests/real.rs.

Needs torch 2.11, transformers 5.23 and gguf 0.19. Usage: python models/tests/golden/make_models.py MODELS_FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
TEXT = "List the named entities: This Loan Agreement is made between Silicon Valley Bank and the Borrower. Entities:"
MODELS = {"smollm2": "smollm2-135m", "qwen-coder-0.5b": "qwen2.5-coder-0.5b"}


def golden(file):
    load = dict(pretrained_model_name_or_path=file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(**load, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = AutoTokenizer.from_pretrained(**load)(TEXT, add_special_tokens=False)["input_ids"]
    ids, lead = list(prompt), []
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        for _ in range(64):
            best = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
            lead.append((best.values[0] - best.values[1]).item())
            ids.append(best.indices[0].item())
    return {
        "prompt": prompt, "first": logits[0, ::997].tolist(), "last": logits[-1, ::997].tolist(), "greedy": ids[len(prompt):],
        "smallest_lead": min(lead),
    }


for name, folder in MODELS.items():
    for file in (Path(sys.argv[1]) / folder).glob("*.gguf"):
        (HERE / f"{name}-logits.json").write_text(json.dumps(golden(file)) + "\n")
