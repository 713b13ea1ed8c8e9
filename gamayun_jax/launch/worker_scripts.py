"""What runs on the workers, as bash scripts, and their words on a command line.

A script's $1 is the launch's name; $HOME/gamayun-NAME is its folder, with code/ venv/
log pid exit (the trainer's status), arguments, and stopping (asked by `stop`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

# Arguments: commit, Python, setup script, extra of the package. Ubuntu 24.04, which VMs
# of TPU7x have, has no Python 3.11, and 22.04 no 3.12. At its first boot a VM installs
# updates, and holds apt's lock for minutes.
INSTALL = """set -eu
d=$HOME/gamayun-$1 python=$3
mkdir -p "$d"
if [ "$(cat "$d/commit" 2> /dev/null)" != "$2" ]; then
  if [ -z "$python" ]; then
    python=python3.11
    if command -v python3.12 > /dev/null; then python=python3.12; fi
  fi
  rm -rf "$d/code" "$d/commit"
  mkdir "$d/code"
  tar -xzf "$HOME/gamayun-$1.tgz" -C "$d/code"
  if ! "$python" -c "import ensurepip" 2> /dev/null; then
    sudo apt-get update -q
    sudo apt-get -o DPkg::Lock::Timeout=600 install -y -q "$python" "$python-venv"
  fi
  "$python" -m venv "$d/venv"
  pins= # a run that is preempted goes on with the same versions
  if [ -f "$d/code/constraints.txt" ]; then
    pins="--constraint $d/code/constraints.txt"
  fi
  "$d/venv/bin/pip" install --quiet $pins --editable "$d/code[$5]"
  echo "$2" > "$d/commit"
fi
if [ -n "$4" ]; then bash -c "$4"; fi"""

# Arguments: environment, how to join the others, then those of `gamayun train`. The
# trainer outlives the ssh session. Its exit status appears in one piece.
START = """set -eu
d=$HOME/gamayun-$1 environment=$2 join=$3
shift 3
if [ -f "$d/pid" ] && kill -0 "$(cat "$d/pid")" 2> /dev/null; then exit 0; fi
rm -f "$d/pid" "$d/exit" "$d/stopping"
if [ -f "$d/log" ]; then mv "$d/log" "$d/log.before"; fi
: > "$d/log"
printf "%s\\0" "$@" > "$d/arguments"
nohup bash -c 'd=$1
shift
cd "$d/code"
"$@" >> "$d/log" 2>&1 < /dev/null &
echo "$!" > "$d/pid"
status=0
wait "$!" || status=$?
echo "$status" > "$d/exit.new"
mv "$d/exit.new" "$d/exit"' gamayun "$d" env $environment "$d/venv/bin/gamayun" \\
  train "$@" $join > /dev/null 2>&1 < /dev/null &
for i in $(seq 50); do
  if [ -s "$d/pid" ]; then exit 0; fi
  sleep 0.1
done
exit 1"""

# One line a worker, of running, exit N, stopped N, dead and none, with a checksum of
# the arguments; and the end of the log where the trainer failed.
LOOK = """d=$HOME/gamayun-$1
sum=$(sha256sum < "$d/arguments" 2> /dev/null | cut -c 1-16)
if [ -f "$d/exit" ] && [ -f "$d/stopping" ]; then state="stopped $(cat "$d/exit")"
elif [ -f "$d/exit" ]; then state="exit $(cat "$d/exit")"
elif [ -f "$d/pid" ] && kill -0 "$(cat "$d/pid")" 2> /dev/null; then state="running 0"
elif [ -f "$d/pid" ]; then
  sleep 1 # the trainer may have ended just now
  if [ -f "$d/exit" ]; then state="exit $(cat "$d/exit")"; else state="dead 0"; fi
else state="none 0"; fi
case $state in
  "exit 0" | "exit 3" | stopped* | running* | none*) ;;
  *) tail -n 40 "$d/log" 2> /dev/null | sed "s/^/gamayun-log $(hostname) /" ;;
esac
echo "gamayun-worker $state ${sum:-none} $(hostname)\""""

# Argument: "asked" where a person stops the run, and not the launcher.
TERMINATE = """d=$HOME/gamayun-$1
if [ "$2" = asked ]; then touch "$d/stopping"; fi
if [ -f "$d/exit" ] || [ ! -f "$d/pid" ]; then
  echo "no trainer runs on $(hostname)"
  exit 0
fi
if kill -TERM "$(cat "$d/pid")" 2> /dev/null; then
  echo "asked the trainer on $(hostname) to save and stop"
fi
exit 0"""

# Where one worker died the others wait for it for ever: saving needs all of them.
KILL = """d=$HOME/gamayun-$1
if [ -f "$d/pid" ] && [ ! -f "$d/exit" ]; then
  kill -KILL "$(cat "$d/pid")" 2> /dev/null
fi
for i in $(seq 50); do
  if [ ! -f "$d/pid" ] || [ -f "$d/exit" ]; then break; fi
  kill -0 "$(cat "$d/pid")" 2> /dev/null || break
  sleep 0.1
done
exit 0"""

LOG_FROM = """tail -c "+$2" "$HOME/gamayun-$1/log" 2> /dev/null; exit 0"""
LOG_FOLLOW = """tail -n 200 -F "$HOME/gamayun-$1/log\""""


def quoted(text: str) -> str:
    """Text as one word of any POSIX shell; always in quotes."""
    return "'" + text.replace("'", "'\\''") + "'"


def remote_command(script: str, name: str, arguments: Sequence[str]) -> str:
    """The command line of a shell on a worker that runs a script."""
    words = " ".join(map(quoted, (name, *arguments)))
    return f"bash -c {quoted(script)} gamayun {words}"


def checksum(arguments: Sequence[str]) -> str:
    """Of a trainer's arguments, as `LOOK` has it."""
    data = b"".join(word.encode() + b"\0" for word in arguments)
    return hashlib.sha256(data).hexdigest()[:16]
