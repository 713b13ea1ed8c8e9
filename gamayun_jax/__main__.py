"""`python -m gamayun_jax` is the `gamayun` command."""

from gamayun_jax.cli import command

if __name__ == "__main__":
    command()
