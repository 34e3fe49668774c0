"""The program in an answer: what is taken out of the text, and what of its prompt goes before it."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping
from typing import Any

PYTHON = re.compile(r"(python|py|python3)\b", re.IGNORECASE)


def program_in(text: str) -> str | None:
    """The last ```python fence of the answer block (or the last fence without a language), else the block; of a text
    without answer tags the same from what follows its last </think>. None where the tags are not one pair.
    """
    opened, closed = text.count("<answer>"), text.count("</answer>")
    if opened == closed == 1:
        text = text.partition("<answer>")[2].partition("</answer>")[0]
    elif opened or closed:
        return None
    else:
        text = text.rpartition("</think>")[2]
    fences = _fences(text)
    named = [code for language, code in fences if PYTHON.match(language)]
    chosen = named or [code for language, code in fences if not language]
    return chosen[-1] if chosen else text.strip("\n").rstrip()


def _fences(text: str) -> list[tuple[str, str]]:
    """(language, code) of each ``` fence; one that is not closed ends with the text."""
    found: list[tuple[str, list[str]]] = []
    inside = False
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            inside = not inside
            if inside:
                found.append((line.strip().strip("`").strip(), []))
        elif inside:
            found[-1][1].append(line)
    return [(language, "\n".join(lines).rstrip()) for language, lines in found]


def whole(program: str, meta: Mapping[str, Any]) -> str:
    """The program to run. ``meta["prefix"]``, where there is one, is the beginning that the prompt gave (HumanEval): it
    goes before what continues it, and its imports and helpers before what defines the function anew.
    """
    prefix = meta.get("prefix", "")
    if not prefix or (_defines(program, meta["functions"]) and "__future__" in program):
        return program
    return f"{prefix.rstrip()}\n\n{program}"


def _defines(program: str, names: list[str]) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes such as "\\w"
            tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(node, ast.FunctionDef) and node.name in names for node in tree.body)
