"""What the authors of DeepSeek-R1 report of its stages, beside a recipe's own table; nothing of it is measured here.

Source: "DeepSeek-R1 incentivizes reasoning in LLMs through reinforcement learning", Nature 645 (2025), 633–638,
doi:10.1038/s41586-025-09422-z, table 2; the same figures as table 3 of arXiv:2501.12948v2.
"""

from __future__ import annotations

SOURCE = "Nature 645 (2025), 633–638, table 2 (arXiv:2501.12948v2, table 3)"
STAGES = ("r1_zero", "dev1", "dev2", "dev3", "r1")
"""The columns of the table, under the names that the stages of configs/recipe/r1.yaml have."""
FIGURES: dict[str, tuple[float, float, float, float, float]] = {
    "MMLU (EM)": (88.8, 89.1, 91.2, 91.0, 90.8),
    "MMLU-Redux (EM)": (85.6, 90.0, 93.0, 93.1, 92.9),
    "MMLU-Pro (EM)": (68.9, 74.1, 83.8, 83.1, 84.0),
    "DROP (3-shot F1)": (89.1, 89.8, 91.1, 88.7, 92.2),
    "IF-Eval (prompt strict)": (46.6, 71.7, 72.0, 78.1, 83.3),
    "GPQA Diamond (pass@1)": (75.8, 66.1, 70.7, 71.2, 71.5),
    "SimpleQA (correct)": (30.3, 17.8, 28.2, 24.9, 30.1),
    "FRAMES (acc.)": (82.3, 78.5, 81.8, 81.9, 82.5),
    "AlpacaEval 2.0 (LC win rate)": (24.7, 50.1, 55.8, 62.1, 87.6),
    "Arena-Hard": (53.6, 77.0, 73.2, 75.6, 92.3),
    "LiveCodeBench (pass@1)": (50.0, 57.5, 63.5, 64.6, 65.9),
    "Codeforces (percentile)": (80.4, 84.5, 90.5, 92.1, 96.3),
    "SWE-bench Verified (resolved)": (43.2, 39.6, 44.6, 45.6, 49.2),
    "Aider-Polyglot (acc.)": (12.2, 6.7, 25.6, 44.8, 53.3),
    "AIME 2024 (pass@1)": (77.9, 59.0, 74.0, 78.1, 79.8),
    "MATH-500 (pass@1)": (95.9, 94.2, 95.9, 95.4, 97.3),
    "CNMO 2024 (pass@1)": (88.1, 58.0, 73.9, 77.3, 78.8),
    "CLUEWSC (EM)": (93.1, 92.8, 92.6, 91.6, 92.8),
    "C-Eval (EM)": (92.8, 85.7, 91.9, 86.4, 91.8),
    "C-SimpleQA (correct)": (66.4, 58.8, 64.2, 66.9, 63.7),
}
"""Benchmark → percent (of Codeforces the percentile; its rating is left out) of each of STAGES."""
SHOWN = (
    "AIME 2024 (pass@1)",
    "MATH-500 (pass@1)",
    "GPQA Diamond (pass@1)",
    "LiveCodeBench (pass@1)",
    "IF-Eval (prompt strict)",
    "AlpacaEval 2.0 (LC win rate)",
)
"""Those that fit beside a table; dev.json has all."""


def of_stage(name: str) -> dict[str, float]:
    """Benchmark → figure of the model that has this name here; empty where it is none of R1's."""
    if name not in STAGES:
        return {}
    return {benchmark: row[STAGES.index(name)] for benchmark, row in FIGURES.items()}
