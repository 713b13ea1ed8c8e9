"""The command line: help, one-line errors with exit status 2, and a small run."""

import dataclasses
import inspect
import json
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from pathlib import Path, PurePath

import pytest

from gamayun_jax import cli
from gamayun_jax.config import UserError, to_dict
from gamayun_jax.data.corpus import open_corpus
from gamayun_jax.evaluate.tasks import load_task
from gamayun_jax.fields import is_local
from gamayun_jax.storage import is_bucket
from gamayun_jax.training import join

# What people, scripts and launch_tpu.sh write: it must go on to be read.
PARAMETERS = {
    "demo": "--workdir --long --set",
    "corpus build": "config --set --out --workers",
    "corpus copy": "folder out",
    "corpus debian": "--out --work --languages",
    "corpus inspect": "folder",
    "corpus split": "files --out --share --text-field --id-field --seed",
    "tasks build": "--out --work --embedded",
    "tokenizer train": "config --set --out",
    "tokenizer report": "corpus --model",
    "curriculum": "config --set --out --init-from",
    "controls": "config --set --out --arms --check",
    "train": "config --set --workdir --init-from --profile --fresh --distributed "
    "--coordinator --num-processes --process-id --silence",
    "launch": "arguments",
    "study": "file --out --plan --side-by-side --keep-runs --arms",
    "plan": "config --set --topology --table --slices --search --price --efficiency "
    "--json --cache --spot --restart --save --queue --measured --currency",
    "eval": "model --tasks --limit --corpus --languages --batch-size --window --out",
    "align": "model --out --corpus --languages --eval",
    "forgetting": "run --examples --steps --corpus",
    "compare": "models --tasks --limit --languages --out",
    "generate": "model --prompt --interactive --literal --max-tokens --temperature "
    "--top-k --top-p --min-p --repetition-penalty --seed",
    "lm-eval": "arguments",
    "average": "run out --last --window --ema --weights --until",
    "quantize": "model out --bits --corpus --no-eval",
    "import-hf": "folder out",
    "export-hf": "model out --dtype --tokenizer",
    "report": "runs --out",
}
PARSED = [
    ("demo", {}),
    ("demo --workdir=w --long 8", {"workdir": Path("w"), "long": 8.0}),
    ("corpus build c.py --out o", {"config": Path("c.py"), "out": Path("o")}),
    ("corpus build --out o --workers 2 c.py --set a=1 --set b=-1 --set=c=x y",
     None),
    ("corpus build --out o --workers 2 c.py --set a=1 --set b=-1 --set=c=--x",
     {"config": Path("c.py"), "out": Path("o"), "workers": 2,
      "set": ["a=1", "b=-1", "c=--x"]}),
    ("corpus build c.py", None),
    ("corpus build c.py --out o --workers 0", None),
    ("corpus debian --out o --languages ru tr",
     {"out": Path("o"), "languages": ["ru", "tr"]}),
    ("corpus debian --out o --languages", None),
    ("corpus inspect f", {"folder": Path("f")}),
    ("tasks build --out o --emb", {"out": Path("o"), "embedded": True}),
    ("curriculum c.py --out a.SVG", {"config": Path("c.py"), "out": Path("a.SVG")}),
    ("curriculum c.py --out a.gif", None),
    ("controls c.py --arms single ramped --out o --check a b",
     {"config": Path("c.py"), "arms": ["single", "ramped"], "out": Path("o"),
      "check": [Path("a"), Path("b")]}),
    ("controls c.py --out o --arms sorted", None),
    ("train c.py --work w --init r --fresh --process-id -1 --num-processes 02",
     {"config": Path("c.py"), "workdir": Path("w"), "init_from": Path("r"),
      "fresh": True, "process_id": -1, "num_processes": 2}),
    ("train c.py --workdir w --pro 10:13", None),  # --profile or --process-id
    ("train c.py --workdir w --profile 10:", None),
    ("train c.py --workdir w --silence 0", None),
    ("train c.py --workdir w --silence nan", None),
    ("train c.py", None),
    ("study s.py --out o --side-by-side 4 --arms 1M-*",
     {"file": Path("s.py"), "out": Path("o"), "side_by_side": 4, "arms": "1M-*"}),
    ("study s.py --out o --side-by-side -1", None),
    ("study s.py", None),
    ("plan c.py --table a b --price 1.2 --json j --slices 2",
     {"config": Path("c.py"), "table": ["a", "b"], "price": 1.2, "json": Path("j"),
      "slices": 2}),
    ("eval m --tasks all a.yaml --limit 3 --languages ru",
     {"model": Path("m"), "tasks": ["all", "a.yaml"], "limit": 3,
      "languages": ["ru"]}),
    ("eval --out o m --batch-size 1 --window 8",
     {"model": Path("m"), "out": Path("o"), "batch_size": 1, "window": 8}),
    ("align m --eval e", {"model": Path("m"), "eval": Path("e")}),
    ("forgetting r --examples 8 --steps 3 7",
     {"run": Path("r"), "examples": 8, "steps": [3, 7]}),
    ("compare a b --out o", {"models": [Path("a"), Path("b")], "out": Path("o")}),
    ("compare --out o", None),
    ("generate m --prompt a --prompt 'b c' --literal --top-k 3 --min-p 0.1",
     {"model": Path("m"), "prompt": ["a", "b c"], "literal": True, "top_k": 3,
      "min_p": 0.1}),
    ("generate m --prompt a --max-tokens 0", None),
    ("generate m --prompt a --top-k -1", None),
    ("generate m --prompt a --temperature=-1", None),
    ("generate m --prompt a --top-p 0", None),
    ("generate m --prompt a --min-p 1.5", None),
    ("generate m --prompt a --repetition-penalty 0", None),
    ("generate m --prompt a --seed=-1", None),
    ("generate m --prompt '-- a' --temperature .5",
     {"model": Path("m"), "prompt": ["-- a"], "temperature": 0.5}),
    ("average r o --last 4 --weights 1-sqrt --until 9",
     {"run": Path("r"), "out": Path("o"), "last": 4, "weights": "1-sqrt",
      "until": 9}),
    ("average r o --window 0", None),
    ("average r o --last 4 --weights cosine", None),
    ("quantize m o --bits 4 --no-eval",
     {"model": Path("m"), "out": Path("o"), "bits": 4, "no_eval": True}),
    ("quantize m o --bits 5", None),
    ("export-hf m o --dtype bfloat16",
     {"model": Path("m"), "out": Path("o"), "dtype": "bfloat16"}),
    ("export-hf m o --dtype int8", None),
    ("report a b --out o", {"runs": [Path("a"), Path("b")], "out": Path("o")}),
    ("report -- -a", {"runs": [Path("-a")]}),
    ("report", None),
    ("report a -x", None),
    ("report ''", None),
    ("train c.py --workdir=", None),
]  # fmt: skip


def parsers(parser, name=""):
    """Command -> its parser."""
    for group in (a for a in parser._actions if isinstance(a.choices, dict)):
        return {
            command: found
            for word, part in group.choices.items()
            for command, found in parsers(part, f"{name} {word}".strip()).items()
        }
    return {name: parser}


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_command_has_its_parameters(name):
    actions = parsers(cli.build_parser())[name]._actions
    names = [(a.option_strings or [a.dest])[-1] for a in actions]
    assert sorted(names) == sorted([*PARAMETERS[name].split(), "--help"])
    assert set(PARAMETERS) == set(cli.COMMANDS)


@pytest.mark.parametrize(("line", "values"), PARSED)
def test_a_command_line_is_read(line, values, capsys):
    """None: refused by one line, with status 2."""
    if values is None:
        assert cli.main(shlex.split(line)) == 2
        error = capsys.readouterr().err
        assert error.startswith("gamayun: error: ")
        assert error.count("\n") == 1
        return
    call = cli.parse(shlex.split(line))
    assert any(line.startswith(k) and f is call.func for k, f in cli.COMMANDS.items())
    given = {name.strip("_"): value for name, value in call.keywords.items()}
    assert {k: v for k, v in given.items() if v is not False} == values


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("corpus", "the following arguments are required: COMMAND"),
        ("tran c.py", "there is no command tran: did you mean train?"),
        (
            "corpus biuld",
            "there is no command corpus biuld: did you mean corpus build?",
        ),
        ("inspect x", "there is no command inspect: did you mean corpus inspect?"),
        ("train c.py --workdri w", "there is no --workdri: did you mean --workdir?"),
        ("eval m --language=ru --taks x", "there is no --taks: did you mean --tasks?"),
        ("--hlep", "there is no --hlep: did you mean --help?"),
        ("--verison eval m --tasks x", "there is no --verison: did you mean --version"),
    ],
)
def test_a_mistyped_word_gets_a_suggestion(line, message, capsys):
    assert cli.main(line.split()) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"gamayun: error: {message}")
    assert "--help" in told.err
    assert told.err.count("\n") == 1
    assert not told.out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_says_what_each_command_reads_and_writes(name, capsys):
    try:
        status = cli.main([*name.split(), "--help"])
    except SystemExit as e:  # argparse ends so, and lm-evaluation-harness
        status = e.code
    assert status == 0
    assert len(capsys.readouterr().out) > 200
    assert f"gamayun {name} " in inspect.getdoc(cli.COMMANDS[name])  # an example


def test_help_says_types_and_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--max-tokens N most tokens to add (default: 128)" in told
    assert (
        "--temperature FLOAT 0 always takes the most likely token (default: 0.8)"
        in told
    )
    assert "--seed INT seed of the draws (default: 0)" in told
    assert "--prompt TEXT text to continue; may be repeated --" in told


@pytest.fixture
def writable_buckets(monkeypatch):
    """Addresses of examples are not asked."""
    monkeypatch.setattr("gamayun_jax.commands.check_writable", lambda path: None)


@pytest.mark.usefixtures("writable_buckets")
def test_examples_of_help_are_read():
    for name, command in cli.COMMANDS.items():
        lines = re.findall(r"^  (gamayun .*)", inspect.getdoc(command), re.MULTILINE)
        assert lines, name
        for line in lines:
            assert cli.parse(shlex.split(line)[1:]).func is command


WRITTEN = [
    Path("README.md"),
    *Path("docs").glob("*.md"),
    *Path("experiments").glob("*"),
]


@pytest.mark.usefixtures("writable_buckets")
@pytest.mark.parametrize("path", [p for p in WRITTEN if p.is_file()], ids=str)
def test_commands_of_the_documents_are_read(path):
    text = re.sub(r"\\+\n", " ", path.read_text())  # two in a docstring of Python
    for line in re.findall(r"^ *(gamayun .*)", text, re.MULTILINE):
        words = shlex.split(re.split(r" {2,}[#(]", line)[0].replace("...", ""))
        if "[" not in line:  # a form of the command, not an example
            assert cli.parse(words[1:]).func, line


def test_help_of_all_commands(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["--help"])
    assert e.value.code == 0
    told = capsys.readouterr().out
    assert all(f"\n    {name.split()[0]}" in told for name in cli.COMMANDS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_options(shell, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["--completion", shell])
    assert e.value.code == 0
    script = capsys.readouterr().out
    assert "export-hf" in script
    assert "init-from" in script


def test_lm_eval_without_its_extra(monkeypatch, capsys):
    """Help, and a message that names a command which works from a checkout."""
    monkeypatch.setitem(sys.modules, "gamayun_jax.evaluate.lm_eval", None)
    monkeypatch.delattr("gamayun_jax.evaluate.lm_eval", raising=False)
    extra = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]
    assert "optional-dependencies" in extra["dynamic"]
    install = "pip install -e '.[lm-eval]'"
    assert "lm-eval" in extra["dynamic"]["optional-dependencies"]
    assert cli.main(["lm-eval", "--help"]) == 0
    assert install in " ".join(capsys.readouterr().out.split())
    assert cli.main(["lm-eval", "--model", "gamayun"]) == 2
    said = capsys.readouterr().err
    assert install in said
    assert len(said.splitlines()) == 1


def test_help_does_not_wait_for_jax():
    code = "import sys; from gamayun_jax import cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def path_arguments():
    """(words of a command, one of its arguments that is a path at a bucket)."""
    for name, parser in parsers(cli.build_parser()).items():
        actions = parser._actions
        needed = [a for a in actions if not a.option_strings or a.required]
        for action in actions:
            if not hasattr(action, "complete"):
                continue
            words = name.split()
            for a in dict.fromkeys([*needed, action]):
                value = "gs://bucket/x.png" if a is action else "x"
                words += [*a.option_strings[:1], value]
            argument = [*action.option_strings, action.metavar][0]
            yield pytest.param(words, argument, id=f"{name} {argument}")


# What is executed, made bit by bit, locked, or drawn by matplotlib. `corpus build` says
# itself how a corpus comes into a bucket.
LOCAL_ALONE = {
    "config",
    "CONFIG",
    "STUDY",
    "--work",
    "--json",
    "corpus debian --out",
    "corpus split --out",
    "tasks build --out",
    "tokenizer train --out",
    "curriculum --out",
    "controls --out",
    "study --out",
}


@pytest.mark.usefixtures("writable_buckets")
@pytest.mark.parametrize(("words", "name"), list(path_arguments()))
def test_every_path_at_a_bucket_is_taken_or_refused(
    words, name, tmp_path, monkeypatch, capsys
):
    """A command gets it as one in a bucket, or says in a line that it cannot be."""
    monkeypatch.chdir(tmp_path)
    # planning needs one of a group, which is no path
    more = ["--topology", "v5e:2x2"] if words[0] == "plan" else []
    groups = words[0] in cli.GROUPS
    command = " ".join(words[: 1 + groups])
    if {name, f"{command} {name}"} & LOCAL_ALONE:
        assert cli.main([*words, *more]) == 2
        error = capsys.readouterr().err.strip()
        place = "gs://bucket/x.png"
        assert error.startswith(f"gamayun: error: argument {name}: {place} must")
        assert "mount the bucket" in error
        assert len(error.splitlines()) == 1
    else:
        given = cli.parse([*words, *more]).keywords.values()
        paths = [p for v in given for p in (v if isinstance(v, list) else [v])]
        assert [str(p) for p in paths if isinstance(p, PurePath) and is_bucket(p)] == [
            "gs://bucket/x.png"
        ]
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_a_bucket_is_tried_before_the_work(bucket, bucket_server, capsys):
    words = ["eval", "nowhere", "--out"]
    bucket_server.fault = lambda kind, _: 403 if kind == "write" else None
    for out, said in ((bucket, " gs://runs"), ("hdfs://a/b", "not read")):
        assert cli.main([*words, out]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"gamayun: error: argument --out: {out}")
        assert said in error
        assert len(error.splitlines()) == 1


WRITTEN = {"--out", "--workdir", "--json"}


@pytest.mark.parametrize(
    ("words", "name"), [p for p in path_arguments() if WRITTEN & {p.values[1]}]
)
def test_what_cannot_be_written_is_refused_before_the_work(
    words, name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for path in ("file/x.png", "file/y/x.png"):
        args = [path if "bucket" in word else word for word in words]
        assert cli.main(args) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"gamayun: error: argument {name}: {path} must be a f")
        assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "override",
    [
        "data.corpus=hdfs://bucket/corpus",
        "corpus.tokenizer.model=s3://bucket/tokenizer.model",
        'corpus.sources.en/help.files=["tfds:gs://bucket/wiki:train"]',
        "corpus.sources.0.files.0=https://example.org/a.jsonl",
        "corpus.heldout.udhr.files.en=hf://datasets/x/en.jsonl",
        'evaluation.tasks=["gs://bucket/a.yaml"]',
    ],
)
def test_every_path_of_a_config_is_local(experiment, tmp_path, capsys, override):
    out = str(tmp_path / "out")
    words = ["corpus", "build", str(experiment), "--out", out, "--set", override]
    assert cli.main(words) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"gamayun: --set {override}: ")
    assert "must be a path on this machine" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_functions_take_a_path_in_a_bucket_as_one(bucket, config):
    """`Path` makes a relative folder "gs:" of it."""
    for path in (f"{bucket}/x.yaml", Path(f"{bucket}/x.yaml")):
        with pytest.raises(UserError, match=f"no corpus in {bucket}/x.yaml"):
            open_corpus(path)
        with pytest.raises(UserError, match=r"gs:/+.* must be a path on this"):
            load_task(path)
    for path in ("a:b/c", "/data/wiki:train"):
        assert is_local(Path(path))
    data = dataclasses.replace(config.data, corpus=Path("gs://bucket/x"))
    cfg = dataclasses.replace(config, data=data)
    assert cfg.data.corpus == "gs://bucket/x"


@pytest.fixture
def experiment(config, tmp_path):
    """The small config as an experiment file."""
    path = tmp_path / "small.py"
    text = json.dumps(to_dict(config))
    path.write_text(
        "import json\nfrom gamayun_jax.config import from_json\n"
        f"def get_config():\n    return from_json({text!r})\n"
    )
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "sed=1"], "Did you mean 'seed'"),
        (["--set", "data.corpus=nowhere"], "gamayun corpus build"),
        (["--set", "stages.align.schedule.decay_tokens=9999"], "shorten them"),
        (["--set", "corpus.tokenizer.vocab_size=300"], "another tokenizer"),
        (["--set", "data.batch_size=11"], "use a multiple of 2"),
        (["--set", "data.max_epochs=0.001"], "over its cap of 0.001 epochs"),
        (["--init-from", "nowhere"], "nowhere does not exist"),
        (["--set", "stages.align.mixture.shares.xx/*=0.1"], "matches no source"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(experiment, tmp_path, capsys, words, message):
    run = str(tmp_path / "run")
    assert cli.main(["train", str(experiment), "--workdir", run, *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("gamayun: ")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        "eval demoo", "eval demoo --tasks udhr", "forgetting demoo",
        "align demoo --out out", "align demo --eval demoo", "generate demoo --prompt a",
        "average demoo out --last 2", "quantize demoo out --bits 8",
        "import-hf demoo out", "export-hf demoo out", "report demoo",
        "compare demoo demoo --out out", "train CONFIG --init-from demoo --workdir out",
        "curriculum CONFIG --init-from demoo", "controls CONFIG --check demoo",
        "plan CONFIG --topology v5e:2x2 --spot 1 --measured demoo",
    ],
)  # fmt: skip
def test_a_folder_that_is_not_there(experiment, tmp_path, monkeypatch, capsys, words):
    """What takes a run says so, and names the one that was meant."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    words = [str(experiment) if w == "CONFIG" else w for w in words.split()]
    assert cli.main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "demoo does not exist (did you mean demo?): " in error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stages.align.schedule.warmup_tokens=300000000",
            "stages.align.schedule: warmup_tokens=300000000 + decay_tokens=0 exceed",
        ),
        ("stages.enrich.mixture.ramp_tokens=9999", "stages.enrich.mixture.ramp_tokens"),
        ("corpus.tokenizer.vocab_size=300", "another tokenizer"),
    ],
)
def test_the_preview_refuses_what_training_does(experiment, override, message, capsys):
    assert cli.main(["curriculum", str(experiment), "--set", override]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert not told.out


@pytest.mark.parametrize(
    ("coordinator", "processes", "process", "message"),
    [
        ("localhost:{free}", "2", "5", "--process-id 5: the 2 processes are numbered"),
        ("localhost:{free}", "2", "-1", "--process-id -1: the 2 processes"),
        ("localhost:{free}", "0", "0", "--num-processes 0: there is at least 1"),
        ("localhost:{free}", "-1", "0", "--num-processes -1"),
        ("localhost", "2", "0", "--coordinator localhost: give HOST:PORT"),
        (":8476", "2", "0", "--coordinator :8476: give HOST:PORT"),
        ("localhost:http", "2", "0", "--coordinator localhost:http: give HOST:PORT"),
        ("localhost:70000", "2", "0", "with a port up to 65535"),
        ("nowhere.invalid:8476", "2", "1", "host nowhere.invalid is not known"),
        ("a..b:8476", "2", "1", "host a..b is not known (it is no name of a host)"),
        ("localhost:{used}", "2", "0", "cannot listen at port {used} (Address already"),
    ],
)
def test_a_cluster_that_cannot_be(
    tmp_path, capsys, monkeypatch, coordinator, processes, process, message
):
    """JAX raises its own errors for some, and for others ends in its native code."""
    monkeypatch.setattr(join, "LOOKUP_SECONDS", 0)
    with socket.create_server(("", 0)) as server, socket.create_server(("", 0)) as free:
        ports = {"used": server.getsockname()[1], "free": free.getsockname()[1]}
        free.close()
        words = ["--coordinator", coordinator.format(**ports)]
        words += ["--num-processes", processes, f"--process-id={process}"]
        run = str(tmp_path / "run")
        assert cli.main(["train", "small.py", "--workdir", run, *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message.format(**ports) in error
    assert error.startswith("gamayun: ")
    assert len(error.splitlines()) == 1


def test_a_host_that_is_not_known_yet(monkeypatch, capsys):
    """Status 2 would keep a launcher from starting it again."""
    answers = [socket.gaierror(-2, "Name or service not known")] * 2
    pauses = []

    def look_up(*args):
        if answers:
            raise answers.pop()

    monkeypatch.setattr(join.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(join.time, "sleep", pauses.append)
    join.check_cluster("pod-0.train:8476", 2, 1)
    assert pauses == [1, 1]
    assert "pod-0.train is not known" in capsys.readouterr().err


def test_nobody_reads_the_output(config):
    """Not success: a run that lost its log was not trained to the end."""
    program = [sys.executable, "-m", "gamayun_jax", "corpus", "inspect"]
    command = [*program, config.data.corpus]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_distributed_and_a_coordinator_exclude_each_other(tmp_path, capsys):
    words = ["--workdir", str(tmp_path), "--distributed", "--num-processes", "2"]
    assert cli.main(["train", "small.py", *words]) == 2
    assert "leave out --coordinator" in capsys.readouterr().err


def test_curriculum_prints_the_table_and_draws_it(experiment, tmp_path, capsys):
    picture = tmp_path / "curriculum.png"
    assert cli.main(["curriculum", str(experiment), "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "align" in out
    assert "tr/help" in out
    assert "20.00%" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_curriculum_before_there_is_a_corpus(experiment, config, tmp_path, capsys):
    """Shares and tokens by what the config says; epochs if it says the sizes, and then
    all is as with a corpus of these sizes."""
    manifest = json.loads((Path(config.data.corpus) / "manifest.json").read_text())
    assert cli.main(["curriculum", str(experiment)]) == 0
    built = capsys.readouterr().out
    words = ["curriculum", str(experiment), "--set", f"data.corpus={tmp_path / 'no'}"]
    assert cli.main([*words, "--out", str(tmp_path / "curriculum.png")]) == 0
    table, said = capsys.readouterr()
    assert "no corpus in" in said
    assert len(said.splitlines()) == 1

    def cells(text):
        rows = [line.split() for line in text.splitlines() if "/help" in line]
        return {(stage, source): rest for stage, source, *rest in rows}

    alike, guessed = cells(built), cells(table)
    assert guessed.keys() == alike.keys()
    for place, (share, tokens, *epochs) in guessed.items():
        assert epochs == ["?", "?"]
        if place in {("enrich", "ru/help"), ("enrich", "tr/help")}:
            assert share == "~20.00%"
        else:
            assert [share, tokens] == alike[place][:2]
    for name, source in manifest["sources"].items():
        words += ["--set", f"corpus.sources.{name}.tokens={source['tokens']}"]
    assert cli.main(words) == 0
    for place, (share, tokens, *epochs) in cells(capsys.readouterr().out).items():
        assert [share, tokens] == alike[place][:2]
        # Records are filled up, so that they hold a little more.
        passes = [float(x) for x in alike[place][2:]]
        assert [float(x) for x in epochs] == pytest.approx(passes, rel=0.05, abs=0.01)
    assert cli.main([*words, "--set", "data.max_epochs=0.001"]) == 2
    assert "over its cap of 0.001 epochs" in capsys.readouterr().err
    nothing = ["--set", "corpus.sources=[]"]
    assert cli.main([*words[:4], *nothing]) == 2
    assert "gamayun corpus build" in capsys.readouterr().err


def test_train_eval_report(experiment, tmp_path, capsys):
    run = tmp_path / "run"
    train = ["train", str(experiment), "--workdir", str(run)]
    short = ["--set", "stages.align.tokens=1024", "--set", "stages.enrich.tokens=1024"]
    short += ["--set", "stages.enrich.schedule.decay_tokens=512"]
    short += ["--set", "stages.enrich.mixture.ramp_tokens=0"]
    short += ["--set", "stages.align.schedule.warmup_tokens=512"]
    short += ["--set", "stages.enrich.schedule.warmup_tokens=512"]
    assert cli.main([*train, *short]) == 0
    check = ["controls", str(experiment), *short, "--check", str(run)]
    assert cli.main(check) == 0
    assert "as planned, 3 sources, 2,048 tokens" in capsys.readouterr().out
    wrong = [*check[:2], "--set", "stages.align.tokens=2048", *check[-2:]]
    assert cli.main(wrong) == 2
    told = capsys.readouterr()
    assert "(at step 4 of" in told.out
    advice = shlex.split(told.err[told.err.index("--set stages") :])
    assert cli.main([*wrong, *advice]) == 0
    assert "as planned" in capsys.readouterr().out
    out = tmp_path / "eval"
    assert cli.main(["eval", str(run), "--out", str(out), "--languages", "ru"]) == 0
    table = capsys.readouterr().out
    assert "xz -9e" in table
    found = json.loads((out / "eval.json").read_text())["sets"]["udhr"]["languages"]
    at_the_end = json.loads((run / "eval" / "4.json").read_text())
    same = at_the_end["sets"]["udhr"]["languages"]["ru"]
    assert found["ru"]["bits"] == pytest.approx(same["bits"], rel=1e-5)
    assert list(found) == ["ru"]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        name for name in ("eval.json", "index.html", "items") if name in table
    )
    both = ["compare", str(out), str(out), "--out", str(tmp_path / "compared")]
    assert cli.main(both) == 0  # held-out sets alone, as `eval` without tasks writes
    table = capsys.readouterr().out
    assert "heldout-udhr" in table
    (row,) = (x for x in table.splitlines() if x.split()[:1] == ["ru"])
    assert row.endswith("+0.000")
    items = (run / "eval" / "4.items" / "heldout-udhr.jsonl").read_text().splitlines()
    units = [r for r in map(json.loads, items) if r["language"] == "ru"]
    assert sum(r["bits"] for r in units) == pytest.approx(same["bits"])
    assert sum(r["bytes"] for r in units) == same["bytes"]
    assert cli.main(["report", str(run)]) == 0
    assert "change in stage enrich (from end of align" in capsys.readouterr().out
    page = (run / "report" / "index.html").read_text()
    assert "end of align" in page
    assert cli.main(["report", str(tmp_path)]) == 2
    assert cli.main(["eval", str(tmp_path)]) == 2


def test_corpus_inspect_and_tokenizer_report(config, capsys):
    assert cli.main(["corpus", "inspect", config.data.corpus]) == 0
    assert "tr/help" in capsys.readouterr().out
    assert cli.main(["tokenizer", "report", config.data.corpus]) == 0
    out = capsys.readouterr().out
    assert "bytes/token" in out
    assert "Gini" in out
    model = f"{config.data.corpus}/tokenizer.model"
    both = ["--model", model, config.data.corpus]
    assert cli.main(["tokenizer", "report", config.data.corpus, *both]) == 0
    assert f"{model}: bytes/token" in capsys.readouterr().out
