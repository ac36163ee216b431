"""Which words stand between the turns: the tokenizer's own chat template, or the form its family was trained on.

Promises that a conversation starts with exactly the tokens that the tokenizer itself puts first, that text written by
a person never becomes a special token, and that a template which fails is replaced with a sentence that says so.
Rendering is transformers' own, in its sandbox. Knows nothing of engines.

The forms are those of the models' own code and of ipex-llm's examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from nibble.engines.base import Message
from nibble.errors import NibbleError
from nibble.prompts.trial import first_line, try_template

OWN = "tokenizer"
"""Name of a template that came with the tokenizer."""


@dataclass(frozen=True)
class Form:
    """A chat form of ours, and the models that it is for. The first form in `FORMS` that fits is taken."""

    name: str
    jinja: str
    families: tuple[str, ...] = ()
    """Values of `model_type` in config.json; a form with neither families nor tokens fits every model."""
    tokens: tuple[str, ...] = ()
    """Tokens that the vocabulary must have; enough on their own where `families` is empty."""
    named: tuple[str, ...] = ()
    """Words one of which must stand in the model's name."""
    stops: tuple[str, ...] = ()
    """Tokens that end an answer, where the vocabulary has them."""


LLAMA2 = """\
{%- if messages[0].role == 'system' -%}
{%- set block = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set block = '' -%}{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- if message.role == 'user' -%}
{{- '[INST] ' + (block + message.content if loop.first else message.content.strip()) + ' [/INST]' -}}
{%- else -%}
{{- ' ' + message.content.strip() + ' ' + eos_token + bos_token -}}
{%- endif -%}
{%- endfor -%}"""

LLAMA3 = """\
{%- for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content.strip() + '<|eot_id|>' -}}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}"""

CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' -}}"""

CHATGLM3 = """\
{%- for message in messages -%}
{{- '<|' + message.role + '|>\\n' + message.content + '\\n' -}}
{%- endfor -%}
{{- '<|assistant|>' -}}"""

CHATGLM2 = """\
{%- for message in messages -%}
{{- '问：' if message.role == 'user' else '答：' if message.role == 'assistant' else '' -}}
{{- message.content + '\\n\\n' -}}
{%- endfor -%}
{{- '答：' -}}"""

BAICHUAN2 = """\
{%- for message in messages -%}
{{- '<reserved_106> ' if message.role == 'user' else '<reserved_107> ' if message.role == 'assistant' else '' -}}
{{- message.content + ' ' -}}
{%- endfor -%}
{{- '<reserved_107>' -}}"""

INTERNLM2 = """\
{%- for message in messages -%}
{{- {'system': '<|System|>:', 'user': '<|User|>:', 'assistant': '<|Bot|>:'}[message.role] -}}
{{- message.content + '\\n' -}}
{%- endfor -%}
{{- '<|Bot|>:' -}}"""

PLAIN = """\
{%- for message in messages -%}
{{- ('\\n' if message.role == 'user' and not loop.first else '') + message.content -}}
{%- endfor -%}"""

FORMS: tuple[Form, ...] = (
    Form("ChatML", CHATML, tokens=("<|im_start|>", "<|im_end|>"), stops=("<|im_end|>", "<|endoftext|>")),
    Form("ChatML", CHATML, families=("qwen", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), stops=("<|im_end|>",)),
    Form(
        "ChatGLM3 / GLM-4", CHATGLM3, families=("chatglm", "glm", "glm4"), tokens=("<|user|>", "<|assistant|>"),
        stops=("<|user|>", "<|observation|>", "<|endoftext|>"),
    ),
    Form("ChatGLM2", CHATGLM2, families=("chatglm",)),
    Form("Baichuan2", BAICHUAN2, families=("baichuan",), stops=("<reserved_106>",)),
    Form("InternLM2", INTERNLM2, families=("internlm", "internlm2", "internlm3"), stops=("<eoa>", "<|User|>")),
    Form(
        "Llama 3", LLAMA3, tokens=("<|start_header_id|>", "<|eot_id|>"), named=("chat", "instruct"),
        stops=("<|eot_id|>",),
    ),
    Form("Llama 2", LLAMA2, families=("llama",), named=("chat", "instruct")),
    Form("plain", PLAIN),
)  # fmt: skip


@dataclass(frozen=True)
class Template:
    """How a loaded model's conversations become token ids."""

    name: str
    """`tokenizer`, or the name of one of `FORMS`."""
    jinja: str | None = None
    """One of ours; None is the tokenizer's own."""
    prefix: list[int] = field(default_factory=list)
    """Ids before the rendered text: what the tokenizer itself puts first, for templates that do not write it."""
    stops: list[int] = field(default_factory=list)
    """Ids that end an answer, besides the model's own."""
    takes_system: bool = True
    """Whether the template knows a system prompt; where not, it goes before the first question."""
    note: str = ""
    """A sentence for the person: why it is not the tokenizer's own template."""

    @property
    def continues(self) -> bool:
        """Whether an answer goes on with the prompt's own text, so that its leading space belongs to it."""
        return self.name == "plain"

    def encode(self, tokenizer: Any, messages: Sequence[Message], *, opens: bool = True) -> list[int]:
        """The token ids of a conversation's prompt, up to where the answer begins.

        Args:
            tokenizer: of transformers.
            messages: one system prompt at most, then user and assistant in turns.
            opens: whether the words that open an answer follow. False leaves them out where the template knows how,
                which ours do not.

        Raises:
            NibbleError: the template refuses this conversation.
        """
        try:
            encoding = tokenizer.apply_chat_template(
                [dict(message) for message in (messages if self.takes_system else _fold_system(messages))],
                chat_template=self.jinja, add_generation_prompt=opens, return_dict=True, sanitize_control_tokens=True,
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, OverflowError) as error:
            raise NibbleError(
                f"The model's chat template refuses this conversation: {first_line(error)}.", "Begin a new chat."
            ) from error
        return [*self.prefix, *encoding["input_ids"]]


def choose_template(tokenizer: Any, family: str, names: Sequence[str] = ()) -> Template:
    """The tokenizer's own template where it works, else the form of the model's family, else plain completion.

    Args:
        tokenizer: of transformers.
        family: `model_type` of config.json.
        names: whatever the model is called; "chat" in a Llama's name tells it from a base model.
    """
    note = ""
    if tokenizer.chat_template:
        verdict = try_template(tokenizer)
        if not verdict.problem:
            return Template(OWN, takes_system=verdict.takes_system)
        note = f"The tokenizer's own chat template cannot be used: {verdict.problem}."
    vocabulary = tokenizer.get_vocab()
    form = next(form for form in FORMS if _fits(form, vocabulary, family, names))
    return Template(
        form.name,
        form.jinja,
        prefix=_leading_ids(tokenizer),
        stops=[vocabulary[token] for token in form.stops if token in vocabulary],
        note=note,
    )


def _fits(form: Form, vocabulary: dict[str, int], family: str, names: Sequence[str]) -> bool:
    called = " ".join(names).lower()
    return (
        (not form.families or family in form.families)
        and all(token in vocabulary for token in form.tokens)
        and (not form.named or any(word in called for word in form.named))
    )


def _leading_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text of its own accord: a BOS token, ChatGLM's [gMASK] sop, or nothing."""
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    full = tokenizer("x")["input_ids"]
    starts = (start for start in range(len(full) - len(bare) + 1) if full[start : start + len(bare)] == bare)
    return list(full[: next(starts, 0)])


def _fold_system(messages: Sequence[Message]) -> Sequence[Message]:
    if messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]
