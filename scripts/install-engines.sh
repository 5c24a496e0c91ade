#!/bin/sh
# Installs what the features `nats` and `mpi` of flops-distributed and their tests need, on Debian and Ubuntu: nats-server,
# Open MPI with its headers, and libclang for the bindings to it. Does nothing, and says nothing, where all is there.
#
#   scripts/install-engines.sh [nats] [mpi]     both where none is named
set -eu

has() { command -v "$1" >/dev/null 2>&1; }

has_libclang() {
    if [ -n "${LIBCLANG_PATH:-}" ]; then return 0; fi
    # not libclang-cpp, which is another library
    for folder in /usr/lib/llvm-*/lib /usr/lib/* /usr/lib64 /usr/local/lib; do
        for file in "$folder"/libclang.so* "$folder"/libclang-[0-9]*.so*; do
            if [ -e "$file" ]; then return 0; fi
        done
    done
    return 1
}

engines=${*:-nats mpi}
packages=
for engine in $engines; do
    case $engine in
    nats)
        # Debian puts it into /usr/sbin, which may not be in the path of a user
        if ! has nats-server && [ ! -x /usr/sbin/nats-server ]; then packages="$packages nats-server"; fi
        # tests make certificates with it
        if ! has openssl; then packages="$packages openssl"; fi
        ;;
    mpi)
        if ! has mpirun; then packages="$packages openmpi-bin"; fi
        if ! has mpicc; then packages="$packages libopenmpi-dev"; fi
        if ! has_libclang; then packages="$packages libclang-dev"; fi
        ;;
    *)
        echo "$0: the engine is $engine; give nats, mpi, or nothing for both" >&2
        exit 2
        ;;
    esac
done
if [ -z "$packages" ]; then exit 0; fi

if ! has apt-get; then
    echo "$0: this is no Debian or Ubuntu; install these yourself:$packages" >&2
    echo "  nats-server is one file: https://github.com/nats-io/nats-server/releases" >&2
    exit 1
fi
if [ "$(id -u)" = 0 ]; then
    as_root=
elif has sudo && sudo -n true 2>/dev/null; then
    as_root=sudo
else
    echo "$0: this needs root; run: sudo apt-get update && sudo apt-get install -y$packages" >&2
    exit 1
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() { $as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 "$@" >>"$log" 2>&1; }
# lists may be missing or old: they are fetched only where the packages cannot be installed without
# shellcheck disable=SC2086 # several packages
if ! apt install -y --no-install-recommends $packages; then
    if ! { apt update && apt install -y --no-install-recommends $packages; }; then
        tail -n 20 "$log" >&2
        echo "$0: apt cannot install$packages" >&2
        exit 1
    fi
fi
# the package may start a server, which tests do not need: they start their own
