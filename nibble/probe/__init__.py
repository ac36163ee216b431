"""What this machine is good for: measured once, in about two seconds, in a process of its own, and kept in the home.

`python -m nibble.probe --home H` measures. Importing this imports no torch.
"""

from nibble.probe.machine import FILE, Machine, ensure, identity, known, renew, unmeasured

__all__ = ["FILE", "Machine", "ensure", "identity", "known", "renew", "unmeasured"]
