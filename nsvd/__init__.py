"""Low-rank compression of language models: NSVD, ASVD and relatives.

Importing the package also teaches transformers to read compressed checkpoints.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("nsvd")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"

from nsvd.lab.corpora import EMBEDDED, documents, windows
from nsvd.lab.evaluation import Evaluation, evaluate, perplexity
from nsvd.lab.models import embedded_models, load
from nsvd.linalg import METHODS, LowRank, Moments, decompose
from nsvd.model.checkpoint import CheckpointError, save
from nsvd.model.compress import Report, compress_, prepare
from nsvd.model.compress_kv import CacheReport, compress_kv_
from nsvd.model.files import replacing
from nsvd.model.latent import cache_bytes
from nsvd.model.layers import LowRankLinear, targets
from nsvd.model.moments import Statistics, calibrate

__all__ = [
    "EMBEDDED",
    "METHODS",
    "CacheReport",
    "CheckpointError",
    "Evaluation",
    "LowRank",
    "LowRankLinear",
    "Moments",
    "Report",
    "Statistics",
    "cache_bytes",
    "calibrate",
    "compress_",
    "compress_kv_",
    "decompose",
    "documents",
    "embedded_models",
    "evaluate",
    "load",
    "perplexity",
    "prepare",
    "replacing",
    "save",
    "targets",
    "windows",
]
