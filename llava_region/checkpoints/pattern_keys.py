"""Match the keys of `rank_pattern` and `alpha_pattern`, and other fields that are regular expressions, against names of modules.

Keys come from a file, and some expressions take longer than anybody lives: those are matched in a process of their own that can be
stopped. This file imports the standard library alone, so that the process starts at once.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection

# How PEFT puts a key into an expression: older versions (0.10, 0.12) and newer ones (0.17). `^a` and a whole name match by the second
# alone, and `a|b` matches other modules by each.
RULES = (r".*\.{key}$", r"(.*\.)?({key})$")
WHOLE = "{key}"  # of the fields that hold one expression, which has to match a whole name
SECONDS = 5.0
_PLAIN = re.compile(r"[\w.^$|-]+", re.ASCII)  # nothing in it repeats, so that it is matched at once

Matches = set[tuple[str, str, str]]


class BadPattern(ValueError):
    """A key that cannot be matched; the message says why."""


def matches(keys: Collection[str], modules: Collection[str], rules: Collection[str] = RULES) -> Matches:
    """Which key matches which module by which rule: triples of rule, key and module.

    Raises:
        BadPattern: a key is not a regular expression, or matching takes longer than `SECONDS`.
    """
    if all(map(_PLAIN.fullmatch, keys)):
        return _match(keys, modules, rules)
    asked = json.dumps([[*keys], [*modules], [*rules]])
    try:
        done = subprocess.run([sys.executable, "-I", __file__], input=asked, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as e:
        raise BadPattern(f"one of them takes longer than {SECONDS:g} s to match") from e
    if done.returncode:
        raise BadPattern(done.stdout.strip() or "one of them cannot be matched")
    return {(rule, key, module) for rule, key, module in json.loads(done.stdout)}


def _match(keys: Collection[str], modules: Collection[str], rules: Collection[str]) -> Matches:
    found = set()
    for rule in rules:
        for key in keys:
            pattern = re.compile(rule.replace("{key}", key))
            match = pattern.fullmatch if rule == WHOLE else pattern.match
            found |= {(rule, key, module) for module in modules if match(module)}
    return found


def _main() -> int:
    keys, modules, rules = json.load(sys.stdin)
    try:
        json.dump(sorted(_match(keys, modules, rules)), sys.stdout)
    except (re.error, RecursionError, OverflowError, MemoryError) as e:
        print(f"one of them is not a regular expression ({e})")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
