"""Low-rank compression of language models: NSVD, ASVD and relatives.

Importing the package also teaches transformers to read compressed checkpoints.
"""

from nsvd.cache.compress import CacheReport, compress_kv_
from nsvd.cache.latent import cache_bytes
from nsvd.compression.compress import Report, compress_
from nsvd.compression.measure import prepare
from nsvd.compression.request import RECIPES
from nsvd.compression.strs import Sensitivity, sensitivity
from nsvd.lab.advise import Advice, advise
from nsvd.lab.calibration import domains
from nsvd.lab.choices import Choices, accuracy_difference, multiple_choice, questions
from nsvd.lab.compress import compress
from nsvd.lab.corpora import EMBEDDED, documents, windows
from nsvd.lab.evaluation import Evaluation, evaluate, perplexity
from nsvd.lab.models import embedded_models, load
from nsvd.lab.results import results
from nsvd.lab.speed import faster, speed
from nsvd.linalg import METHODS, LowRank, Moments, decompose
from nsvd.stored.checkpoint import CheckpointError, save
from nsvd.stored.files import replacing
from nsvd.stored.layers import LowRankLinear, PivotedLinear
from nsvd.stored.loading import default_device
from nsvd.version import __version__
from nsvd.walk.calibrate import calibrate
from nsvd.walk.gradients import fisher
from nsvd.walk.moments import mix
from nsvd.walk.sampling import own_text, random_tokens, sample
from nsvd.walk.statistics import Statistics
from nsvd.walk.targets import targets

__all__ = [
    "EMBEDDED",
    "METHODS",
    "RECIPES",
    "Advice",
    "CacheReport",
    "CheckpointError",
    "Choices",
    "Evaluation",
    "LowRank",
    "LowRankLinear",
    "Moments",
    "PivotedLinear",
    "Report",
    "Sensitivity",
    "Statistics",
    "__version__",
    "accuracy_difference",
    "advise",
    "cache_bytes",
    "calibrate",
    "compress",
    "compress_",
    "compress_kv_",
    "decompose",
    "default_device",
    "documents",
    "domains",
    "embedded_models",
    "evaluate",
    "faster",
    "fisher",
    "load",
    "mix",
    "multiple_choice",
    "own_text",
    "perplexity",
    "prepare",
    "questions",
    "random_tokens",
    "replacing",
    "results",
    "sample",
    "save",
    "sensitivity",
    "speed",
    "targets",
    "windows",
]
