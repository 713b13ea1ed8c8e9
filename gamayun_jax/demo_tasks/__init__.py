"""The embedded tasks: a YAML and its items each. See NOTICE.md and manifest.json.

`gamayun tasks build --out DIR --embedded` makes the items, by
recipes/demo_data/tasks.py. The tasks `help` and `udhr` have
none of their own: they are the held-out sets of demo_corpus.
"""

from __future__ import annotations

from pathlib import Path

FOLDER: Path = Path(__file__).parent
