"""Train multilingual language models from scratch in JAX, in curriculum stages.

    import gamayun_jax as gx

    cfg = gx.shorten(gx.load_config("tiny"), steps=100)
    gx.build_corpus(cfg)
    run = gx.train(cfg, "runs/short")

A name is imported when it is first used: `import gamayun_jax` costs nothing.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gamayun_jax.api.configs import shorten as shorten
    from gamayun_jax.api.curricula import curriculum as curriculum
    from gamayun_jax.api.models import compare as compare
    from gamayun_jax.api.models import evaluate as evaluate
    from gamayun_jax.api.models import load_model as load_model
    from gamayun_jax.api.plans import plan as plan
    from gamayun_jax.api.runs import build_corpus as build_corpus
    from gamayun_jax.api.runs import read_run as read_run
    from gamayun_jax.api.runs import train as train
    from gamayun_jax.config import UserError as UserError
    from gamayun_jax.config import load_config as load_config
    from gamayun_jax.data.corpus import open_corpus as open_corpus
    from gamayun_jax.interop.huggingface import export_hf as export_hf
    from gamayun_jax.interop.huggingface import import_hf as import_hf

__version__ = "0.1.0"
__all__ = [
    "UserError",
    "build_corpus",
    "compare",
    "curriculum",
    "evaluate",
    "export_hf",
    "import_hf",
    "load_config",
    "load_model",
    "open_corpus",
    "plan",
    "read_run",
    "shorten",
    "train",
]
# Name -> its module.
HOMES = {
    "load_config": "config",
    "UserError": "config",
    "open_corpus": "data.corpus",
    "export_hf": "interop.huggingface",
    "import_hf": "interop.huggingface",
    "shorten": "api.configs",
    "curriculum": "api.curricula",
    "build_corpus": "api.runs",
    "read_run": "api.runs",
    "train": "api.runs",
    "compare": "api.models",
    "evaluate": "api.models",
    "load_model": "api.models",
    "plan": "api.plans",
}


def find(name: str) -> Any:
    """What a public name stands for."""
    messages = importlib.import_module("gamayun_jax.api.messages")  # quiet first
    value = getattr(importlib.import_module(f"gamayun_jax.{HOMES[name]}"), name)
    return value if inspect.isclass(value) else messages.speak_of_calls(value)


class Room(ModuleType):
    """A module that is also the function of its name: `gx.train(cfg, workdir)` beside
    `gamayun_jax.train.fit`. Python binds a submodule's name in its package, so that a
    function of that name would come and go with who imported what."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return find(self._function)(*args, **kwargs)

    @property
    def _function(self) -> str:
        return self.__name__.rpartition(".")[2]

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return find(self._function).__doc__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(find(self._function))


class Package(ModuleType):
    """The package, whose submodules of a function's name are `Room`s."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in HOMES and isinstance(value, ModuleType):
            value.__class__ = Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = Package


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'gamayun_jax' has no attribute {name!r}")
    value = find(name)  # its module is imported, and with it a room of that name
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
