# shellcheck shell=bash
# Sourced by the other scripts: makes a virtual environment and installs into it, once.
#
#   make_environment FOLDER REQUIREMENT...
#
# The requirements, pyproject.toml and the kernels are remembered in FOLDER; as long as they stay as they are, a second
# call does nothing. Prints what it does.

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
    local wanted stamp
    wanted=$(cat pyproject.toml; cat kernels/* | cksum; printf '%s\n' "$@")
    stamp=$folder/.installed-$(printf '%s' "$*" | cksum | cut -d' ' -f1)
    if [ -f "$stamp" ] && [ "$wanted" = "$(cat "$stamp")" ]; then
        echo "$folder is up to date: nothing to install"
        return 0
    fi
    echo "installing $* into $folder; PyTorch is large, this takes a few minutes the first time"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    printf '%s\n' "$wanted" >"$stamp"
}
