#!/usr/bin/env bash
# Hardware counters and a flame graph of training steps: Linux perf around `knltrain bench`.
set -euo pipefail

usage() {
    cat <<'EOF'
Usage: bash perf/perf_stat.sh [--out DIR] [--json] [--quick] [options of knltrain bench]

Runs `knltrain bench` and watches it from its first step on, the three that bench does not time included: perf stat
counts cycles, instructions, cache misses and AVX-512 frequency licences, perf record takes call stacks. Where perf is
missing or may not count, says what to do about it, and writes what could be measured.

  --out DIR   folder for perf_stat.json, perf_stat.png, stacks.folded, perf.data; default perf_stat-DATE-TIME here
  --json      print one JSON object on stdout, people's text on stderr
  --quick     a small network and few steps: shows that the script works
  -h, --help  this text

Environment: PYTHON, the interpreter that has knltrain (python3).

  bash perf/perf_stat.sh --model resnet50 --batch 32 --steps 20
EOF
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
out=perf_stat-$(date +%Y%m%d-%H%M%S)
report=() bench=()
while (($#)); do
    case $1 in
        --out) out=${2:?--out needs a folder}; shift ;;
        --out=*) out=${1#--out=} ;;
        --json) report+=(--json) ;;
        --quick) bench=(--model alexnet_bn_small --batch 8 --steps 5 "${bench[@]}") ;;
        -h | --help) usage; exit ;;
        *) bench+=("$1") ;;
    esac
    shift
done
if ! "$python" -c 'import knltrain' 2>/dev/null; then
    echo "perf_stat.sh: $python has no knltrain; activate its environment, or set PYTHON" >&2
    exit 1
fi
mkdir -p "$out"
# What an earlier run left in the same folder is not this run's.
rm -f "$out"/{stat.csv,bench.json,bench.log,script.txt,perf.data,stacks.folded,perf_stat.json,perf_stat.png}

command=("$python" -m knltrain bench "${bench[@]}" --json)
reason=
if ! type -P perf >/dev/null; then
    reason="perf is not installed: linux-perf on Debian, linux-tools-$(uname -r) on Ubuntu, perf elsewhere"
elif ! perf stat -e task-clock -- true >/dev/null 2>&1 || ! perf record -q -o /dev/null -- true >/dev/null 2>&1; then
    reason="perf may not count here: kernel.perf_event_paranoid is $(cat /proc/sys/kernel/perf_event_paranoid)\
; sudo sysctl kernel.perf_event_paranoid=2 allows a process to watch itself; a container needs CAP_PERFMON"
else
    events=task-clock,page-faults,context-switches,cpu-migrations
    events+=,cycles,instructions,branches,branch-misses,cache-references,cache-misses
    # How long the cores ran at the lower frequencies of AVX-512: Xeon Scalable up to Cascade Lake.
    known=$(perf list --no-desc 2>/dev/null || true)
    for level in 0 1 2; do
        licence=core_power.lvl${level}_turbo_license
        if grep -qw "$licence" <<<"$known"; then events+=,$licence; fi
    done
fi

export LC_ALL=C
: >"$out/bench.log"
# 2: oneDNN names its generated code in /tmp/perf-PID.map, where perf script looks.
ONEDNN_JIT_PROFILE=2 "${command[@]}" >"$out/bench.json" 2>"$out/bench.log" &
pid=$!
watchers=()
# bench says what it runs, then makes its first step: perf is not to see how PyTorch is loaded.
until grep -q ' threads' "$out/bench.log" || ! kill -0 $pid 2>/dev/null; do sleep 0.05; done
if [[ ! $reason ]] && kill -0 $pid 2>/dev/null; then
    perf stat -x ';' -e "$events" -o "$out/stat.csv" -p $pid &
    watchers+=($!)
    # Stacks are 16 KiB each, of every busy thread: fewer a second where there are many. PyTorch keeps no frame pointers.
    threads=$(nproc)
    frequency=$((200 / threads > 99 ? 99 : 200 / threads < 2 ? 2 : 200 / threads))
    perf record -q -F "$frequency" --call-graph dwarf,16384 -o "$out/perf.data" -p $pid &
    watchers+=($!)
fi
wait $pid || { status=$?; cat "$out/bench.log" >&2; exit $status; }
for watcher in "${watchers[@]}"; do wait "$watcher"; done
if [[ ! $reason ]]; then
    # Inlined functions would have to be looked up in PyTorch's own hundreds of MB, which takes minutes.
    perf script --no-inline -i "$out/perf.data" -F comm,pid,ip,sym,dso >"$out/script.txt" 2>/dev/null
fi
rm -f "/tmp/perf-$pid.map"
exec "$python" "$here/_perf_stat.py" "$out" --reason "$reason" "${report[@]}"
