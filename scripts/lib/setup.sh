# Sourced by the scripts of this folder: what a bare Debian machine with rustup's Rust still needs.
# Everything is checked first, so that a second run installs nothing.

ebb_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
ebb_tools="${EBB_TOOLS:-$ebb_root/target/tools}"
export PATH="$ebb_tools/venv/bin:$HOME/.cargo/bin:$PATH"

say()  { printf '\033[1m==> %s\033[0m\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else
    fail "this needs root: $*"; fi
}

# need_debian PROGRAM:PACKAGE …   installs the packages whose program is missing
need_debian() {
  local missing=() pair
  for pair in "$@"; do command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}"); done
  [ ${#missing[@]} = 0 ] && return 0
  command -v apt-get >/dev/null || fail "please install: ${missing[*]} (this script knows only Debian's apt-get)"
  say "installing ${missing[*]}"
  as_root apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
}

# need_rust   a Rust that is new enough
need_rust() {
  command -v cargo >/dev/null || fail "cargo is missing: install Rust with rustup (https://rustup.rs), then run this again"
  local want have
  want=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$ebb_root/Cargo.toml")
  have=$(rustc --version | cut -d' ' -f2)
  [ "$(printf '%s\n%s\n' "$want" "$have" | sort -V | head -1)" = "$want" ] ||
    fail "Rust $want or newer is needed, this is $have: rustup update stable"
}

# need_python PACKAGE …   into a virtual environment below target/
need_python() {
  local py=/usr/bin/python3 package missing=()
  [ -x "$py" ] || py=$(command -v python3)
  if [ ! -x "$ebb_tools/venv/bin/pip" ]; then
    "$py" -c 'import ensurepip' 2>/dev/null || need_debian no-such-program:python3-venv
    mkdir -p "$ebb_tools"
    "$py" -m venv "$ebb_tools/venv"
  fi
  for package in "$@"; do
    "$ebb_tools/venv/bin/pip" show -q "${package%%[*}" >/dev/null 2>&1 || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return 0
  say "installing ${missing[*]} (Python)"
  "$ebb_tools/venv/bin/pip" install -q --disable-pip-version-check "${missing[@]}"
}

# need_fuse   /dev/fuse, or a clear word
need_fuse() {
  need_debian fusermount3:fuse3
  [ -e /dev/fuse ] || as_root modprobe fuse 2>/dev/null || true
  [ -e /dev/fuse ] || fail "/dev/fuse is missing: load the fuse module (modprobe fuse), or pass the device into the container (--device /dev/fuse --cap-add SYS_ADMIN)"
}
