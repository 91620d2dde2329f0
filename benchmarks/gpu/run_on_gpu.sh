#!/usr/bin/env bash
# On the GPU host, in the root of a checkout, from the folder that benchmarks/gpu/kit.py wrote:
#   bash .gpukit/run_on_gpu.sh probe             what the host has, and whether everything of the kit loads
#   bash .gpukit/run_on_gpu.sh tests [FILE…]     the tests with the marker gpu
#   bash .gpukit/run_on_gpu.sh check [OPTION…]   benchmarks/gpu_check.py, as in: check --parts kernels,engine
#   bash .gpukit/run_on_gpu.sh exec COMMAND…     anything else with the kit's packages
# Join commands with && where a call costs a start. OUT: the folder of results (gpu-results). SITE: where the kit is
# unpacked, once (~/.kvferry-site). PYTHON: of version 3.12 (python3).
set -euo pipefail
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
site=${SITE:-$HOME/.kvferry-site}
out=${OUT:-gpu-results}
python=${PYTHON:-python3}

if [[ ! -e $site/complete ]]; then
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { echo "the kit is for Python 3.12" >&2; exit 3; }
    rm -rf "$site"
    mkdir -p "$site/stubs"
    tar -C "$site" -xJf "$kit/flashinfer.tar.xz" &
    tar -C "$site" -xJf "$kit/nixl_cu13.tar.xz"
    wait $!
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$kit"/wheels/*.whl
    # To link a module that is not prebuilt, where the toolkit has no stub of the driver's library.
    c++ -shared -x c /dev/null -Wl,-soname,libcuda.so.1 -o "$site/stubs/libcuda.so" || echo "no C++ compiler" >&2
    touch "$site/complete"
fi
mkdir -p "$out"
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export FLASHINFER_CUDA_ARCH_LIST=9.0a FLASHINFER_EXTRA_LDFLAGS=-L$site/stubs
# Headers that a toolkit of wheels lacks may be beside torch.
headers=$("$python" -c 'import importlib.util as u, pathlib as p
spec = u.find_spec("nvidia")
print(*[d for r in (spec.submodule_search_locations if spec else ()) for d in p.Path(r).glob("cu13/include")][:1])')
[[ -z $headers ]] || export FLASHINFER_EXTRA_CUDAFLAGS=-I$headers

probe() {
    nvidia-smi
    echo "cores $(nproc); shared memory $(df -h /dev/shm | awk 'NR == 2 {print $4}'); may lock $(ulimit -l) KiB"
    "$python" - <<'PY'
import pathlib, time

began = time.monotonic()


def say(what):
    print(f"{time.monotonic() - began:5.1f} s  {what}")


import torch

torch.zeros(1, device="cuda")
say(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
import flashinfer, tvm_ffi

say(f"flashinfer {flashinfer.__version__}")
for path in sorted(pathlib.Path(flashinfer.__file__).parent.glob("data/aot/*/*.so")):
    tvm_ffi.load_module(str(path))
    say(f"loads: {path.stem}")
from nixl_cu13._api import nixl_agent, nixl_agent_config

agent = nixl_agent("probe", nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
memory = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
agent.register_memory([(memory.data_ptr(), memory.numel(), 0, "")], "VRAM")
say("nixl: 1 GiB of VRAM is registered")
PY
}

tests() {
    local files=("$@") links
    ((${#files[@]})) || mapfile -t files < <(grep -rl --include='test_*.py' 'pytest.mark.gpu' tests | sort)
    links=$(mktemp -d) # the package has its name there, whatever the checkout's folder is called
    ln -s "$PWD" "$links/kvferry"
    PYTHONPATH=$links:$PYTHONPATH "$python" -m pytest -m gpu -W default -p no:cacheprovider --tb=short -rs -v \
        --durations=15 --junitxml="$out/tests.xml" --rootdir="$PWD" -c pyproject.toml "${files[@]}"
}

run=${1:-probe}
shift || true
case $run in
probe | tests) "$run" "$@" 2>&1 | tee "$out/$run.log" ;;
check) "$python" benchmarks/gpu_check.py --json "$out/gpu.json" --log-dir "$out" "$@" 2>&1 | tee "$out/check.log" ;;
exec) "$@" ;;
*) echo "probe, tests, check or exec, not $run" >&2 && exit 2 ;;
esac
