"""`flask doctor`: looks at an installation from this host, and says what is wrong and what to do about it.

Each module looks at one thing, and gives a `Finding` for each check; `examination` runs them side by side, within a bounded
time, whatever hangs or fails; `cli` shows what they found. Nothing is changed by it, and no secret is shown.
"""
