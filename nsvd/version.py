"""The version of the package."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("nsvd")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"
