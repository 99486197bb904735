#!/usr/bin/env bash
# Sets up .venv in this checkout: every dependency, llama-cpp-python built here, the demo's model.
#
#     deploy/bootstrap.sh           what `make` runs; does nothing when nothing has changed
#     deploy/bootstrap.sh --check   only looks whether this machine has what it takes
#
# PYTHON=/path/to/python chooses the interpreter. Nothing outside the checkout is written (but pip's
# cache), and nothing here calls sudo. What is missing is named in one sentence with the command that
# mends it; the exit status is then 3.
set -euo pipefail

root=$(cd -- "${BASH_SOURCE[0]%/*}/.." && pwd)
venv=${VENV:-$root/.venv}
stamp=$venv/.bootstrap
log=$venv/build.log
lean=$root/deploy/llama_lean.cmake
llama_options="-DGGML_RPC=on -DLLAVA_BUILD=on -DLLAMA_OPENSSL=off -DCMAKE_PROJECT_llama.cpp_INCLUDE=$(printf %q "$lean")"

say() { printf '%s\n' "$*"; }

missing() {
    printf '%s\n' "$*" >&2
    exit 3
}

has() { command -v "$1" >/dev/null 2>&1; }

# How this system installs packages: the words of Debian's kin, since those are the boards we know.
install_command() {
    if has apt-get || ! has dnf; then
        printf 'sudo apt-get install %s' "$1"
    else
        printf 'sudo dnf install %s' "$2"
    fi
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || printf 'broken'; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The interpreter to build the environment with, in $python.
find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        has "$PYTHON" || missing "PYTHON=$PYTHON is not a program: give the path of a Python 3.11 or newer."
        is_new_enough "$PYTHON" ||
            missing "PYTHON=$PYTHON is Python $(version_of "$PYTHON") and 3.11 or newer is needed: give the path of another."
        python=$PYTHON
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.14; do
        if has "$candidate" && is_new_enough "$candidate"; then
            python=$candidate
            return
        fi
    done
    has python3 || missing "Python is missing: $(install_command 'python3 python3-venv' python3)"
    missing "Python 3.11 or newer is needed and python3 is $(version_of python3):" \
        "$(install_command 'python3.11 python3.11-venv' python3.11) (or name another: make PYTHON=/path/to/python3.11)"
}

check_venv() {
    local package=python3-venv
    [[ ${python##*/} == python3 ]] || package=python$(version_of "$python")-venv
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        missing "$package is missing: $(install_command "$package" python3-libs)"
}

# llama-cpp-python has no ready-made build: it is compiled here.
check_compiler() {
    local tool
    for tool in cc:gcc c++:g++; do
        has "${tool%:*}" || missing "A ${tool%:*} compiler is missing: $(install_command build-essential 'gcc gcc-c++ make')"
    done
    # A here-string and no pipe: a compiler that ends before it has read all would look like one that fails.
    c++ -x c++ -fsyntax-only - <<<$'#include <cstdio>\nint main() { return 0; }' >/dev/null 2>&1 ||
        missing "The C++ compiler cannot compile (its headers are missing): $(install_command build-essential 'gcc-c++ glibc-devel')"
    has make || has ninja || missing "make is missing: $(install_command build-essential make)"
}

pinned_llama() { sed -n 's/^llama[-_]cpp[-_]python==//p' "$root/constraints.txt"; }

# The pinned one, with the library that pictures need (0034).
llama_is_there() {
    [[ -x $venv/bin/python ]] &&
        "$venv/bin/python" -c 'import sys
from importlib.metadata import files, version
name = "llama-cpp-python"
sys.exit(version(name) != sys.argv[1] or not any("libmtmd" in each.name for each in files(name)))' \
            "$(pinned_llama)" 2>/dev/null
}

# What the installed state depends on.
fingerprint() {
    { printf '%s %s\n' "$root" "$1"; cat "$root/pyproject.toml" "$root/constraints.txt" "$lean" "${BASH_SOURCE[0]}"; } | sha256sum
}

failed() {
    say ""
    say "--- the last lines of $log"
    tail -n 30 "$log"
    say "---"
    missing "$1 did not install. Mend what the lines above name (with no network there is no way around" \
        "it), then run the same command again: what was done is kept."
}

# pip, logged whole and shown as a line; the first argument is what a person is told.
pip_install() {
    local what=$1
    shift
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input -v install -c "$root/constraints.txt" "$@" 2>&1 |
        tee -a "$log" | "$venv/bin/python" "$root/deploy/progress.py" "$what" || failed "$what"
}

build_llama() {
    local cores minutes
    cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || printf 1)
    minutes=$(((10 + cores - 1) / cores))
    say "building llama-cpp-python $(pinned_llama): about $minutes minutes on $cores cores, once" \
        "(seconds where pip has built it before); everything goes to ${log#"$root"/}"
    export CMAKE_ARGS="$llama_options ${CMAKE_ARGS:-}" CMAKE_BUILD_PARALLEL_LEVEL=$cores
    pip_install llama-cpp-python "llama-cpp-python==$(pinned_llama)"
    # A wheel in pip's cache may have been built with other options.
    llama_is_there || pip_install llama-cpp-python --no-cache-dir --force-reinstall --no-deps \
        "llama-cpp-python==$(pinned_llama)"
}

main() {
    if [[ -x $venv/bin/python ]] && is_new_enough "$venv/bin/python"; then
        python=$venv/bin/python
        if [[ ${1:-} != --check && -f $stamp && $(<"$stamp") == "$(fingerprint "$(version_of "$python")")" ]]; then
            return
        fi
    fi
    if [[ -z ${python:-} || ${1:-} == --check ]]; then
        find_python
        check_venv
    fi
    llama_is_there || check_compiler
    if [[ ${1:-} == --check ]]; then
        say "This machine has what it takes: $python is Python $(version_of "$python")."
        return
    fi
    if [[ $python != "$venv/bin/python" ]]; then
        say "setting up ${venv#"$root"/} with Python $(version_of "$python")"
        "$python" -m venv --clear "$venv" || missing "$python could not make $venv: see above."
    fi
    : >"$log"
    "$venv/bin/python" -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (25, 1))' ||
        pip_install pip 'pip>=25.1'
    llama_is_there || build_llama
    say "installing the other packages (about 150 MB the first time)"
    (cd "$root" && pip_install packages -e '.[llama,demo]' --group dev)
    fingerprint "$(version_of "$venv/bin/python")" >"$stamp"
    say "ready: ${venv#"$root"/}"
}

main "$@"
