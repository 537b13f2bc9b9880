"""pytest's own `--log-file`: what is logged inside is in the file that the host has open."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest

from isolation.plain import os
from pytest_isolation.peers.carrier import Carrier, Refused
from pytest_isolation.wire.sanitize import clean_output

_TEXT_AT_MOST = 1 << 20  # characters, of one test


class LogFileCarrier(Carrier):
    """As text, which is as it would be in the file."""

    name = "log-file"

    def __init__(self, handler: logging.FileHandler) -> None:
        self._handler = handler
        self._text = io.StringIO()
        self._outside: object = None
        self._cut: list[str] = []
        self._lost = ""

    @classmethod
    def of(cls, config: pytest.Config) -> LogFileCarrier | None:
        handler = getattr(config.pluginmanager.getplugin("logging-plugin"), "log_file_handler", None)
        if not isinstance(handler, logging.FileHandler) or handler.baseFilename == os.devnull:
            return None
        return cls(handler)

    def begin(self) -> None:
        self._text = io.StringIO()
        before = self._handler.setStream(self._text)  # type: ignore[arg-type]
        self._outside = self._outside or before  # else Python would warn of a file that nobody has closed

    def collect(self, item: pytest.Item, phase: str) -> object | None:
        text = self._text.getvalue()
        self._text.seek(0)
        self._text.truncate()
        return {"text": text[:_TEXT_AT_MOST], "cut": len(text) > _TEXT_AT_MOST} if text else None

    def check(self, item: pytest.Item, sent: Any) -> tuple[str, bool]:
        if not isinstance(sent["text"], str) or len(sent["text"]) > _TEXT_AT_MOST:
            raise Refused("log-file: no text, or too much")
        return clean_output(sent["text"]), bool(sent["cut"])

    def apply(self, item: pytest.Item, value: tuple[str, bool]) -> None:
        text, cut = value
        if cut:
            self._cut.append(item.nodeid)
        stream: Any = self._handler.stream
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError) as error:
            self._lost = str(error)

    def notes(self) -> list[str]:
        lines = [f"of what {nodeid} has logged, the first {_TEXT_AT_MOST >> 20}M are in the file" for nodeid in self._cut]
        return lines + ([f"could not be written: {self._lost}"] if self._lost else [])
