"""Tables as text and as Markdown; pages are in tests/report."""

from gamayun_jax.tables import Cell, Table

BODY = [
    ["en", Cell("1.25", "±0.10", verdict="better"), "7"],
    ["russian", Cell("10.50", verdict="worse"), Cell()],
]
TABLE = Table(["language", "bits", "items"], BODY, [["mean", "5.88", "7"]])


def test_columns_are_aligned():
    assert TABLE.text().splitlines() == [
        "language        bits  items",
        "en        1.25 ±0.10      7",
        "russian        10.50      –",
        "mean            5.88      7",
    ]


def test_verdicts_are_marked():
    lines = TABLE.text(notes=False, marks=True).splitlines()
    assert lines[1] == "en         1.25 +      7"
    assert lines[2] == "russian   10.50 -      –"
    assert lines[3] == "mean       5.88        7"


def test_what_is_too_wide_goes_on_below():
    lines = TABLE.text(width=20).splitlines()
    assert max(map(len, lines)) == 20
    first = [line.split()[0] for line in lines]
    assert first == ["language", "en", "russian", "mean"] * 2
    assert lines[4].split() == ["language", "items"]
    # One column is shown, however wide it is.
    assert len(TABLE.text(width=1).splitlines()) == 8


def test_a_heading_that_comes_again_stays_beside_the_column_before_it():
    heads = ["language", "help", "change", "udhr", "change", "quiz"]
    table = Table(heads, [["en", "1.0", "+0.1", "2.0", "+0.2", "3.0"]])
    for width in range(8, 40):
        lines = table.text(width=width).splitlines()
        words = [line.split()[1:] for line in lines[::2]]
        assert [word for line in words for word in line] == heads[1:]
        assert all(line[0] != "change" for line in words)
        assert max(map(len, lines)) <= max(width, len("language  help  change"))


def test_markdown():
    lines = TABLE.markdown().splitlines()
    assert lines[:3] == ["| language | bits | items |", "| --- | ---: | ---: |",
                         "| en | 1.25 | 7 |"]  # fmt: skip
    assert len(lines) == 5


def test_empty_columns_can_be_left_out():
    table = Table(["a", "b", "c"], [["1", "", "3"], ["2", "", ""]])
    assert table.without_empty_columns().heads == ["a", "c"]
