#!/bin/sh
# Build the environment in folder $1 from requirements.lock with Python 3.12, or say exactly what is missing.
set -eu
venv=$1

find_python() {
    for candidate in ${MRL_PYTHON:-} python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python \
        /opt/python/3.12*/bin/python3 /usr/local/bin/python3.12 python3; do
        path=$(command -v "$candidate" 2>/dev/null) || continue
        if "$path" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
            echo "$path"
            return
        fi
    done
    if command -v uv >/dev/null 2>&1; then
        uv python find 3.12 2>/dev/null && return
    fi
    return 1
}

if ! python=$(find_python); then
    cat >&2 <<'MESSAGE'
mrl needs Python 3.12 (megatron-core and the pinned sglang do), and none was found.
Looked at: $MRL_PYTHON, python3.12 and python3 on PATH, ~/.pyenv/versions/3.12*, /opt/python, uv.
Install one of: apt install python3.12 python3.12-venv python3.12-dev | pyenv install 3.12 | uv python install 3.12
or name it:     MRL_PYTHON=/path/to/python3.12 make demo
MESSAGE
    exit 1
fi

if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    echo "mrl: $python has no venv module; install it (Debian: apt install python3.12-venv)" >&2
    exit 1
fi

# Certificates of the system, which a company's proxy may have added to.
export UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-1}
echo "mrl: building $venv with $python"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# An environment that uv has made comes without pip.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip --upgrade >/dev/null
[ -x "$venv/bin/uv" ] || "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" -r requirements.lock
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps --no-build-isolation -e .
