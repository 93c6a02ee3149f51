#!/usr/bin/env bash
# All that a card can tell which is there for a quarter of an hour; see README.md beside this file.
#
#   benchmarks/gpu/once.sh OUT           at most 300 s: what matters most, first things first
#   benchmarks/gpu/once.sh OUT second    at most 270 s: the release model, the tests on the card
#   benchmarks/gpu/once.sh OUT rest [S]  the other figures, in at most S seconds (250)
#
# Each part has a limit of its own, and what it has found is in OUT before the next begins; one that
# fails is written down.  ONCE_DEVICE=cpu rehearses every part on toy sizes.
set -u
usage="usage: once.sh OUT [second | rest [S]]"
what=${2:-first} device=${ONCE_DEVICE:-cuda}
case $what in
  first) total=300 ;;
  second) total=270 ;;
  rest) total=${3:-250} ;;
  *) echo "once.sh: unknown part '$what'; $usage" >&2; exit 2 ;;
esac
case $device in cuda | cpu) ;; *) echo "once.sh: ONCE_DEVICE must be cuda or cpu, got '$device'" >&2; exit 2 ;; esac
[[ $total =~ ^[1-9][0-9]*$ ]] || { echo "once.sh: S must be a number of seconds, got '$total'" >&2; exit 2; }
out=$(mkdir -p "${1:?$usage}" && cd "$1" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
export PYTHONPATH=. PYTHONUNBUFFERED=1
log=$out/$what.log summary=$out/summary.txt work=$(mktemp -d) failed=0
trap 'rm -rf "$work"' EXIT
trap 'kill $(jobs -p) 2>/dev/null; exit 143' TERM INT # timeout hands it on

say() { echo "$what, $SECONDS s: $*" | tee -a "$summary"; }

# part NAME LIMIT [-s SIGNAL] COMMAND ...: runs it, for so many seconds at most
part() {
  local name=$1 limit=$2 signal=TERM code begin=$SECONDS left=$((total - 12 - SECONDS))
  shift 2
  if [[ $1 == -s ]]; then signal=$2; shift 2; fi
  ((limit > left)) && limit=$left
  if ((limit < 5)); then say "$name: skipped, no time is left"; failed=1; return 1; fi
  printf '\n==== %s\n' "$name" >>"$log"
  timeout -s "$signal" -k 10 "$limit" "$@" >>"$log" 2>&1 &
  wait $!
  code=$?
  case $code in
    0) say "$name: done in $((SECONDS - begin)) s" ;;
    124 | 137) say "$name: stopped after its $limit s"; failed=1 ;;
    *) say "$name: failed, exit code $code, see $what.log"; failed=1 ;;
  esac
  return $code
}

sections() { # NAMES: each is a process with a limit of its own, and written when it is done
  part "benchmarks.gpu ($1)" $((total - 12)) \
    python -m benchmarks.gpu --out "$out" --device "$device" --budget $((total - 17)) --only "$1"
  sed -n 's/^== /    /p' "$log" | tee -a "$summary"
}

release() { # the model that the package ships, stopped cleanly at its limit, and in float16
  local choice=(g2p --preset release --steps 20000 --minutes 2.6)
  if [[ $device == cpu ]]; then
    printf '[model]\nd_model = 16\nd_ff = 16\n[recipe]\nbatch_size = 8\ndev_examples = 8\n' >"$work/toy.toml"
    choice=(sort --config "$work/toy.toml" --steps 4)
  fi
  part "release model" 200 python -m npformer train "${choice[@]}" \
    --backend torch --device "$device" --precision bfloat16 --out "$work/release"
  part "release model in float16" 20 python -m benchmarks.gpu.once keep "$work/release" "$out/release"
}

tests() { # NAME LIMIT ARGUMENTS ...: of pytest, which such a machine may lack
  local name=$1 limit=$2
  shift 2
  if python -c 'import pytest, hypothesis' 2>>"$log"; then
    # Stopped by Ctrl-C it still tells what has failed; and no warning is worth a test on a card
    part "$name" "$limit" -s INT python -m pytest -p no:cacheprovider -ra -W default "$@"
  else
    say "$name: skipped, pytest or hypothesis is not installed here"
  fi
}

say "begins on $device"
case $what in
  first)
    # A last: of all sections it needs longest, and takes what is left
    sections "smoke,ceilings,parity,training B,breakdown B,decoding,training C,training A"
    ;;
  second)
    release
    chosen="test_devices or graph or recorded or captured"
    [[ $device == cpu ]] && chosen="lengths or recorded"
    tests "device tests in float32, graph tests" 80 tests/test_devices.py tests/test_captured.py \
      tests/test_fast.py --device "$device" --dtype float32 -k "$chosen"
    tests "device tests in bfloat16" 60 tests/test_devices.py --device "$device" --dtype bfloat16 -k "$chosen"
    part "ddp, fsdp and tp on one device" 60 python -m benchmarks.gpu.once engines "$device" "$work"
    ;;
  rest)
    sections "attention,training A ragged,ladder,crossover,levers,drift"
    ;;
esac
files=$(cd "$out" && find . -type f ! -name 'summary.txt' | sort | sed 's|^\./||' | tr '\n' ' ')
if ((failed)); then say "ended, not all of it went well; in OUT: $files"; else say "ended well; in OUT: $files"; fi
exit $failed
