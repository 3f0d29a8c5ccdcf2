#!/usr/bin/env bash
# Unpacks Prometheus and promtool of this machine's Debian or Ubuntu into the folder build/prometheus,
# without root and without installing anything: package lists and download go there too. Where
# they are on the path, nothing is done. Where apt is not there or cannot download, the tests that want
# them are skipped, which is no error, unless ANTIPHON_REQUIRE_PROMETHEUS is set: then nothing may be
# left out, and this fails.
set -uo pipefail
cd "$(dirname "$0")/../.."
folder=$PWD/build/prometheus

if [ -x "$folder/usr/bin/promtool" ]; then exit 0; fi
if command -v prometheus >/dev/null && command -v promtool >/dev/null; then
    echo "Prometheus is on the path"
    exit 0
fi

mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial"
apt() {
    timeout 120 apt-get -qq -o "Dir::State::lists=$folder/lists" -o "Dir::Cache=$folder/cache" \
        -o APT::Sandbox::User= "$@"
}
if apt update && (cd "$folder" && apt download prometheus && dpkg-deb -x prometheus_*.deb .); then
    rm -rf "$folder"/lists "$folder"/cache "$folder"/prometheus_*.deb
    echo "Prometheus is in build/prometheus"
else
    rm -rf "$folder"
    if [ -n "${ANTIPHON_REQUIRE_PROMETHEUS:-}" ]; then
        echo "no Prometheus could be had, and ANTIPHON_REQUIRE_PROMETHEUS is set" >&2
        exit 1
    fi
    echo "no Prometheus on this machine: the tests that need it will be skipped" >&2
fi
