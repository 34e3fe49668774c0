"""Runs programs that a model wrote, and lets nothing of a test near them (docs/sandbox.md).

    box.py, judge.py   trusted: they have the tests       ──socket per run──►  a child (untrusted: the program alone)
         │ control socket                                                       ▲ fork
         └──────────────► server.py: clean, warm, tests never come here ────────┘  walls.py, filter.py; bubblewrap.py

Invariants
- Tests, expected values and comparisons never enter the child: only arguments go in, and only plain values come back
  (values.py), so an object that equals everything, an early exit or a forged line has nothing to act on.
- A run is one process, and it is gone when its `close` returns; all of them are gone with the process that has the box.
- Where no wall works nothing is run: SandboxError says why.
"""
