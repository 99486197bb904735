#!/usr/bin/env bash
# Installs meshd on a board or a computer as a systemd service.
#
#     sudo deploy/install.sh              from a checkout of the repository
#     deploy/install.sh --dry-run         prints every step and does nothing
#     --no-llama    no language models here: nothing is compiled
#     --no-cuda     a build for the CPU, even where CUDA is found (nvcc in PATH, CUDA_HOME or
#                   /usr/local/cuda)
#
# What it makes: /opt/meshd (Python environment, and a Python of its own where the system's is older than
# 3.11), /usr/local/bin/meshd, the user meshd, /etc/meshd/meshd.toml, /var/lib/meshd, meshd.service.
# Running it again updates all but the configuration and the state. deploy/uninstall.sh undoes it.
#
# NEVER RUN ON A REAL BOARD YET: the CUDA build (Jetson), the Python of its own (JetPack 6 ships 3.10) and
# the GPU devices of the unit. Run so far: the dry run, on Debian 12, by the tests.
set -euo pipefail

source_dir=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
prefix=/opt/meshd
venv=$prefix/venv
python_version=3.12
dry_run=no
llama=yes
cuda=auto

usage() { sed -n '2,/^# What it makes/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; }

fail() {
    printf 'install: %s\n' "$*" >&2
    exit 1
}

# Every change to the system goes through here.
run() {
    printf '+ %s\n' "$(printf '%q ' "$@")"
    [[ $dry_run == yes ]] || "$@"
}

say() { printf '# %s\n' "$*"; }

has() { command -v "$1" >/dev/null 2>&1; }

while (($#)); do
    case $1 in
    --dry-run) dry_run=yes ;;
    --no-llama) llama=no ;;
    --no-cuda) cuda=no ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) fail "unknown option $1 (there are --dry-run, --no-llama, --no-cuda)" ;;
    esac
    shift
done

[[ $dry_run == yes || $EUID == 0 ]] || fail "this changes the system: run sudo $0, or $0 --dry-run to see what it would do"
[[ $dry_run == yes ]] || has systemctl || fail "there is no systemd here; see docs/operate.md for running meshd by hand"

# -- What is missing from the system ---------------------------------------------------------------------

system_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if has "$candidate" && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s' "$candidate"
            return
        fi
    done
}

install_packages() {
    local packages=()
    has python3 || packages+=(python3)
    python3 -c 'import ensurepip' 2>/dev/null || packages+=(python3-venv)
    if [[ $llama == yes ]] && ! { has c++ && has make; }; then
        packages+=(build-essential)
    fi
    ((${#packages[@]})) || return 0
    [[ $dry_run == yes ]] || has apt-get || fail "missing, and there is no apt-get to install it: ${packages[*]}"
    run apt-get update -q
    run apt-get install -y --no-install-recommends "${packages[@]}"
}

# -- Python ----------------------------------------------------------------------------------------------

# Sets $python. The system's where it is new enough; otherwise one of our own, by uv, which comes from
# the package index like everything else (decision 0011).
provide_python() {
    python=$(system_python)
    if [[ -n $python ]]; then
        say "Python: the system's $python"
        return
    fi
    say "Python: the system's is older than 3.11, so one of our own goes to $prefix/python"
    run python3 -m venv "$prefix/uv"
    run "$prefix/uv/bin/python" -m pip install --quiet uv
    run env UV_PYTHON_INSTALL_DIR="$prefix/python" "$prefix/uv/bin/uv" python install "$python_version"
    if [[ $dry_run == yes ]]; then
        python="$prefix/python/bin/python$python_version"
    else
        python=$(env UV_PYTHON_INSTALL_DIR="$prefix/python" "$prefix/uv/bin/uv" python find --managed-python "$python_version")
    fi
}

# -- llama.cpp -------------------------------------------------------------------------------------------

# Sets $nvcc, empty for a build without CUDA.
find_cuda() {
    nvcc=
    [[ $cuda != no ]] || return 0
    if has nvcc; then
        nvcc=$(command -v nvcc)
    elif [[ -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]]; then
        nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
    fi
}

install_llama() {
    local options="-DGGML_RPC=on -DLLAVA_BUILD=on -DLLAMA_OPENSSL=off" settings
    options+=" -DCMAKE_PROJECT_llama.cpp_INCLUDE=$(printf %q "$source_dir/deploy/llama_lean.cmake")"
    find_cuda
    settings=("CMAKE_BUILD_PARALLEL_LEVEL=$(getconf _NPROCESSORS_ONLN)")
    if [[ -n $nvcc ]]; then
        say "llama.cpp: CUDA found at $nvcc"
        options="-DGGML_CUDA=on $options"
        settings+=("CUDACXX=$nvcc")
    else
        say "llama.cpp: no CUDA, a build for the CPU"
    fi
    say "this compiles for a while: minutes on a computer, half an hour and more on a small board"
    # Not from pip's cache: a wheel there may have been built with other options.
    run env "CMAKE_ARGS=$options" "${settings[@]}" "$venv/bin/python" -m pip install --no-cache-dir \
        -c "$source_dir/constraints.txt" llama-cpp-python jinja2
    [[ -z $nvcc ]] || run "$venv/bin/python" -c \
        'import llama_cpp, sys; sys.exit(0 if llama_cpp.llama_supports_gpu_offload() else "the build has no GPU support")'
}

# -- All of it -------------------------------------------------------------------------------------------

install_packages
run install -d -m 0755 "$prefix"
provide_python
run "$python" -m venv --upgrade-deps "$venv"
[[ $llama == no ]] || install_llama
run "$venv/bin/python" -m pip install --upgrade -c "$source_dir/constraints.txt" "$source_dir"
run ln -sfn "$venv/bin/meshd" /usr/local/bin/meshd

run install -D -m 0644 "$source_dir/deploy/sysusers.d/meshd.conf" /usr/lib/sysusers.d/meshd.conf
run systemd-sysusers /usr/lib/sysusers.d/meshd.conf
run install -d -m 0755 /etc/meshd
if [[ ! -e /etc/meshd/meshd.toml ]]; then
    run install -m 0644 "$source_dir/deploy/meshd.example.toml" /etc/meshd/meshd.toml
fi
run install -d -o meshd -g meshd -m 0700 /var/lib/meshd
run install -D -m 0644 "$source_dir/deploy/meshd.service" /etc/systemd/system/meshd.service
run systemctl daemon-reload
run systemctl enable meshd.service
[[ -z ${SUDO_USER:-} || $SUDO_USER == root ]] || run usermod -aG meshd "$SUDO_USER"

# An update takes effect at once; a first installation has no mesh to start with.
run systemctl try-restart meshd.service
if [[ $dry_run == yes ]] || ! systemctl --quiet is-active meshd.service; then
    cat <<'NEXT'

Installed. The daemon needs a mesh before it starts. The first node makes one:
    sudo -u meshd meshd init NAME
    sudo systemctl start meshd && meshd status
Every other one joins it, with the token that `meshd invite` prints there:
    sudo meshd join TOKEN
NEXT
fi
