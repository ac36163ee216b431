"""A double of the model's host for the page's tests: it answers by script, at once or slowly, and can be told to fail.

Serves the real page with it when run: python -m tests.scripted PORT HOME.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from nibble.engines.base import Chunk, EngineInfo, Message, Sampling
from nibble.errors import EngineDied, ModelError, NibbleError

INFO = EngineInfo(
    model="guide", format="sym_int4", device="cpu", dtype="bfloat16", context=1024, template="tokenizer",
    reason="cpu: torch finds no accelerator; bfloat16: half the memory of float32", memory_bytes=212 * 2**20,
    kernel="torch's int4 matmul", load_s=0.8,
)  # fmt: skip

SHOWCASE = """Quantizing stores each block of weights as small integers and one scale, \\(w \\approx s \\cdot q\\):

```python
def quantize(block):
    scale = max(map(abs, block)) / 8
    return [round(w / scale) for w in block], scale
```

| format | bits a weight | blocks of |
|---|---|---|
| `sym_int4` | 4.5 | 32 |
| `nf4` | 4.5 | 64 |
| `sym_int8` | 8.5 | 32 |

The error of a block is bounded by half a step:

$$\\max_i |w_i - s q_i| \\le \\frac{s}{2}$$

1. Smaller blocks: *less* error, more scales.
2. Bigger blocks: the reverse.
"""


class ScriptedHost:
    """Answers `script(question)`, piece by piece; everything that the page knows of a host, and nothing behind it."""

    def __init__(self, pause: float = 0.01, state: str = "ready") -> None:
        self.pause = pause
        self.state = state
        self.loading = "guide" if state == "loading" else ""
        self.sentence = ""
        self.info: EngineInfo | None = INFO
        self.waiting = 0
        self.asked: list[Sequence[Message]] = []
        self.samplings: list[Sampling] = []
        self.worn: list[str] = []
        self.closed = False

    async def load(self, name: str, low_bit: str = "", device: str = "", *, paths: bool = False) -> EngineInfo:
        """Pretend to have loaded what was asked for."""
        if name == "broken":
            raise ModelError("broken has no tokenizer.", "Copy tokenizer.json into the folder.")
        self.info = replace(INFO, model=name.rpartition("/")[2], format=low_bit or "sym_int4")
        return self.info

    async def unload(self) -> None:
        """Nothing is loaded then."""
        self.info, self.state = None, "empty"

    def close(self) -> None:
        """Remember it."""
        self.closed = True

    def pieces(self, question: str) -> list[str]:
        """The answer to a question."""
        if question == "show":
            return [word + " " for word in SHOWCASE.split(" ")]
        if question == "endless":
            return [f"{number} " for number in range(5_000)]
        if question == "think":
            return ["<think>", "first ", "I ", "think", "</think>", "then ", "I ", "speak"]
        if question.startswith("say:"):
            return [question[4:]]
        return [word + " " for word in f"You said: {question} . That is what I heard".split(" ")]

    async def astream(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        stop: threading.Event,
        visitor: str | None = None,
        adapter: str = "",
    ) -> AsyncGenerator[Chunk, None]:
        """As `ModelHost.astream`."""
        self.asked.append(messages)
        self.samplings.append(sampling)
        self.worn.append(adapter)
        self.waiting += 1
        question, started, tokens = messages[-1]["content"], time.monotonic(), 0
        try:
            if self.info is None:
                raise ModelError("No model is loaded.", "Load one, then send the message again.")
            yield Chunk(loading=self.state == "loading", place=1)
            for piece in self.pieces(question):
                if stop.is_set():
                    yield Chunk(tokens=tokens, tokens_per_s=20.0, first_token_s=0.1, finish_reason="stopped")
                    return
                if question == "die" and tokens == 4:
                    raise EngineDied("The model's process was killed.", "Your next message starts it again.")
                if question == "fail" and tokens == 2:
                    raise NibbleError("The answer failed inside the model.", "Send it again.")
                if question == "crash" and tokens == 2:
                    raise RuntimeError("secret detail /etc/passwd")
                tokens += 1
                speed = tokens / max(1e-6, time.monotonic() - started)
                yield Chunk(piece, tokens, speed, 0.12, 24, 8, finish_reason=None)
                await asyncio.sleep(self.pause)
            yield Chunk("", tokens, 41.8, 0.12, 24, 8, finish_reason="stop")
        finally:
            self.waiting -= 1


if __name__ == "__main__":
    import uvicorn

    from app import build_server
    from nibble.config import Settings

    settings = Settings(port=int(sys.argv[1]), home=sys.argv[2])
    uvicorn.run(build_server(settings, ScriptedHost(pause=0.03)), port=settings.port, log_level="warning", ws="none")
