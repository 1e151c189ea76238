# Shared by the scripts: where the repository is, and how what is missing is installed.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# need PROGRAM-OR-FILE PACKAGE ...: installs Debian packages when something is missing, as root; else says the line to run.
need() {
	local missing=()
	while [ $# -gt 0 ]; do
		if ! command -v "$1" >/dev/null 2>&1 && [ ! -e "$1" ]; then missing+=("$2"); fi
		shift 2
	done
	[ ${#missing[@]} -eq 0 ] && return
	if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
		echo "missing: ${missing[*]}. Run: sudo apt-get install ${missing[*]}" >&2
		exit 2
	fi
	echo "installing ${missing[*]}" >&2
	export DEBIAN_FRONTEND=noninteractive
	{ apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >/dev/null
}

softhsm_module() {
	local m
	for m in /usr/lib/softhsm/libsofthsm2.so /usr/lib/*/softhsm/libsofthsm2.so; do
		[ -e "$m" ] && { echo "$m"; return; }
	done
	echo "SoftHSM's library is not where Debian puts it" >&2
	exit 2
}

command -v go >/dev/null 2>&1 || PATH=$PATH:/usr/local/go/bin
command -v go >/dev/null 2>&1 || { echo "missing: Go 1.26 (https://go.dev/dl)" >&2; exit 2; }
