# shellcheck shell=bash
# Sourced by the other scripts: makes a virtual environment and installs into it, once.
#
#   make_environment FOLDER REQUIREMENT...
#
# The requirements, pyproject.toml and the kernels are remembered in FOLDER; as long as they stay as they are, a second
# call does nothing, and one with other extras of `-e '.[…]'` installs those without building the kernels again.
# Prints what it does.

make_environment() {
    local folder=$1
    shift
    local python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "Python 3.10 or newer is needed; '$python' is not one. Set PYTHON to one that is." >&2
        return 1
    fi
    if [ ! -x "$folder/bin/python" ]; then
        echo "making the virtual environment $folder"
        "$python" -m venv "$folder"
    fi
    local source stamp
    source=$(cat pyproject.toml; echo "${CXX:-}"; find kernels -type f -print0 | LC_ALL=C sort -z | xargs -0 cat | cksum)
    stamp=$folder/.installed-$(printf '%s' "$*" | cksum | cut -d' ' -f1)
    if [ -f "$stamp" ] && [ "$source" = "$(cat "$stamp")" ]; then
        echo "$folder is up to date: nothing to install"
        return 0
    fi
    local requirements=()
    if [ -f "$folder/.built" ] && [ "$source" = "$(cat "$folder/.built")" ]; then
        local word
        for word in "$@"; do
            case $word in
            -e) ;;
            .*) requirements+=("knltrain${word#.}") ;;
            *) requirements+=("$word") ;;
            esac
        done
    else
        rm -f "$folder"/.installed-* "$folder/.built"
        requirements=("$@")
    fi
    echo "installing $* into $folder; PyTorch is large, this takes a few minutes the first time"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "${requirements[@]}"
    printf '%s\n' "$source" | tee "$folder/.built" >"$stamp"
}
