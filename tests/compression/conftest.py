from tests.tiny import float32  # noqa: F401  (used by every test here)
