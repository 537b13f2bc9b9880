"""isolation doctor: from probes to text and data."""

from __future__ import annotations

from isolation import doctor
from isolation.hookspecs import Check, Probe

GOOD = Probe(True, "a sandbox was made", (Check("kernel", True, "6.1"),), frozenset({"tty", "fork"}))
BAD = Probe(
    False,
    "unshare: not permitted",
    (Check("kernel", True, "6.1"), Check("kernel.a_very_long_sysctl_name_indeed", False, "1", "sudo sysctl x=0")),
)


def test_text_says_what_works_what_failed_and_the_remedy() -> None:
    text = doctor.as_text({"good": GOOD, "bad": BAD})
    good, bad = text.split("\n\n")
    assert good.startswith("good: works\n  a sandbox was made\n  PASS  kernel  6.1")
    assert "features: fork, tty" in good
    assert bad.startswith("bad: does not work here\n  unshare: not permitted")
    assert "FAIL  kernel.a_very_long_sysctl_name_indeed" in bad
    assert "→ sudo sysctl x=0" in bad
    assert "\033" not in text


def test_a_remedy_is_told_once() -> None:
    remedy = "ask for another container"
    one = Probe(False, f"it may not; {remedy}", (Check("/proc", False, "covered", remedy),), frozenset({"fork"}))
    other = Probe(
        False, "needs one", (Check("one", False, f"does not work: it may not; {remedy}", remedy),), frozenset({"fork"})
    )
    text = doctor.as_text({"one": one, "other": other})
    assert text.count(remedy) == 1
    assert "→ as above" in text
    assert "features" not in text
    assert doctor.line("one", one) == "one: does not work here"


def test_color_only_when_asked() -> None:
    assert "\033[32mworks\033[0m" in doctor.as_text({"good": GOOD}, color=True)
    assert "\033[31mdoes not work here\033[0m" in doctor.line("bad", BAD, color=True)


def test_commands_are_never_broken_in_the_middle() -> None:
    probe = Probe(False, "x", (Check("k", False, "f", "sysctl " + "a-b" * 60),))
    assert "a-b" * 60 in doctor.as_text({"b": probe}, width=60)


def test_data() -> None:
    data = doctor.as_data({"good": GOOD, "bad": BAD})
    assert data["works"] is True
    assert data["backends"]["bad"]["checks"][1]["remedy"] == "sudo sysctl x=0"
    assert data["backends"]["good"]["features"] == ["fork", "tty"]
    assert doctor.as_data({"bad": BAD})["works"] is False


def test_no_backend_at_all() -> None:
    assert "No backend" in doctor.as_text({})
