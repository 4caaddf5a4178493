import json

import pytest

from bench.paper.sharegpt import Exchange, first_exchange, read_exchanges, read_records

RECORDS = [
    {
        "id": "a",
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
    },
    {"id": "b", "conversations": []},
    {"id": "c", "conversations": [{"from": "gpt", "value": "[, ]}"}]},
]


@pytest.mark.parametrize("num_characters_missing", [0, 1, 2, 5, 30])
def test_whole_records_are_read_from_a_file_that_is_cut_off(num_characters_missing):
    text = json.dumps(RECORDS, indent=2)
    text = text[: len(text) - num_characters_missing]
    found = list(read_records(text))
    # The closing bracket of the list and the line end before it belong to no record.
    assert found == (RECORDS if num_characters_missing <= 2 else RECORDS[:2])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["human", "gpt"], Exchange("0", "1")),
        (["gpt", "human", "gpt"], Exchange("1", "2")),
        (["system", "human", "human", "chatgpt"], Exchange("2", "3")),
        (["human"], None),
        (["gpt", "human"], None),
        ([], None),
    ],
)
def test_the_first_answered_human_turn_counts(names, expected):
    turns = [{"from": name, "value": str(index)} for index, name in enumerate(names)]
    assert first_exchange({"conversations": turns}) == expected


def test_conversations_without_an_exchange_are_left_out(tmp_path):
    path = tmp_path / "cut.json"
    path.write_text(json.dumps(RECORDS)[:-1], encoding="utf-8")
    assert read_exchanges(path) == [Exchange("Hi", "Ho")]
