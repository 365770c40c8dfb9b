"""Text out of bytes that come one token at a time, cut at stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns tokens' bytes into text that can be shown as soon as it is certain.

    What is held back: the bytes of an incomplete character, and text that may turn out to be the
    beginning of a stop string. Bytes that are no UTF-8 become U+FFFD.

    Args:
        stop: strings that end the text; they are not part of it.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, data: bytes) -> str:
        """The text that has become certain; sets `stopped` at a stop string."""
        assert not self.stopped, "the text has ended"
        return self._certain(self._decoder.decode(data))

    def end(self) -> str:
        """The text held back, when no more bytes come; bytes of half a character are left out."""
        text, self._held = self._held, ""
        return text

    def _certain(self, text: str) -> str:
        self._held += text
        # the string that is complete first ends the text, however tokens cut it
        ends = [
            (place + len(stop), place)
            for stop in self._stop
            if (place := self._held.find(stop)) >= 0
        ]
        if ends:
            self.stopped = True
            text, self._held = self._held[: min(ends)[1]], ""
            return text
        certain = len(self._held) - max(
            (_overlap(self._held, stop) for stop in self._stop), default=0
        )
        text, self._held = self._held[:certain], self._held[certain:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text with which the stop string begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
