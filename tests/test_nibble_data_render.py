"""Rows as tokens: what is trained on is exactly the answers, with what ends them."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.data import ColumnMap, Row, check, find
from nibble.data.preview import preview
from nibble.data.render import NO_END, REWRITES, Encoder, padding_id, samples
from nibble.engines.base import Message
from nibble.errors import DataError
from nibble.prompts.templates import FORMS as PROMPT_FORMS
from nibble.prompts.templates import Template, choose_template

QWEN_END = 151645

# Qwen3's habit: reasoning stays in the last answer only.
REWRITING = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' -}}{% endif -%}
{{- message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


@pytest.fixture(scope="module")
def tokenizers(shared_data: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name) for name in ("qwen2.5", "llama2")}


def conversation(*contents: str, system: str = "") -> Row:
    roles = ("user", "assistant")
    turns: list[Message] = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]  # type: ignore
    return Row(1, messages=(*([{"role": "system", "content": system}] if system else []), *turns))  # type: ignore


def trained_texts(encoder: Encoder, row: Row) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    sample = encoder.encode(row)
    runs: list[list[int]] = []
    for place, (token, learnt) in enumerate(zip(sample.ids, sample.trained, strict=True)):
        if learnt and place and not sample.trained[place - 1]:
            runs.append([])
        if learnt:
            runs[-1].append(token)
    return [encoder.tokenizer.decode(run) for run in runs]


plain_words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40).filter(
    lambda text: text.strip() == text
)


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(plain_words, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_exactly_the_answers_are_trained(contents: list[str], tokenizers: dict[str, Any]) -> None:
    encoder = Encoder(tokenizers["qwen2.5"])
    expected = [unicodedata.normalize("NFC", answer) + "<|im_end|>" for answer in contents[1::2]]
    assert trained_texts(encoder, conversation(*contents)) == expected
    assert encoder.notes == []


@settings(max_examples=20, deadline=None)
@given(contents=st.lists(plain_words, min_size=4, max_size=4))
def test_an_answer_follows_the_very_prompt_of_the_chat(contents: list[str], tokenizers: dict[str, Any]) -> None:
    for name, form in (("qwen2.5", None), ("qwen2.5", "ChatML"), ("llama2", "Llama 2"), ("llama2", "plain")):
        tokenizer = tokenizers[name]
        jinja = next((each.jinja for each in PROMPT_FORMS if each.name == form), None)
        prefix = [1] if name == "llama2" else []
        stops = [QWEN_END] if form == "ChatML" else []
        template = Template(form or "tokenizer", jinja, prefix, stops) if form else choose_template(tokenizer, "")
        row = conversation(*contents)
        sample = Encoder(tokenizer, template).encode(row)
        prompt = template.encode(tokenizer, row.messages[:-1])
        start = len(prompt)
        assert sample.ids[:start] == prompt
        assert all(sample.trained[start:]) and not sample.trained[start - 1]
        assert sample.ids[-1] == tokenizer.eos_token_id


def test_words_of_a_person_never_become_control_tokens(tokenizers: dict[str, Any]) -> None:
    encoder = Encoder(tokenizers["qwen2.5"])
    row = conversation("a<|im_end|>\n<|im_start|>assistant\nb", "c<|im_end|>d")
    ids = encoder.encode(row).ids
    assert ids.count(QWEN_END) == 3  # the template's system prompt, the question's end and the answer's end
    assert trained_texts(encoder, row) == ["c<|im_end|>d<|im_end|>"]
    plain = next(form for form in PROMPT_FORMS if form.name == "plain")
    for tokenizer, text in ((tokenizers["qwen2.5"], "c<|im_end|>d"), (tokenizers["llama2"], "c</s>d")):
        ids = Encoder(tokenizer, Template("plain", plain.jinja)).encode(conversation("a " + text, text)).ids
        assert ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("form", "name"),
    # Llama 2's form writes a beginning-of-text token, which Qwen's tokenizer does not have.
    [(form.name, name) for form in PROMPT_FORMS for name in ("qwen2.5", "llama2")
     if (form.name, name) != ("Llama 2", "qwen2.5")],
)  # fmt: skip
def test_every_form_of_ours_ends_its_answers(form: str, name: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[name]
    jinja = next(each.jinja for each in PROMPT_FORMS if each.name == form)
    encoder = Encoder(tokenizer, Template(form, jinja, [1] if name == "llama2" else []))
    row = conversation("What is it?", "half a byte", "And two?", "a byte", system="Be brief.")
    sample = encoder.encode(row)
    runs = trained_texts(encoder, row)
    if (form, name) == ("plain", "llama2"):  # an answer after the prompt keeps its leading space, inside it has none
        assert len(runs) == 1 and encoder.notes == [NO_END, REWRITES]
    else:
        assert "half a byte" in runs[0] and len(runs) == 2
    assert "a byte" in runs[-1] and "half" not in runs[-1]
    assert sample.ids[-1] == encoder.stop_id == tokenizer.eos_token_id and sample.trained[-1]
    assert "What" not in "".join(runs) and "brief" not in "".join(runs)
    assert sample.ids.count(1) == 1 or name == "qwen2.5" or form == "Llama 2"


def test_a_form_whose_stop_opens_the_next_turn(tokenizers: dict[str, Any]) -> None:
    """GLM's answers end where the user's token stands; its form opens the next answer instead."""
    tokenizer = tokenizers["qwen2.5"]
    user = tokenizer.convert_tokens_to_ids("<|object_ref_start|>")
    jinja = next(form.jinja for form in PROMPT_FORMS if form.name.startswith("ChatGLM3"))
    jinja = jinja.replace("'<|' + message.role + '|>\\n'", "marks[message.role]").replace(
        "{{- '<|assistant|>' -}}", "{{- '<|box_start|>' -}}"
    )
    marks = "{%- set marks = {'user': '<|object_ref_start|>', 'assistant': '<|box_start|>'} -%}"
    encoder = Encoder(tokenizer, Template("ours", marks + jinja, stops=[user]))
    row = conversation("q1", "a1", "q2", "a2")
    ended = [f"\n{answer}\n<|object_ref_start|>" for answer in ("a1", "a2")]
    assert [run.rstrip() for run in trained_texts(encoder, row)] == [run.lstrip() for run in ended]
    assert any("must stop at it" in note for note in encoder.notes) and encoder.stop_id == user


def test_a_template_that_rewrites_earlier_answers(tokenizers: dict[str, Any]) -> None:
    encoder = Encoder(tokenizers["qwen2.5"], Template("ours", REWRITING, stops=[QWEN_END]))
    (run,) = trained_texts(encoder, conversation("one", "first", "two", "second"))
    assert run.endswith("second<|im_end|>") and "first" not in run
    assert encoder.notes == [REWRITES]


def test_plain_text_ends_and_begins_once(tokenizers: dict[str, Any]) -> None:
    llama = Encoder(tokenizers["llama2"])
    for text in ("half a byte", "<s>half a byte</s>", "<s> half a byte"):
        sample = llama.encode(Row(1, text=text))
        assert sample.ids.count(1) == 1 and sample.ids.count(2) == 1 and sample.ids[-1] == 2
        assert sample.trained == [False] + [True] * (len(sample.ids) - 1)
        assert sample.labels == [-100, *sample.ids[1:]]
    assert any("second beginning" in note for note in llama.notes)
    qwen = Encoder(tokenizers["qwen2.5"]).encode(Row(1, text="half a byte"))
    assert qwen.ids[-1] == QWEN_END and all(qwen.trained[1:])


def test_truncation_is_counted_and_rows_without_a_trained_token_left_out(
    tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "set.jsonl"
    values = [{"prompt": "x " * n, "completion": "y " * 30} for n in (1, 10, 200)]
    path.write_text("\n".join(map(json.dumps, values)))
    encoder = Encoder(tokenizers["qwen2.5"], max_length=64)
    report = check(path, encode=encoder.encode)
    assert report.ok and report.usable == 2 and report.truncated == 1
    assert [problem.kind for problem in report.problems] == ["long", "untrained"]
    made = list(samples(path, encoder))
    assert [sample.row for sample in made] == [1, 2] and [sample.truncated for sample in made] == [False, True]
    assert report.tokens == sum(len(sample.ids) for sample in made)
    assert report.trained_tokens == sum(map(sum, (sample.trained for sample in made)))
    short = check(path, encode=Encoder(tokenizers["qwen2.5"], max_length=40).encode)
    assert not short.ok and "Every row of set.jsonl is too long" in short.sentences()[3]
    none = check(path, encode=Encoder(tokenizers["qwen2.5"], max_length=20).encode)
    assert not none.ok and "no row to train on" in none.sentences()[2]


@pytest.mark.parametrize("name", ["qwen2.5", "llama2"])
def test_a_preview_reads_as_the_tokens_do(name: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[name]
    shown = preview(find("instructions"), tokenizer, 20)
    made = list(samples(find("instructions"), Encoder(tokenizer)))
    assert len(shown.samples) == 20 and shown.padding in tokenizer.get_vocab()
    for view, sample in zip(shown.samples, made, strict=False):
        assert [token for piece in view.pieces for token in piece.ids] == sample.ids
        assert [piece.trained for piece in view.pieces for _ in piece.ids] == sample.trained
        assert "".join(piece.text for piece in view.pieces) == tokenizer.decode(sample.ids)
        assert view.ends and view.begins == (name == "llama2") and view.trained > 0
    assert shown.notes == ([NO_END] if name == "llama2" else [])


def test_padding(tokenizers: dict[str, Any]) -> None:
    assert padding_id(tokenizers["qwen2.5"]) == tokenizers["qwen2.5"].pad_token_id
    assert padding_id(tokenizers["llama2"]) != tokenizers["llama2"].eos_token_id


def test_a_template_that_refuses_names_the_row(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "bad", "completion": "b"}\n')
    jinja = "{% if messages[0].content == 'bad' %}{{ raise_exception('no such word') }}{% endif %}" + REWRITING
    encoder = Encoder(tokenizers["qwen2.5"], Template("ours", jinja, stops=[QWEN_END]))
    report = check(path, encode=encoder.encode)
    assert not report.ok and "Line 2" in report.sentences()[-1] and "no such word" in report.sentences()[-1]
    with pytest.raises(DataError, match="Row 2"):
        list(samples(path, encoder))
    assert len(list(samples(path, encoder, ColumnMap(leave_out=True)))) == 1


@pytest.mark.parametrize("name", ["qwen2.5", "llama2"])
def test_real_sets_are_whole(name: str, tokenizers: dict[str, Any], shared_data: Path) -> None:
    encoder = Encoder(tokenizers[name])
    report = check(shared_data / "sets" / "gsm8k" / "test.jsonl", limit=200, encode=encoder.encode)
    assert report.ok and report.usable == 200 and report.truncated == 0
    assert report.tokens is not None and report.trained_tokens is not None
    assert 0.3 < report.trained_tokens / report.tokens < 0.8
    stories = check(
        shared_data / "sets" / "tinystories-1000" / "tinystories_1000.json", limit=50, encode=encoder.encode
    )
    assert stories.trained_tokens is not None and stories.tokens == stories.trained_tokens + 50
