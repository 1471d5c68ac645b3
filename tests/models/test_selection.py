"""Which linears are compressed: patterns of every kind, and what is said where they match nothing."""

import pytest

from nowag_pl.models.selection import Selection, matching

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = [[f"model.layers.{block}.{kind}" for kind in KINDS] for block in range(12)]
ALL = {name for block in NAMES for name in block}


def named(*blocks: int, kinds=KINDS) -> set[str]:
    return {f"model.layers.{block}.{kind}" for block in blocks for kind in kinds}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("down_proj", named(*range(12), kinds=KINDS[3:])),
        ("mlp.*", named(*range(12), kinds=KINDS[2:])),
        ("model.layers.1.*", named(1)),  # not 10 and 11
        ("model.layers.1?.mlp.up_proj", named(10, 11, kinds=KINDS[2:3])),
        (r"re:.*\.(1|11)\.self_attn\..*", named(1, 11, kinds=KINDS[:2])),
        ("blocks:0", named(0)),
        ("blocks:-1", named(11)),
        ("blocks:2:4", named(2, 3)),
        ("blocks:-2:", named(10, 11)),
        ("blocks:::6", named(0, 6)),
    ],
)
def test_pattern_matches(pattern, expected):
    assert matching(pattern, NAMES, "option") == expected


def test_targets_less_those_ignored():
    selection = Selection(("mlp.*", "blocks:3"), ("blocks:0", "up_proj"))
    assert selection.of(NAMES) == named(*range(1, 12), kinds=KINDS[3:]) | named(3, kinds=KINDS[:2])
    assert Selection().of(NAMES) == ALL
    assert Selection(ignore=("blocks:0", "blocks:-1")).of(NAMES) == ALL - named(0, 11)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.down_prj", r"'\*\.down_prj' matches none\. Did you mean model\.layers\.\*\.mlp\.down_proj\?"),
        ("experts", r"There are model\.layers\.\*\.self_attn\.q_proj, .*mlp\.down_proj\.$"),
        ("blocks:12", "'blocks:12' matches none"),
        ("blocks:12:", "matches none"),
        ("blocks:first", "form blocks:3, blocks:-1 or blocks:2:10, but got 'blocks:first'"),
        ("blocks:", "form blocks:3"),
        ("re:(", "regular expression in option, but got 're:\\("),
    ],
)
def test_wrong_pattern_is_told(pattern, message):
    with pytest.raises(ValueError, match=message):
        matching(pattern, NAMES, "option")


def test_nothing_left_and_no_linears_are_told():
    with pytest.raises(ValueError, match="to leave a linear, but none is left"):
        Selection(("up_proj",), ("mlp.*",)).of(NAMES)
    with pytest.raises(ValueError, match=r"decoder blocks with linears \(nn\.Linear\), but found none"):
        Selection().of([[], []])
