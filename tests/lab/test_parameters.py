"""Values for the parameters of notebooks, as YAML."""

import pytest

from nsvd.lab import parameters

BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nsize: [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 3000, "v is nested too deeply"),
        (BOMB, "v is not YAML: an alias; write the value out"),
        ("{a: 1, a: 2}", "v is not YAML: a given twice"),
        ("[3", "v is not YAML"),
        ("2024-13-45", "v is not YAML: month must be in 1..12"),
        ("!!python/object/apply:os.getcwd []", "v is not YAML: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "v is not YAML: expected a single document"),
        ("\ud800", "v is not YAML: "),
        ("!!bool x", "v is not YAML: "),
        ("!!timestamp x", "v is not YAML: "),
    ],
)
def test_a_value_that_cannot_be_read_is_named(text, message):
    """Whatever YAML may stumble over."""
    with pytest.raises(ValueError, match=message):
        parameters.parse(text, "v")


def test_a_parameter_given_twice_is_refused():
    """The last would win in silence."""
    assert parameters.from_pairs([("size", "3"), ("label", "x")]) == {"size": 3, "label": "x"}
    with pytest.raises(ValueError, match="size is given twice"):
        parameters.from_pairs([("size", "3"), ("size", "4")])
    with pytest.raises(ValueError, match="the value of size is not YAML"):
        parameters.from_pairs([("size", "[")])
