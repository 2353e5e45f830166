"""Low-rank compression of language models: NSVD, ASVD and relatives.

Importing the package also teaches transformers to read compressed checkpoints.
"""

from nsvd.lab.calibration import domains
from nsvd.lab.corpora import EMBEDDED, documents, windows
from nsvd.lab.evaluation import Evaluation, evaluate, perplexity
from nsvd.lab.models import embedded_models, load
from nsvd.linalg import METHODS, LowRank, Moments, decompose
from nsvd.model.checkpoint import CheckpointError, save
from nsvd.model.compress import Report, compress_
from nsvd.model.compress_kv import CacheReport, compress_kv_
from nsvd.model.files import replacing
from nsvd.model.fisher import fisher
from nsvd.model.latent import cache_bytes
from nsvd.model.layers import LowRankLinear, PivotedLinear
from nsvd.model.loading import default_device
from nsvd.model.moments import Statistics, calibrate, mix
from nsvd.model.prepare import prepare
from nsvd.model.recipes import RECIPES
from nsvd.model.sampling import own_text, random_tokens, sample
from nsvd.model.sensitivity import Sensitivity, sensitivity
from nsvd.model.targets import targets
from nsvd.version import __version__

__all__ = [
    "EMBEDDED",
    "METHODS",
    "RECIPES",
    "CacheReport",
    "CheckpointError",
    "Evaluation",
    "LowRank",
    "LowRankLinear",
    "Moments",
    "PivotedLinear",
    "Report",
    "Sensitivity",
    "Statistics",
    "__version__",
    "cache_bytes",
    "calibrate",
    "compress_",
    "compress_kv_",
    "decompose",
    "default_device",
    "documents",
    "domains",
    "embedded_models",
    "evaluate",
    "fisher",
    "load",
    "mix",
    "own_text",
    "perplexity",
    "prepare",
    "random_tokens",
    "replacing",
    "sample",
    "save",
    "sensitivity",
    "targets",
    "windows",
]
