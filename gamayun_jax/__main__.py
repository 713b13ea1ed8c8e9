"""The `gamayun` command, also `python -m gamayun_jax`."""

from typing import NoReturn

from gamayun_jax import huge_pages
from gamayun_jax.training import xla


def main() -> NoReturn:
    """Run the command line, on CPUs with memory in huge pages."""
    if xla.only_cpus():
        huge_pages.restart()
    from gamayun_jax import cli

    cli.command()


if __name__ == "__main__":
    main()
