"""Write ``calib.jsonl`` and ``eval.txt``: text sampled from the example model itself.

Nothing but the openings below was written by a person, so the files carry no licence of anyone
else.  Text that a model wrote is easier for it than real text: use the perplexity of ``eval.txt``
to compare a quantized model with its float original, not to judge the model.

    python examples/make_text.py --seed 2024
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

HERE = Path(__file__).resolve().parent
CALIB_LINES, CALIB_TOKENS = 64, 200
EVAL_TEXTS, EVAL_TOKENS = 40, 480

OPENINGS = (
    "The people of this country",
    "My fellow citizens, we",
    "I have come before you to",
    "And he said unto them,",
    "Now the king went down to the",
    "In the years that lie ahead,",
    "What shall I say, my lord?",
    "Our schools and our farms",
    "O gentle friend, thou",
    "The cost of peace is",
    "There was a man in the city who",
    "This Congress must",
    "Come hither, and tell me",
    "And it came to pass in those days that",
    "We have learned that freedom",
    "Let every house in the land",
)


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    openings: list[str],
    tokens: int,
) -> list[str]:
    """Continue each opening by exactly ``tokens`` sampled tokens."""
    tokenizer.padding_side = "left"
    batch = tokenizer(openings, return_tensors="pt", padding=True)
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=True,
        temperature=0.9,
        top_k=0,
        top_p=0.95,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    return [clean(text) for text in tokenizer.batch_decode(output, skip_special_tokens=True)]


def clean(text: str) -> str:
    """Drop control characters and byte tokens that do not form a character."""
    return "".join(
        c for c in text if c == "\n" or (c.isprintable() and c != "\N{REPLACEMENT CHARACTER}")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample calib.jsonl and eval.txt from a model.")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--model", type=Path, default=HERE / "tiny-llama")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    torch.manual_seed(args.seed)

    def texts(count: int, tokens: int) -> list[str]:
        openings = [OPENINGS[i % len(OPENINGS)] for i in range(count)]
        return sample(model, tokenizer, openings, tokens)

    lines = [json.dumps({"text": text}) + "\n" for text in texts(CALIB_LINES, CALIB_TOKENS)]
    (args.out / "calib.jsonl").write_text("".join(lines), encoding="utf-8")
    evaluation = "\n\n".join(texts(EVAL_TEXTS, EVAL_TOKENS)) + "\n"
    (args.out / "eval.txt").write_text(evaluation, encoding="utf-8")


if __name__ == "__main__":
    main()
