"""A child process that speaks the protocol and has the fault that its argument names; no model has one on demand."""

import json
import os
import signal
import sys
import time

from nibble.engines.base import EngineInfo


def say(**message) -> None:
    sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
    sys.stdout.buffer.flush()


def main(fault: str) -> None:
    name = json.loads(sys.stdin.buffer.readline())["load"]["name"]
    if "slow" in name:
        time.sleep(0.5)
    if "bad" in name:
        say(error={"kind": "ModelError", "message": "bad cannot be loaded.", "hint": "Take another."})
        sys.exit(1)
    if fault == "dies while loading":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "exits while loading":
        sys.exit(3)
    if fault == "floods its log":
        sys.stderr.write("x" * 5_000_000 + "\n" + "y\n" * 100_000)
        sys.stderr.flush()
    if fault == "prints":
        sys.stdout.write('hello\n[1, 2]\n{"half": \n\n')
        sys.stdout.flush()
    say(ready={**EngineInfo(name or "m", "f", "cpu", "bf16", "", 8, "t").__dict__})
    for line in sys.stdin.buffer:
        message = json.loads(line)
        if "ask" not in message:
            continue
        number = message["id"]
        if fault == "says its name":
            for count in range(1, 1001 if "long" in name else 11):
                say(id=number, chunk={"text": f"{name} ", "tokens": count})
                time.sleep(0.01)
            say(id=number, chunk={"tokens": 10, "finish_reason": "stop"})
            continue
        if fault == "stalls":
            say(id=number, chunk={"text": "a", "tokens": 1})
            time.sleep(600)
        if fault == "does not end":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            say(id=number, chunk={"text": "a", "tokens": 1})
            while True:
                time.sleep(1)
        if fault == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        say(id=number + 1000, chunk={"text": "nobody asked"})
        say(id=number, chunk={"text": "fine", "tokens": 1, "finish_reason": "stop"})
        say(id=number, chunk={"text": "too late", "tokens": 2})


main(sys.argv[1])
