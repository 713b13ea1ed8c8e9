"""The help of `gamayun launch`."""

USAGE = """\
usage: gamayun launch COMMAND --name NAME --zone ZONE [flags]
       ./launch_tpu.sh COMMAND ... (the same, with Python alone)

commands
  up       create the machines, or reuse them; wait until they are there (gke: print the
           JobSet)
  run      up, copy the code, install, start on every worker, show worker 0's log; after
           a preemption or a crash create what is missing and resume, until the run is
           complete:
           run [flags] -- CONFIG --workdir DIR [arguments of gamayun train]
               [--then CONFIG --workdir DIR ...]
           A run that is already going is followed, not started twice.
  logs     print the log of one worker and follow it (see --worker)
  status   print the state of the machines and of the trainer on every worker
  stop     ask the trainer to save and stop (SIGTERM); the VMs stay, and cost
  delete   delete the machines; what is on their own disks is lost

where
  --name NAME             of what is created; required
  --backend KIND          queued (the default): queued resources of the TPU API, v4-v6e
                          compute: Compute Engine's instance groups, v5p, v6e and tpu7x
                          gke: a JobSet in a cluster of Kubernetes, by kubectl
                          vm: a TPU VM that exists, by its name
                          hosts: machines that exist, by ssh
  --zone ZONE             zone, e.g. us-west4-a; required, but for gke and hosts
  --project PROJECT       project (default: gcloud's own setting)
  --hosts A,B             --backend hosts, and their names as ssh takes them
  --context NAME          gke: kubectl's context (default: its current one)
  --namespace NAME        gke: namespace (default: default)

what (up and run)
  --type TYPE             accelerator type, e.g. v5litepod-256; required, or:
  --topology CHIP:AxB     as `gamayun plan` has it, e.g. v6e:16x16, tpu7x:4x4x4
  --version VERSION       queued: runtime, e.g. v2-alpha-tpuv5-lite (default: by chip)
  --spot                  spot VMs: cheaper, may be taken away at any time
  --flex                  compute, gke: flex-start, for --max-hours (at most 168)
  --reservation NAME      VMs of a reservation (queued: of the project's)
  --slices N              this many slices, trained together (default 1)
  --network NAME          VPC network (default: the project's)
  --subnet NAME           a subnet of it
  --service-account MAIL  the account that the VMs act as, e.g. to read a bucket (gke:
                          Kubernetes' own)
  --image IMAGE           gke: container, see Containerfile; compute: family of images

how (run)
  --setup FILE            a bash script that every worker runs before each start, e.g.
                          to mount the disk of the corpus; must bear repetition
  --python NAME           Python on the workers, 3.11 or newer (default python3.11;
                          installed by apt-get if that one is missing)
  --extra NAME            what of the package they install (default tpu; hosts: cuda)
  --allow-dirty           train with uncommitted changes; new files not under git are
                          left out
  --max-restarts N        give up after this many restarts (default 50)
  --poll SECONDS          between looks at the workers (default 20)
  --backoff SECONDS       wait before a restart; doubled after each failed start, up to
                          16 times as long (default 30)
  --log-dir DIR           local copies of the workers' logs (default runs/launch/NAME)

for how long (run)
  --max-hours H           hours of machines, over all restarts; then the trainer saves,
                          and they are deleted
  --max-cost MONEY        the same, by the price of all chips
  --price MONEY           of a chip-hour (default: on demand in the US, USD, if known)
  --delete-when-done      delete the machines at the end, of failed runs too; not of a
                          stopped one

other
  --file FILE             fields of the launch: YAML, or Python with get_launch(); flags
                          come on top
  --worker N              logs: which worker, of the first slice (default 0)
  --checkout DIR          clone of the project whose commit is trained (default: .)
  --dry-run               print the calls of gcloud, kubectl and ssh, make none
  --help                  this text

exit status
  0 done, 1 the cloud failed, 2 bad input (here or in gamayun train; never retried),
  3 stopped by `stop` after saving, 4 quota refused, 5 too many restarts, 6 the budget
  is spent: saved and deleted

The corpus and --workdir must be under the same absolute path on every worker, on
storage that outlives the VMs, or in a bucket (gs://...): docs/tpu.md says how.

examples
  gamayun launch run --name gamayun --zone us-west4-a --type v5litepod-256 --spot \\
      --max-cost 20000 --delete-when-done \\
      -- experiments/stage1.py --workdir gs://bucket/runs/stage1 \\
      --then experiments/stage2.py --workdir gs://bucket/runs/stage2 \\
      --init-from gs://bucket/runs/stage1
  gamayun launch delete --name gamayun --zone us-west4-a
"""
