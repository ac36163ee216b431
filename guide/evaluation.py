"""The text that models are measured on: the examination's questions, each with the answer of its topic.

    python -m guide.evaluation

Promises that every line of data/evaluation.jsonl is one conversation, {"messages": [...]}, English and Chinese mixed,
and that no question in it was trained on; the guide was trained on the answers. Knows nothing of how it is measured.
"""

import json
from pathlib import Path

from guide.corpus import load_corpus
from guide.exam import read_exam

FILE = Path(__file__).resolve().parent / "data" / "evaluation.jsonl"


def conversations() -> list[list[dict[str, str]]]:
    """Each question of one turn that has a topic, with that topic's answer: two English ones, then a Chinese one."""
    answers = {topic.id: topic.answer for topic in load_corpus().topics.values()}
    asked: dict[str, list[list[dict[str, str]]]] = {"en": [], "zh": []}
    for question in read_exam():
        if len(question.turns) == 1 and question.topic in answers:
            answer = answers[question.topic][question.lang]
            words = (("user", question.turns[0]), ("assistant", answer))
            asked[question.lang].append([{"role": role, "content": text} for role, text in words])
    mixed: list[list[dict[str, str]]] = []
    while asked["en"] or asked["zh"]:
        for language, count in (("en", 2), ("zh", 1)):
            mixed += asked[language][:count]
            del asked[language][:count]
    return mixed


def main() -> None:
    """Write the file."""
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in conversations()]
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{FILE}: {len(lines)} conversations")


if __name__ == "__main__":
    main()
