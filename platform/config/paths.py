"""What can be a path, and what a part of one. `os.path.isfile` and its like, not pathlib's, ask whether something is
there: they say no where pathlib raises (a folder that may not be read, a name that is too long).
"""

from __future__ import annotations

import os
import re
from pathlib import PurePath

from offtrail.platform.config.errors import refuse

LONGEST_PART = 255
LONGEST_PATH = 4095
"""In bytes, of Linux."""
LONGEST_NAME = 100
"""In bytes, of a name: others are made of it, and have to be names still."""


def path_problem(text: str) -> str:
    """Why no file can have this path; empty where one could."""
    try:
        size = len(os.fsencode(text))
        longest = max((len(os.fsencode(part)) for part in PurePath(text).parts), default=0)
    except UnicodeEncodeError:
        return "must be UTF-8 text"
    if "\0" in text:
        return "must not hold NUL"
    if longest > LONGEST_PART:
        return f"no path: a part of it has {longest:,} bytes, and no file system takes more than {LONGEST_PART}"
    if size > LONGEST_PATH:
        return f"no path: it has {size:,} bytes, and the system takes {LONGEST_PATH:,}"
    return ""


def check_name(key: str, name: str) -> None:
    """Raise ConfigError unless ``name`` can be a part of a path that stays in its folder."""
    if not re.fullmatch(r"[\w+-][\w.+=-]*", name):
        where = "; folders go to run.dir" if key == "run.name" else ", since a folder is named after it"
        raise refuse(key, name, f"letters, digits and . _ - + = only, not beginning with a dot{where}")
    if (size := len(name.encode())) > LONGEST_NAME:
        raise refuse(key, name, f"has {size:,} bytes, at most {LONGEST_NAME}: a folder is named after it")
