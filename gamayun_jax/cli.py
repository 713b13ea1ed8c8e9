"""The command line: `gamayun COMMAND`, also `python -m gamayun_jax`.

Parsers and help are made from the functions in commands/. A parameter before `*` is an
argument by position, one after it is an option; its type is its annotation; its help is
its line under "Args:", where "(N)" is how usage calls the value.

Exit status: 0 the work is done, 1 a defect of the program (with a traceback), 2 bad
input (one line on stderr says what, where and what to do), 3 a run that a signal
stopped after it had saved, 4 another process of the run is lost, 130 interrupted,
141 nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import logging
import os
import re
import signal
import sys
import threading
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from gamayun_jax import __version__
from gamayun_jax.commands import (
    COMMON,
    LOCAL_PATH,
    Repeated,
    data,
    models,
    study,
    train,
)
from gamayun_jax.fields import UserError, nearest
from gamayun_jax.storage import as_path
from gamayun_jax.training import xla

COMMANDS: dict[str, Callable[..., int | None]] = {
    "demo": train.demo,
    "corpus build": data.build_corpus,
    "corpus copy": data.copy_corpus,
    "corpus debian": data.download_debian,
    "corpus inspect": data.inspect_corpus,
    "corpus split": data.split_corpus,
    "tasks build": data.build_tasks,
    "tokenizer train": data.train_tokenizer,
    "tokenizer report": data.report_tokenizer,
    "curriculum": data.preview_curriculum,
    "controls": data.make_controls,
    "train": train.train,
    "launch": train.launch,
    "study": study.study,
    "plan": train.plan,
    "eval": models.evaluate,
    "align": models.align,
    "forgetting": train.forgetting,
    "compare": models.compare,
    "generate": models.generate,
    "lm-eval": models.lm_eval,
    "average": models.average,
    "quantize": models.quantize,
    "import-hf": models.import_hf,
    "export-hf": models.export_hf,
    "report": train.report,
}
GROUPS = {
    "corpus": "Documents to tokens.",
    "tasks": "Test items with a right answer.",
    "tokenizer": "SentencePiece tokenizers.",
}
METAVARS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}  # shtab.FILE


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the option that was perhaps meant."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """Refuse unknown options first: what else is wrong may come from them."""
        known = self._option_string_actions
        words = itertools.takewhile(lambda word: word != "--", args)
        if not self.get_default("command"):  # what follows its name is a command's own
            words = itertools.takewhile(lambda word: word.startswith("-"), words)
        for word in words:
            option = word.partition("=")[0]
            is_option = word.startswith("--") and " " not in word
            if is_option and not any(k.startswith(option) for k in known):
                self.error(f"there is no {option}{did_you_mean(option, known)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage and leaving."""
        raise UserError(f"error: {message} (see {self.prog} --help)")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question about the nearest of the known words; empty if none is near."""
    near = nearest(word, known)
    return f": did you mean {near}?" if near else ""


def check_command(words: Sequence[str]) -> None:
    """Raise UserError for a command that does not exist."""
    words = [*itertools.takewhile(lambda word: not word.startswith("-"), words)]
    for count in range(1, len(words) + 1):
        name = " ".join(words[:count])
        if name in COMMANDS:
            return
        if name not in GROUPS:
            near = did_you_mean(name, [*COMMANDS, *GROUPS])
            raise UserError(f"error: there is no command {name}{near} (gamayun --help)")


class Completion(argparse.Action):
    """Print a script that completes the command line in a shell."""

    def __call__(self, parser, namespace, values, option_string=None):
        import shtab

        print(shtab.complete(parser, values))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; their functions are in the result as `command`."""
    parser = Parser(
        prog="gamayun",
        description="Train multilingual language models in JAX, in curriculum stages.",
        epilog="Help on a command, with examples: gamayun COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--completion",
        choices=("bash", "zsh", "tcsh"),
        default=argparse.SUPPRESS,
        action=Completion,
        help='print completion for a shell: eval "$(gamayun --completion bash)"',
    )
    options: dict[str, Any] = dict(metavar="COMMAND", required=True)
    groups = {"": parser.add_subparsers(title="commands", **options)}
    for words, command in COMMANDS.items():
        group, _, name = words.rpartition(" ")
        if group not in groups:
            about = GROUPS[group]
            of_group = groups[""].add_parser(group, help=about, description=about)
            groups[group] = of_group.add_subparsers(**options)
        text, _, arguments = (inspect.getdoc(command) or "").partition("\n\nArgs:\n")
        command_parser = groups[group].add_parser(
            name,
            help=text.split("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
        )
        command_parser.set_defaults(command=command)
        add_parameters(command_parser, command, COMMON + arguments)
    return parser


def add_parameters(parser: Parser, command: Callable[..., Any], docs: str) -> None:
    """Add the parameters of a function to its parser, with their lines of `docs`."""
    lines = re.findall(r"^  (\w+)(?: \((.+?)\))?: (.+(?:\n    .+)*)", docs, re.M)
    texts = {name: (metavar, " ".join(text.split())) for name, metavar, text in lines}
    hints = typing.get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        metavar, text = texts[name]
        text = text.rstrip(".").replace("%", "%%")
        flag, default = name.strip("_").replace("_", "-"), parameter.default
        options = argument(hints[name])
        is_path = options.get("metavar") == METAVARS[Path]
        if parameter.kind is parameter.KEYWORD_ONLY:
            names = [f"--{flag}"]
            options |= dict(dest=name, required=default is parameter.empty)
            unset = any(default is x for x in (None, False, (), parameter.empty))
            if not unset and "default" not in text:
                text += f" (default: {default})"
        else:
            names, metavar = [name], metavar or flag.upper()
        if metavar:
            options["metavar"] = metavar
        action = parser.add_argument(*names, help=text, **options)
        if is_path:
            action.complete = FILES  # type: ignore[attr-defined]


def argument(hint: Any) -> dict[str, Any]:
    """What argparse must know of a type: how many words it takes, and of which kind."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return dict(action="store_true")
    if hint == Repeated:
        return dict(action="append")
    if origin in (types.UnionType, typing.Union):
        return argument(args[0])
    if origin is list:
        return dict(nargs="+", **argument(args[0]))
    if origin is Literal:
        return dict(choices=args, type=type(args[0]))
    if origin is Annotated:
        return argument(args[0]) | dict(type=bounded(*args))
    return dict(type=bounded(hint), metavar=METAVARS[hint])


def bounded(
    kind: type, *bounds: tuple[str, Callable[[Any], Any]]
) -> Callable[[str], Any]:
    """An argument type: a value within its bounds, as fields of a config have them."""

    def parse(text: str) -> Any:
        if kind is Path and not text:  # pathlib would take it for the current folder
            raise argparse.ArgumentTypeError("an empty text is given: give a path")
        value = kind(text)
        try:
            if kind is Path and LOCAL_PATH not in bounds:
                value = as_path(text)
            for bound, holds in bounds:
                if not holds(value):
                    raise argparse.ArgumentTypeError(f"{text} must be {bound}")
        except UserError as e:
            raise argparse.ArgumentTypeError(str(e)) from e
        return value

    parse.__name__ = kind.__name__  # argparse names it in its messages
    return parse


def parse(words: Sequence[str]) -> functools.partial[Any]:
    """The command that the words of a command line ask for, ready to be called."""
    own = {"lm-eval": models.lm_eval, "launch": train.launch}
    if words and words[0] in own:  # all else is for them to read, --help too
        return functools.partial(own[words[0]], *words[1:])
    check_command(words)
    values = vars(build_parser().parse_args(words))
    return functools.partial(values.pop("command"), **values)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    xla.skip_absent_tpu()
    # Libraries' words are not for the user of the command line: what Orbax logs with
    # a traceback it raises too.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        status = parse(sys.argv[1:] if argv is None else argv)()
        sys.stdout.flush()
        return status or 0
    except UserError as e:
        print(f"gamayun: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE  # training may have been cut short
    except OSError as e:
        name = f"{e.filename}: " if e.filename else ""
        print(f"gamayun: {name}{e.strerror or e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gamayun: interrupted", file=sys.stderr)
        return 130


def command() -> NoReturn:
    """The `gamayun` command: `main`, ended with its status.

    A save that failed can leave threads of Orbax waiting ten minutes for each other,
    and Python would wait for them: a failed command does not. What TensorStore has to
    say to Orbax's event loop when that is closed is no error of anybody's.
    """

    def tell(what: Any) -> None:
        if str(what.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(what)

    sys.unraisablehook = tell
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    others = [t for t in threading.enumerate() if t is not threading.main_thread()]
    if status and any(not t.daemon for t in others):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
