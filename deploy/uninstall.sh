#!/usr/bin/env bash
# Removes what deploy/install.sh made.
#
#     sudo deploy/uninstall.sh            keeps /etc/meshd and /var/lib/meshd (keys, catalogue) and the user
#     sudo deploy/uninstall.sh --purge    removes these too: this node's identity is gone for good
#     deploy/uninstall.sh --dry-run       prints every step and does nothing
#
# NEVER RUN ON A REAL BOARD YET. Run so far: the dry run, on Debian 12, by the tests.
set -euo pipefail

dry_run=no
purge=no

fail() {
    printf 'uninstall: %s\n' "$*" >&2
    exit 1
}

run() {
    printf '+ %s\n' "$(printf '%q ' "$@")"
    [[ $dry_run == yes ]] || "$@"
}

while (($#)); do
    case $1 in
    --dry-run) dry_run=yes ;;
    --purge) purge=yes ;;
    -h | --help)
        sed -n '2,7p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'
        exit 0
        ;;
    *) fail "unknown option $1 (there are --dry-run, --purge)" ;;
    esac
    shift
done

[[ $dry_run == yes || $EUID == 0 ]] || fail "this changes the system: run sudo $0, or $0 --dry-run to see what it would do"

if [[ $dry_run == yes || -e /etc/systemd/system/meshd.service ]]; then
    run systemctl disable --now meshd.service
    run rm -f /etc/systemd/system/meshd.service
    run systemctl daemon-reload
fi
run rm -f /usr/local/bin/meshd /usr/lib/sysusers.d/meshd.conf
run rm -rf /opt/meshd
if [[ $purge == yes ]]; then
    run rm -rf /etc/meshd /var/lib/meshd
    if [[ $dry_run == yes ]] || id meshd >/dev/null 2>&1; then
        run userdel meshd
    fi
else
    printf '%s\n' "kept: /etc/meshd, /var/lib/meshd and the user meshd (--purge removes them)"
fi
