"""The process that measures one model: `python -m nibble.quality.child`, asked by `nibble.quality.processes`.

It reads one JSON object from its standard input and writes one a line to its output: {"progress": [done, total]}, at
last {"result": ...} or {"error": [message, hint]}. Whatever a library prints goes to standard error. It ends when its
parent does. Needs torch.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nibble.errors import ModelError, NibbleError
from nibble.screen import check

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that this process gets when the thread that started it ends."""


class Work:
    """One thing that is asked of this process. Keys of a spec: those that `__init__` and the methods read."""

    def __init__(self, spec: Mapping[str, Any], progress: Any) -> None:
        from nibble.devices import choose
        from nibble.quality import windows

        self.spec = spec
        self.progress = progress
        self.folder = Path(spec["folder"])
        self.trusted = bool(spec.get("trusted"))
        self.device = choose(spec.get("device", "cpu"))
        self.tokenizer = windows.load_tokenizer(self.folder, trusted=self.trusted)
        self.fingerprint = windows.fingerprint(self.tokenizer)
        if spec.get("fingerprint", self.fingerprint) != self.fingerprint:
            raise ModelError(
                f"{spec['name']} and {spec['against']} have different vocabularies.",
                "Compare models of the same family, or formats of one model.",
            )
        self.windows: list[list[int]] = spec.get("windows") or self._cut(int(spec["tokens"]))

    def _cut(self, tokens: int) -> list[list[int]]:
        from nibble.quality import text, windows

        path = self.spec.get("text")
        return windows.cut(text.read_text(Path(path) if path else None), self.folder, self.tokenizer, tokens)

    def tokens(self) -> dict[str, Any]:
        """Nothing but the windows, and that the vocabulary is the one expected."""
        return self._shared()

    def reference(self) -> dict[str, Any]:
        """Write the log-probabilities of the stored weights in float32 into the file `fd`, of `room` bytes at most.

        Where fewer bytes are free than are `needed`, only `free` is told.
        """
        from nibble.devices import free_memory
        from nibble.quality import distance, subject

        free = free_memory(self.device.kind)
        if self.spec["needed"] > free:
            return self._shared() | {"free": free}
        model = subject.load_exact(self.folder, self.device, trusted=self.trusted)
        vocabulary = self._vocabulary(model)
        most = int(self.spec["room"]) // (4 * vocabulary)
        if distance.positions(self.windows) > most:
            self.windows = self._cut(max(1, most))
        into = distance.LogProbs(self.spec["fd"], distance.positions(self.windows), vocabulary)
        found = distance.read(model, self.windows, self.progress, into=into)
        return self._shared() | found | {"vocabulary": vocabulary}

    def measure(self) -> dict[str, Any]:
        """Load the model as chat does, answer once, then read the text and look at each layer."""
        from nibble.quality import distance, layers, subject
        from nibble.transformers import count_parameters

        options = dict(self.spec["options"]) | {"trust_remote_code": self.trusted}
        with subject.Peak(self.device.kind) as loading:
            start = time.perf_counter()
            model = subject.load(self.folder, options, self.device)
            load_s = time.perf_counter() - start
        with subject.Peak(self.device.kind) as answering:
            rate = subject.speed(model, [token for window in self.windows for token in window])
        mapped = subject.mapped_weights()
        subject.settle()
        steady = answering.now() + mapped
        size, parameters = subject.stored_bytes(model), count_parameters(model)
        found: dict[str, Any] = self._shared() | {
            "load_s": load_s, "steady_bytes": steady, "tokens_per_s": rate,
            "peak_bytes": max(loading.bytes, answering.bytes + mapped, steady),
            "size_bytes": size, "bits_per_weight": 8 * size / parameters, "layers": [],
        }  # fmt: skip
        if self.spec.get("reads", True):
            found |= distance.read(model, self.windows, self.progress, beside=self._beside(model))
        if self.spec.get("dense"):
            found["layers"] = layers.errors(model, layers.DenseWeights(Path(self.spec["dense"])))[: layers.WORST]
        return found

    def sensitivity(self) -> dict[str, Any]:
        """What packing each layer alone would cost, in each of `formats`."""
        from nibble.quality import sensitivity, subject

        model = subject.load(self.folder, {"load_in_low_bit": "bf16", "trust_remote_code": self.trusted}, self.device)
        found = sensitivity.sensitivities(model, self.windows, self.spec["formats"], self.progress)
        return self._shared() | {"sensitivities": found}

    def _beside(self, model: Any) -> Any:
        from nibble.quality import distance

        if self.spec.get("fd") is None:
            return None
        if self._vocabulary(model) != self.spec["vocabulary"]:
            raise ModelError(
                f"{self.spec['name']} and {self.spec['against']} have vocabularies of different sizes: "
                f"{self._vocabulary(model)} and {self.spec['vocabulary']}.",
                "Compare models of the same family, or formats of one model.",
            )
        return distance.LogProbs(self.spec["fd"], distance.positions(self.windows), self.spec["vocabulary"])

    @staticmethod
    def _vocabulary(model: Any) -> int:
        """How many logits the model gives: often a few more than the tokenizer has tokens."""
        import torch

        with torch.inference_mode():
            return int(model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device)).logits.shape[-1])

    def _shared(self) -> dict[str, Any]:
        return {"windows": self.windows, "fingerprint": self.fingerprint, "device": self.device.kind}


WORKS = {"tokens": Work.tokens, "reference": Work.reference, "measure": Work.measure, "sensitivity": Work.sensitivity}


def work(spec: Mapping[str, Any], progress: Any) -> dict[str, Any]:
    """Do what a spec asks for.

    Raises:
        NibbleError: it cannot be done.
    """
    import torch

    from nibble.devices import usable_cores

    check(Path(spec["folder"]), trust_remote_code=bool(spec.get("trusted")))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())
    torch.manual_seed(0)
    return WORKS[spec["work"]](Work(spec, progress))


def main() -> int:
    """Take the pipes for the protocol, leave the standard streams to whoever prints, and work."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(**message: Any) -> None:
        sink.write(json.dumps(message) + "\n")
        sink.flush()

    spec = json.loads(sys.stdin.buffer.readline())
    try:
        send(result=work(spec, lambda done, total: send(progress=[done, total])))
    except NibbleError as error:
        send(error=[error.message, error.hint])
    except (RuntimeError, MemoryError) as error:
        # An accelerator's out-of-memory is one of these; the traceback is for the log.
        words = str(error).strip().splitlines() or [type(error).__name__]
        send(error=[f"{spec['name']} could not be measured: {words[0][:300]}", "Measure fewer tokens, or fewer bits."])
    return 0


if __name__ == "__main__":
    code = main()
    # Threads of torch would hold up an ordinary exit.
    sys.stderr.flush()
    os._exit(code)
