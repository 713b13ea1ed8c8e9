"""What a run shows while it trains: TensorBoard's files are read back."""

import dataclasses
import json
import os
import signal

from gamayun_jax import train
from gamayun_jax.report.story import SAMPLES


def quiet(text):
    pass


def stop_at(step):
    """A log function that sends SIGTERM once the given record is written."""

    def log(text):
        if f"step {step}/" in text and "eval" not in text:
            os.kill(os.getpid(), signal.SIGTERM)

    return log


def records(run):
    return [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]


def events(run):
    """The events of a run folder, in the order in which they were written."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(run.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its CRC, data, its CRC
            size = int.from_bytes(data[at : at + 8], "little")
            yield Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size


def test_tensorboard_has_each_step_once(config, replace, tmp_path):
    cfg = replace(config, "log.tensorboard", True)
    run = tmp_path / "run"
    assert train.train(cfg, run, log=stop_at(11)) == train.PREEMPTED
    assert train.train(cfg, run, log=quiet) == 0
    purged, seen = [], []
    for event in events(run):
        if event.session_log.status:
            purged.append(event.step)
            seen = [s for s in seen if s < event.step]
        for value in event.summary.value:
            if value.tag == "train/nll":
                seen.append(event.step)
    assert purged[-1] % (8 * 64) == 1  # just after the step it stopped at
    assert seen == [r["tokens"] for r in records(run)]


def test_tensorboard_has_what_the_model_writes(config, replace, tmp_path):
    """The samples of the report: by language, before and after each stage."""
    cfg = replace(config, "log.tensorboard", True)
    evaluation = dataclasses.replace(
        cfg.evaluation, tasks=("cldr_names",), task_items=SAMPLES + 1
    )
    cfg = dataclasses.replace(cfg, evaluation=evaluation)
    run = tmp_path / "run"
    assert train.train(cfg, run, log=quiet) == 0
    texts = {
        (value.tag.removesuffix("/text_summary"), event.step): b"".join(
            value.tensor.string_val
        ).decode()
        for event in events(run)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "text"
    }
    wanted = {}
    for step in (0, 7, 13):
        path = run / "eval" / f"{step}.items" / "cldr_names.jsonl"
        for item in map(json.loads, path.read_text().splitlines()):
            place = (f"samples/cldr_names/{item['language']}", step * 8 * 64)
            wanted.setdefault(place, []).append(item)
    assert {k[0] for k in wanted} == {
        f"samples/cldr_names/{k}" for k in ("en", "ru", "tr")
    }
    assert set(texts) == set(wanted)
    for place, items in wanted.items():
        assert len(items) == SAMPLES + 1
        plain = texts[place].replace("\n    ", "\n")
        for item in items[:SAMPLES]:
            assert {item["prompt"], item["answers"][0]} <= set(plain.split("\n\n"))
            assert item["text"].strip() in plain
        assert plain.count("\n---\n") == SAMPLES - 1
