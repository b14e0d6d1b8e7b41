# shellcheck shell=bash
# Shared by deploy/demo, deploy/install, tests/run, tests/failover and tests/bench: what a fresh Debian 12
# machine needs before Tandem can be built and its lab can run. Sourced, never executed.
#
# Everything here prints to standard error, so that a script's standard output belongs to the
# program it ends in (`--json` prints one document and nothing else).
#
# Nothing here starts a service or leaves one enabled: see `install_packages`.

set -euo pipefail

TANDEM_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
TANDEM_TARGET="${CARGO_TARGET_DIR:-$TANDEM_ROOT/target}"
[[ $TANDEM_TARGET == /* ]] || TANDEM_TARGET="$PWD/$TANDEM_TARGET"
TANDEM_STARTED=$SECONDS
CARGO_FLAGS=(--manifest-path "$TANDEM_ROOT/Cargo.toml" --locked)

# A compiler and linker for Rust, and for the C and assembly of ring.
BUILD_PACKAGES=(gcc libc6-dev)

# ---------------------------------------------------------------------------- saying things

step() { printf '[%3ds] %s\n' "$((SECONDS - TANDEM_STARTED))" "$*" >&2; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() {
    printf '%s: %s\n' "$(basename -- "$0")" "$1" >&2
    shift
    local hint
    for hint in "$@"; do printf '  %s\n' "$hint" >&2; done
    exit 1
}

# ---------------------------------------------------------------------------- cleaning up
# `at_exit COMMAND` runs COMMAND when the script ends, however it ends; last registered first.

AT_EXIT=()
CHILD=
at_exit() { AT_EXIT+=("$1"); }

cleanup() {
    local rc=$? i
    trap - EXIT INT TERM HUP
    set +e
    stop_child
    for ((i = ${#AT_EXIT[@]} - 1; i >= 0; i--)); do eval "${AT_EXIT[i]}"; done
    exit "$rc"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

# Runs a command as a child with a process group of its own and waits for it, so
# that a signal to this script is acted on at once and reaches the whole group. Its standard
# input is empty: a background group that reads the terminal would be stopped. Give it external
# commands: in a function called before `||` or `&&`, bash ignores `set -e`.
run_child() {
    local rc=0
    set -m
    "$@" </dev/null &
    CHILD=$!
    set +m
    wait "$CHILD" || rc=$?
    CHILD=
    return "$rc"
}

# The lab removes its namespaces on SIGTERM; 30 s is far more than that takes.
stop_child() {
    [[ -n $CHILD ]] || return 0
    kill -TERM -- "-$CHILD" 2>/dev/null || true
    local i
    for ((i = 0; i < 300; i++)); do
        kill -0 -- "-$CHILD" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL -- "-$CHILD" 2>/dev/null || true
    wait "$CHILD" 2>/dev/null || true
    CHILD=
}

# ---------------------------------------------------------------------------- the machine

need_root() {
    [[ $(id -u) -eq 0 ]] && return 0
    die "needs root ($1)" "run: sudo $0"
}

need_tun() {
    [[ -c /dev/net/tun ]] && return 0
    modprobe tun 2>/dev/null || true
    [[ -c /dev/net/tun ]] && return 0
    die "there is no /dev/net/tun" \
        "the kernel module is called tun; in a container, pass the device: --device /dev/net/tun"
}

# Package names from a list file: one a line, `#` starts a comment.
packages_in() { sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' -- "$1"; }

package_installed() {
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null || true) == installed ]]
}

# need_packages NAME...: installs the ones that are missing. The package index is fetched at
# most once per script, and only if something is missing.
APT_UPDATED=
need_packages() {
    command -v dpkg-query >/dev/null ||
        die "this needs a Debian system (dpkg-query was not found)" "wanted packages: $*"
    local name missing=()
    for name in "$@"; do package_installed "$name" || missing+=("$name"); done
    ((${#missing[@]})) || return 0
    [[ $(id -u) -eq 0 ]] || die "missing Debian packages: ${missing[*]}" \
        "run: sudo apt-get install ${missing[*]}"
    install_packages "${missing[@]}"
}

# Debian starts a package's services as it installs it, and at every boot after. strongSwan's
# would take ports 500 and 4500 of the very host that may run tandemd next, so no service
# starts, and the one that we brought in stays off.
install_packages() {
    local log policy=/usr/sbin/policy-rc.d had_starter=
    log=$(mktemp)
    at_exit "rm -f -- '$log'"
    package_installed strongswan-starter && had_starter=1
    if [[ ! -e $policy ]]; then
        at_exit "rm -f -- $policy"
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    else
        policy=
    fi
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=120)
    if [[ -z $APT_UPDATED ]]; then
        step "fetching Debian's package index"
        run_child "${apt[@]}" update >"$log" 2>&1 ||
            { cat -- "$log" >&2; die "apt-get update failed (its output is above)"; }
        APT_UPDATED=1
    fi
    step "installing Debian packages: $*"
    run_child "${apt[@]}" install --no-install-recommends "$@" >"$log" 2>&1 ||
        { cat -- "$log" >&2; die "apt-get install failed (its output is above)"; }
    [[ -z $policy ]] || rm -f -- "$policy"
    rm -f -- "$log"
    if [[ -z $had_starter ]] && package_installed strongswan-starter; then
        systemctl disable --quiet strongswan-starter.service >/dev/null 2>&1 ||
            rm -f -- /etc/systemd/system/multi-user.target.wants/strongswan-starter.service
    fi
}

# ---------------------------------------------------------------------------- Rust

rust_wanted() { sed -n 's/^rust-version = "\(.*\)"/\1/p' "$TANDEM_ROOT/Cargo.toml"; }

# True if the cargo on PATH runs and is at least the workspace's rust-version (Debian 12's own
# is older).
cargo_fits() {
    local have want
    have=$(cargo --version 2>/dev/null | sed -n 's/^cargo \([0-9.]*\).*/\1/p') || return 1
    want=$(rust_wanted)
    [[ -n $have && $(printf '%s\n%s\n' "$want" "$have" | sort -V | head -n 1) == "$want" ]]
}

# Puts a fitting cargo on PATH: the one there; root's; the one of the user who called sudo
# (which resets PATH and HOME); or a new one by rustup's installer, for root.
need_cargo() {
    if cargo_fits; then return 0; fi
    export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    if cargo_fits; then return 0; fi
    local home
    if [[ -n ${SUDO_USER:-} && $SUDO_USER != root ]]; then
        home=$(getent passwd "$SUDO_USER" | cut -d: -f6)
        if [[ -x $home/.cargo/bin/cargo ]]; then
            # The toolchain is the user's; what root downloads stays in root's CARGO_HOME.
            if PATH="$home/.cargo/bin:$PATH" RUSTUP_HOME="$home/.rustup" cargo_fits; then
                export PATH="$home/.cargo/bin:$PATH" RUSTUP_HOME="$home/.rustup"
                return 0
            fi
        fi
    fi
    install_rust
    cargo_fits || die "cargo $(rust_wanted) or newer is needed and could not be installed" \
        "install it by https://rustup.rs, then run this again"
}

install_rust() {
    need_packages ca-certificates curl
    local installer
    installer=$(mktemp)
    at_exit "rm -f -- '$installer'"
    step "installing Rust for $(id -un) by rustup (no cargo $(rust_wanted) or newer was found)"
    # Fetched whole before it is run: a download cut short must not be executed.
    run_child curl --proto '=https' --tlsv1.2 --fail --silent --show-error --location \
        --retry 3 --output "$installer" https://sh.rustup.rs ||
        die "rustup's installer could not be fetched" \
            "install Rust $(rust_wanted) or newer in another way, then run this again"
    run_child sh "$installer" -y -q --no-modify-path --profile minimal \
        --default-toolchain stable --component clippy --component rustfmt >&2 ||
        die "rustup's installer failed (its output is above)"
    hash -r
}

# need_component clippy|rustfmt
need_component() {
    local tool=$1
    [[ $tool == rustfmt ]] && tool=fmt
    cargo "$tool" --version >/dev/null 2>&1 && return 0
    step "adding the Rust component $1"
    run_child rustup component add "$1" >&2 ||
        die "cargo $tool is missing and rustup could not add it"
}

# build_release CARGO_ARGUMENTS...: a release build into the shared target folder.
build_release() {
    step "building in release: cargo build --release $*"
    run_child cargo build --release "${CARGO_FLAGS[@]}" "$@" >&2 ||
        die "the build failed (its output is above)"
    give_back_target
}

# Under sudo the target folder would become root's, and the user's next `cargo build` fail.
give_back_target() {
    if [[ -n ${SUDO_UID:-} && $SUDO_UID != 0 && -d $TANDEM_TARGET ]]; then
        chown -R -- "$SUDO_UID:${SUDO_GID:-$SUDO_UID}" "$TANDEM_TARGET" || true
    fi
}

# ---------------------------------------------------------------------------- the lab

# Everything the programs of tests/lab need from this machine, and
# cargo to build them.
need_lab() {
    local names list
    list=$(packages_in "$TANDEM_ROOT/tests/lab/packages.txt")
    mapfile -t names <<<"$list"
    need_packages "${BUILD_PACKAGES[@]}" "${names[@]}"
    need_tun
    need_cargo
}

lab_binary() { printf '%s/release/%s\n' "$TANDEM_TARGET" "$1"; }

# exec_lab NAME ARGUMENTS...: becomes the lab's program, which handles signals and cleans up
# its own network.
exec_lab() {
    local program
    program=$(lab_binary "$1")
    shift
    [[ -x $program ]] || die "the build made no $program"
    step "starting $program"
    trap - EXIT INT TERM HUP
    exec "$program" "$@"
}
