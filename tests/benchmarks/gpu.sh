#!/usr/bin/env bash
# Check and time the package on one GPU, within some five minutes and without a network:
#
#     OUT=/tmp bash tests/benchmarks/gpu.sh
#
# The tests marked gpu come first, then tests/benchmarks/gpu_step.py, whose table is printed last.
# Leaves gpu.log, gpu.xml, gpu.json and gpu.md in $OUT. Arguments go to gpu_step.py.
set -u
cd "$(dirname "$0")/../.." || exit 1
out=${OUT:-/tmp}
python=${PYTHON:-python3}
mkdir -p "$out"
exec > >(tee "$out/gpu.log") 2>&1
begin=$SECONDS

# A copy of the tree, which a checkout without write access allows too.
copy_package() {
    local tree
    tree=$(mktemp -d)
    cp -r safestep "$tree/safestep"
    [ -d callbacks ] && [ ! -e "$tree/safestep/callbacks" ] && cp -r callbacks "$tree/safestep/callbacks"
    export PYTHONPATH="$tree${PYTHONPATH:+:$PYTHONPATH}"
}

if ! "$python" -m pip install -q --no-deps --no-build-isolation --no-index -e .; then
    echo "pip could not install it; using a copy"
    copy_package
fi
cd_free_import='import safestep; print(safestep.__file__)'
(cd / && "$python" -c "$cd_free_import") || { copy_package; (cd / && "$python" -c "$cd_free_import"); }

export CUBLAS_WORKSPACE_CONFIG=:4096:8 TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(mktemp -d)}
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || true
"$python" -c '
import platform, torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}")'

rm -f "$out/gpu.xml"
# Warnings are errors in the project's own settings; another torch has others, test_gpu.py looks
# for those of the package itself.
timeout 130 "$python" -m pytest -o addopts=--import-mode=importlib -m gpu -q -W default -p no:cacheprovider --tb=short --show-capture=no \
    --junitxml="$out/gpu.xml" tests/test_gpu.py
tests=$?
[ $tests -eq 5 ] && tests=0 # none was selected
echo "tests: status $tests after $((SECONDS - begin)) s"

timeout 290 "$python" tests/benchmarks/gpu_step.py --junit "$out/gpu.xml" \
    --json "$out/gpu.json" --markdown "$out/gpu.md" "$@" 2>&1
timing=$?
echo "all: tests $tests, timing $timing, $((SECONDS - begin)) s"
[ $tests -eq 0 ] && [ $timing -eq 0 ]
