"""A warm process that saves a model again and again, in forked children that are killed or meet faults; prints JSON.

`python -m tests.support.crashing kills|faults WORK N SEED`: at the moments that SEED gives, N saves are killed; or each
call of a save that writes, syncs, renames or makes something fails once, every N-th of them (1 is every one). After
each save the folder must be one version whole.
"""

import ctypes
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import transformers

from nibble import publish
from nibble.transformers import AutoModelForCausalLM

FORMATS = ("sym_int4", "nf4")
NOTHING = "nothing"


class Bench:
    """Two versions of a model in memory, the folder that they are saved to, and what each looks like on disk."""

    def __init__(self, work: Path) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        shape = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "vocab_size": 256}
        config = transformers.LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
        transformers.LlamaForCausalLM(config).save_pretrained(work / "source")
        (work / "source" / "tokenizer_config.json").write_text("{}")
        self.models = {
            name: AutoModelForCausalLM.from_pretrained(work / "source", load_in_low_bit=name) for name in FORMATS
        }
        self.prompt = torch.tensor([[1, 2, 3]])
        self.texts, self.known = {}, {}
        for name, model in self.models.items():
            model.save_low_bit(work / "reference" / name)
            self.texts[name] = self.text(model)
            self.known[name] = hashes(work / "reference" / name)
        self.folder = work / "models" / "m"
        self.folder.parent.mkdir()
        self.save(FORMATS[0])
        began = time.monotonic()
        self.save(FORMATS[1])
        self.seconds = time.monotonic() - began

    def save(self, name: str) -> None:
        self.models[name].save_low_bit(self.folder)

    def text(self, model: transformers.PreTrainedModel) -> list[int]:
        return model.generate(self.prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False).tolist()[0]

    def version(self) -> str:
        """Which version lies in the folder, by every byte of it; "mixed" where it is none of those known."""
        if not self.folder.exists():
            return NOTHING
        found = hashes(self.folder)
        return next((name for name, files in self.known.items() if files == found), f"mixed: {sorted(found)}")

    def other(self) -> str:
        """The version that is not there now."""
        return FORMATS[1] if self.version() == FORMATS[0] else FORMATS[0]

    def check(self, allowed: set[str]) -> str:
        """After a save the folder is one of these versions, and a new start leaves nothing beside it."""
        version = self.version()
        assert version in allowed, f"{version}, not one of {allowed}"
        publish.clean_all(self.folder.parent)
        assert self.version() == version
        assert not self.leftovers()
        if version != NOTHING:
            publish.verify(self.folder, contents=True)
        return version

    def leftovers(self) -> list[str]:
        """What killed saves have left beside the folder."""
        return [path.name for path in self.folder.parent.iterdir() if ".tmp-" in path.name or ".old-" in path.name]

    def read(self) -> None:
        """What lies in the folder loads and says what it said in memory."""
        assert self.text(AutoModelForCausalLM.load_low_bit(self.folder)) == self.texts[self.version()]


def hashes(folder: Path) -> dict[str, str]:
    """Name -> sha256 of each file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kills(bench: Bench, count: int, seed: int) -> Counter[str]:
    """Kill `count` saves; how they ended."""
    dice, ends, reach = random.Random(seed), Counter[str](), bench.seconds
    for number in range(count):
        if number % 5 == 0:  # each fifth is the first save to its place
            shutil.rmtree(bench.folder, ignore_errors=True)
        before, after = bench.version(), bench.other()
        child = os.fork()
        if child == 0:
            bench.save(after)
            os._exit(0)
        moment = dice.random()
        time.sleep(moment * reach)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        ends["unfinished"] += bool(bench.leftovers())
        version = bench.check({before, after})
        ends["killed" if killed else "saved"] += 1
        ends["new" if version == after else "old"] += 1
        # A busy machine saves more slowly: the moments must go on to lie all over the save.
        reach *= 0.93 if not killed else 1.1 if version == before and moment > 0.5 else 1.0
        if number % 10 == 9 and version != NOTHING:
            bench.read()
    return ends


def faults(bench: Bench, every: int, seed: int) -> Counter[str]:
    """Fail each call of a save, once with each error; and let the disk be full from each call on."""
    library = ctypes.CDLL(None)
    watched = str(bench.folder.parent).encode()
    library.fault_arm(watched, 0, 0, 0)
    bench.save(bench.other())
    calls = library.fault_count()
    ends = Counter[str](calls=calls)
    for call in range(1 + seed % every, calls + 1, every):
        for code, times in ((errno.ENOSPC, 1), (errno.EIO, 1), (errno.ENOSPC, 10**9)):
            before, after = bench.version(), bench.other()
            child = os.fork()
            if child == 0:
                library.fault_arm(watched, call, times, code)
                try:
                    bench.save(after)
                except Exception as error:  # noqa: BLE001 - whatever it is, it must name the cause
                    told = str(error)
                    os._exit(1 if os.strerror(code) in told else 2)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            end = ("saved", "refused", "refused without the cause")[os.waitstatus_to_exitcode(status)]
            try:
                bench.check({after} if end == "saved" else {before})
            except AssertionError as error:
                raise AssertionError(f"call {call} of {calls}, {errno.errorcode[code]}, {end}: {error}") from None
            ends[end] += 1
    bench.read()
    return ends


def main() -> None:
    action, work, number, seed = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bench = Bench(Path(work))
    ends = {"kills": kills, "faults": faults}[action](bench, int(number), int(seed))
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
