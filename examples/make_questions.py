"""Make ``questions.json``: find the ending of a sentence of ``eval.txt`` among shuffled ones.

Each question has the true ending and three whose words are in another order, in the layout of
TruthfulQA's multiple choice: ``slim-ptq evaluate MODEL questions.json --task truthfulqa``.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
QUESTIONS = 100


def question(words: list[str], chance: random.Random) -> dict[str, object]:
    middle = len(words) // 2
    ending = words[middle:]
    answers = [" ".join(ending)]
    while len(answers) < 4:
        other = " ".join(chance.sample(ending, len(ending)))
        if other not in answers:
            answers.append(other)
    right = answers[0]
    chance.shuffle(answers)
    targets = {answer: int(answer == right) for answer in answers}
    return {
        "question": " ".join(words[:middle]),
        "mc1_targets": targets,
        "mc2_targets": targets,
    }


def main() -> None:
    chance = random.Random(0)
    text = (HERE / "eval.txt").read_text(encoding="utf-8")
    sentences = [line.split() for line in text.split("\n")]
    fit = [words for words in sentences if 12 <= len(words) <= 24 and len(set(words)) > 10]
    questions = [question(words, chance) for words in chance.sample(fit, QUESTIONS)]
    (HERE / "questions.json").write_text(json.dumps(questions, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
