#!/usr/bin/env bash
# A real Slurm on this host, without systemd: three nodes n1, n2, n3 with eight pretended GPUs each.
#
#   slurm/testcluster/cluster.sh install            # Debian's or Ubuntu's slurm-wlm and munge, as root; else exit code 77
#   slurm/testcluster/cluster.sh start [DIRECTORY]
#   eval "$(slurm/testcluster/cluster.sh env [DIRECTORY])"; sinfo
#   slurm/testcluster/cluster.sh stop [DIRECTORY]   # daemons, and whatever jobs have left
#
# Everything is kept in DIRECTORY (default: testcluster in $TMPDIR or /tmp): configuration, state, logs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here NOT_POSSIBLE=77

say() { printf 'testcluster: %s\n' "$*" >&2; }

installed() { command -v slurmctld slurmd munged sbatch >/dev/null; }

install() {
    installed && return
    if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
        say "slurmctld, slurmd or munged is missing, and only root on Debian or Ubuntu gets them installed here; install" \
            "the packages slurm-wlm and munge (or your distribution's)"
        return $NOT_POSSIBLE
    fi
    say "installing slurm-wlm and munge"
    export DEBIAN_FRONTEND=noninteractive
    if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >"$log" 2>&1; then
        tail -n 5 "$log" >&2
        say "apt-get could not install slurm-wlm and munge"
        return $NOT_POSSIBLE
    fi
}

# The first of four ports that nobody listens on.
free_ports() {
    local first port
    for first in $(shuf -i 12000-18000 -n 50); do
        for port in "$first" $((first + 1)) $((first + 2)) $((first + 3)); do
            (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && continue 2
        done
        echo "$first"
        return
    done
}

configure() {
    local port file
    mkdir -p etc run log state spool-n1 spool-n2 spool-n3 dev
    chmod 755 . run log # munged refuses directories that others may write
    port=$(free_ports)
    for file in slurm.conf gres.conf cgroup.conf; do
        sed -e "s#@DIRECTORY@#$PWD#g" -e "s#@HOST@#$(hostname -s)#g" -e "s#@USER@#$(id -un)#g" -e "s#@PORT@#$port#g" \
            -e "s#@PORT1@#$((port + 1))#" -e "s#@PORT2@#$((port + 2))#" -e "s#@PORT3@#$((port + 3))#" \
            "$here/$file" >"etc/$file"
    done
    for file in dev/gpu{0..7}; do
        [[ -e $file ]] || mknod "$file" c 1 3 2>/dev/null || touch "$file" # /dev/null by another name
    done
    [[ -s etc/munge.key ]] || (umask 077 && head -c 1024 /dev/urandom >etc/munge.key)
}

nodes_are() { [[ $(sinfo -h -N -p debug -o %t 2>/dev/null | sort -u) == "$1" ]]; }

start() {
    if [[ -e run/slurmctld.pid ]] && kill -0 "$(<run/slurmctld.pid)" 2>/dev/null; then
        say "already running in $PWD; stop it first"
        return 1
    fi
    stop
    rm -rf state spool-* log run
    configure
    trap 'say "the cluster did not start:"; tail -n 5 log/*.log >&2; stop' ERR
    munged --key-file="$PWD/etc/munge.key" --socket="$PWD/run/munge.socket" --pid-file="$PWD/run/munged.pid" \
        --log-file="$PWD/log/munged.log" --seed-file="$PWD/run/munged.seed"
    slurmctld -f "$SLURM_CONF"
    local node
    for node in n1 n2 n3; do slurmd -f "$SLURM_CONF" -N "$node"; done
    for _ in {1..300}; do
        nodes_are idle && break
        sleep 0.2
    done
    nodes_are idle
    trap - ERR
    say "n1, n2 and n3 are up, $(sinfo --version); use them with: eval \"\$($0 env $PWD)\""
}

# Processes of jobs and daemons, which all have this cluster's configuration in their environment or command line.
processes() {
    local process
    for process in /proc/[0-9]*; do
        if [[ ${process#/proc/} != "$$" && ${process#/proc/} != "$BASHPID" ]] &&
            grep -qzE "SLURMD_NODENAME=|slurmstepd|slurm(d|ctld)|munged" "$process/environ" "$process/cmdline" 2>/dev/null &&
            grep -qz -e "$PWD/" -e "SLURM_CONF=$SLURM_CONF" "$process/environ" "$process/cmdline" 2>/dev/null; then
            echo "${process#/proc/}"
        fi
    done
}

stop() {
    local signal pids
    for signal in TERM KILL KILL; do
        for _ in {1..25}; do
            mapfile -t pids < <(processes)
            ((${#pids[@]})) || return 0
            kill "-$signal" "${pids[@]}" 2>/dev/null || true
            sleep 0.2
        done
    done
    say "cannot end processes ${pids[*]}"
    return 1
}

directory=${2:-${TMPDIR:-/tmp}/testcluster}
case ${1:-} in
    install)
        log=$(mktemp)
        install
        ;;
    start | stop | env)
        mkdir -p "$directory"
        cd "$directory"
        export SLURM_CONF=$PWD/etc/slurm.conf
        case $1 in
            start) start ;;
            stop) stop ;;
            env) echo "export SLURM_CONF=$SLURM_CONF" ;;
        esac
        ;;
    *)
        sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
