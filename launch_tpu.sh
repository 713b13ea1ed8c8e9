#!/usr/bin/env bash
# Train on Cloud TPU: create (or reuse) TPU VMs, start `gamayun train` on every host,
# and go on after preemptions until the run is complete. `./launch_tpu.sh --help`.
#
# Nothing is remembered here but the log folder: what exists, what runs and how it ended
# is asked from the cloud each time, so any command may be interrupted and repeated.
set -euo pipefail

usage() {
  cat << 'HELP'
usage: launch_tpu.sh COMMAND --name NAME --zone ZONE [flags]

commands
  up       create the TPU VMs by a queued resource, or reuse them; wait until they are there
  run      up, copy the code, install, start on every worker, show worker 0's log; after a
           preemption or a crash create what is missing and resume, until the run is
           complete:
           run [flags] -- CONFIG --workdir DIR [arguments of gamayun train]
           A run that is already going is followed, not started twice.
  logs     print the log of one worker and follow it (see --worker)
  status   print the state of the TPU VMs and of the trainer on every worker
  stop     ask the trainer to save and stop (SIGTERM); the VMs stay, and cost
  delete   delete the TPU VMs; what is on their own disks is lost

where
  --name NAME             name of the queued resource and of its node(s); required
  --zone ZONE             zone, e.g. us-west4-a; required
  --project PROJECT       project (default: gcloud's own setting)

what (up and run)
  --type TYPE             accelerator type, e.g. v5litepod-256; required
  --version VERSION       runtime, e.g. v2-alpha-tpuv5-lite; required
  --spot                  spot VMs: cheaper, may be taken away at any time
  --slices N              this many slices of TYPE, trained together (default 1)
  --network NAME          VPC network (default: the project's)
  --service-account MAIL  the account that the VMs act as, e.g. to read a bucket

how (run)
  --setup FILE            a bash script that every worker runs before each start, e.g. to
                          mount the bucket or disk of the corpus; must bear repetition
  --python NAME           Python on the workers, 3.11 or newer (default python3.11;
                          installed by apt-get if that one is missing)
  --allow-dirty           train with uncommitted changes; new files not under git are
                          left out
  --max-restarts N        give up after this many restarts (default 50)
  --poll SECONDS          between looks at the workers (default 20)
  --backoff SECONDS       wait before a restart; doubled after each failed start, up to
                          16 times as long (default 30)
  --log-dir DIR           local copy of worker 0's log (default runs/launch/NAME)

other
  --worker N              logs: which worker, of the first slice (default 0)
  --dry-run               print the gcloud commands, run none
  --help                  this text

exit status
  0 done, 1 the cloud failed, 2 bad input (here or in gamayun train; never retried),
  3 stopped by `stop` after saving, 4 quota refused, 5 too many restarts

The corpus and --workdir must be under the same absolute path on every worker, on storage
that outlives the VMs: docs/tpu.md says how.

examples
  ./launch_tpu.sh run --name gamayun --zone us-west4-a --type v5litepod-256 \
      --version v2-alpha-tpuv5-lite --spot --setup mount.sh \
      -- experiments/stage1.py --workdir /mnt/gamayun/runs/1p5b
  ./launch_tpu.sh delete --name gamayun --zone us-west4-a
HELP
}

say() { printf 'launch_tpu: %s\n' "$*" >&2; }

# die STATUS MESSAGE: one line that says what, where and what to do.
die() {
  local status=$1
  shift
  say "$*"
  exit "$status"
}

# Text as one word of any POSIX shell. Not printf %q, whose $'...' is bash only.
quoted() {
  local one="'\\''"
  printf "'%s'" "${1//\'/$one}"
}

quoted_all() {
  local x
  for x in "$@"; do
    quoted "$x"
    printf ' '
  done
}

# --- arguments ---------------------------------------------------------------------

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NAME='' ZONE='' PROJECT='' TYPE='' VERSION='' NETWORK='' ACCOUNT='' SETUP='' LOG_DIR=''
SPOT=0 SLICES=1 DIRTY=0 DRY=0 WORKER=0
PYTHON=python3.11 MAX_RESTARTS=50 POLL=20 BACKOFF=30
TRAIN=()

[ "$#" -gt 0 ] || { usage >&2; exit 2; }
COMMAND=$1
shift
case "$COMMAND" in
  up | run | logs | status | stop | delete) ;;
  -h | --help | help) usage; exit 0 ;;
  *) die 2 "unknown command '$COMMAND': use up, run, logs, status, stop or delete, or see --help" ;;
esac

while [ "$#" -gt 0 ]; do
  flag=$1
  shift
  case "$flag" in
    --help | -h) usage; exit 0 ;;
    --spot) SPOT=1; continue ;;
    --allow-dirty) DIRTY=1; continue ;;
    --dry-run) DRY=1; continue ;;
    --) TRAIN=("$@"); break ;;
    --*=*) set -- "${flag#*=}" "$@"; flag=${flag%%=*} ;;
  esac
  case "$flag" in
    --name | --zone | --project | --type | --version | --slices | --network | \
      --service-account | --setup | --python | --max-restarts | --poll | --backoff | \
      --log-dir | --worker) ;;
    *) die 2 "unknown argument '$flag': see --help; arguments of gamayun train follow --" ;;
  esac
  [ "$#" -gt 0 ] || die 2 "$flag needs a value: see --help"
  value=$1
  shift
  case "$flag" in
    --slices | --max-restarts | --poll | --backoff | --worker)
      [[ "$value" =~ ^(0|[1-9][0-9]{0,6})$ ]] || die 2 "$flag $value is not a whole number: give one, e.g. $flag 2" ;;
  esac
  case "$flag" in
    --name) NAME=$value ;;
    --zone) ZONE=$value ;;
    --project) PROJECT=$value ;;
    --type) TYPE=$value ;;
    --version) VERSION=$value ;;
    --slices) SLICES=$value ;;
    --network) NETWORK=$value ;;
    --service-account) ACCOUNT=$value ;;
    --setup) SETUP=$value ;;
    --python) PYTHON=$value ;;
    --max-restarts) MAX_RESTARTS=$value ;;
    --poll) POLL=$value ;;
    --backoff) BACKOFF=$value ;;
    --log-dir) LOG_DIR=$value ;;
    --worker) WORKER=$value ;;
  esac
done

[[ "$NAME" =~ ^[a-z]([a-z0-9-]{0,60}[a-z0-9])?$ ]] \
  || die 2 "--name '$NAME' is no name for a TPU: give lower-case letters, digits and hyphens, a letter first"
[ -n "$ZONE" ] || die 2 "--zone is missing: give the zone of the TPU, e.g. --zone us-west4-a"
[ "$SLICES" -ge 1 ] || die 2 "--slices 0 leaves no TPU: give 1 or more"
if [ "$COMMAND" = up ] || [ "$COMMAND" = run ]; then
  [ -n "$TYPE" ] || die 2 "--type is missing: give the accelerator type, e.g. --type v5litepod-256"
  [ -n "$VERSION" ] || die 2 "--version is missing: give the runtime, e.g. --version v2-alpha-tpuv5-lite"
fi
if [ "$COMMAND" = run ]; then
  [ "${#TRAIN[@]}" -gt 0 ] || die 2 "run has no config: end with -- CONFIG --workdir DIR"
  [ -z "$SETUP" ] || [ -f "$SETUP" ] || die 2 "--setup $SETUP is no file: name a bash script"
fi
[ "$DRY" = 1 ] || command -v gcloud > /dev/null \
  || die 2 "gcloud is not on the PATH: install the Google Cloud CLI and run \`gcloud auth login\`"

PLACE=(--zone "$ZONE" --quiet)
[ -z "$PROJECT" ] || PLACE+=(--project "$PROJECT")
LOG_DIR=${LOG_DIR:-$ROOT/runs/launch/$NAME}
TMP=$(mktemp -d)
trap 'rm -rf "$TMP"' EXIT
exec 3>&1 # dry runs print here, also where a command's output is captured

# --- the cloud ---------------------------------------------------------------------

# Every call of gcloud goes through here.
cloud() {
  if [ "$DRY" = 1 ]; then
    { printf 'gcloud '; quoted_all "$@"; printf '\n'; } >&3
    return 0
  fi
  gcloud "$@" < /dev/null
}

resources() { cloud compute tpus queued-resources "$@" "${PLACE[@]}"; }

# The first line of what gcloud complained about.
complaint() {
  local line
  line=$(grep -m1 -i error "$1" || head -n1 "$1" || true)
  printf '%s' "${line:-no message}"
}

is_missing() { grep -qiE 'NOT_FOUND|was not found|does not exist' "$1"; }

refuse_quota() {
  if grep -qiE 'quota|RESOURCE_EXHAUSTED' "$1"; then
    die 4 "quota refused for $TYPE x $SLICES in $ZONE: $(complaint "$1"); ask for more at IAM & Admin > Quotas, or take a smaller --type, another --zone or --spot"
  fi
}

# State of the queued resource in $STATE; MISSING if there is none.
STATE=''
find_state() {
  if [ "$DRY" = 1 ]; then
    resources describe "$NAME" --format 'value(state.state)'
    STATE=MISSING
  elif STATE=$(resources describe "$NAME" --format 'value(state.state)' 2> "$TMP/err"); then
    STATE=${STATE//[[:space:]]/}
  elif is_missing "$TMP/err"; then
    STATE=MISSING
  else
    STATE=UNKNOWN
  fi
}

# Names of the slices' nodes, as `create` below gives them.
nodes() {
  local i
  if [ "$SLICES" = 1 ]; then
    printf '%s\n' "$NAME"
  else
    for ((i = 0; i < SLICES; i++)); do printf '%s\n' "$NAME-$i"; done
  fi
}

# stop, status and logs know the slices from the cloud, so that --slices needn't be
# repeated.
count_slices() {
  local count
  count=$(resources describe "$NAME" --format 'value(tpu.nodeSpec[0].multisliceParams.nodeCount)' 2> /dev/null) || return 0
  if [[ "$count" =~ ^[1-9][0-9]*$ ]]; then SLICES=$count; fi
}

create() {
  local words=(create "$NAME" --accelerator-type "$TYPE" --runtime-version "$VERSION")
  if [ "$SLICES" = 1 ]; then
    words+=(--node-id "$NAME")
  else
    words+=(--node-count "$SLICES" --node-prefix "$NAME")
  fi
  [ "$SPOT" = 0 ] || words+=(--spot)
  [ -z "$NETWORK" ] || words+=(--network "$NETWORK")
  [ -z "$ACCOUNT" ] || words+=(--service-account "$ACCOUNT")
  say "creating $TYPE x $SLICES as $NAME in $ZONE"
  if ! resources "${words[@]}" --async > "$TMP/out" 2> "$TMP/err"; then
    refuse_quota "$TMP/err"
    die 1 "could not create $NAME in $ZONE: $(complaint "$TMP/err"); correct the flags or repeat the command"
  fi
}

remove() {
  if ! resources delete "$NAME" --force > "$TMP/out" 2> "$TMP/err"; then
    is_missing "$TMP/err" \
      || die 1 "could not delete $NAME in $ZONE: $(complaint "$TMP/err"); it may still cost: repeat the command"
  fi
}

# Create, recreate or wait, until the VMs are there. Waits in the queue for ever.
up() {
  local shown='' unknown=0 created=0
  while true; do
    find_state
    if [ "$STATE" != UNKNOWN ]; then unknown=0; fi
    case "$STATE" in
      ACTIVE)
        say "$NAME is up"
        return ;;
      MISSING)
        # Right after `create --async` it may not be visible yet.
        if [ "$created" = 0 ]; then create; created=1; fi
        if [ "$DRY" = 1 ]; then return; fi ;;
      FAILED)
        resources describe "$NAME" --format 'value(state.failedData.error.message)' > "$TMP/err" 2>&1 || true
        refuse_quota "$TMP/err"
        if [ "$created" = 1 ]; then
          die 1 "$NAME in $ZONE failed: $(complaint "$TMP/err"); correct the flags or try another zone"
        fi
        say "$NAME failed before: deleting it"
        remove ;;
      SUSPENDED)
        say "$NAME was taken away: deleting what is left"
        created=0
        remove ;;
      UNKNOWN)
        unknown=$((unknown + 1))
        if [ "$unknown" -ge 5 ]; then
          die 1 "could not ask for $NAME in $ZONE: $(complaint "$TMP/err"); check \`gcloud auth list\`, --project and --zone"
        fi ;;
      *)
        if [ "$shown" != "$STATE" ]; then say "$NAME: $STATE"; fi ;;
    esac
    shown=$STATE
    sleep "$POLL"
  done
}

# --- the workers -------------------------------------------------------------------

# on_node NODE WORKER SCRIPT [ARG]...: run a bash script on a node's workers.
on_node() {
  local node=$1 worker=$2 script=$3
  shift 3
  cloud compute tpus tpu-vm ssh "$node" --worker "$worker" "${PLACE[@]}" \
    --command "bash -c $(quoted "$script") gamayun $(quoted_all "$NAME" "$@")"
}

# The same on every worker of every slice; false if any of them fails.
on_all() {
  local node status=0
  while read -r node <&4; do
    on_node "$node" all "$@" || status=$?
  done 4< <(nodes)
  return "$status"
}

# What follows runs on the workers: $1 is the name, $HOME/gamayun-NAME the folder with
# code/ venv/ log pid exit (the trainer's status) arguments stopping (asked by `stop`).
# shellcheck disable=SC2016 # expanded on the worker
INSTALL='set -eu
d=$HOME/gamayun-$1 python=$3
mkdir -p "$d"
if [ "$(cat "$d/commit" 2> /dev/null)" != "$2" ]; then
  rm -rf "$d/code" "$d/commit"
  mkdir "$d/code"
  tar -xzf "$HOME/gamayun-$1.tgz" -C "$d/code"
  if ! command -v "$python" > /dev/null; then
    sudo apt-get update -q
    sudo apt-get install -y -q "$python" "$python-venv"
  fi
  "$python" -m venv "$d/venv"
  "$d/venv/bin/pip" install --quiet --editable "$d/code" "jax[tpu]"
  echo "$2" > "$d/commit"
fi
if [ -n "$4" ]; then bash -c "$4"; fi'

# The trainer outlives the ssh session. Its exit status appears in one piece.
# shellcheck disable=SC2016
START='set -eu
d=$HOME/gamayun-$1
shift
if [ -f "$d/pid" ] && kill -0 "$(cat "$d/pid")" 2> /dev/null; then exit 0; fi
rm -f "$d/pid" "$d/exit" "$d/stopping"
if [ -f "$d/log" ]; then mv "$d/log" "$d/log.before"; fi
: > "$d/log"
printf "%s\0" "$@" > "$d/arguments"
nohup bash -c '\''d=$1
shift
cd "$d/code"
"$@" >> "$d/log" 2>&1 < /dev/null &
echo "$!" > "$d/pid"
status=0
wait "$!" || status=$?
echo "$status" > "$d/exit.new"
mv "$d/exit.new" "$d/exit"'\'' gamayun "$d" "$d/venv/bin/gamayun" train "$@" --distributed > /dev/null 2>&1 < /dev/null &
for i in $(seq 50); do
  if [ -s "$d/pid" ]; then exit 0; fi
  sleep 0.1
done
exit 1'

# One line a worker: running|exit N|stopped N|dead|none, and a checksum of the arguments.
# shellcheck disable=SC2016
LOOK='d=$HOME/gamayun-$1
sum=$(cksum < "$d/arguments" 2> /dev/null | tr " " -)
if [ -f "$d/exit" ] && [ -f "$d/stopping" ]; then state="stopped $(cat "$d/exit")"
elif [ -f "$d/exit" ]; then state="exit $(cat "$d/exit")"
elif [ -f "$d/pid" ] && kill -0 "$(cat "$d/pid")" 2> /dev/null; then state="running 0"
elif [ -f "$d/pid" ]; then
  sleep 1 # the trainer may have ended just now
  if [ -f "$d/exit" ]; then state="exit $(cat "$d/exit")"; else state="dead 0"; fi
else state="none 0"; fi
echo "gamayun-worker $state ${sum:-none} $(hostname)"'

# shellcheck disable=SC2016
TERM_ALL='d=$HOME/gamayun-$1
if [ "$2" = asked ]; then touch "$d/stopping"; fi
if [ -f "$d/exit" ] || [ ! -f "$d/pid" ]; then echo "no trainer runs on $(hostname)"; exit 0; fi
kill -TERM "$(cat "$d/pid")" 2> /dev/null && echo "asked the trainer on $(hostname) to save and stop"
exit 0'

# Where one worker died the others wait for it for ever: saving needs all of them.
# shellcheck disable=SC2016
KILL_ALL='d=$HOME/gamayun-$1
if [ -f "$d/pid" ] && [ ! -f "$d/exit" ]; then kill -KILL "$(cat "$d/pid")" 2> /dev/null; fi
for i in $(seq 50); do
  if [ ! -f "$d/pid" ] || [ -f "$d/exit" ]; then break; fi
  kill -0 "$(cat "$d/pid")" 2> /dev/null || break
  sleep 0.1
done
exit 0'

# shellcheck disable=SC2016
LOG_FROM='tail -c "+$2" "$HOME/gamayun-$1/log" 2> /dev/null; exit 0'
# shellcheck disable=SC2016
LOG_FOLLOW='tail -n 200 -F "$HOME/gamayun-$1/log"'

# --- run ---------------------------------------------------------------------------

# The code of one commit, in $TMP/code.tgz; sets COMMIT.
pack() {
  local config=${TRAIN[0]} changed i workdir=''
  for ((i = 1; i < ${#TRAIN[@]}; i++)); do
    case "${TRAIN[i]}" in
      --workdir) workdir=${TRAIN[i + 1]:-} ;;
      --workdir=*) workdir=${TRAIN[i]#*=} ;;
    esac
  done
  [[ "$workdir" = /* ]] \
    || die 2 "--workdir '$workdir' must be an absolute path on storage that all workers share: see docs/tpu.md"
  changed=$(git -C "$ROOT" status --porcelain) || die 2 "$ROOT is no git checkout: clone the project with git"
  COMMIT=$(git -C "$ROOT" rev-parse HEAD)
  if [ -n "$changed" ]; then
    [ "$DIRTY" = 1 ] \
      || die 2 "$ROOT has uncommitted changes: commit them, or give --allow-dirty"
    # A commit of the changed files that no branch names; empty if none is tracked.
    changed=$(git -C "$ROOT" stash create)
    COMMIT=${changed:-$COMMIT}
  fi
  git -C "$ROOT" cat-file -e "$COMMIT:$config" 2> /dev/null \
    || die 2 "config $config is not in commit ${COMMIT:0:12} of $ROOT: give its path from there, and commit it"
  git -C "$ROOT" archive --format tar.gz -o "$TMP/code.tgz" "$COMMIT"
}

install_and_start() {
  local node setup=''
  [ -z "$SETUP" ] || setup=$(cat "$SETUP")
  say "installing commit ${COMMIT:0:12} on every worker"
  while read -r node <&4; do
    cloud compute tpus tpu-vm scp "$TMP/code.tgz" "$node:gamayun-$NAME.tgz" --worker all "${PLACE[@]}" || return 1
  done 4< <(nodes)
  on_all "$INSTALL" "$COMMIT" "$PYTHON" "$setup" || return 1
  say "starting gamayun train"
  on_all "$START" "${TRAIN[@]}" || return 1
  SEEN=0
}

# Copy what is new in worker 0's log to the screen and to the log folder. It is polled,
# not streamed, so that a broken connection loses nothing.
SEEN=0
show_log() {
  local first
  first=$(nodes | head -n1)
  on_node "$first" 0 "$LOG_FROM" "$((SEEN + 1))" > "$TMP/log" 2> /dev/null || return 0
  if [ "$DRY" = 1 ]; then return 0; fi
  SEEN=$((SEEN + $(wc -c < "$TMP/log")))
  cat "$TMP/log"
  cat "$TMP/log" >> "$LOG_DIR/worker0.log"
}

# What the workers do, in $FOUND: done, bad, stopped, running, ending (some are through),
# other, idle, broken or unreachable.
FOUND=''
look() {
  local sum
  if ! on_all "$LOOK" > "$TMP/look" 2> "$TMP/look.err"; then
    FOUND=unreachable
    return
  fi
  grep '^gamayun-worker ' "$TMP/look" > "$TMP/workers" || { FOUND=unreachable; return; }
  sum=$(printf '%s\0' "${TRAIN[@]}" | cksum | tr ' ' -)
  if grep -q ' exit 2 ' "$TMP/workers"; then
    FOUND=bad
  elif ! grep -qv ' exit 0 ' "$TMP/workers"; then
    FOUND='done'
  elif ! grep -qvE ' stopped [0-9]+ ' "$TMP/workers"; then
    FOUND=stopped
  elif ! grep -qv ' none 0 ' "$TMP/workers"; then
    FOUND=idle
  elif grep -qE ' (dead 0|none 0|exit [0-9]+) ' "$TMP/workers"; then
    # Worker 0 may still write what is written once when the others are through.
    if grep -q ' running 0 ' "$TMP/workers" && ! grep -qvE ' (running 0|exit [03]) ' "$TMP/workers"; then
      FOUND=ending
    else
      FOUND=broken
    fi
  elif grep -v -qF " $sum " "$TMP/workers"; then
    FOUND=other
  else
    FOUND=running
  fi
}

# Follow the trainer until it ends one way or another; sets $FOUND.
follow() {
  local lost=0 odd=0 ending=0
  while true; do
    look
    show_log
    case "$FOUND" in
      running) lost=0 odd=0 ending=0 ;;
      ending)
        ending=$((ending + 1))
        if [ "$ending" -ge 45 ]; then return; fi ;; # a quarter of an hour by default
      # Workers end within seconds of each other, not at once: look again before
      # taking one that ended for a failure. A preempted VM is asked from the cloud.
      broken)
        odd=$((odd + 1))
        if [ "$odd" -ge 2 ]; then return; fi ;;
      unreachable)
        find_state
        if [ "$STATE" != ACTIVE ] && [ "$STATE" != UNKNOWN ]; then return; fi
        lost=$((lost + 1))
        if [ "$lost" -ge 5 ]; then return; fi ;;
      *) return ;;
    esac
    sleep "$POLL"
  done
}

run() {
  local restarts=0 failures=0 began message
  pack
  mkdir -p "$LOG_DIR"
  up
  if [ "$DRY" = 1 ]; then
    install_and_start
    on_all "$LOOK"
    show_log
    return
  fi
  look
  case "$FOUND" in
    running | ending) say "it runs already: following it" ;;
    other) die 2 "$NAME already trains with other arguments: stop it first, or use another --name" ;;
    *) FOUND=start ;;
  esac
  while true; do
    began=$SECONDS
    if [ "$FOUND" != start ] || install_and_start; then
      follow
    else
      FOUND=unreachable
    fi
    case "$FOUND" in
      done)
        say "the run is complete; the VMs still cost: \`launch_tpu.sh delete --name $NAME --zone $ZONE\`"
        return 0 ;;
      bad)
        message=$(grep '^gamayun: ' "$TMP/log" "$LOG_DIR/worker0.log" -h | tail -n1 || true)
        on_all "$KILL_ALL" > /dev/null 2>&1 || true
        die 2 "gamayun train refused its input on $NAME: ${message:-see the log in $LOG_DIR}; correct it and run again" ;;
      stopped)
        die 3 "stopped as asked; the same command goes on; the VMs still cost until \`delete\`" ;;
    esac
    find_state
    restarts=$((restarts + 1))
    if [ "$restarts" -gt "$MAX_RESTARTS" ]; then
      die 5 "$NAME in $ZONE ended $restarts times without finishing: see $LOG_DIR/worker0.log, then run again or raise --max-restarts $MAX_RESTARTS"
    fi
    # A try that lasted ten minutes did something: begin again with short waits.
    if [ "$((SECONDS - began))" -ge 600 ]; then failures=0; fi
    say "$NAME is $STATE and the trainer $FOUND: restart $restarts of at most $MAX_RESTARTS in $((BACKOFF << failures)) s"
    sleep "$((BACKOFF << failures))"
    if [ "$failures" -lt 4 ]; then failures=$((failures + 1)); fi
    up
    on_all "$KILL_ALL" > /dev/null 2>&1 || true
    FOUND=start
  done
}

# --- commands ----------------------------------------------------------------------

# For commands that need what exists.
need() {
  find_state
  if [ "$DRY" = 1 ]; then return; fi
  case "$STATE" in
    MISSING) die 2 "there is no $NAME in $ZONE: create it with up or run, or check --name, --zone and --project" ;;
    UNKNOWN) die 1 "could not ask for $NAME in $ZONE: $(complaint "$TMP/err"); check \`gcloud auth list\`, --project and --zone" ;;
  esac
  count_slices
}

case "$COMMAND" in
  up) up ;;
  run) run ;;
  logs)
    need
    on_node "$(nodes | head -n1)" "$WORKER" "$LOG_FOLLOW" ;;
  status)
    need
    printf '%s: %s\n' "$NAME" "$STATE"
    if [ "$STATE" = ACTIVE ] || [ "$DRY" = 1 ]; then
      on_all "$LOOK" || die 1 "some workers of $NAME in $ZONE do not answer: repeat, or \`run\` again to recreate them"
    fi ;;
  stop)
    need
    on_all "$TERM_ALL" asked || die 1 "some workers of $NAME in $ZONE do not answer: repeat the command" ;;
  delete)
    remove
    say "$NAME in $ZONE is deleted" ;;
esac
