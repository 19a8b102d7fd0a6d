"""Tables as CSV that is safe to open: a spreadsheet runs a cell that begins with = + - @ as a formula."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write(rows: Iterable[Sequence[str | float | None]]) -> str:
    """Rows as CSV, the first one the headers; numbers as they are, texts that look like a formula quoted."""
    out = io.StringIO()
    writer = csv.writer(out)
    for row in rows:
        writer.writerow([_cell(value) if isinstance(value, str) else value for value in row])
    return out.getvalue()


def _cell(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA) else text
