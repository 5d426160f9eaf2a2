#!/usr/bin/env bash
# Prove on a GPU what has only run on a CPU, then measure it. Two commands:
#
#   gpu/prove.sh wheels FOLDER [PACKAGE…]   with a network: gather what the GPU machine lacks
#   WHEELS=FOLDER gpu/prove.sh run [OUT [PART…]]   on the GPU machine, which needs none
#
#   gpu/prove.sh list                       the parts of a run: name|needs|seconds at most|phase|command
#
# wheels: of the packages named, else of all that constraints.txt pins but PyTorch and Triton, in the versions pinned there, for
#     Python $PYTHON_VERSION (default 3.12) on x86-64 Linux.
# run: installs from $WHEELS (default wheels) what is not there yet, and the project; then runs all parts, or those named. The
#     checks run side by side, the measurements one by one. Each has a time limit of its own, all together take $TOTAL seconds
#     (default 520) at most. In OUT (default runs/proof): summary.md and summary.json, a log a part, environment.txt,
#     and what `smca benchmark` writes.
#     Exit status 0: all passed. 1: a part failed. 3: none failed, but not all ran.
#
# Folders are relative to the repository. PYTHON names the interpreter; default .venv/bin/python where there is one, else python3.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
SMCA='from smca.gpu.cli import main; main()' # the command `smca`, of whatever interpreter

parts() {
    cat << 'END'
kernels|triton|180|check|python tests/gpu/test_kernel_compilation.py
fused-attention|cuda triton|180|check|pytest tests/gpu/test_fused_attention.py --deselect tests/gpu/test_fused_attention.py::test_at_the_size_of_a_detector --deselect tests/gpu/test_fused_attention.py::test_agrees_with_the_reference --deselect tests/gpu/test_fused_attention.py::test_padded_keys_may_hold_anything --deselect tests/gpu/test_fused_attention.py::test_half_precision_keeps_narrow_gaussians --deselect tests/gpu/test_fused_attention.py::test_half_precision_with_centers_far_off_the_map --deselect tests/gpu/test_fused_attention.py::test_half_precision_on_maps_of_many_cells
fused-attention-half|cuda triton|180|check|pytest tests/gpu/test_fused_attention.py::test_half_precision_keeps_narrow_gaussians tests/gpu/test_fused_attention.py::test_half_precision_with_centers_far_off_the_map tests/gpu/test_fused_attention.py::test_half_precision_on_maps_of_many_cells
fused-attention-shapes|cuda triton|180|check|pytest tests/gpu/test_fused_attention.py::test_agrees_with_the_reference tests/gpu/test_fused_attention.py::test_padded_keys_may_hold_anything
fused-attention-float32|cuda triton|180|check|pytest tests/gpu/test_fused_attention.py::test_at_the_size_of_a_detector -k torch.float32
fused-attention-float16|cuda triton|180|check|pytest tests/gpu/test_fused_attention.py::test_at_the_size_of_a_detector -k torch.float16
fused-attention-bfloat16|cuda triton|180|check|pytest tests/gpu/test_fused_attention.py::test_at_the_size_of_a_detector -k torch.bfloat16
real-sizes|cuda triton cupy|180|check|pytest tests/gpu/test_real_sizes.py -rP
assignment|cuda cupy|180|check|pytest tests/gpu/test_assignment.py
step|cuda triton cupy|180|check|pytest tests/gpu/test_gpu_step.py tests/gpu/test_layers.py --deselect tests/gpu/test_gpu_step.py::test_a_compiled_step_does_not_wait_either
step-compiled|cuda triton cupy|180|check|pytest tests/gpu/test_gpu_step.py -k compiled
triton-cuda|cuda triton|180|check|smca conformance --implementation triton-cuda
compiled||180|check|smca conformance --implementation compiled
cuda-assignment|cuda cupy|180|check|smca conformance --implementation cuda-assignment
criterion-cupy|cuda cupy|180|check|smca conformance --implementation criterion-cupy
oracle-cupy|cuda cupy|180|check|smca conformance --implementation oracle-cupy
attention|cuda triton|105|measure|smca benchmark --only attention --repeats 5 --minutes 0.8
step-speed|cuda triton cupy|105|measure|smca benchmark --only step --batches 16 --repeats 5 --minutes 0.7
assignment-speed|cuda cupy|50|measure|smca benchmark --only assignment --repeats 5 --minutes 0.2
profile|cuda triton cupy|90|measure|smca benchmark --only profile --repeats 5 --minutes 0.5
multi-scale|cuda triton|105|measure|smca benchmark --only multi-scale --repeats 5 --minutes 0.6
compiled-speed|cuda cupy|90|measure|smca benchmark --only compiled --repeats 5 --minutes 0.8
END
}

# What of cuda, triton and cupy this machine has.
probe() {
    "$PYTHON" - << 'END'
import importlib.util
try:
    import torch
except ImportError:
    raise SystemExit
print("cuda" if torch.cuda.is_available() else "", *(n for n in ("triton", "cupy") if importlib.util.find_spec(n)))
END
}

# plain NAME: as pip compares names.
plain() { tr '[:upper:]_.' '[:lower:]--' <<< "$1"; }

gather_wheels() {
    local folder=$1 line name wanted=() packages=()
    shift
    for name in "$@"; do wanted+=("$(plain "$name")"); done
    while read -r line; do
        name=$(plain "${line%%==*}")
        if (($#)); then
            [[ " ${wanted[*]} " == *" $name "* ]] && packages+=("$line")
        elif [[ $name != torch && $name != triton ]]; then
            packages+=("$line")
        fi
    done < <(grep -v '^#' constraints.txt)
    if (($# && $# != ${#packages[@]})); then
        echo "error: constraints.txt pins ${packages[*]:-none} of $*" >&2
        return 1
    fi
    local platform=() version
    for version in 2_28 2_27 2_26 2_24 2_17 2014 2_12 2010 2_5 1; do
        [[ $version == *_* ]] && platform+=(--platform "manylinux_${version}_x86_64") || platform+=(--platform "manylinux${version}_x86_64")
    done
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
        --python-version "${PYTHON_VERSION:-3.12}" "${platform[@]}" --dest "$folder" "${packages[@]}"
}

# Wheels of what is not there (setuptools also where it is too old to build the project), then the project from this folder.
install() {
    local wheel name missing=()
    for wheel in "$1"/*.whl; do
        [[ -e $wheel ]] || continue
        name=$(basename "$wheel")
        "$PYTHON" - "${name%%-*}" << 'END' || missing+=("$wheel")
import importlib.metadata, sys
version = importlib.metadata.version(sys.argv[1])
raise SystemExit(sys.argv[1] == "setuptools" and int(version.split(".")[0]) < 77)
END
    done 2> /dev/null
    echo "installed from $1: ${missing[*]:-nothing}"
    if ((${#missing[@]})); then
        "$PYTHON" -m pip install --no-index --no-deps "${missing[@]}" || return
    fi
    "$PYTHON" -c 'import pathlib, smca.gpu.cli as m; raise SystemExit(pathlib.Path(m.__file__).resolve().parents[1] != pathlib.Path.cwd())' \
        2> /dev/null || "$PYTHON" -m pip install --no-deps --no-build-isolation -e .
}

# run_part NAME SECONDS COMMAND…: the command under a time limit; its status and seconds go to NAME.result, the rest to NAME.log.
run_part() {
    local name=$1 limit=$2 kind=$3 began=$SECONDS status
    shift 3
    local left=$((TOTAL - SECONDS))
    if ((left < limit)); then limit=$left; fi
    if ((limit < 5)); then
        echo "left out|0|the $TOTAL seconds of the whole are used up" > "$OUT/$name.result"
        return
    fi
    local command=("$PYTHON")
    case $kind in
        pytest) command+=(-m pytest -p no:cacheprovider) ;;
        smca) command+=(-c "$SMCA") ;;
    esac
    command+=("$@")
    if [[ $1 == benchmark ]]; then command+=(--output "$OUT"); fi
    timeout --kill-after=5 "$limit" "${command[@]}" > "$OUT/$name.log" 2>&1
    status=$?
    case $status in
        0) echo "passed|$((SECONDS - began))|" ;;
        124 | 137) echo "timed out|$((SECONDS - began))|stopped after $limit s" ;;
        *) echo "failed|$((SECONDS - began))|exit status $status, see $name.log" ;;
    esac > "$OUT/$name.result"
}

# missing NEEDS HAS: why a part cannot run here, else nothing.
missing() {
    local need
    for need in $1; do
        case " $2 " in
            *" $need "*) ;;
            *) [[ $need == cuda ]] && echo "PyTorch sees no CUDA device" || echo "$need is not installed" ;;
        esac
    done
}

summarize() {
    local name status seconds note rows=() code=0
    {
        echo "| part | result | seconds | |"
        echo "|---|---|---|---|"
    } > "$OUT/summary.md"
    for name in "$@"; do
        IFS='|' read -r status seconds note < "$OUT/$name.result"
        rm "$OUT/$name.result"
        echo "| $name | $status | $seconds | $note |" >> "$OUT/summary.md"
        rows+=("{\"part\": \"$name\", \"result\": \"$status\", \"seconds\": $seconds, \"note\": \"$note\"}")
        case $status in
            passed) ;;
            skipped | "left out") if ((code == 0)); then code=3; fi ;;
            *) code=1 ;;
        esac
    done
    (IFS=,; echo "[${rows[*]}]") > "$OUT/summary.json"
    cat "$OUT/summary.md"
    echo "$SECONDS s in all; logs and results in $OUT"
    return "$code"
}

run() {
    OUT=${1:-runs/proof}
    TOTAL=${TOTAL:-520}
    local chosen=("${@:2}") known has name needs limit phase command reason ran=(install)
    known=$(parts | cut -d'|' -f1)
    for name in ${chosen[@]+"${chosen[@]}"}; do
        grep -qxF -- "$name" <<< "$known" || { echo "error: no part '$name': choose of ${known//$'\n'/, }" >&2; return 2; }
    done
    mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || return
    if install "${WHEELS:-wheels}" > "$OUT/install.log" 2>&1; then
        echo "passed|$SECONDS|" > "$OUT/install.result"
    else
        echo "failed|$SECONDS|see install.log" > "$OUT/install.result"
    fi
    has=$(probe)
    {
        date -u
        git log -1 --format='commit %H'
        nvidia-smi
        "$PYTHON" -m pip list
    } > "$OUT/environment.txt" 2>&1
    local wanted
    for wanted in check measure; do
        while IFS='|' read -r name needs limit phase command; do
            [[ $phase == "$wanted" ]] || continue
            ((${#chosen[@]} == 0)) || [[ " ${chosen[*]} " == *" $name "* ]] || continue
            ran+=("$name")
            reason=$(missing "$needs" "$has" | paste -sd, | sed 's/,/, /g')
            if [[ -n $reason ]]; then
                echo "skipped|0|$reason" > "$OUT/$name.result"
                continue
            fi
            local words
            read -ra words <<< "$command"
            if [[ $phase == check ]]; then
                OMP_NUM_THREADS=2 run_part "$name" "$limit" "${words[@]}" < /dev/null &
            else
                run_part "$name" "$limit" "${words[@]}" < /dev/null
            fi
        done < <(parts)
        wait
    done
    summarize "${ran[@]}"
}

case ${1:-} in
    wheels) shift && gather_wheels "${@:?wheels needs a folder}" ;;
    run) shift && run "$@" ;;
    list) parts ;;
    *)
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
        exit 2
        ;;
esac
