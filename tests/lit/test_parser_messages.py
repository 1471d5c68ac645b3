import pytest

from nowag_pl.lit.parser_messages import explained

UNION = """Parser key "{}":
  Does not validate against any of the Union subtypes
  Subtypes: [{}]
  Errors:
    - Expected a <class 'int'>
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: {}"""
INNER = """Parser key "compression.compressor":
  Problem with given class_path 'nowag_pl.NoWagPruner':
    {}"""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            UNION.format("trainer.max_epochs", "<class 'int'>, <class 'NoneType'>", "1.5"),
            "Expected trainer.max_epochs to be a whole number or null, but got 1.5.",
        ),
        (
            UNION.format("trainer.precision", "typing.Literal[64, '32'], typing.Literal['32', 'bf16-mixed']", "17"),
            "Expected trainer.precision to be 64, 32 or bf16-mixed, but got 17.",
        ),
        (
            UNION.format("data.eval_files", "dict[str, str], <class 'NoneType'>", "['a.txt']"),
            "Expected data.eval_files to be a mapping, such as {name: value} or null, but got ['a.txt'].",
        ),
        (
            INNER.format("Parser key \"damping\":\n      Expected a <class 'float'>. Got value: nan"),
            "Expected compression.compressor.damping to be a number, but got nan.",
        ),
        (
            INNER.format("Option 'sparsty' is not accepted"),
            "Expected compression.compressor to have options of nowag_pl.NoWagPruner, but got 'sparsty'.",
        ),
        (
            'Parser key "model.objective":\n\n  - Expected a path but X either not accessible or invalid\n'
            "  - Import path torch.nn.Linear does not correspond to a subclass of Objective",
            "Expected model.objective to be the class path of one of the kind Objective, but got torch.nn.Linear.",
        ),
        (INNER.format("Expected sparsity in [0, 1), but got 2."), "Expected sparsity in [0, 1), but got 2."),
        ("unrecognized arguments: --x", "unrecognized arguments: --x"),
    ],
)
def test_message_is_one_line(message, expected):
    assert explained(message) == expected


def test_yaml_without_a_space_is_explained():
    said = UNION.format("data.eval_files", "dict[str, str]", "{mine:a.txt}").replace("'int'", "'dict'")
    assert "a space after the colon" in explained(said)
    assert "a space after the colon" not in explained(said.replace("mine:", "mine: "))
