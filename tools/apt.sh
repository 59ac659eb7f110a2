#!/bin/sh
# Install Debian packages that are missing, and only those: tools/apt.sh PACKAGE...
# Says nothing when all are there. Needs root, or sudo without a password; says what to do when it has neither.
set -eu

missing=""
for package in "$@"; do
  dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
  echo "missing:$missing. This is no Debian: install what has their place by hand" >&2
  exit 1
fi
as_root=""
if [ "$(id -u)" != 0 ]; then
  as_root="sudo -n"
  if ! sudo -n true 2>/dev/null; then
    echo "missing:$missing. Without root they cannot be installed here: sudo apt-get install$missing" >&2
    exit 1
  fi
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
echo "installing$missing"
install() { DEBIAN_FRONTEND=noninteractive $as_root apt-get install --yes --quiet --no-install-recommends $missing >"$log" 2>&1; }
# The lists of packages are fetched only where those at hand do not do: they may be old, or not there at all.
install || { $as_root apt-get update --quiet >"$log" 2>&1 && install; } || {
  echo "could not install$missing:" >&2
  tail -n 5 "$log" >&2
  exit 1
}
