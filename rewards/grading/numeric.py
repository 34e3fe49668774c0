"""Numbers as they are written in answers, read exactly."""

from __future__ import annotations

import re
from fractions import Fraction

NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*\$?\s*(?P<whole>\d{1,3}(?:,\d{3})+|\d*)(?:\.(?P<decimals>\d*))?"
    r"(?:[eE](?P<exponent>[-+]?\d{1,2}))?(?:\s*/\s*(?P<below>\d+))?",
    re.ASCII,
)
LONGEST_NUMBER = 100


def number(text: str) -> Fraction | None:
    """The exact value of `18`, `18.0`, `$1,800.50`, `-3/4`, `1e-05` or `18.`; None for anything else."""
    text = text.strip()
    match = NUMBER.fullmatch(text) if len(text) <= LONGEST_NUMBER else None
    if match is None or not (match["whole"] or match["decimals"]):
        return None
    above = Fraction(f"{match['whole'].replace(',', '') or '0'}.{match['decimals'] or '0'}e{match['exponent'] or '0'}")
    below = int(match["below"] or 1)
    if below == 0:
        return None
    return above / below * (-1 if match["sign"] == "-" else 1)
