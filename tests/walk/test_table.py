"""Every row of ``docs/architectures.md`` is what happens."""

import pytest
from torch import nn
from transformers import CONFIG_MAPPING

from tests.architectures import ARCHITECTURES, HEAD, OTHERS, TABLE, built, row


@pytest.mark.every
@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_an_architecture_works_or_is_refused_as_the_table_says(name):
    """Compressed by every family of methods and read again with the same bits, or refused in one sentence."""
    if name in ARCHITECTURES and name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    if name == "jamba" and any(type(m) is nn.Linear for n, m in built(name).named_modules() if n.endswith("router")):
        pytest.skip("its router is a linear layer in this transformers")
    assert row(name) in TABLE.read_text(encoding="utf-8").splitlines()


def test_the_table_has_a_row_for_each():
    """At least thirty, nothing left from an earlier table."""
    text = TABLE.read_text(encoding="utf-8")
    assert text.startswith(HEAD)
    assert len(text.removeprefix(HEAD).splitlines()) == len(ARCHITECTURES) + len(OTHERS) >= 30
