"""Records that cannot be used: a line, a file, a folder of `data.paths`. The run stops at the first one, or leaves them out and counts.

`data.bad_records = "stop"` refuses with the sentence of the first one. With "skip" every one is left out, and how many of which kind is
told in one line at the start of the run. Empty files are no fault, but are told in either case.
"""

from moe_jax.data.documents import DataError

EMPTY = "empty file"


class BadRecordError(DataError):
    """One record that cannot be used.

    Attributes:
      kind: what is wrong with it, as "not JSON": those of a kind are counted together.
      where: its file, line or folder.
    """

    def __init__(self, kind: str, where: str, sentence: str):
        """`sentence` goes after the place: what is wrong exactly, and the fix."""
        super().__init__(f"{where} {sentence}")
        self.kind, self.where = kind, where


class BadRecords:
    """What is done with the bad records of a corpus, and what was left out so far.

    Attributes:
      stops: whether the first one ends it.
      left_out: {kind: (how many, where the first is)}.
    """

    def __init__(self, policy: str = "stop"):
        """`policy` is "stop" or "skip"."""
        self.stops = policy == "stop"
        self.left_out: dict[str, tuple[int, str]] = {}

    def meet(self, error: BadRecordError) -> None:
        """Leaves a bad record out and counts it; with "stop" raises `error`."""
        if self.stops:
            raise error
        self.count(error.kind, error.where)

    def count(self, kind: str, where: str) -> None:
        """Counts what is left out in silence otherwise."""
        count, first = self.left_out.get(kind, (0, where))
        self.left_out[kind] = (count + 1, first)

    def describe(self) -> str:
        """One line: "left out: 2 x not JSON (the first: web.jsonl:7), 1 x empty file (a.txt)"; "" where nothing was."""
        parts = [
            f"{count} x {kind} ({'the first: ' * (count > 1)}{where})" for kind, (count, where) in sorted(self.left_out.items())
        ]
        return f"left out: {', '.join(parts)}" if parts else ""


def decode(raw: bytes, where: str) -> str:
    """UTF-8 bytes as text. Raises BadRecordError."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        sentence = f"is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}; convert the file to UTF-8."
        raise BadRecordError("not UTF-8", where, sentence) from error
