"""Settings of one method, and what is said where there is nothing to choose from."""

import pytest

from nowag_pl.compressors import ArmorCompressor, Compressor, MagnitudePruner, NoWagPruner, NoWagQuantizer, WandaPruner
from nowag_pl.compressors.budget import Budget, settings_of, titles


@pytest.mark.parametrize("kind", [NoWagPruner, WandaPruner, MagnitudePruner])
def test_pruners_offer_sparsities_on_both_sides(kind):
    settings = settings_of(kind(sparsity=0.5), Budget())
    assert settings == [kind(sparsity=sparsity) for sparsity in (0.5, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8)]
    assert [each.sparsity for each in settings_of(kind(sparsity=0.1), Budget())] == [0.1, 0.0, 0.2, 0.3, 0.4]
    assert [each.sparsity for each in settings_of(kind(sparsity=0.8), Budget())] == [0.8, 0.5, 0.6, 0.7, 0.9]


def test_other_settings_stay_as_they_are():
    settings = settings_of(NoWagPruner(update="refit", structured="rows", damping=0.3), Budget())
    assert {(each.update, each.structured, each.damping) for each in settings} == {("refit", "rows", 0.3)}


@pytest.mark.parametrize(
    ("dim", "size", "expected"),
    [
        (4, 256, [(4, 256), (4, 128), (4, 64), (3, 256), (3, 128), (3, 64), (2, 64), (2, 32), (2, 16)]),
        (6, 4096, [(6, 4096), (6, 2048), (6, 1024), (5, 4096), (5, 2048), (5, 1024), (4, 4096), (4, 2048), (4, 1024)]),
        (4, 200, [(4, 200), (4, 128), (4, 64), (4, 32), (3, 128), (3, 64), (3, 32), (2, 32), (2, 16), (2, 8)]),
        (1, 4, [(1, 4), (1, 2)]),
        (1, 1, [(1, 1)]),
    ],
)
def test_quantizer_offers_codebooks_that_are_none_larger(dim, size, expected):
    quantizer = NoWagQuantizer(subvector_dim=dim, codebook_size=size, seed=3)
    others = quantizer.alternatives()
    settings = [quantizer, *(NoWagQuantizer(**each, seed=3) for each in others)]
    assert [(each.subvector_dim, each.codebook_size) for each in settings] == expected
    if others:
        assert settings_of(quantizer, Budget()) == settings


def test_candidates_change_fields_and_each_setting_is_there_once():
    budget = Budget([{"sparsity": 0.4}, {"sparsity": 0.5}, {"sparsity": 0.4}, {"pattern": [1, 4], "sparsity": None}])
    settings = settings_of(NoWagPruner(), budget)
    assert settings == [NoWagPruner(), NoWagPruner(sparsity=0.4), NoWagPruner(pattern=(1, 4))]
    assert titles(settings) == [
        "sparsity=0.5, pattern=None",
        "sparsity=0.4, pattern=None",
        "sparsity=None, pattern=(1, 4)",
    ]


def test_patterns_and_blocks_can_be_candidates():
    assert titles(settings_of(NoWagPruner(pattern=(2, 4)), Budget([{"pattern": [1, 4]}]))) == [
        "pattern=(2, 4)",
        "pattern=(1, 4)",
    ]
    assert titles(settings_of(ArmorCompressor(), Budget([{"block_size": 32}]))) == ["block_size=128", "block_size=32"]


@pytest.mark.parametrize("compressor", [NoWagPruner(pattern=(2, 4)), ArmorCompressor(), NoWagQuantizer(1, 1)])
def test_nothing_to_choose_from_is_refused(compressor):
    with pytest.raises(ValueError, match=r"Expected settings .* but .* offers none\. Give compression\.budget\.candid"):
        settings_of(compressor, Budget())


def test_unknown_field_is_named_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"Expected fields of NoWagPruner .* sparsity, pattern, .* but got sparsty\."):
        settings_of(NoWagPruner(), Budget([{"sparsty": 0.4}]))


def test_value_out_of_its_range_is_named_with_its_candidate():
    with pytest.raises(ValueError, match=r"compression\.budget\.candidates: {'sparsity': 1\.5}: Expected sparsity"):
        settings_of(NoWagPruner(), Budget([{"sparsity": 1.5}]))


def test_value_of_another_type_is_named_with_its_candidate():
    with pytest.raises(ValueError, match=r"compression\.budget\.candidates: {'codebook_size': 'many'}: "):
        settings_of(NoWagQuantizer(), Budget([{"codebook_size": "many"}]))


def test_method_without_fields_is_refused():
    class Custom(Compressor):
        def compress(self, linear, second_moment):
            raise NotImplementedError

    with pytest.raises(ValueError, match=r"Expected a dataclass with compression\.budget, but got Custom\."):
        settings_of(Custom(), Budget([{"sparsity": 0.5}]))


def test_no_sequence_is_refused():
    with pytest.raises(ValueError, match=r"compression\.budget\.num_sequences of at least 1, but got 0"):
        Budget(num_sequences=0)
