"""Tables for people: one form, shown as text, as Markdown or by a page's template.

What a corpus, a plan or an evaluation prints is the same kind of table as in the
report, so this module stands below all rooms; it needs the standard library alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

# Languages in the order of tables where no config tells another, and of their colours,
# which begin again after twelve.
# fmt: off
LANGUAGES = (
    "en", "ru", "de", "fr", "es", "it", "pt", "pl", "zh", "ja", "ko", "tr",
    "uk", "nl", "cs", "ar", "hi", "vi", "id", "sv", "fi", "el", "he", "fa",
    "ro", "hu", "bg", "da", "no", "th", "ka", "kk", "be", "sr", "hr", "sk",
    "ca", "lt", "lv", "et", "sl", "az", "uz", "hy", "tg", "ky", "mn", "bn",
)
# fmt: on
MARKS = {"better": " +", "worse": " -"}


@dataclass(frozen=True)
class Cell:
    """One value of a table, as it is shown."""

    text: str = "–"
    note: str = ""  # small print beside it: its error, or interval
    below: str = ""  # small print on a line of its own, on pages only
    value: float | None = None  # what a page sorts by
    verdict: str = ""  # better | worse | same
    colour: int | None = None  # a language's, on pages only


class Table:
    """Headings and rows of cells; a text stands for a cell of no more than that.

    Args:
      foot: rows that stay below the others when a page sorts: means.
      left: numbers of the columns that align to the left.
    """

    def __init__(
        self,
        heads: Iterable[str],
        body: Iterable[Sequence[Cell | str]],
        foot: Iterable[Sequence[Cell | str]] = (),
        left: Collection[int] = (0,),
    ):
        self.heads, self.left = list(heads), left
        self.body, self.foot = (
            [[Cell(c) if isinstance(c, str) else c for c in row] for row in rows]
            for rows in (body, foot)
        )

    def without_empty_columns(self) -> Table:
        """The same table without columns that are empty in all rows."""
        rows = [*self.body, *self.foot]
        kept = [i for i in range(len(self.heads)) if any(r[i].text for r in rows)]
        body, foot = ([[r[i] for i in kept] for r in x] for x in (self.body, self.foot))
        return Table([self.heads[i] for i in kept], body, foot)

    def text(self, notes: bool = True, marks: bool = False, width: int = 100) -> str:
        """Aligned columns; a table that is too wide goes on below itself.

        A heading that comes again ("change") says what it is of by the column before
        it, which it stays beside.

        Args:
          notes: show the small print.
          marks: show verdicts: + better, - worse.
          width: most characters of a line.
        """
        columns = []
        for i, head in enumerate(self.heads):
            cells = [row[i] for row in (*self.body, *self.foot)]
            texts = [
                f"{c.text} {c.note}" if notes and c.note else c.text for c in cells
            ]
            if marks and any(c.verdict for c in cells):
                texts = [
                    text + MARKS.get(c.verdict, "  ")
                    for text, c in zip(texts, cells, strict=True)
                ]
                head += "  "
            size = max(map(len, (head, *texts)))
            align = str.ljust if i in self.left else str.rjust
            columns.append([align(text, size) for text in (head, *texts)])
        groups: list[list[list[str]]] = []
        for head, column in zip(self.heads[1:], columns[1:], strict=True):
            if groups and self.heads.count(head) > 1:
                groups[-1].append(column)
            else:
                groups.append([column])
        blocks = [columns[:1]]
        for group in groups:
            wide = sum(len(c[0]) + 2 for c in (*blocks[-1], *group)) - 2 > width
            if wide and len(blocks[-1]) > 1:
                blocks.append(columns[:1])
            blocks[-1] = [*blocks[-1], *group]
        return "\n".join(
            "  ".join(line).rstrip() for b in blocks for line in zip(*b, strict=True)
        )

    def markdown(self, notes: bool = False) -> str:
        """A table of Markdown; `notes`: with the small print."""
        lines = ["---" if i in self.left else "---:" for i in range(len(self.heads))]
        rows = [self.heads, lines]
        rows += [
            [f"{c.text} {c.note}".rstrip() if notes else c.text for c in row]
            for row in (*self.body, *self.foot)
        ]
        rows = [[text.replace("|", "\\|") for text in row] for row in rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def _repr_markdown_(self) -> str:
        return self.markdown(notes=True)

    def __repr__(self) -> str:
        return self.text()
