#!/usr/bin/env bash
# A real Slurm of one node, for tests/test_slurm.py: controller, node daemon and munge, with all that they write in one folder.
#
#   tests/slurm_up.sh --install        the Debian packages, where they are missing
#   tests/slurm_up.sh FOLDER           start; afterwards `SLURM_CONF=FOLDER/slurm.conf sinfo` answers
#   tests/slurm_up.sh --down FOLDER    end what was started in FOLDER
#
# Needs root, since a Slurm of another user could not start its jobs. Nothing outside FOLDER is touched, other than by --install: key, socket and ports are
# this cluster's own, so it stands beside whatever Slurm the machine may have. Exit code 3 and a line that says why: it cannot be had here.
set -eu
export PATH=$PATH:/usr/sbin:/sbin
programs="munged munge slurmctld slurmd sbatch squeue sinfo srun"

cannot() { echo "$1"; exit 3; }

missing() { for p in $programs; do command -v "$p" >/dev/null || printf '%s ' "$p"; done; }

install() {
    [ -n "$(missing)" ] || return 0
    [ "$(id -u)" = 0 ] || cannot "not root, so no packages can be installed (missing: $(missing))"
    command -v apt-get >/dev/null || cannot "no apt-get here (missing: $(missing))"
    log=$(mktemp)
    { timeout 300 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 600 apt-get install -y -qq --no-install-recommends slurm-wlm slurm-wlm-basic-plugins munge; } >"$log" 2>&1 \
        || cannot "apt-get could not install slurm-wlm and munge: $(tail -n 1 "$log")"
}

alive() { # a daemon of FOLDER, by name
    pid=$(cat "$1/$2.pid" 2>/dev/null) && [ -n "$pid" ] && case "$(ps -o stat= -p "$pid")" in ""|Z*) false ;; esac
}

down() {
    export SLURM_CONF=$1/slurm.conf
    if timeout 5 scancel --user="$(id -un)" 2>/dev/null; then # first its jobs: they would outlive it
        for _ in $(seq 200); do [ -n "$(timeout 5 squeue -h -t running,completing 2>/dev/null)" ] || break; sleep .2; done
    fi
    for daemon in slurmd slurmctld munged; do
        ! alive "$1" $daemon || kill "$(cat "$1/$daemon.pid")" 2>/dev/null || true
    done
    for _ in $(seq 50); do # they save their state
        alive "$1" slurmd || alive "$1" slurmctld || alive "$1" munged || return 0
        sleep .1
    done
}

case "${1:-}" in
    --install) install; exit 0 ;;
    --down) down "$(cd "$2" && pwd)"; exit 0 ;;
    "") sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

[ "$(id -u)" = 0 ] || cannot "not root"
[ -z "$(missing)" ] || cannot "$(missing)not installed; as root: tests/slurm_up.sh --install"
mkdir -p "$1/ctld" "$1/node"
folder=$(cd "$1" && pwd) host=$(hostname -s)
chmod 755 "$folder"

# two free ports, one for each daemon
read -r port node_port < <(python3 -c 'import socket
s = [socket.socket() for _ in range(2)]
for x in s: x.bind(("127.0.0.1", 0))
print(*(x.getsockname()[1] for x in s))')

head -c 128 /dev/urandom > "$folder/munge.key"; chmod 400 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" 2>"$folder/munged.err" \
    || cannot "munged did not start: $(tail -n 1 "$folder/munged.err")"

cat > "$folder/slurm.conf" <<CONF
ClusterName=llmlab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$node_port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/ctld
SlurmdSpoolDir=$folder/node
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
# one machine, whatever it is: no control groups, no binding to cores, no memory limits
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# two cores at least, so that a job of two processes finds room; the tests wait for each turn of the scheduler
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(n=$(nproc); echo $((n < 4 ? 4 : n))) RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF

export SLURM_CONF=$folder/slurm.conf
slurmctld 2>"$folder/slurmctld.err" || { down "$folder"; cannot "slurmctld did not start: $(tail -n 1 "$folder/slurmctld.err")"; }
slurmd 2>"$folder/slurmd.err" || { down "$folder"; cannot "slurmd did not start: $(tail -n 1 "$folder/slurmd.err")"; }
for _ in $(seq 100); do
    ! sinfo -h -o %T 2>/dev/null | grep -q idle || exit 0
    sleep .1
done
why=$(tail -n 1 "$folder/slurmd.log" "$folder/slurmctld.log" 2>/dev/null | tr '\n' ' ')
down "$folder"
cannot "the daemons started, but no node is ready: $why"
