"""The examination: 380 hand-written questions that the guide was never trained on.

    python -m guide.exam [--low-bit sym_int4] [--model DIR] [--json]

Promises: only the last answer of each question is judged: at least one alternative of every `required` group is in
it, and no `forbidden` word; words are compared casefolded. Exit code 0 when at least 90 % is right, else 1. Knows
nothing of how the model was trained.
"""

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BAR = 0.90
FOLDER = Path(__file__).resolve().parent
LONGEST = 256  # tokens judged: every answer but the tour is shorter
KINDS = {"greeting": "talk", "smalltalk": "talk", "beyond": "beyond"}


@dataclass(frozen=True)
class Question:
    """One line of exam.jsonl."""

    id: str
    lang: str
    topic: str
    turns: tuple[str, ...]
    required: tuple[tuple[str, ...], ...]
    forbidden: tuple[str, ...]

    @property
    def kind(self) -> str:
        """topic, talk, beyond or several turns."""
        return "several turns" if len(self.turns) > 1 else KINDS.get(self.topic, "topic")

    def is_right(self, answer: str) -> bool:
        """Whether `answer` holds what it must and nothing that it must not."""
        text = answer.casefold()
        held = all(any(word.casefold() in text for word in group) for group in self.required)
        return held and not any(word.casefold() in text for word in self.forbidden)


def read_exam(path: Path = FOLDER / "exam.jsonl") -> list[Question]:
    """The questions in the order of the file."""
    questions = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        required = tuple(tuple(group) for group in entry["required"])
        turns, forbidden = tuple(entry["turns"]), tuple(entry.get("forbidden", ()))
        questions.append(Question(entry["id"], entry["lang"], entry["topic"], turns, required, forbidden))
    return questions


class Candidate:
    """A model that sits the examination: batched greedy answers."""

    def __init__(self, folder: Path, low_bit: str) -> None:
        """`low_bit`: a name from `nibble.lowbit.FORMATS`; nothing is sampled."""
        from transformers import AutoTokenizer

        from nibble.transformers import AutoModelForCausalLM

        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit=low_bit).eval()

    @torch.inference_mode()
    def answer(self, conversations: list[list[dict[str, str]]], batch: int = 32) -> list[str]:
        """The answer to each conversation; all of them end with a user's message."""
        tokenizer = self._tokenizer
        prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in conversations]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers = [""] * len(prompts)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            inputs = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True, add_special_tokens=False)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            tokens = self._model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=LONGEST, do_sample=False)
            texts = tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(rows, texts, strict=True):
                answers[i] = text
        return answers


def sit(candidate: Candidate, questions: list[Question]) -> list[str]:
    """The last answer to each question; the candidate's own earlier answers stand between the turns."""
    talks: list[list[dict[str, str]]] = [[] for _ in questions]
    last = [""] * len(questions)
    for turn in range(max(len(question.turns) for question in questions)):
        rows = [i for i, question in enumerate(questions) if turn < len(question.turns)]
        for i in rows:
            talks[i].append({"role": "user", "content": questions[i].turns[turn]})
        for i, text in zip(rows, candidate.answer([talks[i] for i in rows]), strict=True):
            talks[i].append({"role": "assistant", "content": text})
            last[i] = text
    return last


def report(questions: list[Question], answers: list[str]) -> dict[str, Any]:
    """Accuracy overall, by language and by kind, and the failures."""
    marks: dict[str, list[bool]] = defaultdict(list)
    failures = []
    for question, answer in zip(questions, answers, strict=True):
        right = question.is_right(answer)
        for key in ("all", question.lang, question.kind):
            marks[key].append(right)
        if not right:
            failures.append({"id": question.id, "topic": question.topic, "turns": question.turns, "answer": answer})
    accuracy = {key: round(sum(values) / len(values), 4) for key, values in marks.items()}
    return {"accuracy": accuracy, "questions": len(questions), "failures": failures}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=FOLDER / "model")
    parser.add_argument("--low-bit", default="bf16")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args()
    questions = read_exam()
    result = report(questions, sit(Candidate(flags.model, flags.low_bit), questions))
    if flags.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        for failure in result["failures"]:
            print(
                f"{failure['id']} [{failure['topic']}] {' / '.join(failure['turns'])}\n    -> {failure['answer'][:160]}"
            )
        print(f"{flags.low_bit}: " + ", ".join(f"{key} {value:.1%}" for key, value in result["accuracy"].items()))
    return 0 if result["accuracy"]["all"] >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
