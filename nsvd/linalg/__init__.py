"""Mathematics on tensors. Nothing here knows a model, a file or a device string."""

from nsvd.linalg.decomposition import Decomposition, Oblique, Orthogonal, from_metric, from_whitener
from nsvd.linalg.factors import LowRank, Pivoted, least_rank, pivoted, rank_for_ratio, saves_parameters, split_rank
from nsvd.linalg.methods import METHODS, Method, SplitMethod, by_name, decompose, matrix_method
from nsvd.linalg.moments import Moments
from nsvd.linalg.whiteners import NumericalWarning, cholesky, scaled_rotation, spectral

__all__ = [
    "METHODS",
    "Decomposition",
    "LowRank",
    "Method",
    "Moments",
    "NumericalWarning",
    "Oblique",
    "Orthogonal",
    "Pivoted",
    "SplitMethod",
    "by_name",
    "cholesky",
    "decompose",
    "from_metric",
    "from_whitener",
    "least_rank",
    "matrix_method",
    "pivoted",
    "rank_for_ratio",
    "saves_parameters",
    "scaled_rotation",
    "spectral",
    "split_rank",
]
