"""Makes tokenizers.json: ids, offsets and decoded texts of transformers, for models/tests/gguf_tokenizer.rs.

Needs transformers 5.23, gguf 0.19. Usage: python models/tests/golden/make_tokenizer.py MODELS_FOLDER
The tokenizers are those that transformers makes of GGUF files. Two things are different on purpose, as in
the models' own tokenizer.json: Qwen's tokenizer composes characters (NFC), and SmolLM2's takes digits one by one.
sentencepiece.gguf is a file with a small SentencePiece vocabulary with scores and byte fallback, made here.
"""

import json
import sys
from pathlib import Path

import gguf
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer

here = Path(__file__).parent

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces   three\t\ttabs\n\n\nlines \r\n end  ",
    "1234567890 3.14 1,000,000 x86_64 ²³ ٣٤ Ⅷ",
    "don't I'LL we've HE'D",
    "Ünïcödé naïve café cafe\u0301 n\u0303 o\u0308\u0323 \u1e69 s\u0323\u0307",
    "emoji 🙂🙃 👩‍👩‍👧‍👦 🇩🇪 ☕️ 🤷🏽‍♀️",
    "東京都 日本語テキスト 中文。你好！ 한국어 안녕하세요",
    "עברית العربية हिन्दी ไทย ქართული",
    "\u00a0no-break\u2003em\u200bzero\ufeffbom",
    "𝕳𝖊𝖑𝖑𝖔 ﬁ ﬂ ½ № ™ \u0000 \u001b",
    "def f(x):\n    return x ** 2  # comment\n\n\tif a!=b: pass",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_startx",
    "https://example.org/a?b=c&d=%20#e mail@x.y",
    "a" * 70 + " " * 40 + "🜁" * 3,
    "<s>x</s><unk> <0x41> ▁▁ _ ▁a",
]


def sentence_piece(file: Path):
    tokens, scores, types = ["<unk>", "<s>", "</s>"], [0.0] * 3, [2, 3, 3]
    for byte in range(256):
        tokens.append(f"<0x{byte:02X}>")
        scores.append(0.0)
        types.append(6)
    pieces = "▁ ▁a he ll o ▁the el in er ▁t ▁he llo ▁hello hello wor ld ▁wor ▁world world or ▁▁ ▁▁▁▁".split(" ")
    pieces += "東京 東 京 é ca fe café ▁ca 12 1 2 3 a b c d e f h i l n r t w 123 \n , !".split(" ")
    for rank, piece in enumerate(dict.fromkeys(pieces)):
        tokens.append(piece)
        # Several with the same score: the order of equal ones is a rule of its own.
        scores.append(-float(rank // 2))
        types.append(1)
    tokens.append("<|tool|>")
    scores.append(0.0)
    types.append(4)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def golden(folder: Path, name: str):
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    backend = tokenizer.backend_tokenizer
    if "qwen" in name.lower():
        backend.normalizer = normalizers.NFC()
    if "smollm" in name.lower():
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    rows = []
    for text in TEXTS + ["x<|tool|>y"]:
        encoding = backend.encode(text)
        offsets = [list(pair) for pair in encoding.offsets]
        row = {"text": text, "ids": encoding.ids, "offsets": offsets}
        row["decoded"] = backend.decode(encoding.ids, skip_special_tokens=False)
        row["skipped"] = backend.decode(encoding.ids)
        rows.append(row)
    special = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return {"special_tokens": special, "rows": rows}


models = Path(sys.argv[1])
sentence_piece(here / "sentencepiece.gguf")
goldens = {"sentencepiece": golden(here, "sentencepiece.gguf")}
for key, folder in [("smollm2-135m", models / "smollm2-135m"), ("qwen2.5-coder-0.5b", models / "qwen2.5-coder-0.5b")]:
    goldens[key] = golden(folder, next(folder.glob("*.gguf")).name)
text = json.dumps(goldens, ensure_ascii=False, separators=(",", ":")).replace('},{"text"', '},\n{"text"')
(here / "tokenizers.json").write_text(text + "\n")
