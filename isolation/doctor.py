"""`isolation doctor`: what each backend's probe found, as text for people or as JSON for programs."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import Any

from isolation.hookspecs import Probe

_GREEN, _YELLOW, _RED, _BOLD = "32", "33", "31", "1"
_PASS, _CAUTION, _FAIL = "PASS", "NOTE", "FAIL"


def as_text(probes: Mapping[str, Probe], *, color: bool = False, width: int = 100) -> str:
    """One paragraph per backend: does it work, why (not), its checks with their remedies, its features."""
    if not probes:
        return "No backend is installed: reinstall isolation-kit, which brings one."
    said: set[str] = set()
    return "\n\n".join(_paragraph(name, probe, color, width, said) for name, probe in probes.items())


def as_data(probes: Mapping[str, Probe]) -> dict[str, Any]:
    """For `--json`."""
    return {
        "works": any(probe.works for probe in probes.values()),
        "backends": {
            name: {
                "works": probe.works,
                "reason": probe.reason,
                "checks": [dataclasses.asdict(check) for check in probe.checks],
                "features": sorted(probe.features),
            }
            for name, probe in probes.items()
        },
    }


def line(name: str, probe: Probe, *, color: bool = False) -> str:
    """For `isolation backends`."""
    state = _paint("works", _GREEN, color) if probe.works else _paint("does not work here", _RED, color)
    features = f" ({', '.join(sorted(probe.features)) or 'no features'})" if probe.works else ""
    return f"{name}: {state}{features}"


def _paragraph(name: str, probe: Probe, color: bool, width: int, said: set[str]) -> str:
    """`said`: remedies that stand above, and are not told again."""
    remedies = {check.remedy for check in probe.checks if check.remedy} | said

    def once(text: str) -> str:
        """A reason, and what is found, may name the remedies, too."""
        for remedy in remedies:
            text = text.replace(f"; {remedy}", "")
        return text

    state = _paint("works", _GREEN, color) if probe.works else _paint("does not work here", _RED, color)
    lines = [f"{_paint(name, _BOLD, color)}: {state}", *_wrap(once(probe.reason), "  ", width)]
    longest = max((len(check.name) for check in probe.checks), default=0)
    # A long name gets its line to itself, rather than pushing every other one to the right.
    column = min(longest, 24)
    for check in probe.checks:
        bad = _paint(_CAUTION, _YELLOW, color) if check.optional else _paint(_FAIL, _RED, color)
        mark = _paint(_PASS, _GREEN, color) if check.ok else bad
        if len(check.name) > column:
            lines += [f"  {mark}  {check.name}", *_wrap(once(check.found), " " * (column + 10), width)]
        else:
            head = f"  {mark}  {check.name:<{column}}  "
            found = _wrap(once(check.found), " " * (column + 10), width) or [""]
            lines += [head + found[0].lstrip(), *found[1:]]
        if not check.ok and check.remedy:
            lines += _wrap("→ as above" if check.remedy in said else f"→ {check.remedy}", " " * (column + 10), width)
            said.add(check.remedy)
    if probe.works:
        lines += _wrap(f"features: {', '.join(sorted(probe.features)) or 'none'}", "  ", width)
    return "\n".join(line.rstrip() for line in lines)


def _wrap(text: str, indent: str, width: int) -> list[str]:
    """Commands and names are there to be copied: never broken in the middle."""
    return textwrap.wrap(
        text,
        max(width, len(indent) + 40),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _paint(text: str, code: str, color: bool) -> str:
    return f"\033[{code}m{text}\033[0m" if color else text
