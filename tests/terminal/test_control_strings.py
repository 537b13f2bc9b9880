"""What reaches the user's terminal of what a command writes to its own."""

from __future__ import annotations

import itertools

import pytest

from isolation.terminal.control_strings import ControlStrings

SHOWN = [
    b"plain text\r\n\x1b[31mred\x1b[0m\x1b[2J\x1b[?1049h\x1b7\x1b(0\x1bM",
    b"\x1b]0;title\x07\x1b]2;title\x1b\\\x1b]8;;https://example.org\x1b\\link\x1b]8;;\x1b\\",
    b"\x1b]10;?\x07\x1b]104\x07\x1b]133;A\x07\x1bP$qm\x1b\\\x1bP+q544e\x1b\\\x1bP0;1q#0~~\x1b\\",
    "Привет, Н, Ð, \u00a0, 漢字 and \x1b[1mbold".encode(),
    b"\xd0\x9d\xc3\x9d",  # which hold the byte of a string's beginning, and are letters
]
LEFT_OUT = [
    b"\x1b]52;c;cm0gLXJmIH4=\x07", b"\x1b]52;c;cm0gLXJmIH4=\x1b\\", "\x9d52;c;AAAA\x9c".encode(), b"\x1b]052;c;AAAA\x07",
    b"\x1b]1337;File=name=eA==:AAAA\x07", b"\x1b]50;font\x07", b"\x1b]777;notify;a;b\x07", b"\x1b]\x07",
    b"\x1bPtmux;\x1b\x1b]52;c;AAAA\x07\x1b\\", b"\x1bP@kitty-cmd{}\x1b\\", "\x90@kitty-cmd{}\x9c".encode(),
    b"\x1b_Gf=24,t=f;AAAA\x1b\\", "\x9fGa=d;\x9c".encode(), b"\x1b^message\x1b\\", b"\x1bXstring\x1b\\",
]  # fmt: skip


def filtered(*pieces: bytes) -> bytes:
    screen = ControlStrings()
    return b"".join(map(screen, pieces))


@pytest.mark.parametrize("text", SHOWN)
def test_what_only_shows_is_passed_on(text: bytes) -> None:
    assert filtered(text + b".") == text + b"."
    assert filtered(*(bytes([byte]) for byte in text + b".")) == text + b"."


@pytest.mark.parametrize("text", LEFT_OUT)
def test_what_does_more_is_left_out(text: bytes) -> None:
    whole = b"before" + text + b"after"
    for cut in range(len(whole) + 1):
        for passed in (filtered(whole[:cut], whole[cut:]), filtered(*(bytes([byte]) for byte in whole))):
            assert passed.startswith(b"before")
            assert passed.endswith(b"after")
            for beginning in (
                b"\x1b]",
                b"\x1bP",
                b"\x1b_",
                b"\x1b^",
                b"\x1bX",
                "\x9d".encode(),
                "\x90".encode(),
                "\x9f".encode(),
            ):
                assert beginning not in passed


@pytest.mark.parametrize("end", [b"\x07", b"\x18", b"\x1a", b"\x1b\\", b"\x1b", "\x9c".encode(), b""])
def test_no_string_is_a_cover_for_another(end: bytes) -> None:
    """A terminal gives one up at the next ESC: so does the filter."""
    for outer, inner in itertools.product(SHOWN[1:3] + LEFT_OUT, LEFT_OUT):
        cut = outer.rstrip(b"\\\x07\x1b")
        assert b"\x1b]52" not in filtered(cut + end + inner + b"text" * 10)
        assert b"kitty" not in filtered(cut + end + inner + b"text" * 10)


def test_a_string_without_an_end_holds_back_nothing_that_grows() -> None:
    screen = ControlStrings()
    screen(b"\x1b]52;c;")
    for _ in range(1000):
        assert screen(b"A" * 1000) == b""
    assert len(screen._held) < 100
    assert screen(b"\x07text.") == b"text."
