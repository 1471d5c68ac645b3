"""The section on training from rewards tells the first and the last steps."""

from nowag_pl.reports.policy import policy_page, policy_section


def policy(budget):
    answers = [{"prompt": "1 < 2", "answer": "yes\nyes", "reward": 0.5, "tokens": 3}]
    return {
        "budget": budget,
        "num_prompts": 7,
        "history": {
            "reward": [0.0] * 10 + [1.0] * 10,
            "accuracy": [0.5] * 20,
            "mean_length": [40.0] * 10 + [20.0] * 10,
        },
        "answers": {"first": answers, "last": answers},
    }


def test_section_compares_the_first_steps_with_the_last():
    rows = {row["title"]: (row["first"], row["last"]) for row in policy_section(policy(None))["table"]}
    assert rows["reward, before length counts"] == ("0.000", "1.000")
    assert rows["tokens of an answer"] == ("40.0", "20.0")
    assert "price of length" not in rows


def test_page_tells_budget_and_answers():
    page = policy_page(policy({"tokens": 25}), "a model")
    assert "The budget is 25 tokens" in page
    assert "1 &lt; 2" in page
    assert "(3 tokens, reward 0.50)" in page


def test_without_such_a_training_there_is_no_section():
    assert policy_section(None) == {"table": []}
