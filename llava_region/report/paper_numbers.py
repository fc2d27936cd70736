"""The paper's own numbers: Tables 1 to 4, as printed, to compare one's own with, and as a check on our averages.

All in percent. A row of Tables 1 to 3 holds the eight visual tasks in the order of `tasks.VISUAL`, a row of Table 4 holds MMLU
and BIG-bench-Hard. The paper's text does not give the figures' numbers, except those of Figure 2 for all the data, which are
Table 2's.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One printed row: its section, label and scores, and the average and the percentage of the first row's average as printed."""

    section: str
    label: str
    scores: tuple[float, ...]
    average: float | None = None
    percent: float | None = None


BUNNY, LLAVA_7B, LLAVA_13B = "Bunny-Llama-3-8B-V", "LLaVA-1.5-7B", "LLaVA-1.5-13B"
HEURISTIC, IMPORTANCE = "Heuristic selections", "Importance-based selections"

TABLE_1 = (
    Row("", "All layers", (64.26, 29.45, 50.12, 83.84, 74.74, 64.29, 79.28, 62.11), 63.51),
    Row(HEURISTIC, "Sparse & Uniform", (62.65, 29.51, 48.33, 83.68, 73.88, 63.68, 78.78, 62.43), 62.88),
    Row(HEURISTIC, "Consecutive Lower", (61.38, 22.47, 46.49, 83.27, 73.63, 62.33, 75.26, 62.26), 60.89),
    Row(HEURISTIC, "Consecutive Lower-middle", (62.54, 26.13, 48.17, 83.77, 72.51, 62.81, 77.14, 60.96), 61.75),
    Row(HEURISTIC, "Consecutive Upper-middle", (62.32, 28.06, 43.12, 83.40, 70.27, 61.28, 78.83, 59.33), 60.83),
    Row(HEURISTIC, "Consecutive Top", (60.48, 26.47, 39.92, 83.22, 67.96, 60.30, 77.54, 58.71), 58.08),
    Row(HEURISTIC, "Hybrid Top-Lower", (57.63, 29.76, 41.79, 83.26, 72.25, 62.71, 77.99, 62.74), 61.02),
    Row(IMPORTANCE, "Image Attention Score", (63.65, 24.53, 43.62, 83.90, 72.59, 62.82, 77.59, 61.99), 61.34),
    Row(IMPORTANCE, "Parameter Change Ratio", (63.94, 26.94, 47.67, 83.88, 73.54, 63.21, 78.68, 61.73), 62.45),
    Row(IMPORTANCE, "Block Influence Score", (62.38, 28.45, 46.37, 83.73, 71.13, 61.93, 77.34, 59.93), 61.41),
    Row(IMPORTANCE, "Multimodal BI Score", (61.48, 28.80, 46.68, 83.74, 73.02, 63.23, 77.24, 62.23), 62.05),
    Row(IMPORTANCE, "Angular Distance", (60.95, 27.71, 46.74, 83.49, 73.88, 62.11, 77.14, 62.76), 61.85),
)
TABLE_2 = (
    Row(BUNNY, "32 layers", (64.26, 29.45, 50.12, 83.84, 74.74, 64.29, 79.28, 62.11), 63.51),
    Row(BUNNY, "16 layers", (62.42, 26.43, 49.15, 84.04, 74.83, 64.10, 78.93, 62.96), 62.86, 98.98),
    Row(BUNNY, "8 layers", (62.65, 29.51, 48.33, 83.68, 73.88, 63.68, 78.78, 62.43), 62.88, 99.00),
    Row(BUNNY, "6 layers", (62.25, 29.76, 47.71, 84.01, 75.00, 62.93, 77.54, 62.92), 62.78, 98.85),
    Row(BUNNY, "4 layers", (62.40, 28.89, 46.00, 83.99, 73.71, 62.66, 77.69, 62.74), 62.26, 98.03),
    Row(BUNNY, "2 layers", (57.96, 28.49, 44.67, 83.15, 72.68, 61.00, 78.48, 60.35), 60.85, 95.81),
    Row(BUNNY, "1 layer", (53.68, 24.33, 38.47, 82.92, 68.64, 59.19, 77.69, 58.32), 57.91, 91.18),
)
TABLE_3 = (
    Row(LLAVA_7B, "32 layers", (61.51, 19.46, 49.01, 83.40, 66.67, 62.98, 68.47, 58.19), 58.71),
    Row(LLAVA_7B, "16 layers", (64.01, 20.75, 48.02, 83.47, 64.00, 62.43, 67.53, 58.27), 58.56, 99.74),
    Row(LLAVA_7B, "8 layers", (62.19, 21.10, 47.71, 83.10, 63.92, 61.60, 68.17, 57.35), 58.14, 99.03),
    Row(LLAVA_7B, "6 layers", (61.39, 22.84, 46.54, 83.31, 61.77, 61.08, 68.32, 56.19), 57.69, 98.26),
    Row(LLAVA_7B, "4 layers", (63.28, 21.01, 43.47, 83.14, 60.82, 60.48, 67.97, 54.48), 56.83, 96.80),
    Row(LLAVA_7B, "2 layers", (54.54, 19.10, 41.90, 81.47, 57.22, 57.38, 65.84, 53.27), 53.84, 91.70),
    Row(LLAVA_7B, "1 layer", (53.16, 16.96, 33.29, 81.20, 51.89, 55.83, 64.50, 45.51), 50.29, 85.66),
    Row(LLAVA_13B, "40 layers", (67.60, 25.19, 50.26, 83.61, 68.38, 63.29, 71.64, 60.21), 61.27),
    Row(LLAVA_13B, "10 layers", (65.17, 23.56, 48.27, 83.57, 66.58, 62.01, 70.75, 59.13), 59.88, 97.73),
    Row(LLAVA_13B, "9 layers", (66.47, 23.65, 49.29, 83.74, 65.61, 62.31, 72.14, 59.71), 60.37, 98.53),
)
TABLE_4 = (
    Row(BUNNY, "Fully-trained (32 layers)", (60.27, 30.93)),
    Row(BUNNY, "Partial-trained (8 layers)", (63.36, 31.50)),
    Row(BUNNY, "LLM backbone", (66.01, 57.93)),
    Row(LLAVA_7B, "Fully-trained (32 layers)", (50.52, 26.85)),
    Row(LLAVA_7B, "Partial-trained (8 layers)", (50.74, 31.64)),
    Row(LLAVA_7B, "LLM backbone", (49.78, 29.33)),
)

# Section 4.1: the eight layers of Bunny-Llama-3-8B-V that each metric ranks highest.
IMPORTANCE_SETS = {
    "Image Attention Score": (1, 2, 3, 4, 5, 27, 29, 31),
    "Parameter Change Ratio": (0, 2, 9, 12, 23, 24, 25, 26),
    "Block Influence Score": (12, 15, 18, 25, 27, 29, 30, 31),
    "Multimodal BI Score": (0, 1, 2, 3, 4, 5, 9, 31),
    "Angular Distance": (0, 1, 2, 3, 5, 6, 7, 8),
}
