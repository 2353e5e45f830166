"""Numbers printed in the NSVD paper (arXiv 2503.17101), to stand beside ours; no other model is expected to reach them."""

from __future__ import annotations

import pandas as pd

SETS = ("WikiText-2", "PTB", "C4", "SNIPS", "AlpacaEval", "MCTest", "CMRC 2018", "AlpacaEval JP")

# Table 1: perplexity of LLaMA-7B on these sets, calibrated on WikiText-2, k1 = 0.95 k, by (fraction removed, method).
LLAMA_7B: dict[tuple[float, str], tuple[float, ...]] = {
    (0.1, "asvd-1"): (7.07, 12.42, 12.04, 7.84, 4.81, 2.21, 14.05, 15.93),
    (0.1, "nsvd-1"): (7.08, 12.03, 11.58, 7.74, 4.66, 2.19, 12.54, 14.89),
    (0.2, "asvd-1"): (7.89, 16.54, 15.93, 10.50, 6.14, 2.44, 48.09, 38.31),
    (0.2, "nsvd-1"): (7.92, 15.44, 15.23, 9.93, 5.85, 2.40, 34.49, 34.51),
    (0.3, "asvd-1"): (9.51, 27.11, 25.81, 17.89, 9.45, 3.06, 688.23, 813.23),
    (0.3, "nsvd-1"): (9.64, 25.19, 24.41, 15.74, 8.85, 3.02, 577.63, 367.69),
    (0.4, "asvd-1"): (13.74, 62.82, 55.55, 38.96, 19.72, 4.78, 20629.84, 35974.28),
    (0.4, "nsvd-1"): (14.24, 61.16, 54.22, 35.57, 18.88, 4.75, 11899.94, 11729.03),
    (0.5, "asvd-1"): (26.61, 182.81, 151.83, 92.57, 65.07, 13.81, 87327.64, 210253.49),
    (0.5, "nsvd-1"): (28.53, 180.56, 146.62, 89.91, 62.81, 13.11, 60518.94, 110191.48),
}
AVERAGE = {0.1: 0.042, 0.2: 0.087, 0.3: 0.147, 0.4: 0.183, 0.5: 0.135}  # its last column, over all sets but the first


def reductions() -> pd.DataFrame:
    """Reduction of perplexity, 1 − PPL(NSVD-I) / PPL(ASVD-I): a row a set, a column a fraction removed."""
    pairs = {ratio: zip(LLAMA_7B[ratio, "nsvd-1"], LLAMA_7B[ratio, "asvd-1"], strict=True) for ratio in AVERAGE}
    return pd.DataFrame(
        {ratio: [1 - ours / theirs for ours, theirs in both] for ratio, both in pairs.items()}, index=SETS
    )
