"""report.py: the page and tables of made-up runs, whole, damaged and hostile."""

import copy
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_run import (
    LANGUAGES,
    SOURCES,
    evaluation,
    records,
    with_samples,
    without_english,
    write_run,
)

from gamayun_jax.config import UserError
from gamayun_jax.report import (
    curves,
    figures,
    formats,
    provenance,
    read_run,
    report,
    scores,
)


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails on what would load or run."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []
        self.places: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert len(set(self.places)) == len(self.places)
        assert set(self.links) <= set(self.places)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert tag not in ("img", "link", "iframe", "object", "base", "form", "b\n")
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "srcset", "action", "ping")
            if name in ("href", "xlink:href"):
                assert value.startswith(("#", "data:text/csv;"))
                if value.startswith("#"):
                    self.links.append(value[1:])
            if name == "id":
                self.places.append(value)

    def handle_data(self, data):
        self.text.append(data)


def page_of(out: Path, *runs: Path) -> Page:
    path = report.write_report(runs, out)
    assert path == out / "index.html"
    assert sorted(p.name for p in out.iterdir()) == ["exposure.json", "index.html"]
    return Page(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "balanced", records(every=20))


def test_one_run(run, tmp_path):
    page = page_of(tmp_path, run)
    text = " ".join(page.text)
    assert page.tags.count("script") == 1
    assert len(page.links) == page.tags.count("h2")  # a list of contents
    # Every figure has its numbers beside it.
    assert page.tags.count("figure") == page.source.count('href="data:text/csv')
    for word in ("balanced", "2.36M", "2.1B", "align → enrich", "end of enrich"):
        assert word in text, word
    for k in LANGUAGES:  # a row in both sets' tables, and labels in figures
        assert page.text.count(k) >= 5, k
    for name in ("help", "udhr"):
        assert f"Held-out set “{name}” by language" in text
    bpb = records(every=20)["eval/1000.json"]["sets"]["udhr"]["languages"]["ko"]
    assert f"{bpb['bits_per_byte']:.3f}" in page.text
    assert "Not recorded" not in text
    assert "unreadable" not in text
    assert "url(" not in re.sub(r"url\(#", "", page.source)
    assert len(page.source) < 2_000_000
    # The page's own colours, in both modes, and no others.
    assert not set(re.findall(r"(?:fill|stroke): (#\w+)", page.source)) - {"#000000"}


def test_without_english_nothing_is_relative_to_it(run, tmp_path):
    assert "English = 1" in page_of(tmp_path / "with", run).source
    folder = write_run(tmp_path / "r", without_english(records(every=50)))
    page = page_of(tmp_path / "out", folder)
    assert "English = 1" not in page.source
    headings = re.findall(r"<th [^>]*>([^<]*)</th>", page.source)
    assert "parity" not in headings
    assert "xz -9e" in headings


def test_one_run_does_not_say_that_its_switch_helped(run, tmp_path):
    page = page_of(tmp_path, run)
    part = page.source.split("Did the switch help?</h2>")[1].split("<h2")[0]
    assert "One run can&#39;t tell" in part
    # The learning rate's share is named: it fell all the while.
    assert "its learning rate went from 0.004 to 0, falling over 100% of its" in part
    assert "“align”" not in part  # begins from nothing: no switch
    one = records(every=50, evals=(0, 800))
    first = write_run(tmp_path / "first", one)
    assert "Did the switch help?" not in page_of(tmp_path / "out", first).source


def test_samples_stand_side_by_side(tmp_path):
    folder = with_samples(write_run(tmp_path / "r", records(every=50)))
    page = page_of(tmp_path / "out", folder)
    part = page.source.split("Samples, task “names”</h2>")[1].split("</table>")[0]
    for step in (0, 800, 1000):
        assert part.count(f"written at {step} &lt;b&gt;") == 2 * len(LANGUAGES)
    assert part.count("answer 1") == len(LANGUAGES)
    assert "answer 2" not in part
    assert part.count('class="better"') == 2 * 3  # ru's, at three evaluations


def test_losses_are_in_bits_per_byte_of_the_sources_served(tmp_path):
    files = records(every=50)
    loss, unit = curves.losses(read_run.read_run(write_run(tmp_path / "r", files)))
    assert unit == "bits per byte"
    # A token of every source is three bytes here.
    nats = files["metrics.jsonl"][3]["languages"]["ru"]["nll"]
    assert loss[3][0]["ru"] == pytest.approx(nats / math.log(2) / 3)
    mean = sum(loss[3][0][k] for k in LANGUAGES) / len(LANGUAGES)
    assert loss[3][0]["macro"] == pytest.approx(mean)
    del files["lineage.json"]["corpus"]["sources"]["ru/help"]["bytes"]
    other = read_run.read_run(write_run(tmp_path / "other", files))
    loss, unit = curves.losses(other)
    assert unit == "nats per token"
    assert loss[3][0]["ru"] == nats
    page = page_of(tmp_path / "out", tmp_path / "other")
    assert "Nats per token, unweighted" in page.source


def test_same_records_same_page(run, tmp_path):
    first = page_of(tmp_path / "a", run).source
    assert page_of(tmp_path / "b", run).source == first


def test_several_runs(run, tmp_path):
    files = records(quality=2.6, every=20, evals=(0, 400, 800, 1000))
    other = write_run(tmp_path / "other", files)
    page = page_of(tmp_path / "out", run, other)
    text = " ".join(page.text)
    for words in ("Runs compared on “help”", "Runs compared on “udhr”", "− balanced",
                  "other: Lineage", "balanced: Curriculum"):  # fmt: skip
        assert words in text, words
    a = records(every=20)["eval/1000.json"]["sets"]["help"]["languages"]["ru"]
    b = files["eval/1000.json"]["sets"]["help"]["languages"]["ru"]
    delta = b["bits_per_byte"] - a["bits_per_byte"]
    error = math.sqrt(2) * 0.012
    cell = re.search(
        rf'<td class="(\w+)" data-v="{re.escape(str(delta))}">'
        r'([^<]*)<b class="mark"></b><small>([^<]*)',
        page.source,
    )
    assert cell is not None
    assert cell[1] == "better"
    assert cell[2] == f"−{-delta:.3f}"
    ends = (delta - 1.96 * error, delta + 1.96 * error)
    assert cell[3].strip() == " … ".join(f"−{-x:.3f}" for x in ends) + " unpaired"


def replace_strings(value, text: str):
    """Every text in a record, keys that are names included, gets `text` appended."""
    if isinstance(value, str):
        return value + text
    if isinstance(value, list):
        return [replace_strings(v, text) for v in value]
    if isinstance(value, dict):
        names = (*LANGUAGES, *SOURCES, "help", "udhr")
        return {
            k + text if k in names else k: replace_strings(v, text)
            for k, v in value.items()
        }
    return value


def test_names_are_data(tmp_path):
    evil = (
        "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&$x^{$\\frac\n\ud800"
    )
    hostile = replace_strings(records(every=50), evil)
    for line in hostile["metrics.jsonl"]:
        line["kind"] = "train"
    origin = {"checkpoint": evil, "run": evil, "restarted": [evil], "lineage": {}}
    origin["lineage"] = copy.deepcopy(hostile["lineage.json"])
    hostile["lineage.json"]["init_from"] = origin
    folder = write_run(tmp_path / "a<b>&c", hostile, tail="<script>")
    other = write_run(tmp_path / "<script>x", records(every=50))
    page = page_of(tmp_path / "out", folder, other)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert "<script>alert" in "".join(page.text)
    scores.run_text(folder)


def test_torn_and_unknown_lines(tmp_path):
    files = records(every=50)
    files["metrics.jsonl"][3:3] = [{"kind": "later"}, 7, None, ["x"]]
    page = page_of(tmp_path / "out", write_run(tmp_path / "r", files, '{"kind": "tra'))
    said = "unreadable lines of metrics.jsonl left out: 4, number 5, 6, 7, "
    assert said in " ".join(page.text)


def damaged(seed: int) -> dict:
    """A run's records with 4, 12, ... fields dropped or of another type."""
    rng = random.Random(seed)
    files = records(every=100)
    junk = [None, "text", [], {}, -1, 1e300, float("nan"), 10**400, True, [{"x": 1}]]
    for _ in range(4 * 3 ** (seed % 5)):
        part, last = files, rng.choice([*files])
        while isinstance(part[last], dict | list) and part[last]:
            part = part[last]
            last = rng.choice([*part] if isinstance(part, dict) else range(len(part)))
            if rng.random() < 0.15:
                break
        if part is files:
            continue
        if isinstance(part, dict) and rng.random() < 0.5:
            del part[last]
        else:
            part[last] = copy.deepcopy(rng.choice(junk))
    return files


@pytest.mark.parametrize("seed", range(5))
def test_damaged_fields_leave_gaps(run, tmp_path, seed):
    """Whatever is dropped or of another type, there is a page and a table."""
    folder = write_run(tmp_path / "r", damaged(seed))
    page_of(tmp_path / "out", *([folder], [run, folder])[seed % 2])
    scores.run_text(folder)


def test_missing_files_leave_labelled_gaps(tmp_path):
    folder = write_run(tmp_path / "r", {"config.json": {}})
    text = " ".join(page_of(tmp_path / "out", folder).text)
    assert text.count("Not recorded in this run") == 5
    assert scores.run_text(folder) == "no evaluation in this run"


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="is no run folder.*give the folder of a run"):
        report.write_report([tmp_path], tmp_path / "out")
    model = write_run(tmp_path / "m", {"config.json": {"model_type": "qwen3"}})
    with pytest.raises(UserError, match="is a model in Hugging Face's format"):
        report.write_report([model], tmp_path / "out")
    folder = write_run(tmp_path / "r", {"config.json": {}})
    (folder / "lineage.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"lineage\.json is damaged.*restore"):
        report.write_report([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_long_run_stays_small(tmp_path):
    line = records(every=1000)["metrics.jsonl"][0]
    lines = [{**line, "step": k, "tokens": 1000 * k} for k in range(1, 5001)]
    files = {**records(), "metrics.jsonl": lines}
    page = page_of(tmp_path / "out", write_run(tmp_path / "r", files))
    assert len(page.source) < 1_000_000


def test_language_table():
    files = records()
    evals = [files[f"eval/{k}.json"] for k in (0, 800, 1000)]
    table = scores.language_text(evals, LANGUAGES[::-1])
    lines = table.splitlines()
    assert 80 <= max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines[2:16]] == [
        *LANGUAGES[::-1], "macro", "micro"
    ]  # fmt: skip
    assert len({len(line) for line in lines[1:14]}) == 1
    assert "end of align" in lines[1]
    assert "below xz -9e: 12 of 12 languages" in lines
    assert "held-out set 'udhr'" in table
    many = scores.language_text(evals * 3).splitlines()
    assert max(map(len, many)) <= 104
    assert scores.language_text([]) == ""


def test_a_shuffled_stage_is_named(tmp_path):
    """Its shares are drawn as planned; what was served scatters."""
    files = records(every=50)
    names = {"align": "shuffled", "enrich": "interleaved"}
    files["config.json"]["stages"] = [
        {"name": k, "mixture": {"order": order}} for k, order in names.items()
    ]
    page = page_of(tmp_path / "out", write_run(tmp_path / "r", files))
    assert "random order in align: over a part of it" in page.source


def test_curriculum_figure_and_table(tmp_path):
    points = records()["lineage.json"]["curriculum"]["shares"]
    figure = figures.curriculum_figure(points)
    figure.savefig(tmp_path / "c.png", dpi=50)
    assert (tmp_path / "c.png").stat().st_size > 5000
    labels = {t.get_text() for t in figure.axes[0].texts}
    assert set(SOURCES) <= labels
    stages = records()["lineage.json"]["stages"]
    figure = figures.curriculum_figure(points, LANGUAGES, stages)
    assert {"align", "enrich"} <= {t.get_text() for t in figure.axes[0].texts}
    rows = [
        {"phase": p, "source": s, "share": 0.5, "examples": 8, "epochs": 1.5,
         "epochs_total": 2.5}
        for p in ("align", "enrich") for s in ("en/hq", "ru/web")
    ]  # fmt: skip
    table = provenance.curriculum_table(rows, 256).text().splitlines()
    assert len(table) == 6
    rows.append({**rows[2], "source": "en/web", "share": 0.2})
    total = provenance.curriculum_table(rows, 256).text().splitlines()[-1]
    assert total.split() == ["enrich", "en,", "all", "70.00%", "4.1k"]
    assert table[1].split() == ["align", "en/hq", "50.00%", "2.05k", "1.50", "2.50"]


def test_numbers():
    found = [
        formats.short(x) for x in (0, 391, 999.6, 2_100_000, 999_999, 1.5e12, None)
    ]
    assert found == ["0", "391", "1k", "2.1M", "1M", "1.5T", "–"]
    assert formats.plain("a\x00b\ud800" + "x" * 99, 10) == "a b xxxxx…"


def test_loss_points_do_not_blend_stages(tmp_path):
    lines = [
        {"kind": "train", "tokens": k, "stage": "a" if k < 500 else "b",
         "languages": {"en": {"nll": 5.0 if k < 500 else 3.0, "targets": 9}}}
        for k in range(1000)
    ]  # fmt: skip
    folder = write_run(tmp_path / "r", {"metrics.jsonl": lines})
    raw, smooth = curves.loss_points(read_run.read_run(folder), "en")
    assert len(raw) <= 250
    assert {y for _, y in raw + smooth} == {5.0, 3.0}


def test_import_is_light():
    code = "import sys, gamayun_jax.report.report as r; print([m for m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not {"'jax'", "'matplotlib'"} & set(out.stdout.strip("[]\n").split(", "))


def quantised(folder: Path, bits: int, added: float) -> Path:
    """A folder as `gamayun quantize` leaves it, as far as the report reads it."""
    before = evaluation(1000, "before", 2.4, random.Random(0))
    after = copy.deepcopy(before) | {"label": f"int{bits}"}
    for part in after["sets"].values():
        for row in (*part["languages"].values(), part["macro"]):
            row["bits_per_byte"] += added
    record = {
        "format": 1, "run": "tiny", "step": 1000, "bits": bits,
        "bytes": {"before": 4_000_000, "after": bits * 125_000},
        "evals": [before, after],
    }  # fmt: skip
    folder.mkdir()
    (folder / "quantised.json").write_text(json.dumps(record))
    return folder


def test_quantised_weights_beside_their_floats(run, tmp_path):
    small = [
        quantised(tmp_path / f"int{b}", b, x) for b, x in ((4, 0.125), (8, -0.003))
    ]
    page = page_of(tmp_path / "out", run, *small)
    assert "Quantised weights of tiny, “help”" in page.source
    assert "Weights: before 4MB, int8 1MB, int4 500kB" in page.source
    part = page.source.split("Quantised weights of tiny, “udhr”</h2>")[1]
    part = part.split("</table>")[0]
    assert part.count(">+0.125<") == len(LANGUAGES) + 2  # and the means
    assert part.count(">−0.003<") == len(LANGUAGES) + 2
    # Beyond noise, all but the mean over units, which is no further test; the errors of
    # 0.03 are wider than 0.003.
    assert part.count('class="worse"') == len(LANGUAGES) + 1
    assert 'class="better"' not in part
    assert "unpaired" in part
    rng = random.Random(0)
    for label, added in (("before", 0.0), ("int8", -0.3)):
        (small[1] / "items" / label).mkdir(parents=True)
        rows = [
            {"id": i, "language": k, "bytes": 100,
             "bits": 200 + added + rng.gauss(0, 0.1)}
            for k in LANGUAGES for i in range(30)
        ]  # fmt: skip
        path = small[1] / "items" / label / "heldout-udhr.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    path = report.write_report([run, small[1]], tmp_path / "items")
    part = path.read_text().split("Quantised weights of tiny, “udhr”</h2>")[1]
    part = part.split("</table>")[0]
    assert "unpaired" not in part
    assert part.count('class="better"') == len(LANGUAGES) + 1
    assert "Quantised" not in page_of(tmp_path / "out", run).source
    (small[0] / "quantised.json").write_text("{")
    with pytest.raises(UserError, match="quantised.json is damaged"):
        report.write_report([run, small[0]], tmp_path / "out")
