from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from polyak.evaluation.text_stream import TextStream

LETTERS = st.text("abß€😀", max_size=12)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(places)]


def run(parts: list[bytes], stop: tuple[str, ...]) -> tuple[list[str], bool]:
    stream, shown = TextStream(stop), []
    for part in parts:
        shown.append(stream.push(part))
        if stream.stopped:
            return shown, True
    return [*shown, stream.end()], False


def directly(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """Letter by letter: the text ends where a stop string is complete."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(
    LETTERS,
    st.lists(st.text("abß€😀", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 60)),
)
def test_text_and_stop_do_not_depend_on_how_tokens_cut_it(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    shown, stopped = run(pieces(text.encode(), cuts), tuple(stop))
    assert ("".join(shown), stopped) == directly(text, tuple(stop))


@given(st.binary(max_size=20), st.lists(st.integers(0, 30)))
def test_any_bytes_give_what_decoding_them_at_once_gives(data: bytes, cuts: list[int]) -> None:
    stream = TextStream()
    whole = "".join([*(stream.push(part) for part in pieces(data + b".", cuts)), stream.end()])
    assert whole == (data + b".").decode("utf-8", "replace")


def test_half_a_character_is_never_shown() -> None:
    stream = TextStream()
    assert [stream.push(bytes([byte])) for byte in "a€".encode()] == ["a", "", "", "€"]
    assert stream.push("€".encode()[:2]) == ""
    assert stream.end() == ""  # the rest never came


def test_what_may_begin_a_stop_string_is_held_back_until_it_does_not() -> None:
    stream = TextStream(("<end>",))
    assert stream.push(b"a <en") == "a "
    assert stream.push(b"try> <e") == "<entry> "
    assert stream.end() == "<e"
