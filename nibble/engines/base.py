"""The contract of every engine: one stream of chunks for the page, the console, the tests and the benchmarks.

Promises plain data that crosses a process border as JSON. Knows nothing of torch, tokenizers or Gradio.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypedDict

from nibble.errors import NibbleError

FinishReason = Literal["stop", "length", "stopped"]


class Message(TypedDict):
    """One turn of a conversation; `content` is plain text."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. A field left None takes the model's own generation config.

    Raises:
        NibbleError: a value outside its range, naming the field.
    """

    max_new_tokens: int | None = None
    """Longest answer, in tokens."""
    temperature: float | None = None
    """0 is greedy: always the most likely token."""
    top_p: float | None = None
    """Nucleus: sample among the most likely tokens whose probabilities add up to this."""
    top_k: int | None = None
    """Sample among this many most likely tokens; 0 is no limit."""
    repetition_penalty: float | None = None
    """Above 1, tokens that were already used become less likely."""
    seed: int | None = None
    """The same seed, settings and conversation give the same answer."""

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            # `not <=` rather than `>`: a NaN must fail too.
            if value is not None and not low <= value <= high:
                raise NibbleError(f"{name} is {value}.", f"It must lie between {low:g} and {high:g}.")


LIMITS: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 32_768),
    "temperature": (0.0, 5.0),
    "top_p": (0.01, 1.0),
    "top_k": (0, 1_000),
    "repetition_penalty": (0.5, 3.0),
    "seed": (0, 2**32 - 1),
}
"""Field of `Sampling` -> lowest and highest value accepted."""


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer, or word of how it fares. The texts of all chunks, joined, are the answer."""

    text: str = ""
    """What was decoded since the chunk before; whole characters only."""
    tokens: int = 0
    """Tokens generated so far."""
    tokens_per_s: float = 0.0
    """Decode speed so far, the first token left out."""
    first_token_s: float | None = None
    """Seconds from the request's turn to its first token; None before it."""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Tokens of the prompt whose keys and values were still in the cache."""
    dropped_turns: int = 0
    """Oldest turns that did not fit into the context and were left out."""
    place: int = 0
    """Requests that are served before this one; 0 when it is this one's turn."""
    loading: bool = False
    """The model is still being loaded, or started again; the answer follows when it is there."""
    finish_reason: FinishReason | None = None
    """Set on the last chunk only."""
    full_text: str | None = None
    """On the last chunk: the whole answer decoded at once, where it differs from the joined pieces."""


@dataclass(frozen=True)
class LoadSpec:
    """Which model to load, and how."""

    folder: str
    """A Hugging Face folder, as an absolute path."""
    low_bit: str = "sym_int4"
    """A format for a model in full precision; empty keeps the stored precision."""
    device: str = "auto"
    name: str = ""
    """What to call the model; empty is the folder's name."""
    dtype: str = ""
    """Of activations, by torch's name; empty is the device's own."""
    trust_remote_code: bool = False
    """Whether Python code in the folder may run."""


@dataclass(frozen=True)
class EngineInfo:
    """What is loaded, for the status line, `nibble models` and `nibble doctor`."""

    model: str
    format: str
    device: str
    dtype: str
    reason: str
    """Why this device and dtype."""
    context: int
    """Tokens the model can see at once."""
    template: str
    """Where the chat template came from: "tokenizer" or the name of one of ours."""
    family: str = ""
    """`model_type` of config.json."""
    parameters: int = 0
    memory_bytes: int = 0
    """Private memory of the process that holds the model (on a GPU: memory allocated there)."""
    kernel: str = ""
    """The matmul that serves one-token steps, e.g. "int4 kernel of torch" or "portable"."""
    load_s: float = 0.0
    warmup_s: float = 0.0
    note: str = ""
    """A sentence for the person where something was not as usual, such as a chat template that cannot be used."""


class Engine(Protocol):
    """Whatever can answer. One object may be asked from several threads at once; it queues them fairly."""

    @property
    def info(self) -> EngineInfo: ...

    def stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        stop: threading.Event,
        visitor: str | None = None,
        adapter: str = "",
    ) -> Iterator[Chunk]:
        """Answer the conversation, piece by piece.

        Visitors are served in turn; a request without one counts as a visitor of its own. No step blocks longer than
        0.5 s: an empty chunk is yielded when there is nothing to tell. Setting `stop` ends this request alone, with
        finish reason "stopped" and the text so far kept. Closing the iterator does the same. `adapter` is the folder
        of an adapter that the loaded model wears for this answer; empty is none.

        Raises:
            NibbleError: whatever went wrong in the generating thread or process, in one sentence.
        """
        ...

    def close(self) -> None:
        """Give back memory, threads and processes. A second call does nothing."""
        ...
